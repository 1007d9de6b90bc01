"""Which blocks share: patterns that look at data, that leave the ends alone, and that tie whole stages."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers.two_processes import Together
from torch import nn

import mlpreduce
from mlpreduce import ReductionError, repair
from mlpreduce import recipe as recipes
from mlpreduce.calibration import Batch
from mlpreduce.calibration.similarity import cka, outputs_of
from mlpreduce.edits import Plan
from mlpreduce.recipe.schema import runs
from mlpreduce.search.spaces.points import Pricer
from mlpreduce.search.spaces.space import Suggestion
from mlpreduce.search.spaces.subjects import RecipeModel
from mlpreduce.testing import tiny_vit
from mlpreduce.train import build_model
from mlpreduce.train.probes import layer_similarity
from mlpreduce.transforms.parts import Parts
from mlpreduce.transforms.patterns import BY_DATA
from mlpreduce.transforms.steps import needs_data, without_data


def images(count: int = 40) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(9))


def owners(made: Plan) -> list[int]:
    names = [row.mlp for row in made.rows]
    return [names.index(row.owner) for row in made.rows]


def alike_in_turns() -> nn.Module:
    """MLPs 0, 2 and 4 give the same, and so do 1, 3 and 5, as no block changes the stream by much."""
    model = tiny_vit(depth=6).eval()
    with torch.no_grad():
        for number, block in enumerate(model.blocks):
            block.load_state_dict(model.blocks[number % 2].state_dict())
            block.attn.proj.weight.zero_()
            block.mlp.fc2.weight.mul_(1e-4 if number < 2 else 1)
    return model


NOTES = {
    "similarity": "the mean CKA of MLPs that share is 1.000, of all 0.",
    "cost": "two MLPs that share move what the model gives by 0 on average (1 - cosine), any two of a stage by ",
}


@pytest.mark.parametrize("pattern", NOTES)
def test_those_are_put_together_that_give_the_like(
    pattern: str, unchanged: Callable[[nn.Module], Callable[[], None]]
) -> None:
    model = alike_in_turns()
    check = unchanged(model)
    config: dict[str, Any] = {"pattern": pattern, "group": 3, "scale": "none"}
    plans = [mlpreduce.plan(model, "grouped", **config, data=images().split(size)) for size in (1, 7, 40)]
    check()
    assert owners(plans[0]) == [0, 1, 0, 1, 0, 1]
    assert len({plan.to_json() for plan in plans}) == 1
    assert plans[0].data == {"samples": 40, "fingerprint": plans[0].data["fingerprint"]}  # type: ignore[index]
    assert NOTES[pattern] in " ".join(str(plans[0]).split())
    before = model(images(4))
    torch.testing.assert_close(mlpreduce.apply(model, plans[0])(images(4)), before)
    assert mlpreduce.plan(alike_in_turns(), "grouped", **config, data=images()).edits == plans[0].edits


def test_similarity_is_that_of_the_probe() -> None:
    """Where all tokens count: of few images, the probe takes all."""
    model, batch = tiny_vit().eval(), images(20)
    rows = outputs_of(model, mlpreduce.find_mlps(model), Batch(batch), 10**6)
    expected = layer_similarity(model, batch)
    for mine, theirs in zip(cka(rows), expected, strict=True):
        assert mine == pytest.approx(theirs)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"pattern": "sandwich"}, [0, 1, 1, 3, 3, 5]),
        ({"pattern": "sandwich", "group": 4}, [0, 1, 1, 1, 1, 5]),
        ({"pattern": "sandwich", "group": "all"}, [0, 1, 1, 1, 1, 5]),
        ({"pattern": "sandwich", "group": 3, "remainder": "own"}, [0, 1, 1, 1, 4, 5]),
        ({"pattern": "sandwich", "group": 3, "remainder": "merge"}, [0, 1, 1, 1, 1, 5]),
        ({"group": "all"}, [0] * 6),
        ({"group": "all", "pattern": "cycle"}, [0] * 6),
        ({"group": "all", "pattern": "cycle_reverse"}, [0] * 6),
    ],
)
def test_patterns(config: dict[str, Any], expected: list[int]) -> None:
    assert owners(mlpreduce.plan(tiny_vit(depth=6), "grouped", **config)) == expected
    at_all = mlpreduce.plan(tiny_vit(depth=6), "grouped", pattern="similarity", group="all", data=images(4))
    assert owners(at_all) == [0] * 6


def test_stages_share_within_themselves() -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, window_size=7, depths=(1, 2, 4, 2))
    assert owners(mlpreduce.plan(model, "grouped", group="all")) == [0, 0, 2, 2, 2, 2, 6, 6]
    assert owners(mlpreduce.plan(model, "grouped", pattern="sandwich", group=2)) == [0, 1, 2, 3, 3, 5, 6, 7]
    for pattern in BY_DATA:
        made = mlpreduce.plan(model, "grouped", pattern=pattern, group=2, data=torch.randn(20, 3, 56, 56))
        assert len(set(owners(made))) == 4
        assert all(owner < 2 for owner in owners(made)[:2])


def test_wrong_calls_are_told() -> None:
    model = tiny_vit(depth=6)
    for config, message in {
        "no data": ({"pattern": "similarity"}, "needs calibration data; give data=, a loader of images"),
        "a name": ({"pattern": "sandwhich"}, "pattern is 'sandwhich'; did you mean 'sandwich'"),
        "a word": ({"group": "every"}, "group is 'every', the number of blocks that share one MLP, or 'all'"),
        "a fraction": ({"group": 2.0, "pattern": "similarity"}, r"group is 2\.0, the number of blocks"),
        "left over": ({"group": 3, "pattern": "sandwich"}, r"4 MLPs \(blocks\.1\.mlp to blocks\.4\.mlp\) do not split"),
        "a list": ({"remainder": ["own"]}, r"remainder is \['own'\]"),
    }.values():  # fmt: skip
        with pytest.raises(ReductionError, match=message):
            mlpreduce.plan(model, "grouped", **config)
    with pytest.raises(ReductionError, match="nothing would change"):
        mlpreduce.plan(tiny_vit(depth=2), "grouped", pattern="sandwich")


def test_mlps_that_give_constants_are_like_none() -> None:
    model = tiny_vit()
    for block in model.blocks[:2]:
        nn.init.zeros_(block.mlp.fc2.weight)
    made = mlpreduce.plan(model, "grouped", pattern="similarity", group=2, data=images(4))
    assert owners(made)[3] == 2  # the only two that are alike
    assert "nan" not in str(made)
    apart = mlpreduce.plan(model, "grouped", pattern="similarity", group=4, data=images(4))
    assert owners(apart) == [0] * 4
    nn.init.zeros_(model.blocks[3].mlp.fc2.weight)  # one is left
    with pytest.raises(ReductionError, match="no two of 4 MLPs give anything but a constant on the data"):
        mlpreduce.plan(model, "grouped", pattern="similarity", data=images(4))


def measured(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], float]:
    """What is measured of pairs of MLPs from now on."""
    found: dict[tuple[str, str], float] = {}
    distances = Parts.distances

    def noted(parts: Parts, trials: Any) -> dict[tuple[str, str], float]:
        result = distances(parts, trials)
        found.update({names: value for names, value in result.items() if names[0].startswith("blocks.")})
        return result

    monkeypatch.setattr(Parts, "distances", noted)
    return found


@pytest.mark.parametrize("keep", ["first", "last", "align_mean", "auto"])
def test_costs_of_sharing_are_those_of_each_pair_alone(keep: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair costs what the whole model's outputs move by when it alone shares, and the cheapest pair goes together."""
    model = tiny_vit().double().eval()
    for block in model.blocks:
        nn.init.normal_(block.mlp.fc2.weight, std=0.3)
    found = measured(monkeypatch)
    data = images().double()
    made = mlpreduce.plan(model, "grouped", pattern="cost", group=2, keep=keep, scale="none", data=data.split(9))
    whole = model(data)
    for one, other in itertools.combinations(range(4), 2):
        pattern = [[one, other], *([row] for row in range(4) if row not in (one, other))]
        plain = "first" if keep == "auto" else keep
        pair = mlpreduce.apply(copy.deepcopy(model), "grouped", pattern=pattern, keep=plain, scale="none")
        wanted = 1 - torch.cosine_similarity(pair(data), whole).mean().item()
        assert found[f"blocks.{one}.mlp", f"blocks.{other}.mlp"] == pytest.approx(wanted, abs=1e-12)
    least = min(found, key=lambda pair: found[pair])
    names = {row.mlp: row.owner for row in made.rows}
    assert names[least[1]] == least[0]


