"""What reduces a model while it trains, under DDP: two processes with half of the images each do what one does with all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.two_processes import Together
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mlpreduce
from mlpreduce.during import GateL1, LotteryTicket, PruneAndGrow, reduce_in_training
from mlpreduce.testing import tiny_vit
from mlpreduce.train import create_ema

Batch = tuple[torch.Tensor, torch.Tensor]


def tied() -> nn.Module:
    return mlpreduce.apply(tiny_vit().double(), "grouped", group=2, scale="none")


def update(wrapped: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, *after: Callable[[], object]) -> None:
    nn.functional.cross_entropy(wrapped(batch[0]), batch[1]).backward()
    for action in after[:-1]:
        action()
    optimizer.step()
    for action in after[-1:]:
        action()
    optimizer.zero_grad()


def masks(wrap: Callable[[nn.Module], nn.Module], batch: Batch) -> nn.Module:
    model = tied()
    moving = PruneAndGrow(model, density=0.5, interval=2, total_updates=8)
    wrapped, optimizer = wrap(model), torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(6):
        update(wrapped, optimizer, batch, moving.step)
    return moving.finalize()


def gates(wrap: Callable[[nn.Module], nn.Module], batch: Batch) -> nn.Module:
    model = tied()
    gating = GateL1(model, coefficient=1e-2)
    wrapped, optimizer = wrap(model), torch.optim.SGD(gating.parameter_groups(lr=0.1, weight_decay=0.05), momentum=0.9)
    for _ in range(3):
        update(wrapped, optimizer, batch, gating.after_backward, lambda: None)
    return gating.finalize(quantile=0.3, scope="global")


def tickets(wrap: Callable[[nn.Module], nn.Module], batch: Batch) -> nn.Module:
    model = tied()
    ticket = LotteryTicket(model, fraction=0.3, criterion="taylor", rewind="none")
    for _ in range(2):
        update(wrap(model), torch.optim.SGD(model.parameters(), lr=0.1), batch)
        ticket.next_round(data=[batch])
    return model


def carried(wrap: Callable[[nn.Module], nn.Module], batch: Batch) -> nn.Module:
    model = tied()
    optimizer, average = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), create_ema(model, 0.9)
    update(wrap(model), optimizer, batch)
    reduce_in_training(model, "shallow", optimizer, average, ratio=0.5, criterion="taylor", data=[batch])
    update(wrap(model), optimizer, batch)
    average.update(model)
    return nn.ModuleList([model, average.module])


WAYS = [masks, gates, tickets, carried]


def batch_of(rank: int = 0, world: int = 1) -> Batch:
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return images[rank::world], (torch.arange(8) % 5)[rank::world]


def _train(rank: int, folder: str) -> None:
    for way in WAYS:
        reduced = way(DistributedDataParallel, batch_of(rank, 2))
        torch.save(reduced.state_dict(), Path(folder) / f"{way.__name__}-{rank}.pt")


@pytest.fixture(scope="module")
def folder(together: Together, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("two")
    together(_train, str(path))
    return path


@pytest.mark.processes
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_do_what_one_does(way: Callable[..., nn.Module], folder: Path) -> None:
    one, other = (torch.load(folder / f"{way.__name__}-{rank}.pt", weights_only=True) for rank in range(2))
    alone = way(lambda model: model, batch_of()).state_dict()
    assert one.keys() == other.keys() == alone.keys()
    for name, tensor in alone.items():
        assert torch.equal(one[name], other[name])
        torch.testing.assert_close(one[name], tensor, rtol=1e-9, atol=1e-12)
