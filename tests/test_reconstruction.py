"""`reconstruction` and `energy` on models: what they say of hidden units is what plain least squares and means say."""

from __future__ import annotations

import copy
import gc
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.kinds import KINDS, built
from torch import nn
from torch.nn.functional import cross_entropy

import mlpreduce
from mlpreduce.calibration import Answers, memory
from mlpreduce.calibration.sums import UnitSums
from mlpreduce.calibration.units import _weights
from mlpreduce.criteria import Ranking, choose
from mlpreduce.edits import Slice
from mlpreduce.errors import ReductionError
from mlpreduce.graph import MLP, find_mlps, module_at, projection
from mlpreduce.testing import tiny_vit

RIDGE = 1e-2
LOSS = {"name": "reconstruction", "ridge": RIDGE, "metric": "loss"}


def pictures(count: int = 18, side: int = 16) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(11))


def given(model: nn.Module, mlps: list[MLP], images: torch.Tensor) -> dict[str, torch.Tensor]:
    """What fc2 of each MLP is given over all calls, (rows, hidden units)."""
    rows: dict[str, list[torch.Tensor]] = {mlp.owner: [] for mlp in mlps}
    handles = []
    for mlp in mlps:
        if mlp.owner == mlp.name:
            layer = module_at(model, mlp.leaf("fc2").call)
            known = projection(layer)
            assert layer is not None
            assert known is not None
            offset = next(axis.offsets[0] for axis in mlp.axes if axis.tensor.startswith(mlp.leaf("fc2").path))

            def note(module: Any, args: Any, mlp: MLP = mlp, dim: int = known.features, offset: int = offset) -> None:
                flat = args[0].movedim(dim, -1).flatten(0, -2).detach().double()
                rows[mlp.owner].append(flat[:, offset : offset + mlp.hidden_features])

            handles.append(layer.register_forward_pre_hook(note))
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return {owner: torch.cat(calls) for owner, calls in rows.items()}


def columns(model: nn.Module, mlp: MLP) -> torch.Tensor:
    """fc2.weight of the hidden units, (outputs, hidden units)."""
    weight = model.get_parameter(f"{mlp.leaf('fc2').path}.weight").detach().double()
    offset = next(axis.offsets[0] for axis in mlp.axes if axis.tensor.startswith(mlp.leaf("fc2").path))
    return weight.flatten(1)[:, offset : offset + mlp.hidden_features]


