"""Targets that are met exactly, scopes, and the latency table."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers.marks import slow_but
from torch import nn

import mlpreduce
from mlpreduce import ReductionError
from mlpreduce.budget import Budget, LatencyTable, Slot, measure, ranked_widths, solve, staged_widths, uniform_widths
from mlpreduce.budget.latency import _grid, _monotone, timed
from mlpreduce.criteria import choose, register_criterion
from mlpreduce.edits import Slice
from mlpreduce.graph import Survey, find_mlps, survey
from mlpreduce.reduction.planning import make_plan
from mlpreduce.testing import tiny_vit

MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: tiny_vit(depth=6),
    "tied": lambda: mlpreduce.apply(tiny_vit(depth=6), "grouped", group=3),
    "stages": lambda: timm.create_model("pvt_v2_b0", depths=(2, 1, 2, 1)),
    "groups": lambda: timm.create_model("visformer_tiny", img_size=64, embed_dim=96, depth=(2, 1, 1), num_heads=2),
    "mixer": lambda: timm.create_model("mixer_s32_224", img_size=64),
}


@cache
def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().eval()


@cache
def planned(name: str) -> tuple[Any, dict[str, int], dict[str, int]]:
    """Its baseline, and hidden features and groups of each unique MLP."""
    model = model_of(name)
    size = 64 if name in ("groups", "mixer") else None
    baseline = measure(model, None if size is None else torch.zeros(1, 3, size, size))
    owners = [mlp for mlp in baseline.mlps if mlp.owner == mlp.name]
    return baseline, {mlp.name: mlp.hidden_features for mlp in owners}, {mlp.name: mlp.groups for mlp in owners}


@cache
def found(name: str) -> Survey:
    return replace(
        survey(model_of(name), torch.zeros(1, 3, 64, 64) if name in ("groups", "mixer") else None), tree=None
    )


def random_case(number: int) -> tuple[str, str, str, int, float]:
    draw = random.Random(number)
    name, scope = draw.choice([*MODELS]), draw.choice(["uniform", "per_stage", "global"])
    return name, scope, draw.choice(["params", "macs"]), draw.choice([1, 1, 4, 8, 16]), draw.random()


@pytest.mark.parametrize("part", slow_but(range(6), 0))
def test_three_hundred_random_budgets(part: int) -> None:
    """The cost is no more than the target, and no step more would fit: of the fraction of all, or of any MLP."""
    for number in range(50 * part, 50 * part + 50):
        name, scope, unit, round_to, place = random_case(number)
        baseline, full, groups = planned(name)
        steps = {owner: round_to * groups[owner] // _common(round_to, groups[owner]) for owner in full}

        def cost(w: dict[str, int], baseline: Any = baseline, unit: str = unit) -> int:
            return int(getattr(baseline.with_widths(w), unit))

        least = cost({owner: min(steps[owner], size) for owner, size in full.items()})
        most = cost({})
        target = int(least + place * (most - 1 - least))
        criterion = "l2" if scope != "uniform" else "first"
        config = {f"target_{unit}": target, "round_to": round_to, "scope": scope, "criterion": criterion}
        inputs = torch.zeros(1, 3, 64, 64) if name in ("groups", "mixer") and unit == "macs" else None
        made, _ = make_plan(model_of(name), "shallow", config, example_inputs=inputs, found=found(name))
        widths = full | {edit.mlp: len(edit.units) for edit in made.of(Slice)}
        assert cost(widths) <= target
        assert getattr(baseline.after(made), unit) == cost(widths)
        assert all(width == full[owner] or width % steps[owner] == 0 for owner, width in widths.items())
        wider = {owner: min((w // steps[owner] + 1) * steps[owner], full[owner]) for owner, w in widths.items()}
        if scope == "uniform":  # the next larger fraction would change those with the smallest next one
            nearest = min(wider[owner] / full[owner] for owner in full if widths[owner] < full[owner])
            more = {owner: wider[owner] if wider[owner] / full[owner] <= nearest else widths[owner] for owner in full}
            assert cost(more) > target, number
        else:
            for owner in full:
                assert widths[owner] == full[owner] or cost({**widths, owner: wider[owner]}) > target, number
        assert f"target_{unit}={target}" in str(made)


def _common(a: int, b: int) -> int:
    return a if b == 0 else _common(b, a % b)


def test_a_target_is_what_the_model_then_has() -> None:
    for config in (
        {"target_params": 0.7},
        {"target_params": 30_000},
        {"target_macs": 0.6, "scope": "global", "criterion": "l1"},
    ):
        model = tiny_vit()
        before = mlpreduce.profile(model)
        mlpreduce.apply(model, "shallow", **config)
        after = mlpreduce.profile(model)
        name = "params" if "target_params" in config else "macs"
        target = config[f"target_{name}"]
        limit = target * getattr(before, name) if target <= 1 else target
        assert 0.98 * limit < getattr(after, name) <= limit


UNREACHABLE = {
    "too few": ({"target_params": 10}, r"of 10 parameters cannot be reached by slicing 4 MLPs; the range is 20,169 to 53,189"),
    "too many": ({"target_params": 10**9}, r"a target of 1,000,000,000 parameters cannot be reached.*the range is"),
    "too few MACs": ({"target_macs": 0.01}, r"MACs cannot be reached by slicing 4 MLPs; the range is"),
    "steps": ({"target_params": 0.4, "round_to": 64}, r"the range is 36,549 to"),
    "large steps": ({"target_params": 0.9, "round_to": 256}, r"blocks\.0\.mlp has 128 hidden units.*a multiple of 256"),
    "no number": ({"target_params": "0.7"}, r"target_params is '0\.7'; it must be a positive number"),
    "negative": ({"target_macs": -1}, r"target_macs is -1; it must be a positive number"),
    "two": ({"target_macs": 0.5, "ratio": 0.5}, r"2 sizes are given \(ratio, target_macs\)"),
    "scope": ({"scope": "globl"}, r"scope is 'globl'; did you mean 'global'\?"),
    "order": ({"scope": "global", "criterion": "gram_schmidt"}, r"gram_schmidt\(\) orders the units of each MLP"),
    "widths": ({"scope": "global", "widths": [1, 2, 3, 4], "criterion": "l1"}, r"widths tells the width of each MLP"),
    "no table": ({"target_latency": 0.5}, r"target_latency needs latency_table, a path; write one"),
    "weight": ({"latency_weight": 1.0, "scope": "global", "criterion": "l1"}, r"latency_weight needs latency_table"),
    "bad weight": ({"latency_weight": -1.0, "target_params": 0.7}, r"latency_weight is -1\.0"),
    "no file": ({"target_latency": 0.5, "latency_table": "none.json"}, r"LatencyTable\.load\('none\.json'\): No such file"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREACHABLE)
def test_what_cannot_be_reached_is_refused(case: str, unchanged: Callable[[nn.Module], Callable[[], None]]) -> None:
    config, message = UNREACHABLE[case]
    model = tiny_vit()
    check = unchanged(model)
    with pytest.raises(ReductionError, match=message):
        mlpreduce.apply(model, "shallow", **config)
    check()


def test_global_keeps_the_best_units_of_all() -> None:
    """With equal MLPs and steps of one, the units that stay are those of the largest scores over all."""
    model = tiny_vit()
    for number, block in enumerate(model.blocks):
        block.mlp.fc1.weight.data *= 1 + number
    made = mlpreduce.plan(model, "shallow", ratio=0.4, scope="global", criterion="l2")
    scores = torch.stack([
        torch.cat([b.mlp.fc1.weight, b.mlp.fc1.bias[:, None], b.mlp.fc2.weight.T], 1).norm(dim=1) for b in model.blocks
    ])  # fmt: skip
    best = set(scores.flatten().topk(int(0.4 * 512)).indices.tolist())
    units = {edit.mlp: edit.units for edit in made.of(Slice)}
    kept = {128 * i + unit for i in range(4) for unit in units.get(f"blocks.{i}.mlp", range(128))}
    always = {128 * i + int(scores[i].argmax()) for i in range(4)}  # one of each MLP stays
    assert len(kept) == int(0.4 * 512)
    least = sorted(best, key=lambda unit: scores.flatten()[unit].item())[: len(always - best)]
    assert kept == best - set(least) | always
    assert [row.hidden for row in made.rows] == sorted(row.hidden for row in made.rows)


def test_per_stage_keeps_the_share_of_each_stage() -> None:
    model = model_of("stages")
    made = mlpreduce.plan(model, "shallow", ratio=0.5, scope="per_stage", criterion="l1")
    for stage in ("stages.0", "stages.1", "stages.2", "stages.3"):
        rows = [row for row in made.rows if row.mlp.startswith(stage)]
        assert sum(row.hidden for row in rows) == sum(row.hidden_before for row in rows) // 2


def slot(name: str, scores: list[float], step: int = 1, **more: Any) -> Slot:
    return Slot(name, len(scores), step, float, scores=torch.tensor(scores, dtype=torch.float64), **more)


def test_steps_go_by_the_sum_of_their_scores() -> None:
    slots = [slot("a", [9, 8, 3, 3, 1], 2), slot("b", [5, 5, 2, 2], 2)]
    # of "a" first the rest (1), then (3, 3); of "b" (2, 2), whose 4 is less than 6
    assert ranked_widths(Budget(slots, 0, 8, "units")) == {"a": 4, "b": 4}
    assert ranked_widths(Budget(slots, 0, 6, "units")) == {"a": 4, "b": 2}
    assert ranked_widths(Budget(slots, 0, 4, "units")) == {"a": 2, "b": 2}
    with pytest.raises(
        ReductionError, match="a target of 3 units cannot be reached by slicing 2 MLPs; the range is 4 to 9"
    ):
        ranked_widths(Budget(slots, 0, 3, "units"))
    assert uniform_widths(Budget(slots, 0, 6, "units")) == {"a": 4, "b": 2}
    stages = [
        slot("a", [9, 8, 7, 6], stage="s"),
        slot("b", [1, 1, 1, 1], stage="s"),
        slot("c", [1, 1, 1, 1], stage="t"),
    ]
    assert staged_widths(Budget(stages, 0, 6, "units")) == {"a": 3, "b": 1, "c": 2}


def test_a_penalty_on_latency_moves_width_between_mlps() -> None:
    scores = [4.0, 3.0, 2.0, 1.0]
    plain = [slot("a", scores), slot("b", scores)]
    assert ranked_widths(Budget(plain, 0, 4, "units")) == {"a": 2, "b": 2}
    slow = [slot("a", scores, penalty=lambda width: 1.5 * width), slot("b", scores)]
    assert ranked_widths(Budget(slow, 0, 4, "units")) == {"a": 1, "b": 3}
    none = [slot("a", scores, penalty=lambda width: 0.0 * width), slot("b", scores)]
    assert ranked_widths(Budget(none, 0, 4, "units")) == {"a": 2, "b": 2}


# --- latency ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table() -> LatencyTable:
    return LatencyTable.measure(tiny_vit(), batch_size=2, points=4, repeats=3)


def test_a_latency_table_is_monotone_and_saved_whole(table: LatencyTable, tmp_path: Path) -> None:
    assert table.groups == (("blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp", "blocks.3.mlp"),)
    assert table.widths == ((1, 43, 85, 128),)
    assert list(table.milliseconds[0]) == sorted(table.milliseconds[0])
    assert table.milliseconds[0][0] == 0
    every = [table.predict(dict.fromkeys(table.groups[0], width)) for width in range(1, 129)]
    assert every == sorted(every)
    middle = table.predict({"blocks.1.mlp": 64}) - table.predict({"blocks.1.mlp": 43})
    assert middle == pytest.approx((table.milliseconds[0][2] - table.milliseconds[0][1]) * 21 / 42)
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table
    assert table.conditions["batch_size"] == 2


def test_a_table_of_a_machine_that_has_changed_its_speed() -> None:
    found = linear_table({"a": 0.01, "b": 0.02}, 100)
    widths = {"a": 50}
    assert found.predict(widths, whole=2 * found.predict({})) == pytest.approx(2 * found.predict(widths))
    assert found.predict({}, whole=7.0) == pytest.approx(7.0)
    with pytest.raises(ReductionError, match="whole is -1"):
        found.predict({}, whole=-1)


def test_each_model_is_timed_against_the_first_of_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that becomes slower and slower changes no ratio."""
    clock = [0.0]
    monkeypatch.setattr("mlpreduce.budget.latency.time.perf_counter", lambda: clock[0])

    class Taking(torch.nn.Module):
        def __init__(self, seconds: float) -> None:
            super().__init__()
            self.seconds = seconds

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            clock[0] += self.seconds * (1 + clock[0])
            return x

    for repeats in (1, 5):
        clock[0] = 0.0
        whole, half, double = timed(
            [Taking(1e-4), Taking(5e-5), Taking(2e-4)], torch.zeros(1), torch.device("cpu"), repeats
        )
        assert [half / whole, double / whole] == pytest.approx([0.5, 2], rel=1e-3)
    clock[0] = 0.0
    assert timed([Taking(1e-4)], torch.zeros(1), torch.device("cpu"), 3) == pytest.approx([0.1], rel=1e-2)


