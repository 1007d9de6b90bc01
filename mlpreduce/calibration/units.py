"""Moments of hidden units on calibration data: of each, of all pairs, and of what the loss wants of the MLP's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mlpreduce.calibration.batches import Batch
from mlpreduce.calibration.measure import Loss, Measured, objective_of, telling
from mlpreduce.calibration.memory import allowed
from mlpreduce.calibration.probing import Probe, probing
from mlpreduce.calibration.quiet import quiet_copy, running
from mlpreduce.calibration.samples import Samples, together
from mlpreduce.calibration.sums import UnitSums, add_calls, empty_sums, halfway, shared, take_back
from mlpreduce.calibration.taps import Taps
from mlpreduce.calibration.watching import Watcher
from mlpreduce.criteria import Choice
from mlpreduce.errors import ReductionError
from mlpreduce.graph import MLP, module_at, projection

__all__ = ["measure_units"]


def measure_units(
    model: nn.Module,
    mlps: Sequence[MLP],
    data: Any,
    choice: Choice,
    loss: Loss | None = None,
    what: str = "",
    first: str = "",
    watcher: Watcher | None = None,
) -> tuple[dict[str, UnitSums], Measured]:
    """Moments of the hidden units of each unique MLP in one pass over the data, or of as many of them as fit into memory.

    Args:
        model: the model; it is not changed.
        mlps: its MLPs, all uses of each.
        data: an iterable of batches of images, or of (images, labels) where the criterion needs a loss.
        choice: the criterion that asks, which says whether it looks at pairs and at a loss.
        loss: as of `measure_scores`.
        what: is done, as shown while it takes long; by default the criterion.
        first: the owner to begin with, where moments of pairs do not all fit; by default the first of all.
        watcher: looks on.

    Returns:
        Sums by owner, of those from the first on that fit together; and which data was read, without scores.

    Raises:
        ReductionError: as `measure_scores`.
    """
    watcher = watcher or Watcher()
    pairs, slopes = choice.criterion.needs == "pairs", choice.needs_loss
    samples = Samples(data, model, labels=slopes)
    problem: Exception | None = None
    with running(samples.device, gradients=slopes), samples.shown(what or f"criterion {choice.criterion.name}"):
        tree = quiet_copy(model)
        most = min(together(allowed(samples.device, choice.memory)))
        sums = empty_sums(_from(mlps, first), tree, pairs=pairs, slopes=slopes, most=most)
        taps = Taps(tree, [mlp for mlp in mlps if mlp.owner in sums], ("fc2",))
        owners = [mlp for mlp in mlps if mlp.name in sums]
        # fc2 itself and not a layer around it, of which each use has its own
        paths = [mlp.leaf("fc2").path for mlp in owners] if slopes else []
        if not sums:
            raise ReductionError("no MLP has a linear layer or a 1 x 1 convolution for fc2; use a criterion of weights")
        try:
            for number, (batch, labels) in enumerate(samples.chunks()):
                with telling(batch):
                    if number == 0:
                        taps.check_examples(tree, batch)
                    with (
                        watcher.over(tree, batch),
                        taps.recording(len(batch)) as kept,
                        probing(tree, paths) as probes,
                    ):
                        if slopes:
                            total = objective_of(choice, tree, batch, labels, loss)() * len(batch)
                        else:
                            batch.run(tree)
                weights = _add_slopes(sums, tree, owners, probes, total, batch) if slopes else None
                add_calls(sums, kept, samples.rank, batch.mask, weights)
        except Exception as error:  # whatever the data raises, or the model: the other processes are told
            problem = error
        every = samples.finish(shared(sums), problem)
    watcher.end(samples)
    take_back(sums, every, samples.count)
    return sums, Measured({}, samples.count, samples.fingerprint)


def _from(mlps: Sequence[MLP], first: str) -> list[MLP]:
    """All uses of the owner called `first` and of those after it."""
    owners = list(dict.fromkeys(mlp.owner for mlp in mlps))
    left = owners[owners.index(first) :] if first else owners
    return [mlp for mlp in mlps if mlp.owner in left]


def _add_slopes(
    sums: dict[str, UnitSums],
    tree: nn.Module,
    mlps: Sequence[MLP],
    probes: Sequence[Probe],
    total: torch.Tensor,
    batch: Batch,
) -> dict[str, list[torch.Tensor]]:
    """Add gradients by what each MLP gives; weights of its positions by them, (examples, positions), by owner and call."""
    slopes = torch.autograd.grad(total, [probe for *_, probe in probes], materialize_grads=True)
    owners = {mlp.leaf("fc2").path: mlp.owner for mlp in mlps}
    squares: dict[str, list[torch.Tensor]] = {}
    for (path, _, _), slope in zip(probes, slopes, strict=True):
        layer = projection(module_at(tree, path))
        if layer is not None:
            rows = slope.movedim(layer.features, -1)
            sums[owners[path]].add_slopes(rows.flatten(0, -2))
            square = rows.double().square().sum(-1).reshape(len(batch), -1)
            squares.setdefault(owners[path], []).append(square)
    return {owner: _weights(some, batch.mask) for owner, some in squares.items()}


def _weights(squares: Sequence[torch.Tensor], mask: torch.Tensor | None) -> list[torch.Tensor]:
    """Weights of positions, (examples, positions) for each call, by squared gradients there; 1 on average in each example.

    Examples count alike: of a model that is trained, few have a large gradient, and what is fitted must serve all.
    """
    every = torch.cat(list(squares), 1)
    live = torch.cat([torch.ones_like(one) if mask is None or mask.shape != one.shape else mask for one in squares], 1)
    mean = (every * live).sum(1, keepdim=True) / live.sum(1, keepdim=True).clamp(min=1)
    return [halfway(one, mean) for one in squares]