def first_to_go(weight: torch.Tensor, square: torch.Tensor, ridge: float, groups: int, steps: int) -> list[int]:
    """The units that go first, each by solving anew for all others; what does nothing costs nothing."""
    size = len(square)
    weight = weight * (square.diagonal() > 1e-10 * square.diagonal().mean())
    ridged = square + ridge * torch.eye(size, dtype=torch.float64)
    kept, gone, left = list(range(size)), [], set(range(groups))
    for _ in range(steps):
        inverse = torch.linalg.inv(ridged[kept][:, kept])
        fitted = (weight @ ridged)[:, kept] @ inverse
        errors = fitted.square().sum(0) / inverse.diagonal()
        blocked = torch.tensor([unit * groups // size not in left for unit in kept])
        errors[blocked] = torch.inf
        unit = kept.pop(int(errors.argmin()))
        gone.append(unit)
        left.discard(unit * groups // size)
        left = left or set(range(groups))
    return gone


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "fused"])
@pytest.mark.parametrize("refitted", [False, True])
def test_the_order_is_that_of_solving_anew(kind: str, refitted: bool) -> None:
    name, kwargs = KINDS[kind]
    model = built(name, kwargs)
    mlps = find_mlps(model)
    images = pictures(side=kwargs.get("img_size", 64)).double()
    rows = given(model, mlps, images)
    answers = Answers(model, mlps, [images], refitted=refitted)
    choice = choose({"name": "reconstruction", "ridge": RIDGE})
    for mlp in mlps[:3]:
        a, weight = rows[mlp.name], columns(model, mlp)
        layer = module_at(model, mlp.leaf("fc2").path)
        centred = refitted and getattr(layer, "bias", None) is not None
        square = a.T @ a / len(a) - a.mean(0).outer(a.mean(0)) * centred  # as exact as sums are, where a hardly varies
        if float(square.diagonal().mean()) < 1e-6 * float(
            a.square().mean()
        ):  # a class token before it has seen an image
            continue
        expected = first_to_go(weight, square, RIDGE * float(square.diagonal().mean()), mlp.groups, 12)
        answer = answers.of(mlp, choice)
        assert isinstance(answer, Ranking)
        assert answer.order.flip(0)[:12].tolist() == expected, mlp.name
        energy = answers.of(mlp, choose("energy"))
        assert isinstance(energy, torch.Tensor)
        torch.testing.assert_close(energy, square.diagonal() * weight.square().sum(0), rtol=1e-9, atol=1e-15)


def test_uses_of_a_tied_mlp_count_together() -> None:
    model = mlpreduce.apply(tiny_vit().double().eval(), "grouped", group=2, scale="none")
    mlps, images = find_mlps(model), pictures().double()
    rows = given(model, mlps, images)["blocks.0.mlp"]
    assert len(rows) == 2 * len(given(tiny_vit().double().eval(), find_mlps(tiny_vit()), images)["blocks.0.mlp"])
    answers = Answers(model, mlps, [images], refitted=True)
    a = rows - rows.mean(0)
    weight = columns(model, mlps[0])
    energy = answers.of(mlps[1], choose("energy"))
    assert isinstance(energy, torch.Tensor)
    torch.testing.assert_close(energy, a.square().mean(0) * weight.square().sum(0), rtol=1e-9, atol=0)
    answer = answers.of(mlps[0], choose({"name": "reconstruction", "ridge": RIDGE}))
    assert isinstance(answer, Ranking)
    square = a.T @ a / len(a)
    expected = first_to_go(weight, square, RIDGE * float(square.diagonal().mean()), 1, 12)
    assert answer.order.flip(0)[:12].tolist() == expected


@pytest.mark.parametrize("per_use", ["lora", "ssf"])
def test_uses_with_layers_of_their_own_count_as_those_without(per_use: str) -> None:
    """Corrections that have not been trained change nothing, and lie around the shared fc2."""
    images, labels = pictures().double(), torch.arange(18) % 5
    found = []
    for own in ("none", per_use):
        model = mlpreduce.apply(tiny_vit().double().eval(), "grouped", group=2, scale="none", per_use=own)
        answer = Answers(model, mlps := find_mlps(model), [(images, labels)]).of(mlps[1], choose(LOSS))
        assert isinstance(answer, Ranking)
        found.append(answer)
    assert torch.equal(found[0].order, found[1].order)
    torch.testing.assert_close(found[0].scores, found[1].scores)


def test_the_loss_weighs_outputs() -> None:
    """The same order as when fc2's outputs are turned by a root of the second moments of the loss's gradients there, and each
    position counts halfway between 1 and its share of the squared gradient in its example."""
    model, images = tiny_vit().double().eval(), pictures().double()
    labels = torch.arange(18) % 5
    mlps = find_mlps(model)
    mlp = mlps[1]
    slopes: list[torch.Tensor] = []
    layer = module_at(model, mlp.leaf("fc2").call)
    assert layer is not None
    handle = layer.register_forward_hook(lambda module, args, output: output.register_hook(slopes.append) and None)
    cross_entropy(model(images), labels, reduction="sum").backward()
    handle.remove()
    g = slopes[0].flatten(0, 1)
    root = torch.linalg.cholesky(g.T @ g + 1e-12 * torch.eye(g.shape[1], dtype=torch.float64)).T
    a = given(model, mlps, images)[mlp.name]
    norms = slopes[0].square().sum(-1)
    w = (0.5 + 0.5 * norms / norms.mean(1, keepdim=True)).flatten()[:, None]
    square = a.T @ (w * a) / len(a)
    assert float(w.mean()) == pytest.approx(1)
    expected = first_to_go(root @ columns(model, mlp), square, RIDGE * float(square.diagonal().mean()), 1, 20)
    answers = Answers(tiny_vit().double().eval(), mlps, [(images, labels)])
    answer = answers.of(mlp, choose(LOSS))
    plain = answers.of(mlp, choose({"name": "reconstruction", "ridge": RIDGE}))
    assert isinstance(answer, Ranking)
    assert isinstance(plain, Ranking)
    assert answer.order.flip(0)[:20].tolist() == expected
    assert plain.order.tolist() != answer.order.tolist()


def test_positions_of_an_example_count_1_on_average_but_for_padding() -> None:
    squares = [torch.rand(3, 5, dtype=torch.float64) for _ in range(2)]  # of two uses of one MLP
    for one in squares:
        one[1] = 0  # an example on which the loss does not hang
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]).bool()
    found = _weights(squares, mask)
    assert all(torch.equal(one[1], torch.ones(5, dtype=torch.float64)) for one in found)
    live = torch.cat([mask, mask], 1)
    means = (torch.cat(found, 1) * live).sum(1) / live.sum(1)
    torch.testing.assert_close(means, torch.ones(3, dtype=torch.float64))
    assert torch.cat(found)[torch.cat([mask, mask])].ge(0.5).all()
    torch.testing.assert_close(found[0][0, 0] - 0.5, (found[1][0, 0] - 0.5) * squares[0][0, 0] / squares[1][0, 0])


