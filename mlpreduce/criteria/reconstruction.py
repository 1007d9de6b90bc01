"""`reconstruction`: the units without which fc2, refitted, can still give nearly what it gave.

Source: the optimal brain surgeon (Hassibi and Stork, 1993), for hidden units of transformers as in ZipLM (arXiv 2302.04089) and
SlimGPT (arXiv 2412.18110): backward elimination with exact updates, see `mlpreduce.criteria.elimination`.
"""

from __future__ import annotations

import math

import torch

from mlpreduce.criteria import Moments, Ranking, register_criterion
from mlpreduce.criteria.elimination import eliminate, refit_errors, swapped
from mlpreduce.errors import ReductionError, check_number, check_one_of, check_whole
from mlpreduce.words.values import Config

METRICS = ("output", "loss")
_SILENT = 1e-10  # of the mean square of all units, below which a unit does nothing
_RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # of the mean square of a unit


def _at_the_loss(options: Config) -> bool:
    return bool(options["metric"] == "loss")


@register_criterion("reconstruction", needs="pairs", with_loss=_at_the_loss)
def reconstruction(
    seen: Moments,
    *,
    metric: str = "output",
    ridge: float | None = None,
    swaps: int = 0,
    memory: float | None = None,
) -> Ranking:
    """Units in the order in which they are missed, when all others make up for them as well as they can.

    The scores of the units that go add up to the squared error of what the MLP gives at a position, after a refit of fc2 and
    its bias; with `metric="loss"` they are weighed by how much the loss hangs on each output, and compare between MLPs. Each
    position counts by it too: halfway between 1 and its share of the squared gradient of the loss in its example.

    Args:
        seen: the moments.
        metric: `output`, which needs images only, or `loss`.
        ridge: added to the mean squares of the units, as a part of their mean: the larger, the less is made of how units
            correlate on few data. By default the one with which half of the units, on half of the examples, come nearest to
            what the MLP gives on the other half.
        swaps: how often at most, at the width that is kept, a unit is exchanged for one that went, each time the pair that
            lowers the error most. Choices of several widths are then no longer parts of each other. As in OSSCAR (arXiv
            2403.12983).
        memory: MiB that the second moments of MLPs may take at a time, by default half of what is free. Where those of all do
            not fit, the model runs on the data several times, for some of the MLPs each; what comes out is the same. Swaps
            keep them all.

    Raises:
        ReductionError: fewer positions than units and a ridge of 0.
    """
    check_one_of("criterion reconstruction: metric", metric, METRICS)
    if ridge is not None:
        check_number("criterion reconstruction: ridge", ridge)
    check_whole("criterion reconstruction: swaps", swaps, least=0)
    square = seen.products(centred=seen.folded)
    scale = float(square.diagonal().mean())
    if not scale:  # no unit ever does anything
        return Ranking(torch.arange(len(square)), square.new_zeros(len(square)))
    # the ridge would count how a weight changes that nothing passes through
    weight = seen.weight * (square.diagonal() > _SILENT * scale)
    if metric == "loss":
        if seen.wanted is None:
            raise ReductionError("criterion reconstruction: no gradients were measured")
        weight = _root(seen.wanted) @ weight
    share = _chosen(seen, weight) if ridge is None else ridge
    count, least = round(float(seen.rows.sum())), len(square) + seen.folded
    if not share and count < least:
        raise ReductionError(
            f"criterion reconstruction(ridge={ridge}): {count:,} positions of the data are too few for {len(square):,} hidden "
            f"units of {seen.units.mlp.name}: at least {least:,} are needed, {math.ceil(least / count)} times as many; give "
            f"more examples, or leave out ridge"
        )
    groups = seen.units.mlp.groups
    found = eliminate(weight, square, share * scale, groups=groups)

    def exchanged(kept: list[int]) -> list[int]:
        return swapped(weight, square, share * scale, kept, swaps, groups=groups)[0]

    return Ranking(found.order, found.scores, exchanged if swaps else None)


def _root(wanted: torch.Tensor) -> torch.Tensor:
    """R with R^T R = G."""
    values, vectors = torch.linalg.eigh(wanted)
    root: torch.Tensor = values.clamp(min=0).sqrt()[:, None] * vectors.T
    return root


def _chosen(seen: Moments, weight: torch.Tensor) -> float:
    """The ridge with which the half of the units of most energy does best on examples that it was not fitted on."""
    if not seen.rows.all():
        return 1e-2
    energy = seen.mean_square(centred=seen.folded) * weight.square().sum(0)
    kept = energy.argsort(descending=True, stable=True)[: max(len(energy) // 2, 1)]
    halves = [seen.products(centred=seen.folded, half=half) for half in range(2)]
    every = [
        refit_errors(weight, here, [share * float(here.diagonal().mean()) for share in _RIDGES], kept, there)
        for here, there in (halves, halves[::-1])
    ]
    errors = [sum(both) for both in zip(*every, strict=True)]
    return _RIDGES[errors.index(min(errors))]
