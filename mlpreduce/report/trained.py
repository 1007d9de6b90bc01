"""The figure of the bench of trained models: how good a reduced one is, against parameters and multiply-accumulates."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["MAIN", "draw"]

MAIN = {"vit_s": ("probe", "linear probe (%)"), "minilm": ("spearman", "rank correlation")}
_SIZES = {"params": "parameters (M)", "macs": "MACs (M)"}
# the rest would hide these, which a reader looks for; in this order, which is that of their colours
_LINES = (
    ("README's advice", "least_squares"),
    ("energy", "least_squares"),
    ("taylor", "least_squares"),
    ("l2", "least_squares"),
    ("random", "least_squares"),
    ("taylor", "none"),
    ("Torch-Pruning taylor", "none"),
    ("Torch-Pruning magnitude", "none"),
)


def draw(name: str, entry: dict[str, Any]) -> Figure:
    """Draw a line for each way to choose units, through its widths, and a mark for the best way to share.

    Args:
        name: of the model.
        entry: its cells, as in the JSON of the page; means of the draws with the fewest tests, which have every row.
    """
    from mlpreduce.report.canvas import blank

    measured = [cell for cell in entry["cells"] if "measured" in cell]
    tests = min(cell["tests"] for cell in measured)
    cells = [cell for cell in measured if cell["tests"] == tests]
    facts = entry["of"][str(tests)]
    figure = blank(10, 4)
    for axis, size in zip(figure.subplots(1, 2, sharey=True), _SIZES, strict=True):
        _draw(axis, size, MAIN[name][0], cells, facts)
        axis.set_xlabel(_SIZES[size])
    first = figure.axes[0]
    first.set_ylabel(MAIN[name][1])
    figure.legend(*first.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def _draw(axis: Axes, size: str, measure: str, cells: Sequence[dict[str, Any]], facts: dict[str, Any]) -> None:
    def at(cell: dict[str, Any]) -> tuple[float, float]:
        return cell[size] / 1e6, cell["measured"][measure]

    for number, (row, repair) in enumerate(_LINES):
        by_width: dict[float, list[tuple[float, float]]] = {}
        for cell in cells:
            if (cell["row"], cell["repair"]) == (row, repair):
                by_width.setdefault(cell["width"], []).append(at(cell))
        points = [tuple(map(statistics.mean, zip(*some, strict=True))) for _, some in sorted(by_width.items())]
        if points:
            label = row if repair == "none" else f"{row}, {repair}"
            axis.plot(*zip(*points, strict=True), "o-", color=f"C{number}", markersize=4, linewidth=1, label=label)
    shared = [cell for cell in cells if cell["kind"] == "sharing"]
    if shared:
        best = max(shared, key=lambda cell: cell["measured"][measure])
        axis.plot(*at(best), "s", color="black", markersize=6, label=f"{best['row']}, {best['repair']}")
    axis.plot(facts["whole"][size] / 1e6, facts["of_whole"][measure], "*", color="black", label="the whole model")
    axis.grid(alpha=0.3)
