"""Points compared by several objectives: dominance, the Pareto front, hypervolume."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from mlpreduce.search.goals import OBJECTIVES

__all__ = ["dominates", "front", "hypervolume", "losses"]

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