@pytest.mark.parametrize("share", ["attention", "block"])
def test_costs_are_those_of_what_is_shared(share: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_vit().double().eval()
    for number, block in enumerate(model.blocks):  # of the attention alone 0 and 3 are alike
        block.attn.load_state_dict(model.blocks[0 if number == 3 else number].attn.state_dict())
        nn.init.normal_(block.mlp.fc2.weight, std=0.3)
    found = measured(monkeypatch)
    data, config = images().double(), {"share": share, "scale": "none"}
    mlpreduce.plan(model, "grouped", pattern="cost", data=[data], **config)
    for one, other in ((0, 1), (0, 3)):
        pattern = [[one, other], *([row] for row in range(4) if row not in (one, other))]
        pair = mlpreduce.apply(copy.deepcopy(model), "grouped", pattern=pattern, **config)
        wanted = 1 - torch.cosine_similarity(pair(data), model(data)).mean().item()
        assert found[f"blocks.{one}.mlp", f"blocks.{other}.mlp"] == pytest.approx(wanted, abs=1e-12)
    assert (found["blocks.0.mlp", "blocks.3.mlp"] < 1e-12) == (share == "attention")


def test_only_the_first_examples_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair, "_COMPARED", 16)
    config: dict[str, Any] = {"pattern": "cost", "group": 2, "scale": "none"}
    some, more = (mlpreduce.plan(tiny_vit(), "grouped", **config, data=images(count)) for count in (16, 40))
    assert [note for note in some.notes if "cost" in note] == [note for note in more.notes if "cost" in note]
    assert (some.data["samples"], more.data["samples"]) == (16, 40)  # type: ignore[index]