def test_batches_do_not_matter() -> None:
    model, images = tiny_vit().double().eval(), pictures(40).double()
    mlps = find_mlps(model)
    found = [
        Answers(model, mlps, list(images.split(size))).of(mlps[0], choose("reconstruction")) for size in (40, 7, 1)
    ]
    for other in found[1:]:
        assert isinstance(found[0], Ranking)
        assert isinstance(other, Ranking)
        assert torch.equal(found[0].order, other.order)


class Read:
    """Data that counts how often it is read."""

    def __init__(self, *batches: Any) -> None:
        self.batches, self.times = batches, 0

    def __iter__(self) -> Iterator[Any]:
        self.times += 1
        return iter(self.batches)


@pytest.mark.parametrize("metric", ["output", "loss"])
@pytest.mark.parametrize(("tied", "limit", "times"), [(False, 0, 4), (False, 0.6, 2), (True, 0, 2), (False, None, 1)])
def test_what_does_not_fit_into_memory_is_measured_in_parts(
    metric: str, tied: bool, limit: float | None, times: int
) -> None:
    """Second moments of the 128 units of an MLP are 0.25 MiB, of each half of the examples 0.125."""
    model, data = tiny_vit().eval(), Read((pictures(40), torch.arange(40) % 5))
    if tied:
        mlpreduce.apply(model, "grouped", group=2)
    mlps = find_mlps(model)
    asked = {"name": "reconstruction", "metric": metric}
    whole = Answers(model, mlps, data.batches)
    parts = Answers(model, mlps, data)
    for mlp in mlps:
        one, other = whole.of(mlp, choose(asked)), parts.of(mlp, choose(asked | {"memory": limit}))
        assert isinstance(one, Ranking)
        assert isinstance(other, Ranking)
        assert torch.equal(one.order, other.order)
        assert torch.equal(one.scores, other.scores)
    assert data.times == times
    assert whole.data == parts.data
    del whole
    kept = [sums for sums in gc.get_objects() if isinstance(sums, UnitSums) and sums.pairs is not None]
    assert len(kept) == len({mlp.owner for mlp in mlps}) // times


def test_where_nobody_knows_what_is_free_there_is_no_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    assert 0 < memory.allowed(cpu, None) < math.inf
    assert memory.allowed(cpu, 2) == 2 << 20
    monkeypatch.setattr(memory, "_FREE", tmp_path / "absent")
    assert 0 < memory.allowed(cpu, None) < math.inf
    monkeypatch.delattr(os, "sysconf")
    assert memory.allowed(cpu, None) == math.inf


