"""Widths by the loss, and widths that are learned under a budget."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import nn

import mlpreduce
from mlpreduce import ReductionError, budget
from mlpreduce.budget import Loss, PrimalDual, measure
from mlpreduce.edits import Slice
from mlpreduce.graph import find_mlps
from mlpreduce.testing import tiny_vit


def data(count: int = 40) -> list[Any]:
    images = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    return [(images, torch.arange(count) % 5)]


def lively_vit() -> nn.Module:
    model = tiny_vit().eval()
    for block in model.blocks:
        block.mlp.fc1.weight.data *= 10
        block.mlp.fc2.weight.data *= 10
    return model


def loss_of(model: nn.Module) -> float:
    ((images, labels),) = data()
    with torch.no_grad():
        return nn.functional.cross_entropy(model(images), labels).item()


@pytest.mark.parametrize("round_to", [1, 8])
def test_loss_finds_the_narrowest_width_within_the_limit(round_to: int) -> None:
    model, limit = lively_vit(), 2e-4
    search = Loss(limit=limit, round_to=round_to, halvings=None, cumulative=False)
    widths = search.widths(model, data(), criterion="taylor")
    assert list(widths) == [f"blocks.{i}.mlp" for i in range(4)]
    assert all(width % round_to == 0 for width in widths.values())
    assert min(widths.values()) < 128
    for name, width in widths.items():
        growths = []
        for kept in (width, width - round_to):
            if 0 < kept < 128:
                given = {name: kept}
                other = mlpreduce.apply(copy.deepcopy(model), "shallow", widths=given, criterion="taylor", data=data())
                growths.append(loss_of(other) - loss_of(model))
        if width < 128:
            assert growths[0] <= limit + 1e-6
        if width > round_to:
            assert growths[-1] > limit - 1e-6
    made = mlpreduce.plan(model, "shallow", widths=widths, criterion="taylor", data=data())
    assert {edit.mlp: len(edit.units) for edit in made.of(Slice)} == {k: w for k, w in widths.items() if w < 128}


def test_loss_goes_from_the_last_to_the_first_beside_what_was_narrowed() -> None:
    model, limit = lively_vit(), 2e-4
    widths = Loss(limit=limit, halvings=None).widths(model, data(), criterion="taylor")
    given: dict[str, int] = {}

    def loss(some: dict[str, int]) -> float:
        some = {name: width for name, width in some.items() if width < 128}
        if not some:
            return loss_of(model)
        return loss_of(
            mlpreduce.apply(copy.deepcopy(model), "shallow", widths=some, criterion="taylor", data=data(), guard=False)
        )

    for name, width in reversed(widths.items()):
        before = loss(given)
        assert loss(given | {name: width}) - before <= limit + 1e-6
        assert width == 1 or loss(given | {name: width - 1}) - before > limit - 1e-6
        given[name] = width
    assert widths != Loss(limit=limit, halvings=None, cumulative=False).widths(model, data(), criterion="taylor")


def test_loss_halves_the_range_so_often() -> None:
    model = lively_vit()
    for halvings, least in ((1, 64), (3, 16), (None, 1)):
        widths = Loss(limit=1e9, halvings=halvings).widths(model, data(), criterion="l2")
        assert set(widths.values()) == {least}


def test_loss_takes_all_that_has_no_effect() -> None:
    model = lively_vit()
    for number, block in enumerate(model.blocks):
        block.mlp.fc2.weight.data[:, 10 * (number + 1) :] = 0
    widths = Loss(limit=1e-7, halvings=None).widths(model, data(), criterion="fisher")
    assert all(width <= 10 * (i + 1) for i, width in enumerate(widths.values()))


def test_loss_without_labels_and_of_tied_mlps() -> None:
    model = mlpreduce.apply(lively_vit(), "grouped", scale="none")
    images = data()[0][0]
    widths = Loss(limit=1e-3).widths(model, images.split(7))
    assert list(widths) == ["blocks.0.mlp", "blocks.2.mlp"]
    assert mlpreduce.apply(model, "shallow", widths=widths, criterion="entropy_taylor", data=[images])


def test_loss_refuses() -> None:
    model = tiny_vit()
    with pytest.raises(
        ReductionError, match=r"budget\.Loss\(limit=-1, round_to=1\): limit is -1; it must be a number from 0"
    ):
        Loss(limit=-1).widths(model, data())
    with pytest.raises(ReductionError, match="halvings is 0; it must be a whole number from 1"):
        Loss(halvings=0).widths(model, data())
    with pytest.raises(ReductionError, match=r"blocks\.0\.mlp has 128 hidden units, .* of 129; a smaller round_to"):
        Loss(round_to=129).widths(model, data())
    with pytest.raises(ReductionError, match=r"budget\.Loss\(.*\): data has no labels for 40 images"):
        Loss().widths(model, [data()[0][0]], criterion="l2")
    for wrong in ({"limit": None}, {"round_to": 2.0}, {"round_to": True}, {"limit": float("nan")}):
        with pytest.raises(ReductionError, match=r"budget\.Loss\(.*: (limit|round_to) is .*; it must be a"):
            Loss(**wrong).widths(model, data())  # type: ignore[arg-type]
    for criterion in ("entropy_taylor", "gram_schmidt"):
        with pytest.raises(ReductionError, match=r"images with each other, and was given 1|no labels"):
            Loss().widths(model, [data()[0][0][:1]], criterion=criterion)
    with pytest.raises(ReductionError, match="unknown criterion 'l3'"):
        Loss().widths(model, data(), criterion="l3")


@pytest.mark.parametrize("scope", ["per_stage", "uniform", "global"])
def test_a_step_that_fits_to_the_last_parameter_is_taken(scope: str) -> None:
    model = tiny_vit()
    half = mlpreduce.apply(tiny_vit(), "shallow", ratio=0.5)
    target = sum(p.numel() for p in half.parameters()) + 32 + 1 + 32  # one unit more, of one of four MLPs
    made = mlpreduce.apply(model, "shallow", target_params=target, scope=scope, criterion="l2")
    assert sum(p.numel() for p in made.parameters()) == (target if scope != "uniform" else target - 65)


# --- a primal-dual method -----------------------------------------------------------------------------------------------------


def learned(model: nn.Module, updates: int = 300, lr: float = 0.01, **target: Any) -> PrimalDual:
    dual = PrimalDual(model, **target)
    for _ in range(updates):
        dual.after_update(lr)
    return dual


@pytest.mark.parametrize("unit", ["params", "macs"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_learned_budget_is_met_within_one_step(unit: str, tied: bool) -> None:
    model = lively_vit()
    if tied:
        mlpreduce.apply(model, "grouped")
    baseline = measure(model)
    present = getattr(baseline.cost, unit)
    dual = learned(model, **{f"target_{unit}": 0.75}, round_to=4)
    assert dual.cost() == pytest.approx(0.75 * present, rel=0.1)  # learned, before it is made to fit
    widths = dual.widths()
    cost = getattr(baseline.with_widths(widths), unit)
    assert cost <= 0.75 * present
    for owner, width in widths.items():
        assert width % 4 == 0
        assert getattr(baseline.with_widths({**widths, owner: width + 4}), unit) > 0.75 * present
    before = mlpreduce.apply(model, "shallow", widths=widths, criterion="l2")
    assert getattr(mlpreduce.profile(before), unit) == cost


def test_a_smaller_budget_keeps_less() -> None:
    sums = [sum(learned(lively_vit(), target_params=part).widths().values()) for part in (0.9, 0.8, 0.7, 0.6, 0.5)]
    assert sums == sorted(sums, reverse=True)
    assert len(set(sums)) == 5


def test_without_duals_nothing_shrinks_and_later_the_least_columns_do() -> None:
    model = lively_vit()
    before = copy.deepcopy(model)
    dual = PrimalDual(model, target_params=0.7)
    dual.after_update(0.1)
    for (name, now), was in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(now, was), name
    for _ in range(300):
        dual.after_update(0.1)
    for block, old in zip(model.blocks, before.blocks, strict=True):
        ratio = (block.mlp.fc2.weight / old.mlp.fc2.weight).detach()
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-4, atol=1e-6)  # columns as a whole
        shrunk = ratio[0] < 1 - 1e-6
        norms = old.mlp.fc2.weight.norm(dim=0)
        assert shrunk.any()
        assert norms[shrunk].max() <= norms[~shrunk].min()
        assert torch.equal(block.mlp.fc1.weight, old.mlp.fc1.weight)
    narrow = {row.mlp: row.hidden for row in mlpreduce.plan(model, "shallow", widths=dual.widths()).rows}
    assert narrow == dual.widths()


def test_mlps_with_little_to_lose_lose_more() -> None:
    model = lively_vit()
    model.blocks[2].mlp.fc2.weight.data[:, 16:] *= 1e-3
    widths = learned(model, updates=600, lr=1e-3, target_params=0.75, lr_norm=1.0, lr_width=0.005).widths()
    assert min(widths, key=lambda name: widths[name]) == "blocks.2.mlp"


def test_it_goes_on_from_its_state() -> None:
    one, other = lively_vit(), lively_vit()
    whole = learned(one, 40, target_params=0.7)
    half = learned(other, 20, target_params=0.7)
    again = PrimalDual(other, target_params=0.7)
    again.load_state_dict(half.state_dict())
    for _ in range(20):
        again.after_update(0.01)
    assert again.widths() == whole.widths()
    assert torch.equal(one.blocks[1].mlp.fc2.weight, other.blocks[1].mlp.fc2.weight)
    with pytest.raises(ReductionError, match="the state is of 4 MLPs, the model has 2"):
        PrimalDual(tiny_vit(depth=2), target_params=0.7).load_state_dict(half.state_dict())


def test_convolutions_are_shrunk_in_place() -> None:
    model = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), conv_mlp=True, num_classes=5)
    before = model.stages[2].blocks[0].mlp.fc2.weight.detach().clone()
    learned(model, 100, target_params=0.9)
    ratio = (model.stages[2].blocks[0].mlp.fc2.weight / before).detach()[:, :, 0, 0]
    assert (ratio[0] < 1 - 1e-6).any()


def test_primal_dual_refuses() -> None:
    with pytest.raises(ReductionError, match=r"PrimalDual\(\): give one of target_params and target_macs"):
        PrimalDual(tiny_vit())
    with pytest.raises(
        ReductionError, match=r"PrimalDual\(target_params=10\): a target of 10 parameters cannot be reached"
    ):
        PrimalDual(tiny_vit(), target_params=10)
    with pytest.raises(ReductionError, match=r"target_params is True; it must be a positive number"):
        PrimalDual(tiny_vit(), target_params=True)
    for wrong in ({"round_to": 0}, {"round_to": 1.5}, {"lr_width": -1}, {"lr_norm": "fast"}):
        with pytest.raises(ReductionError, match=r"PrimalDual\(target_params=0\.7\): .* it must be a"):
            PrimalDual(tiny_vit(), target_params=0.7, **wrong)  # type: ignore[arg-type]
    with torch.device("meta"):
        meta = tiny_vit()
    with pytest.raises(
        ReductionError, match=r"blocks\.0\.mlp\.fc2 is on the meta device; give the model weights first"
    ):
        PrimalDual(meta, target_params=0.7)
    with pytest.raises(ReductionError, match="found no MLP"):
        PrimalDual(nn.Sequential(nn.Linear(2, 2)), target_params=0.7, example_inputs=torch.zeros(1, 2))
    with pytest.raises(ReductionError, match="the state has no 'gone'; give what"):
        PrimalDual(tiny_vit(), target_params=0.7).load_state_dict({})


def test_columns_beside_those_of_attention() -> None:
    """Where one layer contracts the MLP and attention, the columns of attention stay as they are."""
    kwargs = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = timm.create_model(
        "vit_tiny_patch16_224", block_fn=timm.models.vision_transformer.DiffParallelScalingBlock, **kwargs
    )
    mlp = find_mlps(model)[0]
    (offset,) = next(axis.offsets for axis in mlp.axes if axis.tensor.endswith(f"{mlp.leaf('fc2').path}.weight"))
    before = model.get_submodule(mlp.leaf("fc2").path).weight.detach().clone()
    learned(model, 100, target_params=0.9)
    ratio = model.get_submodule(mlp.leaf("fc2").path).weight.detach() / before
    inside = torch.zeros(before.shape[1], dtype=torch.bool)
    inside[offset : offset + mlp.hidden_features] = True
    assert (ratio[:, ~inside] == 1).all()
    assert (ratio[0, inside] < 1 - 1e-6).any()


@pytest.mark.processes
def test_budget_imports_no_optuna() -> None:
    import subprocess
    import sys

    code = "import mlpreduce.budget, sys; print('optuna' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
    assert budget.Loss is Loss
