"""The figure of a search's front: its first objective against each of the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

from mlpreduce.budget import COSTS
from mlpreduce.records import Objective, StudyDocument, StudyPoint
from mlpreduce.report import search_points as points
from mlpreduce.report.plotting import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

__all__ = ["draw_front"]

_FRONT, _COMPLETE, _PALE, _REFERENCE, _BUDGET = "#c8501e", "#4c78a8", "#c4c4c4", "black", "#777777"
_MARKERS = "Ds^Pv"  # of references, by turns
_LEGEND = ("front", "complete", "complete, over a budget", "pruned")  # then the references and the budgets
# where a label may stand beside its marker, in points: the first free place is taken
_PLACES = [(x * far, y * far) for far in (6, 11) for x, y in ((1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0))]


@dataclass(frozen=True)
class _Spot:
    """A point in a panel, and from where to where its bar goes."""

    point: StudyPoint
    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class _Label:
    x: float
    y: float
    text: str
    needed: bool  # may cover something, rather than be left out


def draw_front(document: StudyDocument) -> tuple[Figure, str] | None:
    """Draw each point's first objective against the others, a panel each; with one objective, over the trials' numbers.

    Returns:
        The figure and its caption; None where no trial has a value.
    """
    first, *others = document.objectives
    if all(points.value_of(p, first.name) is None for p in points.trials(document)):
        return None
    from mlpreduce.report.canvas import blank

    panels = max(1, len(others))
    figure = blank(8.5 if panels == 1 else 4.9 * panels, 5.4)
    axes = figure.subplots(1, panels, squeeze=False, sharey=True)[0]
    beside: list[Objective | None] = [*others] or [None]
    labels = [_draw_panel(axis, document, other) for axis, other in zip(axes, beside, strict=True)]
    axes[0].set_ylabel(plain(points.objective_label(first)))
    entries = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    order = sorted(entries, key=lambda label: _LEGEND.index(label) if label in _LEGEND else len(_LEGEND))
    figure.legend(
        [entries[label] for label in order], order, loc="outside lower center", ncols=2 + panels, frameon=False
    )
    figure.draw_without_rendering()  # labels are placed where the layout has put the axes, which must stay there
    figure.set_layout_engine("none")
    for axis, wanted in zip(axes, labels, strict=True):
        _place(axis, wanted)
    return figure, _caption(document)


def _caption(document: StudyDocument) -> str:
    first, *others = document.objectives
    name = points.objective_label(first)
    name = name[:1].upper() + name[1:]
    text = [f"{name} against each other objective" if others else f"{name} in the order of the trials"]
    if points.front(document):
        stairs = "The line joins the points of the front that no other beats in the two objectives of a panel"
        text.append(
            f"{stairs if others else 'The line is the best value so far'}; numbers are trials, where there is room"
        )
    if any(len(points.measured(p, first.name)) > 1 for p in document.points if p.state == "complete"):
        text.append("Vertical bars: 95 % confidence interval of the mean for three runs or more, range for two")
    if any(p.state == "pruned" for p in points.trials(document)):
        text.append(
            "A pruned trial stands at its best value so far, as a triangle at the edge if that lies further out"
        )
    if any(p.state == "complete" and not p.feasible for p in document.points):
        text.append("Hollow: over a budget")
    return ". ".join(text)


def _draw_panel(axis: Axes, document: StudyDocument, other: Objective | None) -> list[_Label]:
    """Draw one panel, over the numbers of trials if there is no other objective, and return what is to be labelled."""
    first = document.objectives[0]
    references = list(_spots(points.references(document), first, other))
    trials = list(_spots(points.trials(document), first, other))
    complete = [spot for spot in trials if spot.point.state == "complete"]
    front = [spot for spot in (*trials, *references) if spot.point.front]
    rest = [spot for spot in complete if not spot.point.front]
    _draw_pruned(axis, [s for s in trials if s.point.state == "pruned"], [*complete, *references])
    _draw_points(axis, [s for s in rest if s.point.feasible], "complete", _COMPLETE)
    _draw_points(axis, [s for s in rest if not s.point.feasible], "complete, over a budget", _COMPLETE, hollow=True)
    _draw_line(axis, [s for s in complete if s.point.feasible] if other is None else front, first, other)
    for number, spot in enumerate(references):
        name, hollow = spot.point.name, not spot.point.feasible
        if other is None:
            axis.axhline(spot.y, color=_REFERENCE, lw=1, ls=":")
        else:
            _draw_points(axis, [spot], name, _REFERENCE, _MARKERS[number % len(_MARKERS)], hollow=hollow)
    _draw_points(axis, [spot for spot in front if spot.point.kind == "trial"], "front", _FRONT, size=7)
    _draw_budgets(axis, document, other)
    _dress(axis, other)
    names = [_Label(spot.x, spot.y, spot.point.name, True) for spot in references]
    return [*names, *(_Label(s.x, s.y, str(s.point.number), False) for s in front if s.point.kind == "trial")]


def _spots(found: Iterable[StudyPoint], first: Objective, other: Objective | None) -> Iterable[_Spot]:
    """Points with a value in both objectives; without another one, references stand at the left edge."""
    for point in found:
        x = (point.number or 0) if other is None else points.value_of(point, other.name)
        y = points.value_of(point, first.name)
        if x is not None and y is not None:
            yield _Spot(point, x, y, *(_bar(points.measured(point, first.name)) or (y, y)))


def _bar(runs: Sequence[float]) -> tuple[float, float] | None:
    """The interval of three runs or more, the range of two; None for one, or where all are equal."""
    found = points.spread(runs) if len(runs) > 1 else None
    if found is None or found.low is None or found.high is None:
        return None
    return (found.low, found.high) if found.n >= 3 else (min(runs), max(runs))


def _draw_points(
    axis: Axes,
    spots: Sequence[_Spot],
    label: str,
    colour: str,
    marker: str = "o",
    size: float = 5.5,
    hollow: bool = False,
) -> None:
    """Markers, with bars over the runs where a point has several."""
    if not spots:
        return
    sides = ([max(0.0, s.y - s.low) for s in spots], [max(0.0, s.high - s.y) for s in spots])
    axis.errorbar(
        [s.x for s in spots],
        [s.y for s in spots],
        sides if any(map(any, sides)) else None,
        fmt=marker,
        color=colour,
        ms=size,
        mfc="white" if hollow else colour,
        mec=colour if hollow else "white",
        mew=1 if hollow else 0.5,
        ecolor=colour,
        elinewidth=1,
        capsize=2,
        label=plain(label),
        zorder=4 if colour == _FRONT else 3,
    )


def _draw_pruned(axis: Axes, spots: Sequence[_Spot], others: Sequence[_Spot]) -> None:
    """Pale markers, not further out than half the range of the other points: some were stopped after the first epoch."""
    ends = [end for spot in others for end in (spot.low, spot.y, spot.high)]
    span = max(ends) - min(ends) if ends else 0.0
    low, high = (min(ends) - 0.5 * span, max(ends) + 0.5 * span) if span else (-inf, inf)
    kinds = {
        "o": [s for s in spots if low <= s.y <= high],
        "v": [s for s in spots if s.y < low],
        "^": [s for s in spots if s.y > high],
    }
    shown = next((found for found in kinds.values() if found), None)  # the one that the legend has
    for marker, found in kinds.items():
        if found:
            heights = [min(max(s.y, low), high) for s in found]
            axis.plot(
                [s.x for s in found],
                heights,
                marker,
                color=_PALE,
                ms=5,
                label="pruned" if found is shown else None,
                zorder=2,
            )


def _draw_line(axis: Axes, spots: Sequence[_Spot], first: Objective, other: Objective | None) -> None:
    """The best first objective so far: over the numbers of trials, or on the way from good to bad in the other one."""
    sign = 1 if first.direction == "maximize" else -1
    way = -1 if other is not None and other.direction == "maximize" else 1
    corners: list[_Spot] = []
    for spot in sorted(spots, key=lambda s: (way * s.x, -sign * s.y)):
        if not corners or sign * spot.y > sign * corners[-1].y:
            corners.append(spot)
    xs, ys = [s.x for s in corners], [s.y for s in corners]
    if other is None and corners:  # it holds until the last trial
        xs, ys = [*xs, max(s.x for s in spots)], [*ys, ys[-1]]
    if len(xs) > 1:
        axis.step(xs, ys, where="post", color=_FRONT, lw=1.2, alpha=0.7, zorder=1)


def _draw_budgets(axis: Axes, document: StudyDocument, other: Objective | None) -> None:
    first = document.objectives[0].name
    for budget in document.budgets:
        label = plain(f"budget {budget.text}")
        if other is not None and budget.cost == other.name:
            axis.axvline(budget.limit, color=_BUDGET, lw=1, ls="--", label=label)
        elif budget.cost == first:
            axis.axhline(budget.limit, color=_BUDGET, lw=1, ls="--", label=label)


def _dress(axis: Axes, other: Objective | None) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axis.grid(alpha=0.3)
    axis.margins(0.08)
    axis.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=other is None))
    axis.set_xlabel("trial" if other is None else plain(points.objective_label(other)))
    if other is not None and other.name in COSTS:
        axis.xaxis.set_major_formatter(EngFormatter())


def _place(axis: Axes, labels: Sequence[_Label]) -> None:
    """Write labels beside their points, where they cover neither a marker nor each other; one without a place is left out."""
    from matplotlib.transforms import Bbox

    inside = axis.get_window_extent()
    marked = [line for line in axis.lines if line.get_marker() in ("o", *_MARKERS)]
    spots = [spot for line in marked for spot in axis.transData.transform(line.get_xydata())]
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in spots]
    taken += [path.get_extents(axis.transData).padded(1) for bars in axis.collections for path in bars.get_paths()]
    for label in labels:
        overlaps = {}
        for offset in _PLACES:
            note = _write(axis, label, offset)
            box = note.get_window_extent()
            note.remove()
            outside = box.x0 < inside.x0 or box.x1 > inside.x1 or box.y0 < inside.y0 or box.y1 > inside.y1
            overlaps[offset] = len(taken) * outside + box.count_overlaps(taken)
            if not overlaps[offset]:
                break
        best = min(overlaps, key=overlaps.__getitem__)
        if label.needed or not overlaps[best]:
            taken.append(_write(axis, label, best).get_window_extent())


def _write(axis: Axes, label: _Label, offset: tuple[float, float]) -> Annotation:
    from matplotlib.patheffects import withStroke

    return axis.annotate(
        plain(label.text),
        (label.x, label.y),
        offset,
        textcoords="offset points",
        ha="left" if offset[0] > 0 else "right",
        va="bottom" if offset[1] > 0 else "top" if offset[1] < 0 else "center",
        fontsize=8,
        path_effects=[withStroke(linewidth=2, foreground="white")],
        zorder=6,
    )
