"""Which points are trained with further seeds: those of the front, and those that chance may have kept from it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean, variance

from mlpreduce.search.front import front

__all__ = ["next_runs", "pooled_deviation"]


def pooled_deviation(runs: Mapping[str, Sequence[float]]) -> float:
    """The standard deviation over seeds, from all points with at least two; 0 where there is none.

    Example:
        >>> pooled_deviation({"a": [90.0, 92.0], "b": [80.0, 80.0], "c": [50.0]})
        1.0
    """
    several = [values for values in runs.values() if len(values) > 1]
    freedom = sum(len(values) - 1 for values in several)
    return math.sqrt(sum((len(v) - 1) * variance(v) for v in several) / freedom) if freedom else 0.0


def next_runs(
    top1: Mapping[str, Mapping[int, float]],
    costs: Mapping[str, Sequence[float]],
    seeds: Sequence[int],
    deviation: float,
    failed: Collection[tuple[str, int]] = (),
) -> list[tuple[str, int]]:
    """The runs that tell most about the front: one more seed for each point that may belong to it.

    A point may belong to it if it would with its mean top-1 raised by one standard error of the difference to another.

    Args:
        top1: percent, by seed, of each point.
        costs: the other objectives of each point, less is better.
        seeds: which seeds a point of the front is trained with, in order.
        deviation: standard deviation over seeds.
        failed: keys and seeds that are not tried again.

    Returns:
        Keys and seeds; empty when all points that may belong to the front have all seeds.
    """
    means = {key: fmean(values.values()) for key, values in top1.items()}
    chosen = []
    for key, values in top1.items():
        margin = deviation * math.sqrt(1 / len(values) + 1 / max(map(len, top1.values())))
        raised = {name: (-(mean + margin * (name == key)), *costs[name]) for name, mean in means.items()}
        missing = [seed for seed in seeds if seed not in values and (key, seed) not in failed]
        if missing and key in front(raised):
            chosen.append((key, missing[0]))
    fewest = min((len(top1[key]) for key, _ in chosen), default=0)
    return [(key, seed) for key, seed in chosen if len(top1[key]) == fewest]