def test_costs_that_are_not_finite_are_refused() -> None:
    model = tiny_vit()
    with torch.no_grad():
        model.blocks[1].mlp.fc2.bias[0] = math.inf
    with pytest.raises(ReductionError, match="the model gives what is not finite on the data"):
        mlpreduce.plan(model, "grouped", pattern="cost", data=images(4))


@pytest.mark.parametrize("pattern", BY_DATA)
def test_a_recipe_and_a_search_know_its_cost_before(pattern: str) -> None:
    step = {"transform": "grouped", "pattern": pattern, "group": 2, "scale": "none"}
    assert needs_data(step)
    assert without_data(step) == {**step, "pattern": "cycle"}
    recipe = recipes.load("digits_tiny")
    cycle = {**step, "pattern": "cycle"}
    points = [Pricer(RecipeModel(recipe)).price(Suggestion((some,), {})) for some in (step, cycle)]
    assert points[0].cost == points[1].cost
    assert points[0].key != points[1].key


def _plans(rank: int, folder: str, pattern: str) -> None:
    made = mlpreduce.plan(alike_in_turns(), "grouped", pattern=pattern, group=3, data=[images()[rank::2]])
    made.save(Path(folder) / f"{rank}.json")
    assert owners(made) == [0, 1, 0, 1, 0, 1]
    one = mlpreduce.plan(alike_in_turns(), "grouped", pattern=pattern, group=3, data=[] if rank else images())
    assert owners(one) == [0, 1, 0, 1, 0, 1]
    with pytest.raises(ReductionError, match="process 1: data is a int"):
        mlpreduce.plan(alike_in_turns(), "grouped", pattern=pattern, data=3 if rank else [images()])


@pytest.mark.processes
@pytest.mark.parametrize("pattern", BY_DATA)
def test_two_processes_make_one_plan(pattern: str, together: Together, tmp_path: Path) -> None:
    together(_plans, str(tmp_path), pattern)
    one, other = (Plan.load(tmp_path / f"{rank}.json") for rank in range(2))
    assert one.to_json() == other.to_json()
    assert one.data is not None
    assert one.data["samples"] == 40


# --- what is shared -----------------------------------------------------------------------------------------------------------


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_one_block_for_all() -> None:
    """The model then is one block in a loop, as the Universal Transformer is."""
    model, original = tiny_vit().eval(), tiny_vit().eval()
    made = mlpreduce.apply(model, "grouped", share="block", group="all", scale="none")
    with torch.no_grad():
        x = original._pos_embed(original.patch_embed(images(3)))
        for _ in range(4):
            x = original.blocks[0](x)
        expected = original.forward_head(original.norm(x))
        torch.testing.assert_close(made(images(3)), expected)
    assert count(model) == count(original) - 3 * count(original.blocks[0])
    assert mlpreduce.profile(model).params == count(model)
    assert "MLPs" in str(mlpreduce.history(model)[0])


