"""The few units that carry an MLP's output stay, and are told."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import mlpreduce
from mlpreduce.criteria import guarded
from mlpreduce.errors import ReductionError
from mlpreduce.testing import tiny_vit


def loud(unit: int, block: int = 1) -> nn.Module:
    """A ViT of which one hidden unit carries nearly all of what its MLP gives, with a small fc1 row."""
    model = tiny_vit().eval()
    mlp: Any = model.blocks[block].mlp  # type: ignore[index]
    with torch.no_grad():
        mlp.fc1.weight[unit] *= 1e-2
        mlp.fc1.bias[unit] = 30.0
        mlp.fc2.weight[:, unit] *= 4
    return model


@pytest.fixture
def data(images: torch.Tensor) -> list[torch.Tensor]:
    return [torch.randn(16, *images.shape[1:], generator=torch.Generator().manual_seed(5))]


def kept(plan: Any, name: str) -> list[int]:
    (edit,) = [edit for edit in plan.edits if getattr(edit, "mlp", "") == name and hasattr(edit, "units")]
    return list(edit.units)


def test_a_unit_that_carries_the_output_stays(data: list[torch.Tensor]) -> None:
    model, name = loud(77), "blocks.1.mlp"
    plan = mlpreduce.plan(model, "shallow", ratio=0.5, data=data)
    alone = mlpreduce.plan(model, "shallow", ratio=0.5, data=data, guard=False)
    assert kept(alone, name) == list(range(64))
    assert kept(plan, name) == [*range(63), 77]
    (note,) = [note for note in plan.notes if note.startswith("guard: ")]
    assert note.startswith("guard: 1 unit stays that first() would drop: blocks.1.mlp 77 (")
    assert kept(plan, "blocks.0.mlp") == list(range(64))


def test_the_variance_counts_where_a_repair_takes_up_the_mean(data: list[torch.Tensor]) -> None:
    """A unit that hardly varies carries much, and none of it is lost when the bias takes it up."""
    model, name = loud(77), "blocks.1.mlp"
    raw = mlpreduce.plan(model, "shallow", ratio=0.5, criterion="first", data=data)
    repaired = mlpreduce.plan(model, "shallow", ratio=0.5, criterion="first", data=data, repair="least_squares")
    assert 77 in kept(raw, name)
    assert 77 not in kept(repaired, name)


def test_what_goes_though_it_is_strong_is_told(data: list[torch.Tensor]) -> None:
    model = loud(77)
    few = mlpreduce.plan(model, "shallow", width=16, criterion="first", data=data)  # fewer than one in 32
    assert 77 not in kept(few, "blocks.1.mlp")
    (note,) = [note for note in few.notes if "drops 1 of the units that carry much" in note]
    assert "first() drops 1 of the units that carry much of what the MLP gives: blocks.1.mlp 77 (" in note
    assert 'choose criterion="reconstruction"' in note


def test_a_tied_unit_counts_by_the_use_where_it_is_largest(data: list[torch.Tensor]) -> None:
    model = mlpreduce.apply(tiny_vit().eval(), "grouped", group=4, scale="none")
    mlp: Any = model.blocks[0].mlp
    with torch.no_grad():  # silent in the first uses, loud in the last
        mlp.fc1.weight[90] = 0
        mlp.fc1.bias[90] = -20.0
        model.blocks[3].norm2.bias[0] = 60.0  # type: ignore[index, union-attr]
        mlp.fc1.weight[90, 0] = 1.0
        mlp.fc2.weight[:, 90] *= 8
    plan = mlpreduce.plan(model, "shallow", ratio=0.5, criterion="first", data=data)
    assert 90 in kept(plan, "blocks.0.mlp")


def test_the_order_by_hand() -> None:
    order = list(range(64))
    shares = [0.0] * 64
    shares[60], shares[50], shares[40] = 0.4, 0.5, 0.35
    found = guarded(order, shares, 32, 1, "auto")  # one in 32 of those kept; above 20 / 64
    assert (found.stay, found.go) == ([50], [60, 40])
    assert found.order[:3] == [50, 0, 1]
    assert sorted(found.order) == order
    found = guarded(order, shares, 64, 1, "auto")
    assert (found.stay, found.go) == ([], [])
    found = guarded(order, shares, 32, 1, 0.45)
    assert (found.stay, found.go) == ([50], [])
    found = guarded(order, shares, 32, 1, False)
    assert (found.stay, found.go, found.order) == ([], [50, 60, 40], order)


def test_groups_keep_as_many_each() -> None:
    order, shares = list(range(256)), [0.0] * 256
    for unit in (100, 101, 102, 103, 104):  # all of the first group of two
        shares[unit] = 0.18
    found = guarded(order, shares, 64, 2, "auto")
    assert found.stay == [100, 101]  # two of 64
    assert found.go == [102, 103, 104]
    assert guarded(order, shares, 8, 2, "auto").go == [100, 101, 102, 103, 104]


@pytest.mark.parametrize("guard", [True, "on", 0, 1.5, None])
def test_other_guards_are_refused(guard: Any, data: list[torch.Tensor]) -> None:
    with pytest.raises(ReductionError, match='give "auto", False, or the part of an MLP\'s output energy'):
        mlpreduce.plan(tiny_vit(), "shallow", ratio=0.5, guard=guard)


def test_scores_are_not_changed(data: list[torch.Tensor]) -> None:
    model = loud(77)
    widths = [
        [row.hidden for row in mlpreduce.plan(copy.deepcopy(model), "shallow", ratio=0.5, guard=guard, **config).rows]
        for guard in ("auto", False)
        for config in [{"criterion": "activation", "scope": "global", "data": data}]
    ]
    assert widths[0] == widths[1]
