"""The figure of a report: the paper's figure 1, drawn from records. The only module that imports matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from mlpreduce.report import published

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CAPTION", "draw"]

CAPTION = "Validation top-1 and loss over the epochs: lines are means over seeds, bands their ranges"


def draw(records: Sequence[dict[str, Any]]) -> Figure:
    """Draw validation top-1 and loss over the epochs, each variant's mean as a line and range over seeds as a band.

    Of a recipe that reproduces the paper's runs, what figure 1 shows: from epoch 150 on, if training went on to epoch 300.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = dict.fromkeys(record["recipe"]["name"] for record in records)
    whole = all(published.reproduces(name) for name in names) and all(
        len(record["epochs"]) >= published.EPOCHS for record in records
    )
    first = published.FIGURE_FROM if whole else 1
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    for axis, key, label in zip(axes, ("top1", "val_loss"), ("validation top-1 (%)", "validation loss"), strict=True):
        for number, variant in enumerate(dict.fromkeys(record["variant"] for record in records)):
            curves = [[e[key] for e in record["epochs"]] for record in records if record["variant"] == variant]
            columns = list(zip(*curves, strict=False))[first - 1 :]  # epochs that all seeds have
            epochs = range(first, first + len(columns))
            colour = f"C{number}"
            name = _plain(f"{variant} ({len(curves)} {'seed' if len(curves) == 1 else 'seeds'})")
            axis.plot(epochs, [fmean(c) for c in columns], color=colour, label=name)
            axis.fill_between(
                epochs, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.2, lw=0
            )
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend(loc="lower right")
    figure.suptitle(_plain(f"{' + '.join(names)}: mean and range over seeds"))
    return figure


def _plain(text: str) -> str:
    """Text in which matplotlib sees no formula."""
    return text.replace("$", r"\$")