def test_the_widths_of_a_table_are_typical_ones() -> None:
    (mlp, *_) = find_mlps(tiny_vit(mlp_ratio=8))
    assert mlp.hidden_features == 256
    assert _grid(mlp, 5, 1) == (1, 63, 127, 191, 256)
    assert _grid(mlp, 5, 16) == (16, 64, 128, 192, 256)


def test_isotonic_regression_gives_the_nearest_that_never_fall() -> None:
    assert _monotone([1.0, 3.0, 2.0, 4.0]).tolist() == [1.0, 2.5, 2.5, 4.0]
    assert _monotone([1.0, 2.0]).tolist() == [1.0, 2.0]


def linear_table(per_unit: dict[str, float], hidden: int, base: float = 1.0) -> LatencyTable:
    return LatencyTable(
        base=base,
        groups=tuple((owner,) for owner in per_unit),
        widths=((1, hidden),) * len(per_unit),
        milliseconds=tuple((0.0, slope * (hidden - 1)) for slope in per_unit.values()),
        conditions={},
    )


def test_a_target_of_latency(tmp_path: Path) -> None:
    model = tiny_vit()
    slopes = {f"blocks.{i}.mlp": 0.01 * (i + 1) for i in range(4)}
    found = linear_table(slopes, 128)
    found.save(tmp_path / "table.json")
    full = found.predict({})
    for scope, target in (("uniform", 0.6), ("global", 0.6), ("global", full - 3.0), ("per_stage", 0.7)):
        config = {
            "target_latency": target,
            "latency_table": str(tmp_path / "table.json"),
            "scope": scope,
            "criterion": "l1",
        }
        made = mlpreduce.plan(model, "shallow", **config)
        widths = {edit.mlp: len(edit.units) for edit in made.of(Slice)}
        limit = target * full if target <= 1 else target
        assert limit - 0.04 * (4 if scope == "uniform" else 1) < found.predict(widths) <= limit + 1e-9
        assert " ms, " in str(made)
    with pytest.raises(ReductionError, match=r"the latency table has no blocks\.5\.mlp"):
        found.predict({"blocks.5.mlp": 3})
    other = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=5, num_heads=2)
    with pytest.raises(ReductionError, match=r"the latency table has no blocks\.4\.mlp; it is of another model"):
        mlpreduce.plan(other, "shallow", target_latency=0.6, latency_table=str(tmp_path / "table.json"))


