"""What the document of a search says of its points: the same answers for tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite, sqrt
from statistics import fmean, stdev

from mlpreduce.budget import COSTS
from mlpreduce.errors import call_text
from mlpreduce.records import Objective, StudyDocument, StudyPoint
from mlpreduce.report.tables import short

__all__ = [
    "Spread",
    "candidates",
    "compact",
    "front",
    "measured",
    "number_text",
    "objective_label",
    "ranked",
    "reduction",
    "references",
    "spread",
    "trials",
    "value_of",
]

_WORDS = {**COSTS, "top1": "top-1"}


@dataclass(frozen=True)
class Spread:
    """Runs of one point that differ in their seeds: mean, standard deviation (ddof=1), 95 % confidence interval, number."""

    mean: float
    std: float | None
    low: float | None
    high: float | None
    n: int


def spread(values: Sequence[float]) -> Spread:
    """Mean, deviation, and the interval of the mean by Student's t with n - 1 degrees of freedom.

    The deviation is None for one value; the interval is None for one value, and where all are equal.

    Example:
        >>> found = spread([97.0, 98.0, 99.0])
        >>> found.mean, found.std, round(found.low, 3), round(found.high, 3)
        (98.0, 1.0, 95.516, 100.484)
    """
    mean, n = fmean(values), len(values)
    if n < 2:
        return Spread(mean, None, None, None, n)
    std = stdev(values)
    if max(values) - min(values) <= 1e-9:
        return Spread(mean, std, None, None, n)
    from scipy.stats import t

    half = float(t.ppf(0.975, n - 1)) * std / sqrt(n)
    return Spread(mean, std, mean - half, mean + half, n)


def trials(document: StudyDocument) -> list[StudyPoint]:
    """The points that the sampler chose, in order of their numbers."""
    return sorted((p for p in document.points if p.kind == "trial"), key=lambda p: p.number or 0)


def references(document: StudyDocument) -> list[StudyPoint]:
    """Baseline and the paper's points, as the document orders them."""
    return [p for p in document.points if p.kind == "reference"]


def front(document: StudyDocument) -> list[StudyPoint]:
    """The points of the Pareto front, best first in the first objective."""
    return ranked([p for p in document.points if p.front], document.objectives[0])


def candidates(document: StudyDocument) -> list[StudyPoint]:
    """Trials that may be on the front: complete, and within the budgets."""
    return [p for p in trials(document) if p.state == "complete" and p.feasible]


def ranked(points: Sequence[StudyPoint], objective: Objective) -> list[StudyPoint]:
    """Points, best first in an objective; those without a value come last."""
    sign = -1 if objective.direction == "maximize" else 1

    def place(point: StudyPoint) -> float:
        value = value_of(point, objective.name)
        return inf if value is None else sign * value

    return sorted(points, key=place)


def value_of(point: StudyPoint, name: str) -> float | None:
    """An objective or a cost of a point; None where there is none, or no finite one."""
    found = point.values.get(name)
    if found is None and name in COSTS:
        found = point.cost.get(name)
    return None if found is None or not isfinite(found) else found


def measured(point: StudyPoint, name: str) -> list[float]:
    """One number for each run that measured it: top1, final_top1, latency."""
    values = (run.value(name) for run in point.runs)
    return [value for value in values if value is not None and isfinite(value)]


def reduction(point: StudyPoint) -> str:
    """What a point is, as calls, and the settings that it changes.

    Example:
        >>> steps = ({"transform": "grouped", "group": 2},)
        >>> reduction(StudyPoint(name="a", kind="trial", cost={}, steps=steps, settings={"train.lr": 0.001}))
        'grouped(group=2); train.lr=0.001'
    """
    steps = [call_text(s["transform"], {k: v for k, v in s.items() if k != "transform"}) for s in point.steps]
    settings = [f"{key}={value}" for key, value in point.settings.items()]
    return "; ".join(filter(None, [", ".join(steps) or "as it is", ", ".join(settings)]))


def objective_label(objective: Objective) -> str:
    """Name and unit of an objective.

    Example:
        >>> objective_label(Objective(name="top1", unit="%")), objective_label(Objective(name="latency", unit="ms"))
        ('top-1 %', 'latency, ms')
    """
    word, unit = _WORDS.get(objective.name, objective.name), objective.unit
    return f"{word} %" if unit == "%" else f"{word}, {unit}" if unit else word


def number_text(name: str, value: float | None) -> str:
    """A value in a table: counts of parameters exactly, MACs with a letter, what is measured with two decimals or more."""
    if value is None:
        return ""
    if name.startswith("macs"):
        return short(value)
    if name in COSTS:
        return f"{value:,.0f}"
    if name == "score":
        return f"{value:.4f}"
    return f"{value:.2f}" if abs(value) >= 10 or name == "top1" else f"{value:.4g}"


def compact(value: float) -> str:
    """A value at a tick: four digits, and a letter for thousands and more.

    Example:
        >>> compact(136_138), compact(0.5), compact(86_567_656)
        ('136.1 k', '0.5', '86.57 M')
    """
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= max(size, 1e4):
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"