def test_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(memory, "_available", lambda: 800.0)
    assert memory.allowed(torch.device("cpu"), None) == 400
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.allowed(torch.device("cpu"), None) == 100
    assert memory.allowed(torch.device("cpu"), 2) == 2 << 20


def test_widths_are_nested_and_serve_every_target() -> None:
    model, data = tiny_vit().eval(), [(pictures(40), torch.arange(40) % 5)]
    for criterion in ("reconstruction", {"name": "reconstruction", "metric": "loss"}):
        units = [
            {
                edit.mlp: set(edit.units)
                for edit in mlpreduce.plan(
                    copy.deepcopy(model),
                    "shallow",
                    target_params=target,
                    scope="global",
                    criterion=criterion,
                    data=data,
                ).edits
                if hasattr(edit, "units")
            }
            for target in (0.5, 0.7)
        ]
        assert units[0].keys() == units[1].keys()
        assert all(units[0][name] < units[1][name] for name in units[0])


@pytest.mark.parametrize("kind", ["plain", "groups"])
def test_swaps_lower_the_error_at_the_width_that_is_kept(kind: str) -> None:
    if kind == "plain":
        model, side = tiny_vit().double().eval(), 16
    else:
        name, kwargs = KINDS[kind]
        model, side = built(name, kwargs), kwargs["img_size"]
    images = pictures(side=side).double()
    mlps = find_mlps(model)
    units = []
    for swaps in (0, 40):
        criterion = {"name": "reconstruction", "ridge": RIDGE, "swaps": swaps}
        plan = mlpreduce.plan(model, "shallow", ratio=0.25, criterion=criterion, data=[images])
        units.append({edit.mlp: list(edit.units) for edit in plan.of(Slice)})
    rows = given(model, mlps, images)
    better = 0
    for mlp in mlps[:4]:
        a, weight = rows[mlp.name], columns(model, mlp)
        square = a.T @ a / len(a)
        ridged = square + RIDGE * float(square.diagonal().mean()) * torch.eye(len(square), dtype=torch.float64)
        wanted, errors = weight @ ridged, []
        for some in (one[mlp.name] for one in units):
            fitted = wanted[:, some] @ torch.linalg.inv(ridged[some][:, some])
            errors.append(float((wanted * weight).sum() - (fitted * wanted[:, some]).sum()))
            size = mlp.hidden_features // mlp.groups
            assert len({sum(unit // size == group for unit in some) for group in range(mlp.groups)}) == 1
        assert errors[1] <= errors[0] * (1 + 1e-9)
        better += errors[1] < errors[0] * (1 - 1e-6)
    assert better


def test_dead_units_go_first() -> None:
    model = tiny_vit().eval()
    with torch.no_grad():
        mlp: Any = model.blocks[0].mlp  # type: ignore[index]
        mlp.fc1.weight[5:9] = 0
        mlp.fc1.bias[5:9] = -50.0
        last: Any = model.blocks[3].mlp  # type: ignore[index]
        last.fc1.weight.zero_()  # no unit of this MLP ever does anything
        last.fc1.bias.zero_()
    mlps = find_mlps(model)
    answers = Answers(model, mlps, [pictures()])
    answer = answers.of(mlps[0], choose("reconstruction"))
    silent = answers.of(mlps[3], choose("reconstruction"))
    assert isinstance(answer, Ranking)
    assert isinstance(silent, Ranking)
    assert set(answer.order.flip(0)[:4].tolist()) == {5, 6, 7, 8}
    assert not silent.scores.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "outputs"}, "metric"),
        ({"ridge": -1.0}, "ridge"),
        ({"swaps": -1}, "swaps"),
        ({"memory": -1}, "criterion reconstruction: memory is -1"),
        (
            {"ridge": 0.0},
            "34 positions .* too few for 128 hidden units of blocks.0.mlp: at least 128 .* 4 times as many",
        ),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        mlpreduce.plan(
            tiny_vit(), "shallow", criterion={"name": "reconstruction", **options}, data=[pictures(2)], ratio=0.5
        )


@pytest.mark.parametrize("count", [2, 40])
def test_the_ridge_is_the_best_of_halves_judged_by_the_other(count: int) -> None:
    """Half of the units, those of most energy, are refitted on every second example and judged on the others, both ways."""
    model, images = tiny_vit().double(), pictures(count).double()
    (mlp, *_) = find_mlps(model)
    rows: list[torch.Tensor] = []
    fc2 = model.get_submodule("blocks.0.mlp.fc2")
    fc2.register_forward_pre_hook(lambda m, args: rows.append(args[0].detach()))
    model(images)
    halves = [rows[0][half::2].flatten(0, 1) for half in range(2)]
    weight = fc2.weight.detach()  # type: ignore[union-attr]
    every = rows[0].flatten(0, 1)
    energy = every.square().mean(0) * weight.square().sum(0)
    kept = energy.argsort(descending=True)[:64]
    errors = {}
    for ridge in (1e-3, 1e-2, 1e-1, 1.0):
        errors[ridge] = 0.0
        for here, there in (halves, halves[::-1]):
            square = here.T @ here / len(here)
            ridged = square + ridge * square.diagonal().mean() * torch.eye(128, dtype=torch.float64)
            change = -weight.clone()
            change[:, kept] += (weight @ ridged)[:, kept] @ torch.linalg.inv(ridged[kept][:, kept])
            errors[ridge] += float((change @ there.T).square().sum()) / len(there)
    best = min(errors, key=lambda ridge: errors[ridge])
    assert (best == 1e-2) == (count == 40)  # what is taken where there are no halves; else nothing is tested
    fc2._forward_pre_hooks.clear()
    answers = Answers(model, find_mlps(model), [images])
    chosen, given = (answers.of(mlp, choose(c)) for c in ("reconstruction", {"name": "reconstruction", "ridge": best}))
    assert isinstance(chosen, Ranking)
    assert isinstance(given, Ranking)
    assert torch.equal(chosen.order, given.order)
    torch.testing.assert_close(chosen.scores, given.scores)


def test_units_that_never_change_need_a_ridge() -> None:
    model = tiny_vit()
    nn.init.zeros_(model.get_submodule("blocks.0.mlp.fc1").weight[7])  # type: ignore[index, union-attr, arg-type, operator]
    config: dict[str, Any] = {"data": [pictures(200)], "ratio": 0.5, "repair": "parallel"}
    with pytest.raises(ReductionError, match=r"have no inverse with a ridge of 0: .* units that never change"):
        mlpreduce.plan(model, "shallow", criterion={"name": "reconstruction", "ridge": 0.0}, **config)
    mlpreduce.plan(model, "shallow", criterion="reconstruction", **config)


def test_labels_are_asked_for_where_the_loss_counts() -> None:
    with pytest.raises(ReductionError, match="data has no labels for 18 images, which the loss needs"):
        mlpreduce.plan(tiny_vit(), "shallow", criterion={"name": "reconstruction", "metric": "loss"}, data=[pictures()])
    mlpreduce.plan(tiny_vit(), "shallow", criterion="reconstruction", data=[pictures()])


def test_repaired_it_is_nearer_than_others() -> None:
    images = pictures(64)
    gaps = {}
    for criterion in ("reconstruction", "energy", "l2", "taylor", "first"):
        model = tiny_vit().eval()
        before = model(images).detach()
        data = [(images, torch.arange(64) % 5)]
        mlpreduce.apply(model, "shallow", ratio=0.25, criterion=criterion, data=data, repair="least_squares")
        gaps[criterion] = float((model(images) - before).norm().detach())
    assert min(gaps, key=lambda name: gaps[name]) == "reconstruction"