def test_a_target_of_latency_of_a_model_that_is_narrow_already(tmp_path: Path) -> None:
    """A fraction is of what it takes now, not of what it took when the table was measured."""
    found = linear_table({f"blocks.{i}.mlp": 0.01 for i in range(4)}, 128)
    found.save(tmp_path / "table.json")
    model = mlpreduce.apply(tiny_vit(), "shallow", ratio=0.5)
    present = found.predict({f"blocks.{i}.mlp": 64 for i in range(4)})
    made = mlpreduce.plan(model, "shallow", target_latency=0.9, latency_table=tmp_path / "table.json")
    widths = {edit.mlp: len(edit.units) for edit in made.of(Slice)}
    assert 0.9 * present - 0.04 < found.predict(widths) <= 0.9 * present
    with pytest.raises(ReductionError, match=r"blocks\.0\.mlp with 256 hidden units is wider than the latency table"):
        mlpreduce.plan(tiny_vit(mlp_ratio=8), "shallow", target_latency=0.9, latency_table=tmp_path / "table.json")
    with pytest.raises(ReductionError, match=r"latency_weight changes how MLPs compare, and scope='uniform'"):
        mlpreduce.plan(model, "shallow", target_params=0.9, latency_table=tmp_path / "table.json", latency_weight=1.0)


