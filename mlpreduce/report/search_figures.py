"""The figures of a search: its front, what mattered, what was tried, and how the best points share their MLPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mlpreduce.markup import shortened
from mlpreduce.report import search_points as points
from mlpreduce.report.content import Picture
from mlpreduce.report.figure import as_png, plain
from mlpreduce.report.search_front import draw_front
from mlpreduce.report.search_parallel import draw_parallel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

__all__ = ["FILES", "draw_front", "draw_importance", "draw_parallel", "draw_patterns", "pictures"]

FILES = ("front.png", "patterns.png", "importance.png", "parallel.png")
_MOST_BARS = 15
_MOST_PATTERNS = 12


def pictures(document: dict[str, Any]) -> list[Picture]:
    """The figures that have something to show, drawn."""
    draws: tuple[Callable[[dict[str, Any]], tuple[Figure, str] | None], ...]
    draws = (draw_front, draw_patterns, draw_importance, draw_parallel)
    titles = ("Front", "Which block uses which MLP", "Importance of the parameters", "What was tried")
    drawn = ((title, file, draw(document)) for title, file, draw in zip(titles, FILES, draws, strict=True))
    return [Picture(title, file, found[1], as_png(found[0])) for title, file, found in drawn if found]


def draw_importance(document: dict[str, Any]) -> tuple[Figure, str] | None:
    """Draw the importance of each sampled parameter as bars, a panel for each objective.

    Returns:
        The figure and its caption; None where no objective has that of two parameters.
    """
    found = [(o, document["importance"].get(o["name"], {})) for o in document["objectives"]]
    found = [(objective, shares) for objective, shares in found if len(shares) > 1]
    if not found:
        return None
    bars = min(_MOST_BARS, max(len(shares) for _, shares in found))
    figure = _figure(1 + 4.2 * len(found), 1.2 + 0.32 * bars)
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


def draw_patterns(document: dict[str, Any]) -> tuple[Figure, str] | None:
    """Draw which block uses which MLP: of the best points of the front and of the references, a small picture each.

    Returns:
        The figure and its caption; None where no such point has a pattern.
    """
    front = [p for p in points.front(document) if p["pattern"].get("owners")]
    beside = [p for p in points.references(document) if not p["front"] and p["pattern"].get("owners")]
    shown = [*front[:_MOST_PATTERNS], *beside]
    if not shown:
        return None
    largest = max(width for point in shown for width in point["pattern"]["widths"])
    columns = min(5, len(shown))
    rows = -(-len(shown) // columns)
    figure = _figure(2.1 * columns + 1, 2.5 * rows + 0.3)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[len(shown) :]:
        axis.remove()
    del axes[len(shown) :]
    for number, (axis, point) in enumerate(zip(axes, shown, strict=True)):
        image = _draw_pattern(axis, point, largest)
        axis.set_title(plain(_pattern_title(point, document["objectives"][0])), fontsize=8)
        if number + columns >= len(shown):
            axis.set_xlabel("block", fontsize=8)
        if number % columns == 0:
            axis.set_ylabel("MLP", fontsize=8)
    bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 1.6 / rows), aspect=15, pad=0.02)
    bar.set_label("hidden width / largest", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    what = f"the {len(front[:_MOST_PATTERNS])} best of {len(front)} points" if front[_MOST_PATTERNS:] else "the points"
    return figure, (
        f"Which block (column) uses which MLP (row), for {what} of the front and the references; "
        "the darker, the wider the MLP's hidden layer"
    )


def _pattern_title(point: points.Point, first: dict[str, str]) -> str:
    value = points.number_text(first["name"], points.value_of(point, first["name"]))
    size = points.value_of(point, "params")
    facts = [f"{points.compact(size)} parameters"] if size else []
    facts += [f"{value} {first['unit']}".rstrip()] if value and first["name"] != "params" else []
    return f"{shortened(point['name'], 28)}\n{', '.join(facts)}"


def _draw_pattern(axis: Axes, point: points.Point, largest: int) -> AxesImage:
    """Rows are the MLPs that are there, in order of their first use; all pictures have a row for each block."""
    owners, widths = point["pattern"]["owners"], point["pattern"]["widths"]
    row = {owner: number for number, owner in enumerate(dict.fromkeys(owners))}
    cells = [[float("nan")] * len(owners) for _ in owners]
    for block, (owner, width) in enumerate(zip(owners, widths, strict=True)):
        cells[row[owner]][block] = width / largest
    from matplotlib.ticker import MaxNLocator

    image = axis.imshow(cells, cmap="Blues", vmin=0, vmax=1)
    edges = [place - 0.5 for place in range(len(owners) + 1)]
    for spine in axis.spines.values():
        spine.set_color("#aaaaaa")
    axis.set_xticks(edges, minor=True)
    axis.set_yticks(edges, minor=True)
    axis.grid(which="minor", color="#dddddd", lw=0.5)
    axis.tick_params(which="minor", length=0)
    axis.tick_params(labelsize=7)
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(MaxNLocator(6, integer=True))
    return image


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
