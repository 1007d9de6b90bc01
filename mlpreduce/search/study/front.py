"""Points compared by several objectives: dominance, the Pareto front, hypervolume; and which need further seeds to tell."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from statistics import fmean, variance
from typing import TypeVar

from mlpreduce.search.spaces.goals import OBJECTIVES

__all__ = ["dominates", "front", "hypervolume", "losses", "next_runs", "pooled_deviation"]

Name = TypeVar("Name", bound=Hashable)


def losses(values: Mapping[str, float], objectives: Sequence[str]) -> tuple[float, ...]:
    """The values of objectives, each so that less is better."""
    return tuple(-values[name] if OBJECTIVES[name][0] == "maximize" else values[name] for name in objectives)


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether losses are nowhere larger than others and somewhere smaller.

    Example:
        >>> dominates((1, 2), (1, 3)), dominates((1, 2), (1, 2)), dominates((0, 3), (1, 2))
        (True, False, False)
    """
    return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)


def front(points: Mapping[Name, Sequence[float]]) -> list[Name]:
    """The points that no other dominates, from losses by name."""
    return [name for name, found in points.items() if not any(dominates(other, found) for other in points.values())]


def hypervolume(points: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    """The volume between points and a reference: what at least one point dominates and the reference does not.

    Args:
        points: losses; those that are not below the reference in all objectives add nothing.
        reference: the losses of a point that is worse than all of interest.

    Example:
        >>> hypervolume([(1, 3), (2, 2), (3, 3)], reference=(4, 4))
        5.0
    """
    inside = sorted({tuple(map(float, p)) for p in points if all(a < b for a, b in zip(p, reference, strict=True))})
    if not inside:
        return 0.0
    if len(reference) == 1:
        return reference[0] - inside[0][0]
    # slabs along the first objective: within one, what matters is which points have begun
    ends = [point[0] for point in inside[1:]] + [float(reference[0])]
    volume = 0.0
    for number, (point, end) in enumerate(zip(inside, ends, strict=True), 1):
        if end > point[0]:
            volume += (end - point[0]) * hypervolume([p[1:] for p in inside[:number]], reference[1:])
    return volume


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
