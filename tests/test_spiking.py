"""MLPs of spiking transformers, as in SpiLiFormer and Spikformer: 1 x 1 convolutions, BatchNorms and neurons with a memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import mlpreduce
from mlpreduce import ReductionError
from mlpreduce.coverage.proofs import sliced_against_masked, tied_is_copied
from mlpreduce.graph.rules import keeps_units_apart

STEPS = 4


class Spike(torch.autograd.Function):
    """1 above 0, with the derivative of a smooth step."""

    @staticmethod
    def forward(ctx: Any, potential: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(potential)
        return (potential >= 0).to(potential.dtype)

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        (potential,) = ctx.saved_tensors
        return slope / (1 + (4 * potential) ** 2)


class Neuron(nn.Module):
    """Leaky integrate-and-fire over time steps, which are the first dimension: it leaks by half, and fires and resets at 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        potential, spikes = torch.zeros_like(x[0]), []
        for step in x:
            potential = potential / 2 + step
            spike = Spike.apply(potential - 1)
            potential = potential * (1 - spike)
            spikes.append(spike)
        return torch.stack(spikes)


class SpikingMLP(nn.Module):
    """With a neuron after each convolution, or before it, so that what is added to the stream is no spike."""

    def __init__(self, dim: int, hidden: int, before: bool) -> None:
        super().__init__()
        self.before = before
        self.conv1, self.norm1, self.neuron1 = nn.Conv2d(dim, hidden, 1), nn.BatchNorm2d(hidden), Neuron()
        self.conv2, self.norm2, self.neuron2 = nn.Conv2d(hidden, dim, 1), nn.BatchNorm2d(dim), Neuron()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = x.shape[:2]
        x = self.neuron1(x) if self.before else x
        x = self.norm1(self.conv1(x.flatten(0, 1))).unflatten(0, shape)
        x = self.neuron2(x) if self.before else self.neuron1(x)
        x = self.norm2(self.conv2(x.flatten(0, 1))).unflatten(0, shape)
        return x if self.before else self.neuron2(x)


class SpikingBlock(nn.Module):
    def __init__(self, dim: int, hidden: int, before: bool) -> None:
        super().__init__()
        self.mix, self.mlp = nn.Conv2d(dim, dim, 3, padding=1), SpikingMLP(dim, hidden, before)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mix(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return x + self.mlp(x)


class SpikingNet(nn.Module):
    def __init__(self, before: bool) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.Sequential(*(SpikingBlock(8, 16, before) for _ in range(4)))
        self.head = nn.Linear(8, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.embed(images).expand(STEPS, -1, -1, -1, -1)
        return self.head(self.blocks(x).mean((0, 3, 4)))


def spiking(before: bool) -> nn.Module:
    """A model whose neurons fire, with statistics in its norms."""
    torch.manual_seed(0)
    model = SpikingNet(before)
    with torch.no_grad():
        for _ in range(20):
            model(2 * torch.randn(8, 3, 16, 16))
        for block in model.blocks:
            block.mlp.norm1.bias += 0.7
            block.mlp.norm2.bias += 0.7
    return model.eval()


IMAGES = 2 * torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("before", [False, True])
def test_spiking_mlps_are_found_tied_and_sliced(before: bool) -> None:
    model = spiking(before)
    found = mlpreduce.find_mlps(model, IMAGES)
    assert [mlp.name for mlp in found] == [f"blocks.{number}.mlp" for number in range(4)]
    assert {mlp.kind for mlp in found} == {"plain+norm"}
    gap, effect = sliced_against_masked(model, IMAGES)
    assert gap < 1e-5 < effect
    assert tied_is_copied(model, IMAGES)
    reduced = copy.deepcopy(model)
    mlpreduce.apply(reduced, "grouped", example_inputs=IMAGES)
    mlpreduce.apply(reduced, "shallow", ratio=0.25, criterion="l2", example_inputs=IMAGES)
    first, second = reduced.blocks[0].mlp, reduced.blocks[1].mlp
    assert first.conv1 is second.conv1
    assert first.norm1 is not second.norm1  # its statistics are of one depth
    for mlp in (first, second):
        assert mlp.conv1.weight.shape[0] == mlp.norm1.running_mean.numel() == mlp.conv2.weight.shape[1] == 4
    reduced.train()(IMAGES).sum().backward()
    assert all(parameter.grad is not None for parameter in reduced.parameters())


def test_criteria_of_data_tell_that_time_steps_come_first() -> None:
    data = [(IMAGES, torch.arange(4))]
    with pytest.raises(ReductionError, match="does not have the examples one after the other"):
        mlpreduce.plan(spiking(True), "shallow", criterion="taylor", data=data, example_inputs=IMAGES)


def test_what_mixes_units_or_tells_them_apart_is_no_neuron() -> None:
    class MixesUnits(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - x.mean(2, keepdim=True)

    class TellsUnitsApart(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.arange(x.shape[2]).reshape(-1, 1, 1)

    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("not on such a tensor")

    shape = (STEPS, 2, 16, 4, 4)
    state = torch.random.get_rng_state()
    assert keeps_units_apart(Neuron(), shape, 2)
    assert not keeps_units_apart(Neuron(), shape, 0)  # time steps do not stand alone
    assert not any(keeps_units_apart(module, shape, 2) for module in (MixesUnits(), TellsUnitsApart(), Odd()))
    assert not keeps_units_apart(Neuron(), None, 2)
    assert torch.equal(state, torch.random.get_rng_state())
