"""The figure of a report: the paper's figure 1, drawn from records."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from mlpreduce.records import Record
from mlpreduce.report import published
from mlpreduce.report.plotting import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

__all__ = ["CAPTION", "draw"]

CAPTION = "Validation top-1 and loss over the epochs: lines are means over seeds, bands their ranges"


def draw(parts: Sequence[Sequence[Record]]) -> Figure:
    """Draw validation top-1 and loss over the epochs, each variant's mean as a line and range over seeds as a band.

    Of a recipe that reproduces the paper's runs, what figure 1 shows: from epoch 150 on, if training went on to epoch 300.
    Of a sweep, a row for each point, and in a last one top-1 against parameters.

    Args:
        parts: records; of a sweep, those of each point.
    """
    from mlpreduce.report.canvas import blank

    rows = len(parts) + (len(parts) > 1)
    figure = blank(11, 4.5 * rows)
    pieces = figure.subfigures(rows, squeeze=False)[:, 0]
    for piece, records in zip(pieces, parts, strict=False):
        _draw_curves(piece, records)
    if len(parts) > 1:
        _draw_cost(pieces[-1], parts)
    return figure


def _draw_curves(figure: SubFigure, records: Sequence[Record]) -> None:
    names = dict.fromkeys(record.name for record in records)
    whole = all(published.reproduces(name) for name in names) and all(
        len(record.epochs) >= published.EPOCHS for record in records
    )
    first = published.FIGURE_FROM if whole else 1
    axes = figure.subplots(1, 2)
    for axis, key, label in zip(axes, ("top1", "val_loss"), ("validation top-1 (%)", "validation loss"), strict=True):
        for number, variant in enumerate(dict.fromkeys(record.variant for record in records)):
            curves = [[getattr(e, key) for e in record.epochs] for record in records if record.variant == variant]
            columns = list(zip(*curves, strict=False))[first - 1 :]  # epochs that all seeds have
            epochs = range(first, first + len(columns))
            colour = f"C{number}"
            name = plain(f"{variant} ({len(curves)} {'seed' if len(curves) == 1 else 'seeds'})")
            axis.plot(epochs, [fmean(c) for c in columns], color=colour, label=name)
            axis.fill_between(
                epochs, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.2, lw=0
            )
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend(loc="lower right")
    figure.suptitle(plain(f"{' + '.join(names)}: mean and range over seeds"))


def _draw_cost(figure: SubFigure, parts: Sequence[Sequence[Record]]) -> None:
    """Top-1 of the best epoch against parameters: a line for each variant through the points of a sweep."""
    axis = figure.subplots()
    variants = dict.fromkeys(record.variant for records in parts for record in records)
    for number, variant in enumerate(variants):
        found = [[record for record in records if record.variant == variant] for records in parts]
        found = sorted(filter(None, found), key=lambda records: records[0].profile.params)
        tops = [[max(epoch.top1 for epoch in record.epochs) for record in records] for records in found]
        means = [fmean(values) for values in tops]
        below = [max(0.0, mean - min(values)) for mean, values in zip(means, tops, strict=True)]
        above = [max(0.0, max(values) - mean) for mean, values in zip(means, tops, strict=True)]
        params = [records[0].profile.params / 1e6 for records in found]
        axis.errorbar(params, means, (below, above), fmt="o-", color=f"C{number}", capsize=3, label=plain(variant))
    axis.set_xscale("log")
    axis.set_xlabel("parameters (M)")
    axis.set_ylabel("validation top-1 (%), best epoch")
    axis.grid(alpha=0.3, which="both")
    axis.legend(loc="lower right")
    figure.suptitle("top-1 and parameters: mean and range over seeds")
