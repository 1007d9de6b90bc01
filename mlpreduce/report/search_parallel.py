"""The figure of all trials of a search: what was sampled, and what came of it, as parallel coordinates."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from math import log10
from typing import TYPE_CHECKING, Any

from mlpreduce.records import Objective, StudyDocument, StudyPoint
from mlpreduce.report import search_points as points
from mlpreduce.report.plotting import plain
from mlpreduce.words.markup import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_parallel"]

_MOST = 14  # parameters shown
_MISSING = object()
_NOT_SET = -0.14  # height of what a trial has not, below an axis that goes from 0 to 1
_FEW = 6  # numbers that each have a tick
_LOG = 30  # largest over smallest, from which on an axis is logarithmic


@dataclass(frozen=True)
class _Scale:
    """One upright axis: where each trial stands on it, and its ticks."""

    title: str
    heights: list[float]
    ticks: list[tuple[float, str]]


def draw_parallel(document: StudyDocument) -> tuple[Figure, str] | None:
    """Draw each trial as a line through what was sampled and its objectives, coloured by the first objective.

    A parameter of one value only has no axis. A pruned trial is pale and ends before the objectives.

    Returns:
        The figure and its caption; None for fewer than two complete trials, or fewer than two parameters that vary.
    """
    first = document.objectives[0]
    complete = [p for p in points.trials(document) if p.state == "complete"]
    complete = [p for p in complete if points.value_of(p, first.name) is not None]
    complete = points.ranked(complete, first)[::-1]  # the best is drawn last, on top
    pruned = [p for p in points.trials(document) if p.state == "pruned"]
    names = _varying([*pruned, *complete])
    if len(complete) < 2 or len(names) < 2:
        return None
    importance = document.importance.get(first.name, {})
    shown = set(sorted(names, key=lambda name: -importance.get(name, 0.0))[:_MOST])
    scales = [
        _scale(name, [p.params.get(name, _MISSING) for p in (*pruned, *complete)]) for name in names if name in shown
    ]
    parameters = len(scales)
    for objective in document.objectives:
        values = [points.value_of(p, objective.name) for p in complete]
        found = _scale(points.objective_label(objective), [_MISSING if v is None else v for v in values])
        scales.append(_Scale(found.title, [_NOT_SET] * len(pruned) + found.heights, found.ticks))
    figure = _draw(scales, pruned, complete, parameters, first)
    cut = f"; the {_MOST} most important of {len(names)} parameters" if len(names) > _MOST else ""
    marked = [
        *(["the front is thick"] if any(p.front for p in complete) else []),
        *(["dashed lines are over a budget"] if not all(p.feasible for p in complete) else []),
        *(["pruned trials are pale and end before the objectives"] if pruned else []),
    ]
    text = [f"Each line a complete trial, coloured by {points.objective_label(first)}{cut}", *marked]
    return figure, "; ".join(text)


def _varying(found: Sequence[StudyPoint]) -> list[str]:
    """Parameters with two values or more, in the order in which they appear; not to be set is a value."""
    names = dict.fromkeys(name for point in found for name in point.params)
    return [name for name in names if len({repr(point.params.get(name, _MISSING)) for point in found}) > 1]


def _scale(title: str, values: Sequence[Any]) -> _Scale:
    """Numbers by their size, anything else evenly, in order of its text."""
    known = [value for value in values if value is not _MISSING]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in known):
        low, high = min(known, default=0.0), max(known, default=1.0)
        logarithmic = low > 0 and high / low >= _LOG
        size = log10 if logarithmic else float
        span = size(high) - size(low)
        marks = sorted(set(known)) if len(set(known)) <= _FEW else _marks(low, high, logarithmic)
        places = {value: (size(value) - size(low)) / span if span else 0.5 for value in (*known, *marks)}
        ticks = [(places[mark], points.compact(mark)) for mark in marks]
    else:
        texts = sorted({str(value) for value in known})
        even = {text: (number + 0.5) / len(texts) for number, text in enumerate(texts)}
        places = {repr(value): even[str(value)] for value in known}
        values = [value if value is _MISSING else repr(value) for value in values]
        ticks = [(even[text], shortened(text, 16)) for text in texts]
    heights = [_NOT_SET if value is _MISSING else places[value] for value in values]
    if _MISSING in values:
        ticks = [(_NOT_SET, "not set"), *ticks]
    return _Scale(title, heights, _apart(ticks))


def _marks(low: float, high: float, logarithmic: bool) -> list[float]:
    from matplotlib.ticker import LogLocator, MaxNLocator

    found = (LogLocator(subs=(1, 2, 5)) if logarithmic else MaxNLocator(5, steps=[1, 2, 2.5, 5, 10])).tick_values(
        low, high
    )
    return [float(mark) for mark in found if low <= mark <= high]


def _apart(ticks: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Ticks from the bottom up, without those that would stand on the one below."""
    kept: list[tuple[float, str]] = []
    for tick in ticks:
        if not kept or tick[0] - kept[-1][0] >= 0.05:
            kept.append(tick)
    return kept


def _draw(
    scales: Sequence[_Scale],
    pruned: Sequence[StudyPoint],
    complete: Sequence[StudyPoint],
    parameters: int,
    first: Objective,
) -> Figure:
    """Lines through the upright axes, those of pruned trials through the first `parameters` only."""
    from matplotlib.collections import LineCollection

    from mlpreduce.report.canvas import blank

    figure = blank(max(7.0, 1.3 * len(scales) + 1.5), 5)
    axis = figure.subplots()
    lines = [list(enumerate(heights)) for heights in zip(*(scale.heights for scale in scales), strict=True)]
    pale = [line[:parameters] for line in lines[: len(pruned)]]
    axis.add_collection(LineCollection(pale, colors="#bbbbbb", linewidths=0.8, alpha=0.5))
    coloured = LineCollection(lines[len(pruned) :], cmap="viridis", alpha=0.85)
    coloured.set_array([points.value_of(point, first.name) or 0.0 for point in complete])
    coloured.set_linewidth([2.4 if point.front else 1.1 for point in complete])
    coloured.set_linestyle(["-" if point.feasible else "--" for point in complete])
    axis.add_collection(coloured)
    for place, scale in enumerate(scales):
        _draw_scale(axis, place, scale)
    axis.set_xlim(-0.6, len(scales) - 0.7)
    axis.set_ylim(min(-0.05, *(height for scale in scales for height in scale.heights)) - 0.03, 1.03)
    axis.set_xticks(range(len(scales)), [plain(textwrap.fill(scale.title, 16)) for scale in scales], fontsize=9)
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.yaxis.set_visible(False)
    axis.spines[:].set_visible(False)
    bar = figure.colorbar(coloured, ax=axis, pad=0.02, aspect=30)
    bar.set_label(plain(points.objective_label(first)))
    return figure


def _draw_scale(axis: Axes, place: int, scale: _Scale) -> None:
    """An upright line from 0 to 1, its ticks to the left."""
    axis.plot([place, place], [0, 1], color="#333333", lw=1, zorder=3)
    for height, text in scale.ticks:
        axis.plot([place - 0.025, place], [height, height], color="#333333", lw=1, zorder=3)
        axis.annotate(
            plain(text),
            (place, height),
            (-5, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=8,
            zorder=4,
            bbox={"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.75},
        )
