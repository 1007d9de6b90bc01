"""What a matplotlib figure shows, as text."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import Collection, LineCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Annotation, Text


def drawn(figure: Figure) -> str:
    """A line for each text, line, marker and area that is to be seen, in the order of drawing."""
    figure.canvas.draw()
    size = f"figure {_numbers(figure.get_size_inches())}"
    return "\n".join([size, *_lines(figure, "")]) + "\n"


def _lines(artist: Artist, indent: str) -> Iterator[str]:
    for part in artist.get_children():
        if not part.get_visible():
            continue
        if isinstance(part, Axes):
            yield f"{indent}axes {_numbers(part.get_position().bounds)} {part.get_xscale()} {part.get_yscale()}"
        elif told := _told(part):
            yield indent + told
        if not isinstance(part, (Axis, Text, Line2D, Patch, Collection)) or isinstance(part, Axis):
            yield from _lines(part, indent + "  ")


def _told(part: Artist) -> str:
    if isinstance(part, Text):
        words = f"{part.get_text()!r} {_numbers(part.get_position())} {_hex(part.get_color())} {part.get_fontsize():g}"
        at = f" at {_numbers(part.xy)}" if isinstance(part, Annotation) else ""
        return f"text {words}{at}" if part.get_text() else ""
    if isinstance(part, Line2D):
        how = f"{_hex(part.get_color())} {part.get_linewidth():g} {part.get_linestyle()} {part.get_marker()}"
        return f"line {_numbers(part.get_xydata())} {how}" if len(part.get_xydata()) else ""
    if isinstance(part, LineCollection):
        return f"lines {[_numbers(one) for one in part.get_segments()]} {[_hex(c) for c in part.get_colors()]}"
    if isinstance(part, Collection):
        return f"marks {_numbers(part.get_offsets())} {[_hex(colour) for colour in part.get_facecolors()]}"
    if isinstance(part, Patch):
        return f"area {_numbers(part.get_path().vertices)} {_hex(part.get_facecolor())} {_numbers(part.get_extents().bounds)}"
    return ""


def _numbers(values: object) -> str:
    """To three digits: what is next to nothing has no sign."""
    rounded = np.round(np.asarray(values, dtype=float), 3) + 0.0
    return " ".join(f"{value:g}" for value in rounded.ravel())


def _hex(colour: object) -> str:
    return to_hex(colour, keep_alpha=True)  # type: ignore[arg-type]
