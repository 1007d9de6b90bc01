"""What a repair makes of positions: those on which the outputs hang count more, none is forgotten."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import mlpreduce
from mlpreduce.calibration import Batch, quiet_copy
from mlpreduce.graph import MLP, find_mlps
from mlpreduce.repair.whole import Whole
from mlpreduce.testing import tiny_vit


def images(count: int = 24) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def weights(model: nn.Module, mlps: list[MLP], batches: list[Batch]) -> list[list[torch.Tensor]] | None:
    """Of all positions, by MLP and batch."""
    whole, tree = Whole(mlps), quiet_copy(model)
    with torch.no_grad():
        for batch in batches:
            with whole.over(tree, batch):
                batch.run(tree)
    names = [mlp.name for mlp in mlps]
    picks = [(number, torch.ones(len(batch), dtype=torch.bool)) for number, batch in enumerate(batches)]
    found = whole.weights(names, picks, batches)
    return None if found is None else [found[name] for name in names]


def test_after_the_last_block_only_the_class_token_counts() -> None:
    batches = [Batch(images()[:16]), Batch(images()[16:])]
    model = tiny_vit().eval()
    found = weights(model, find_mlps(model), batches)
    assert found is not None
    for some in found:
        every = torch.cat(some)
        assert every.shape == (24, 17)
        assert float(every.mean()) == pytest.approx(1)
        assert float(every.min()) >= 0.5
    last = torch.cat(found[-1])
    assert torch.equal(last[:, 1:], torch.full((24, 16), 0.5, dtype=torch.float64))
    assert float(last[:, 0].mean()) == pytest.approx(0.5 + 0.5 * 17)
    assert torch.cat(found[0])[:, 1:].gt(0.5).all()


def test_calls_of_a_tied_layer_have_weights_of_their_own() -> None:
    model = mlpreduce.apply(tiny_vit().eval(), "grouped", group=4)
    found = weights(model, find_mlps(model), [Batch(images())])
    assert found is not None
    assert torch.equal(found[3][0][:, 1:], torch.full((24, 16), 0.5, dtype=torch.float64))  # the last call
    assert found[0][0][:, 1:].gt(0.5).all()


def test_without_a_derivative_all_count_alike() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = tiny_vit()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                found: torch.Tensor = self.vit(x)
            return found

    model = Frozen().eval()
    assert weights(model, find_mlps(model, images(1)), [Batch(images())]) is None
    config: dict[str, Any] = {"ratio": 0.5, "data": [images()], "repair": "least_squares", "guard": False}
    made = mlpreduce.plan(model, "shallow", example_inputs=images(1), **config)
    assert made.data is not None
    assert made.data["cosine"][0] >= made.data["cosine_before"][0] - 0.01
    assert any("gives no gradient, so all positions count alike" in note for note in made.notes)


def test_a_forward_through_numpy_is_repaired_as_before() -> None:
    class Numpy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = tiny_vit()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(self.vit(x).cpu().numpy()) if not x.is_meta else self.vit(x)  # type: ignore[no-any-return]

    model = Numpy().eval()
    config: dict[str, Any] = {"ratio": 0.5, "data": [images()], "repair": "least_squares", "guard": False}
    made = mlpreduce.plan(model, "shallow", example_inputs=images(1), **config)
    assert any("all positions count alike" in note for note in made.notes)
    plain = mlpreduce.plan(tiny_vit().eval(), "shallow", **config)
    assert not any("all positions count alike" in note for note in plain.notes)


def test_outputs_that_hang_on_no_mlp_leave_all_alike() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = tiny_vit()
            self.free = nn.Parameter(torch.ones(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.vit(x)
            return x.mean((1, 2, 3))[:, None] * self.free.detach() + self.vit.blocks[0].mlp.fc2.weight.sum() * 0

    model = Constant().eval()
    found = weights(model, find_mlps(model, images(1)), [Batch(images().requires_grad_())])
    assert found is not None
    assert all(torch.equal(some[0], torch.ones_like(some[0])) for some in found)