def test_mlps_that_keep_next_to_nothing_are_named() -> None:
    model = tiny_vit()
    model.blocks[2].mlp.fc1.weight.data *= 1e-3
    model.blocks[2].mlp.fc2.weight.data *= 1e-3
    text = str(mlpreduce.plan(model, "shallow", ratio=0.5, scope="global", criterion="l2"))
    assert "1 of 4 MLPs keep less than 1/16 of their units, blocks.2.mlp 1 of 128" in text
    assert "keep less than" not in str(mlpreduce.plan(model, "shallow", ratio=0.5, criterion="l2"))


def test_latency_weight_narrows_what_is_slow(tmp_path: Path) -> None:
    model = tiny_vit()
    linear_table({f"blocks.{i}.mlp": 0.01 if i else 0.1 for i in range(4)}, 128).save(tmp_path / "table.json")

    @register_criterion("alike_for_test", needs="nothing")
    def alike(units: Any) -> torch.Tensor:
        return torch.linspace(1, 0, len(units))

    try:
        assert choose("alike_for_test").criterion.options == {}
        config = {
            "criterion": "alike_for_test",
            "scope": "global",
            "ratio": 0.5,
            "latency_table": str(tmp_path / "table.json"),
        }
        widths = [len(e.units) for e in mlpreduce.plan(model, "shallow", **config).of(Slice)]
        assert widths == [64] * 4
        widths = [len(e.units) for e in mlpreduce.plan(model, "shallow", **config, latency_weight=5.0).of(Slice)]
        assert widths[0] < 32
        assert sum(widths) == 256
    finally:
        from mlpreduce import criteria

        del criteria.registry._CRITERIA["alike_for_test"]


