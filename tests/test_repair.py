"""Repair by least squares: against explicit solutions, and what must hold of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import mlpreduce
from mlpreduce import Plan, ReductionError, transforms
from mlpreduce.edits import Assign, Scale, Slice
from mlpreduce.repair.fit import RIDGES, Fit, solved
from mlpreduce.testing import tiny_vit


def images(count: int = 40) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(21), dtype=torch.float64)


def lively_vit(**kwargs: Any) -> nn.Module:
    model = tiny_vit(**kwargs).double().eval()
    for block in model.blocks:
        nn.init.normal_(block.mlp.fc1.bias, std=0.3)
        nn.init.normal_(block.mlp.fc2.bias, std=0.3)
        block.mlp.fc1.weight.data *= 10
        block.mlp.fc2.weight.data *= 10
    return model


def inputs_of(model: nn.Module, batch: torch.Tensor) -> list[torch.Tensor]:
    """What each MLP is given, (tokens, features)."""
    kept: list[torch.Tensor] = []
    handles = [b.mlp.register_forward_pre_hook(lambda m, args: kept.append(args[0].detach())) for b in model.blocks]
    model(batch)
    for handle in handles:
        handle.remove()
    return [x.flatten(0, 1) for x in kept]


def hidden(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return mlp.norm(mlp.act(mlp.fc1(x))).detach()


def fitted(
    given: torch.Tensor, missing: torch.Tensor, strength: float, biased: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """argmin over D, d of |missing - given D' - d|^2 + ridge |D|^2, as one least squares problem."""
    middle, rest = (given.mean(0), missing.mean(0)) if biased else (given[0] * 0, missing[0] * 0)
    change = torch.zeros(missing.shape[1], given.shape[1], dtype=given.dtype)
    if strength < math.inf:
        ridge = strength * (given - middle).square().sum(0).mean()
        rows = torch.cat([given - middle, ridge.sqrt() * torch.eye(given.shape[1], dtype=given.dtype)])
        right = torch.cat([missing - rest, torch.zeros(given.shape[1], missing.shape[1], dtype=given.dtype)])
        change = torch.linalg.lstsq(rows, right).solution.T
    return change, rest - change @ middle


