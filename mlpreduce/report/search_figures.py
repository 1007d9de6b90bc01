"""The figures of a search: its front, what mattered, what was tried, and how the best points share their MLPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mlpreduce.records import Objective, StudyDocument, StudyPoint
from mlpreduce.report import search_points as points
from mlpreduce.report.content import Picture
from mlpreduce.report.plotting import as_png, plain
from mlpreduce.report.search_front import draw_front
from mlpreduce.report.search_parallel import draw_parallel
from mlpreduce.report.widths import draw_widths, uses_of_pattern
from mlpreduce.words.markup import shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FILES", "draw_front", "draw_importance", "draw_parallel", "draw_patterns", "pictures"]

FILES = ("front.png", "patterns.png", "importance.png", "parallel.png")
_MOST_BARS = 15
_MOST_PATTERNS = 12


def pictures(document: StudyDocument) -> list[Picture]:
    """The figures that have something to show, drawn."""
    draws: tuple[Callable[[StudyDocument], tuple[Figure, str] | None], ...]
    draws = (draw_front, draw_patterns, draw_importance, draw_parallel)
    titles = ("Front", "Which block uses which MLP", "Importance of the parameters", "What was tried")
    drawn = ((title, file, draw(document)) for title, file, draw in zip(titles, FILES, draws, strict=True))
    return [Picture(title, file, found[1], as_png(found[0])) for title, file, found in drawn if found]


def draw_importance(document: StudyDocument) -> tuple[Figure, str] | None:
    """Draw the importance of each sampled parameter as bars, a panel for each objective.

    Returns:
        The figure and its caption; None where no objective has that of two parameters.
    """
    found = [(o, document.importance.get(o.name, {})) for o in document.objectives]
    found = [(objective, shares) for objective, shares in found if len(shares) > 1]
    if not found:
        return None
    bars = min(_MOST_BARS, max(len(shares) for _, shares in found))
    from mlpreduce.report.canvas import blank

    figure = blank(1 + 4.2 * len(found), 1.2 + 0.32 * bars)
    for axis, (objective, shares) in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        best = sorted(shares.items(), key=lambda item: -item[1])[:_MOST_BARS]
        drawn = axis.barh(
            [plain(shortened(name, 30)) for name, _ in best], [value for _, value in best], color="#4c78a8"
        )
        axis.bar_label(drawn, fmt="%.2f", padding=3, fontsize=8)
        axis.set_xlim(0, 1.15 * max(best[0][1], 0.01))
        axis.invert_yaxis()
        axis.set_title(plain(points.objective_label(objective)), fontsize=10)
        axis.set_xlabel("importance")
    most = max(len(shares) for _, shares in found)
    cut = f", the first {_MOST_BARS} of {most}" if most > _MOST_BARS else ""
    return figure, f"How much each sampled parameter matters for each objective, estimated from these trials alone{cut}"


def draw_patterns(document: StudyDocument) -> tuple[Figure, str] | None:
    """Draw the MLPs of the best points of the front and of the references, a small picture each.

    Returns:
        The figure and its caption; None where no such point has a pattern.
    """
    front = [p for p in points.front(document) if p.pattern.get("owners")]
    beside = [p for p in points.references(document) if not p.front and p.pattern.get("owners")]
    shown = [*front[:_MOST_PATTERNS], *beside]
    if not shown:
        return None
    full: dict[str, int] = {}
    for point in shown:
        for name, width in zip(point.pattern["blocks"], point.pattern["widths"], strict=True):
            full[str(name)] = max(full.get(str(name), 0), width)
    first = document.objectives[0]
    figure = draw_widths([(_pattern_title(point, first), uses_of_pattern(point.pattern, full)) for point in shown])
    what = f"the {len(front[:_MOST_PATTERNS])} best of {len(front)} points" if front[_MOST_PATTERNS:] else "the points"
    return figure, (
        f"Hidden width of each block's MLP, for {what} of the front and the references, in an outline of the widest of these; "
        "blocks of one colour use one MLP, that of the block with the number below the bar"
    )


def _pattern_title(point: StudyPoint, first: Objective) -> str:
    value = points.number_text(first.name, points.value_of(point, first.name))
    size = points.value_of(point, "params")
    facts = [f"{points.compact(size)} parameters"] if size else []
    facts += [f"{value} {first.unit}".rstrip()] if value and first.name != "params" else []
    return f"{shortened(point.name, 28)}\n{', '.join(facts)}"
