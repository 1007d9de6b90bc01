"""The one drawing of reduced MLPs: blocks side by side, each MLP's kept hidden width, and which blocks share one.

`mlpreduce.plot`, the report of a recipe and the report of a search all draw it.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlpreduce.report.plotting import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Use", "draw_widths", "uses_of_pattern"]

_OWN, _OUTLINE, _EMPTY, _TEXT = "#8398b3", "#b4bcc8", "#f1f3f6", "#333333"
_SHARED = ("#3b66c4", "#c2500f", "#2c8059", "#8f3fa3", "#a97409", "#0d7787", "#b82c68", "#667027", "#7a4a33", "#52606f")
_GAP = 0.7  # blocks of free space between two stages
_MARGIN = 0.95  # inches beside the bars
_MOST_PLACES = 3  # MLPs of a block that get a row each


@dataclass(frozen=True)
class Use:
    """One MLP of a block: hidden features before the reduction and now, and the MLP whose weights it uses."""

    mlp: str
    full: int
    hidden: int
    owner: str


@dataclass(frozen=True)
class _Column:
    """Where a use stands: which row of bars, which stage, and the block's number within the stage."""

    place: str
    stage: str
    number: str


def uses_of_pattern(pattern: Mapping[str, Sequence[Any]], full: Mapping[str, int]) -> list[Use]:
    """The uses of a search's point: its names, owners (by index) and widths, and the unreduced widths by name."""
    names = [str(name) for name in pattern["blocks"]]
    found = zip(names, pattern["owners"], pattern["widths"], strict=True)
    return [Use(name, max(full.get(name, width), width), width, names[owner]) for name, owner, width in found]