def test_attention_alone() -> None:
    model, original = tiny_vit(), tiny_vit()
    mlpreduce.apply(model, "grouped", share="attention", group=2, keep="last")
    assert count(model) == count(original) - 2 * count(original.blocks[0].attn)
    assert model.blocks[0].attn.qkv is model.blocks[1].attn.qkv
    assert torch.equal(model.blocks[0].attn.qkv.weight, original.blocks[1].attn.qkv.weight)
    for ours, theirs in zip(model.blocks, original.blocks, strict=True):  # and nothing is scaled
        assert torch.equal(ours.mlp.fc1.weight, theirs.mlp.fc1.weight)
        assert torch.equal(ours.norm1.weight, theirs.norm1.weight)
    mean = mlpreduce.apply(tiny_vit(), "grouped", share="attention", keep="mean").blocks[1].attn.proj.weight
    expected = (original.blocks[0].attn.proj.weight + original.blocks[1].attn.proj.weight) / 2
    torch.testing.assert_close(mean, expected)


@pytest.mark.parametrize("share", ["attention", "block"])
def test_it_composes_with_slicing_and_with_shared_mlps(share: str) -> None:
    config: dict[str, Any] = {"share": share, "scale": "none"}
    one = mlpreduce.apply(mlpreduce.apply(tiny_vit(), "grouped", **config), "shallow", ratio=0.5)
    other = mlpreduce.apply(mlpreduce.apply(tiny_vit(), "shallow", ratio=0.5), "grouped", **config)
    assert mlpreduce.verify(one).ok
    assert count(one) == count(other)
    torch.testing.assert_close(one.eval()(images(2)), other.eval()(images(2)))
    if share == "attention":
        both = mlpreduce.apply(mlpreduce.apply(tiny_vit(), "grouped", **config), "grouped", scale="none")
        whole = mlpreduce.apply(tiny_vit(), "grouped", share="block", scale="none")
        assert count(both) - count(whole) == 2 * 2 * count(tiny_vit().blocks[0].norm1)
    plain = mlpreduce.merge(one)
    assert plain.state_dict().keys() == tiny_vit().state_dict().keys()


def test_what_attention_holds_beside_layers_and_statistics_stay_each_blocks_own() -> None:
    kwargs: dict[str, Any] = {"img_size": 56, "window_size": 7, "depths": (2, 2, 2, 2)}
    model = timm.create_model("swin_tiny_patch4_window7_224", **kwargs)
    cost = mlpreduce.plan(model, "grouped", share="block")
    mlpreduce.apply(model, cost)
    first, second = model.layers[0].blocks
    assert first.attn.qkv is second.attn.qkv
    assert first.norm1 is second.norm1
    assert first.attn.relative_position_bias_table is not second.attn.relative_position_bias_table
    visformer = timm.create_model("visformer_tiny", depth=(2, 2, 2), img_size=64)
    mlpreduce.apply(visformer, "grouped", share="block", scale="none")
    first, second = visformer.stage2
    assert first.attn.qkv is second.attn.qkv
    assert first.norm1 is not second.norm1
    assert isinstance(first.norm1, nn.modules.batchnorm._BatchNorm)


def test_a_block_with_two_mlps_is_shared_once() -> None:
    model = timm.create_model("tnt_s_patch16_224", img_size=32, depth=2)
    whole, block = count(model), count(model.blocks[0])
    mlpreduce.apply(model, "grouped", share="block")
    assert count(model) == whole - block
    assert mlpreduce.verify(model).ok


def test_blocks_that_cannot_share_are_told(unchanged: Callable[[nn.Module], Callable[[], None]]) -> None:
    model = timm.create_model("convnext_atto", depths=(2, 2, 2, 2))
    check = unchanged(model)
    with pytest.raises(
        ReductionError, match=r"stages\.0\.blocks\.0 .* there is no attention; use share='mlp', or exclude it"
    ):
        mlpreduce.apply(model, "grouped", share="attention")
    check()
    vit = tiny_vit()
    vit.blocks[1].attn.q_norm = nn.LayerNorm(16)
    with pytest.raises(
        ReductionError, match=r"blocks\.1 cannot share with blocks\.0: attn\.q_norm is in one of them only"
    ):
        mlpreduce.apply(vit, "grouped", share="block")
    with pytest.raises(ReductionError, match="share is 'atention'; did you mean 'attention'"):
        mlpreduce.plan(tiny_vit(), "grouped", share="atention")
    with pytest.raises(ReductionError, match="refits MLPs that share, and share='attention' leaves each its own"):
        mlpreduce.plan(tiny_vit(), "grouped", share="attention", repair="least_squares", data=images())


def test_a_search_prices_it() -> None:
    steps = ({"transform": "grouped", "share": "block"}, {"transform": "shallow", "ratio": 0.5})
    recipe = recipes.load("digits_tiny")
    point = Pricer(RecipeModel(recipe)).price(Suggestion(steps, {}))
    run = runs(recipe, ".")[0].model_copy(update={"steps": steps})
    assert point.cost.params == count(build_model(run))