def test_refused_tables(tmp_path: Path) -> None:
    with pytest.raises(
        ReductionError,
        match=r"LatencyTable\.measure\(VisionTransformer\): points is 1; it must be a whole number from 2",
    ):
        LatencyTable.measure(tiny_vit(), points=1)
    with torch.device("meta"), pytest.raises(ReductionError, match="a model on the meta device cannot be timed"):
        LatencyTable.measure(tiny_vit())
    with pytest.raises(ReductionError, match="found no MLP"):
        LatencyTable.measure(nn.Sequential(nn.Linear(2, 2)), example_inputs=torch.zeros(1, 2))
    for wrong in ({"batch_size": "8"}, {"points": 2.5}, {"repeats": True}):
        with pytest.raises(ReductionError, match="it must be a whole number from"):
            LatencyTable.measure(tiny_vit(), **wrong)  # type: ignore[arg-type]
    for text in ("", "[]", '{"version": 1}', json.dumps({"version": 2})):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ReductionError, match=r"LatencyTable\.load\('.*bad\.json'\): "):
            LatencyTable.load(tmp_path / "bad.json")


def test_measuring_changes_nothing(unchanged: Callable[[nn.Module], Callable[[], None]]) -> None:
    model = tiny_vit().train()
    check = unchanged(model)
    LatencyTable.measure(model, batch_size=1, points=2, repeats=1, round_to=8)
    check()
    assert model.training


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (999.0, "999"),
        (1000.0, "1,000"),
        (-1000.0, "-1,000"),
        (12_345_678.0, "12,345,678"),
        (1000.5, "1,000.5"),
        (0.25, "0.25"),
    ],
)
def test_costs_in_messages(value: float, text: str) -> None:
    assert solve.number(value) == text