def draw_widths(panels: Sequence[tuple[str, Sequence[Use]]], *, columns: int = 3) -> Figure:
    """Draw a panel for each list of uses.

    A bar is an MLP: its height is the kept hidden width, the outline the width before. Blocks of one colour and number use
    one MLP; the number is that of the block which holds its weights, drawn in full colour, the others are pale.

    Args:
        panels: title and uses of each, in order of execution.
        columns: panels side by side, if so many have room.
    """
    from mlpreduce.report.canvas import blank

    places = _places([use.mlp for _, uses in panels for use in uses])
    rows = list(dict.fromkeys(column.place for column in places.values()))
    longest = max(_length(_spots(uses, places)) for _, uses in panels)
    columns = min(columns, len(panels))
    pitch = 0.2 if longest > 26 else 0.24 if columns > 1 else 0.36
    width = max(3.4 if columns > 1 else 5.8, _MARGIN + pitch * longest)
    columns = max(1, min(columns, int(12.5 // width)))
    deep = -(-len(panels) // columns)
    shared = any(use.owner != use.mlp for _, uses in panels for use in uses)
    panels = [(_wrapped(title, int(width * 13)), uses) for title, uses in panels]
    lines = max(title.count("\n") for title, _ in panels)
    figure = blank(width * columns, deep * (1.65 * len(rows) + 0.5 + 0.16 * lines) + 0.4)
    grid = figure.subfigures(deep, columns, squeeze=False).flatten()
    tops = {row: max(use.full for _, uses in panels for use in uses if places[use.mlp].place == row) for row in rows}
    for piece, (title, uses) in zip(grid, panels, strict=False):
        axes = piece.subplots(len(rows), 1, squeeze=False)[:, 0]
        axes[0].set_title(plain(title), fontsize=9, color=_TEXT)
        for axis, row in zip(axes, rows, strict=True):
            mine = [use for use in uses if places[use.mlp].place == row]
            _draw_row(axis, mine, places, _colours(uses), tops[row], (width - _MARGIN) / longest, shared)
            axis.set_xlim(-0.7, longest - 0.3)
            axis.set_ylabel(plain(f"{row}\nhidden width" if len(rows) > 1 else "hidden width"), fontsize=8, color=_TEXT)
        several = len({places[use.mlp].stage for use in uses}) > 1
        axes[-1].set_xlabel("block", fontsize=8, color=_TEXT, labelpad=13 if several else 4)  # below names of stages
    handles = _legend([use for _, uses in panels for use in uses])
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
    return figure


def _wrapped(title: str, most: int) -> str:
    """A title in lines of at most so many characters, two for each of its own."""
    return "\n".join("\n".join(textwrap.wrap(line, most, max_lines=2, placeholder=" …")) for line in title.split("\n"))


def _places(names: Sequence[str]) -> dict[str, _Column]:
    """Where each MLP stands, read off its name: `blocks.3.mlp_tokens` is `mlp_tokens` of block 3 of `blocks`.

    Example:
        >>> _places(["blocks.3.mlp_tokens", "blocks.3.mlp_channels"])["blocks.3.mlp_tokens"]
        _Column(place='mlp_tokens', stage='blocks', number='3')
    """
    found = {}
    for name in dict.fromkeys(names):
        words = name.partition("@")[0].split(".")  # blocks.3.mlp@1 is a further call of blocks.3.mlp
        numbers = [number for number, word in enumerate(words) if word.isdigit()]
        numbers = numbers or [number for number, word in enumerate(words) if word[-1:].isdigit()]  # layer1.mlp
        last = max(numbers, default=None)
        if last is None:
            found[name] = _Column("", "", name.rpartition(".")[2] or "all")
            continue
        digits = re.findall(r"\d+$", words[last])[0]
        place = ".".join(word for word in words[last + 1 :] if word != "base")  # a layer around an MLP has it as `base`
        found[name] = _Column(place, ".".join([*words[:last], words[last].removesuffix(digits)]).strip("."), digits)
    inside = {column.place for column in found.values()}
    blocks = {(column.stage, column.number) for column in found.values()}
    if len(inside) > _MOST_PLACES or len(blocks) == len(found):  # no block has two of them, or names of all kinds
        found = {name: _Column("", column.stage, column.number) for name, column in found.items()}
    return found


def _spots(uses: Sequence[Use], places: Mapping[str, _Column]) -> dict[str, float]:
    """The position of each MLP along a row, stages apart, in the order of their first block."""
    order: dict[str, dict[tuple[str, str], list[str]]] = {}
    for use in uses:
        column = places[use.mlp]
        key = (column.number, "") if sum(places[u.mlp] == column for u in uses) == 1 else (column.number, use.mlp)
        order.setdefault(column.stage, {}).setdefault(key, []).append(use.mlp)
    spots: dict[str, float] = {}
    at = 0.0
    for stage in order.values():
        for names in stage.values():
            spots |= dict.fromkeys(names, at)
            at += 1
        at += _GAP
    return spots


def _length(spots: Mapping[str, float]) -> float:
    """Blocks of space that a row takes."""
    return max(spots.values(), default=0.0) + 1


def _colours(uses: Sequence[Use]) -> dict[str, str]:
    """A colour for each MLP that several places use, by owner; there are ten, by turns."""
    owners = [use.owner for use in uses]
    shared = [owner for owner in dict.fromkeys(owners) if owners.count(owner) > 1]
    return {owner: _SHARED[number % len(_SHARED)] for number, owner in enumerate(shared)}


def _pale(colour: str) -> tuple[float, float, float]:
    """A colour halfway to white."""
    from matplotlib.colors import to_rgb

    red, green, blue = (0.5 + 0.5 * part for part in to_rgb(colour))
    return red, green, blue


def _draw_row(
    axis: Axes,
    uses: Sequence[Use],
    places: Mapping[str, _Column],
    colours: Mapping[str, str],
    top: int,
    pitch: float,
    shared: bool,
) -> None:
    """Draw the MLPs at one place of all blocks; `pitch` is the space of a block in inches, `top` the widest MLP."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    spots = _spots(uses, places)
    strip = 0.17 * top if shared else 0.0  # below the bars: colour and number of the MLP
    for use in uses:
        at, colour = spots[use.mlp], colours.get(use.owner, _OWN)
        axis.bar(at, use.full, 0.84, color=_EMPTY, edgecolor=_OUTLINE, lw=0.7, zorder=1)
        axis.bar(at, use.hidden, 0.84, color=colour if use.owner == use.mlp else _pale(colour), lw=0, zorder=2)
        axis.annotate(
            str(use.hidden),
            (at, max(use.full, use.hidden)),
            (0, 2),
            textcoords="offset points",
            ha="center",
            va="bottom",
            rotation=0 if pitch >= 0.34 and use.hidden < 10_000 else 90,
            fontsize=7 if pitch >= 0.19 else 6,
            color=_TEXT,
        )
        if shared:
            axis.bar(at, -0.75 * strip, 0.84, bottom=-0.25 * strip, color=colour, lw=0, zorder=2)
            number = places[use.owner].number if use.owner in places else "?"
            middle = (at, -0.625 * strip)
            axis.annotate(number, middle, ha="center", va="center_baseline", fontsize=6.5, color="white", zorder=3)
    axis.set_ylim(-strip, top * (1.16 if pitch >= 0.34 else 1.3))
    steps = MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]).tick_values(0, top)
    axis.set_yticks([step for step in steps if 0 <= step <= top])
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.set_xticks(list(spots.values()), [places[name].number for name in spots])
    axis.tick_params(axis="x", length=0, labelsize=7, labelcolor=_TEXT)
    axis.tick_params(axis="y", labelsize=7, color=_OUTLINE, labelcolor=_TEXT)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(_OUTLINE)
    _name_stages(axis, spots, places, pitch)


def _name_stages(axis: Axes, spots: Mapping[str, float], places: Mapping[str, _Column], pitch: float) -> None:
    """Write the name of each stage below its blocks, if there are several."""
    ends: dict[str, list[float]] = {}
    for name, at in spots.items():
        ends.setdefault(places[name].stage, []).append(at)
    if len(ends) < 2:
        return
    words = [stage.split(".") for stage in ends]
    while all(len(stage) > 1 for stage in words) and len({stage[-1] for stage in words}) == 1:
        words = [stage[:-1] for stage in words]  # `layers.0.blocks` beside `layers.1.blocks` is `layers.0`
    labels = [".".join(stage) for stage in words]
    room = [(max(at) - min(at) + 1 + _GAP) * pitch / 0.062 for at in ends.values()]  # characters of 7 points
    if any(len(label) > most for label, most in zip(labels, room, strict=True)):
        labels = [stage[-1] for stage in words]
    below = axis.secondary_xaxis(location=0)
    below.set_xticks([(min(at) + max(at)) / 2 for at in ends.values()], [plain(f"\n{label}") for label in labels])
    below.tick_params(length=0, labelsize=7, labelcolor=_TEXT)
    below.spines["bottom"].set_visible(False)


def _legend(uses: Sequence[Use]) -> list[Any]:
    """What colours and outlines mean, as far as they occur."""
    from matplotlib.patches import Patch

    handles = []
    if any(use.hidden < use.full for use in uses):
        handles.append(Patch(facecolor=_EMPTY, edgecolor=_OUTLINE, label="width before"))
    if any(use.owner != use.mlp for use in uses):
        handles.append(Patch(facecolor=_SHARED[0], label="holds the weights"))
        handles.append(Patch(facecolor=_pale(_SHARED[0]), label="uses the MLP of the block with that number"))
    return handles
