"""Figures without pyplot: nothing is kept in a global list, and a notebook shows them all the same."""

from __future__ import annotations

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mlpreduce.report.plotting import as_png

__all__ = ["Drawing", "blank"]


class Drawing(Figure):
    """A matplotlib Figure that a notebook shows as a picture, whether pyplot is in use there or not."""

    def _repr_png_(self) -> bytes:
        return as_png(self)


def blank(width: float, height: float) -> Drawing:
    """An empty figure of that size in inches, which keeps its parts from overlapping."""
    figure = Drawing(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