def best_solution(
    given: torch.Tensor, wanted: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """That of the ridge with which the fits on every other image do best on the others. Rows are 17 tokens of 40 images."""
    missing = wanted - given @ weight.T - (0 if bias is None else bias)
    odd = (torch.arange(len(given)) // 17 % 2).bool()
    left = []
    for strength in RIDGES:
        total = 0.0
        for here in (odd, ~odd):
            change, shift = fitted(given[here], missing[here], strength, bias is not None)
            total += (missing[~here] - given[~here] @ change.T - shift).square().sum().item()
        left.append(total)
    assert min(left) < missing.square().sum()
    change, shift = fitted(given, missing, RIDGES[left.index(min(left))], bias is not None)
    return weight + change, shift if bias is None else bias + shift


@pytest.mark.parametrize("batch", [1, 16, 40])
def test_equals_the_explicit_solution(batch: int) -> None:
    model = lively_vit()
    made = mlpreduce.plan(model, "shallow", ratio=0.3, criterion="l2", repair="parallel", data=images().split(batch))
    values = {edit.tensor: edit.value for edit in made.of(Assign)}
    assert len(values) == 8
    for block, x, edit in zip(model.blocks, inputs_of(model, images()), made.of(Slice), strict=True):
        units = list(edit.units)
        fc2 = block.mlp.fc2
        expected = best_solution(
            hidden(block.mlp, x)[:, units], block.mlp(x).detach(), fc2.weight.detach()[:, units], fc2.bias.detach()
        )
        for name, value in zip(("weight", "bias"), expected, strict=True):
            torch.testing.assert_close(values[f"{edit.mlp}.fc2.{name}"], value, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("keep", ["first", "mean", "align_mean"])
def test_a_shared_mlp_is_fitted_for_all_its_uses(keep: str) -> None:
    model, batch = lively_vit(), images()
    tied = mlpreduce.apply(copy.deepcopy(model), "grouped", keep=keep)
    config: dict[str, Any] = {"keep": keep, "repair": "parallel", "data": [batch]}
    made = mlpreduce.plan(model, "grouped", **config)
    inputs = inputs_of(model, batch)
    for first in (0, 2):
        shared = tied.blocks[first].mlp
        x = torch.cat(inputs[first : first + 2])
        wanted = torch.cat([model.blocks[first + i].mlp(inputs[first + i]).detach() for i in range(2)])
        expected = best_solution(hidden(shared, x), wanted, shared.fc2.weight.detach(), shared.fc2.bias.detach())
        (weight,) = (e.value for e in made.of(Assign) if e.tensor == f"blocks.{first}.mlp.fc2.weight")
        torch.testing.assert_close(weight, expected[0], rtol=1e-7, atol=1e-9)
    assert not [edit for edit in made.of(Scale) if edit.tensor.endswith("fc2.weight")]  # it is in the new values
    repaired = mlpreduce.apply(copy.deepcopy(model), made)
    assert repaired.blocks[1].mlp.fc2 is repaired.blocks[0].mlp.fc2
    gap = [(other(batch) - model(batch)).norm().item() for other in (tied, repaired)]
    assert gap[1] < gap[0] / 2


def test_units_that_others_can_stand_for_are_not_missed() -> None:
    """Every unit twice: half of them do what all did, but for the ridge."""
    model, batch = lively_vit(), images()
    for block in model.blocks:
        block.mlp.fc1.weight.data[64:] = block.mlp.fc1.weight.data[:64]
        block.mlp.fc1.bias.data[64:] = block.mlp.fc1.bias.data[:64]
    before = model(batch)
    gaps = []
    for repair in ("none", "parallel"):
        other = mlpreduce.apply(copy.deepcopy(model), "shallow", ratio=0.5, repair=repair, data=[batch])
        gaps.append((other(batch) - before).norm().item())
    assert gaps[1] < 1e-2 * gaps[0]


def test_units_without_effect_leave_all_as_it_was() -> None:
    model, batch = lively_vit(), images(20)
    for block in model.blocks:
        block.mlp.fc2.weight.data[:, 64:] = 0
    made = mlpreduce.plan(model, "shallow", ratio=0.5, repair="parallel", data=[batch])
    for edit in made.of(Assign):
        now = model.get_parameter(edit.tensor).detach()
        torch.testing.assert_close(edit.value, now[:, :64] if now.dim() > 1 else now, rtol=0, atol=1e-12)
    assert "differed from before by 0.00% of its variance on average, and does by 0.00% after a fit" in str(made)
    assert "stay as they are" not in str(made)


@pytest.mark.parametrize("count", [2, 8, 16])
def test_few_examples_do_no_harm(count: int) -> None:
    """17 tokens of 2 images for 128 units; and about as many as units, where a fit without ridge is at its worst."""
    model, batch = lively_vit(mlp_ratio=8), images(240)[200:]
    gaps = []
    for repair in ("none", "parallel"):
        data = [images(count)]
        other = mlpreduce.apply(copy.deepcopy(model), "shallow", ratio=0.5, criterion="l1", repair=repair, data=data)
        gaps.append((other(batch) - model(batch)).norm().item())
    assert gaps[1] < 1.02 * gaps[0]


def test_what_no_fit_brings_closer_stays_as_it_is() -> None:
    """What is missing has the other sign in the other half: each fit makes it worse there."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 3).double()
    rows = torch.cat([torch.randn(50, 6), torch.ones(50, 1)], 1).double()
    missing = rows @ torch.randn(7, 3).double()
    sums = torch.stack([missing.sum(0), *[missing.square().sum(0)] * 2])
    square, cross = (rows.T @ rows).expand(2, -1, -1), torch.stack([missing.T @ rows, -missing.T @ rows])
    assert solved(Fit(layer, "fc2", square, cross, torch.stack([sums, sums]), torch.ones(3).double()))[0] == {}
    values, was, now = solved(
        Fit(layer, "fc2", square, cross.abs() * cross[0].sign(), torch.stack([sums, sums]), torch.ones(3).double())
    )
    assert list(values) == ["fc2.weight", "fc2.bias"]
    assert now < 1e-3 * was
    with pytest.raises(
        mlpreduce.ReductionError, match="judges by the other, and one is empty, with 1 in all; give at least 2"
    ):
        mlpreduce.plan(tiny_vit(), "shallow", ratio=0.5, repair="parallel", data=[images(1).float()])


def test_dead_inputs_and_layers_without_bias() -> None:
    model = tiny_vit(depth=2).double().eval()
    for block in model.blocks:
        block.mlp.fc2.bias = None
        block.mlp.fc1.bias.data.fill_(-100)  # no unit is active
    made = mlpreduce.plan(model, "shallow", repair="parallel", data=[images(3)])
    assert not made.of(Assign)
    model = tiny_vit().double().eval()
    for block in model.blocks:
        block.mlp.fc2.bias = None
        block.mlp.fc2.weight.data *= 10
    x, batch = inputs_of(model, images()), images()
    made = mlpreduce.plan(model, "shallow", repair="parallel", data=[batch])
    given = hidden(model.blocks[0].mlp, x[0])[:, :64]
    weight = model.blocks[0].mlp.fc2.weight.detach()[:, :64]
    expected, _ = best_solution(given, model.blocks[0].mlp(x[0]).detach(), weight, None)
    torch.testing.assert_close(made.of(Assign)[0].value, expected, rtol=1e-7, atol=1e-9)


def test_slice_and_share_one_after_the_other(tmp_path: Any) -> None:
    """Repaired twice, saved, and loaded: the values are in the model, and loading repeats the structure alone."""
    model, batch = tiny_vit().eval(), images().float()
    before = model(batch)
    mlpreduce.apply(model, "grouped", scale="none", keep="mean", repair="parallel", data=[batch])
    mlpreduce.apply(
        model, "shallow", ratio=0.5, criterion="fisher", repair="parallel", data=[(batch, torch.arange(40) % 5)]
    )
    assert mlpreduce.verify(model).ok
    mlpreduce.save(model, tmp_path / "model")
    assert torch.equal(mlpreduce.load(tmp_path / "model").eval()(batch), model(batch))
    assert (model(batch) - before).norm() < before.norm()


def test_the_plan_replays_without_data(tmp_path: Any) -> None:
    batch = images().float()
    made = mlpreduce.plan(tiny_vit(), "shallow", criterion="activation", repair="parallel", data=batch.split(7))
    assert made.data == {"samples": 40, "fingerprint": made.data["fingerprint"]}  # type: ignore[index]
    made.save(tmp_path / "plan.json")
    again = mlpreduce.apply(tiny_vit(), Plan.load(tmp_path / "plan.json"))
    expected = mlpreduce.apply(tiny_vit(), made)
    assert torch.equal(again.eval()(batch), expected.eval()(batch))
    assert mlpreduce.history(again)[0].data == made.data


def test_a_graph_module_is_repaired_as_its_model() -> None:
    batch = images(20).float()
    for name, config in (("shallow", {}), ("grouped", {"keep": "mean"})):
        model = mlpreduce.apply(tiny_vit().eval(), name, repair="parallel", data=[batch], **config)
        graph = mlpreduce.to_graph(tiny_vit().eval())
        before = graph(batch)
        mlpreduce.plan(graph, name, repair="parallel", data=[batch], **config)
        assert torch.equal(graph(batch), before)
        mlpreduce.apply(graph, name, repair="parallel", data=[batch], **config)
        assert torch.equal(graph(batch), model(batch))


@pytest.mark.parametrize("repair", ["none", "bias", "parallel", "least_squares"])
@pytest.mark.parametrize("path", ["nowhere.weight", "blocks.0.mlp.fc1.nothing", "blocks.0.mlp", ""])
def test_edits_of_others_that_name_no_tensor_are_refused(
    path: str, repair: str, monkeypatch: pytest.MonkeyPatch, unchanged: Callable[[nn.Module], Callable[[], None]]
) -> None:
    monkeypatch.setattr(transforms.registry, "_TRANSFORMS", dict(transforms.registry._TRANSFORMS))

    @mlpreduce.register("names_nothing")
    def names_nothing(parts: Any, *, repair: str = "none") -> Any:
        """Slice an MLP, and write where nothing is."""
        yield parts.slice(parts[0], range(64))
        yield Assign(path, torch.zeros(3))

    model = tiny_vit().eval()
    check = unchanged(model)
    with pytest.raises(ReductionError, match=f"names_nothing.*VisionTransformer has no tensor '{path}'"):
        mlpreduce.apply(model, "names_nothing", repair=repair, data=torch.randn(8, 3, 16, 16))
    check()
