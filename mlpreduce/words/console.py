"""What the console shows: tables that fit its width, and commands that end as other tools do."""

from __future__ import annotations

import os
import re
import select
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from mlpreduce.errors import ReductionError

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

__all__ = [
    "Column",
    "Grid",
    "command_line",
    "first_that_fits",
    "from_here",
    "run_command",
    "screen",
    "width",
    "wrapped",
]

_UNLIMITED = 10_000  # columns, where output goes to a file
_LEAST_TEXT = 24  # columns, below which text is listed under the table
_GAP = 2  # columns between two others
_UNIT = re.compile(r"(?<=\d) (?=(?:[GMk%]|MiB|ms|s|min|h|images/s)\b|%|±)|(?<=±) ")  # between a number and its unit
_CLOSED_PIPE = 141  # what a shell reports of a tool whose reader has gone: 128 + SIGPIPE


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        header: may be broken at its spaces, where the cells are narrower.
        cells: are never broken, unless the column is of text.
        left: whether cells stand to the left, as words do; numbers stand to the right.
        text: whether cells are sentences, which may be broken at spaces.
    """

    header: str
    cells: Sequence[str]
    left: bool = False
    text: bool = False

    @property
    def width(self) -> int:
        """Characters of the widest cell, or of the widest word of the header."""
        return max(map(len, [*self.cells, *_words(self.header)]), default=0)

    @property
    def word(self) -> int:
        """Characters of the longest word."""
        return max((len(word) for cell in [*self.cells, self.header] for word in cell.split()), default=0)


@dataclass(frozen=True)
class Grid:
    """A table that is drawn to fit: the first column names the row.

    Where the width does not suffice, sentences are broken at their spaces or listed below. If that is not enough, the table
    goes on below itself, with the names again; and where not even one column fits beside the names, each row becomes a block.

    Attributes:
        title: stands above.
        columns: with equally many cells.
        remark: stands below.
        ruled: whether there is a line under the headers.
    """

    title: str
    columns: Sequence[Column]
    remark: str = ""
    ruled: bool = True

    def _total(self, whole: bool) -> int:
        widths = [max(column.width, len(column.header)) if whole else column.width for column in self.columns]
        return sum(widths) + _GAP * (len(widths) - 1)

    def fits(self, width: int | None) -> bool:
        """Whether all columns have room beside each other, nothing broken."""
        return width is None or self._total(whole=False) <= width

    def text(self, width: int | None = None) -> str:
        """The table in so many columns; None for as many as it takes."""
        from io import StringIO

        from rich.console import Console

        file = StringIO()
        console = Console(
            file=file,
            width=width or _UNLIMITED,
            color_system=None,
            force_terminal=False,
            force_jupyter=False,  # in a notebook rich would show the table there and leave the file empty
        )
        console.print(self, soft_wrap=False, crop=False)
        return "\n".join(line.rstrip() for line in file.getvalue().rstrip("\n").split("\n"))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.text import Text

        width = options.max_width
        if self.title:
            yield Text(wrapped(self.title, width), style="bold")
        for number, part in enumerate(self._parts(width)):
            if number:
                yield ""
            yield part
        if self.remark:
            yield Text(wrapped(self.remark, width))

    def _parts(self, width: int) -> Iterator[RenderableType]:
        names, *others = self.columns
        numbers = [column for column in others if not column.text]
        sentences = [column for column in others if column.text]
        room = width - sum(column.width + _GAP for column in [names, *numbers])
        broken = len(sentences) == 1 and room >= max(_LEAST_TEXT, sentences[0].word)
        if self.fits(width) or broken:
            yield _drawn(self.columns, self.ruled, whole=self._total(whole=True) <= width)
            return
        if not others or any(names.width + _GAP + column.width > width for column in numbers):
            yield _blocks(self.columns, width)
            return
        piece = [names]
        for column in numbers:
            if sum(other.width + _GAP for other in [*piece, column]) - _GAP > width:
                yield _drawn(piece, self.ruled)
                piece = [names]
            piece.append(column)
        if len(piece) > 1:
            yield _drawn(piece, self.ruled)
        for column in sentences:
            yield _blocks([names, column], width)


def _words(header: str) -> list[str]:
    return re.split(" (?!%)", header)  # top-1 % stays whole


def _drawn(columns: Sequence[Column], ruled: bool, whole: bool = False) -> RenderableType:
    """Columns side by side; text may be broken at spaces, and so may headers, unless they are kept `whole`."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE_HEAD if ruled else None,
        show_edge=False,
        pad_edge=False,
        padding=(0, _GAP if not ruled else 1, 0, 0),
    )
    for column in columns:
        cells = max(map(len, ["", *column.cells]))
        keep = whole or column.text or len(column.header) <= cells
        header = column.header if keep else "\n".join(_words(column.header))
        justify: Any = "left" if column.left or column.text else "right"
        table.add_column(Text(header), justify=justify, no_wrap=not column.text, overflow="fold", vertical="top")
    for row in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*map(Text, row))  # a name is text, not rich's markup
    return table


def _blocks(columns: Sequence[Column], width: int) -> RenderableType:
    """A block for each row: its name, then a line for each other cell."""
    from rich.text import Text

    names, *others = columns
    alone = len(others) == 1 and others[0].text
    lines = ["", others[0].header] if alone else []
    for number, name in enumerate(names.cells):
        if alone:
            lines.append(wrapped(f"  {name}: {others[0].cells[number]}", width, "    "))
            continue
        lines.append(name)
        told = [f"  {column.header}: {column.cells[number]}" for column in others if column.cells[number]]
        lines += [wrapped(line, width, "    ") for line in told]
    return Text("\n".join(lines), no_wrap=True, overflow="ignore")


def first_that_fits(grids: Iterable[Grid], width: int | None) -> Grid:
    """The first of some tables, the best first, that fits as it is; else the last."""
    for grid in grids:
        if grid.fits(width):
            break
    return grid


def wrapped(text: str, width: int | None, indent: str = "  ") -> str:
    """Text broken at spaces, its further lines indented. A word that is longer than a line, and a number with its unit, stay
    whole.

    Example:
        >>> print(wrapped("left out: head: it is not an MLP", 20))
        left out: head: it
          is not an MLP
    """
    if width is None:
        return text
    lines = []
    for line in _UNIT.sub("\N{NO-BREAK SPACE}", text).split("\n"):
        begin = line[: len(line) - len(line.lstrip())]
        broken = textwrap.wrap(
            line.strip(),
            max(1, width),
            initial_indent=begin,
            subsequent_indent=begin + indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
        lines += broken or [""]
    return "\n".join(lines).replace("\N{NO-BREAK SPACE}", " ")


def command_line(words: Sequence[str], width: int | None) -> str:
    """A command to paste, broken before a word where it does not fit.

    Example:
        >>> print(command_line(["mlflow", "ui", "--port", "5000"], 20))
        mlflow ui --port \\
            5000
    """
    import shlex

    lines = [""]
    for word in map(shlex.quote, words):
        if width is not None and lines[-1].strip() and len(lines[-1]) + len(word) + 3 > width:
            lines[-1] += " \\"
            lines.append(f"    {word}")
        else:
            lines[-1] += f" {word}" if lines[-1] else word
    return "\n".join(lines)


def from_here(path: Path) -> Path:
    """A path as it is typed here: without the folder that the command runs in."""
    place, here = path.resolve(), Path.cwd()
    return place.relative_to(here) if place.is_relative_to(here) else place


def width() -> int | None:
    """Columns of the terminal that is printed to; None for a file or a pipe, unless COLUMNS gives them."""
    given = os.environ.get("COLUMNS", "")
    if given.isdigit() and int(given):
        return int(given)
    return shutil.get_terminal_size().columns if sys.stdout is not None and sys.stdout.isatty() else None


def screen() -> Console:
    """The console of rich, as wide as the terminal, or as wide as it takes where output goes to a file."""
    from rich.console import Console

    class Screen(Console):
        def on_broken_pipe(self) -> None:  # rich would end the process; `run_command` does, after all is put away
            raise

    return Screen(width=width() or _UNLIMITED)


def run_command(body: Callable[[], int], go_on: Callable[[], str | None] | None = None) -> int:
    """Run a command and return its exit status.

    Args:
        body: the command; its exit status.
        go_on: writes the command that goes on with what was interrupted, when all workers have ended; None where none does.

    Returns:
        What `body` returns; 2 after a ReductionError, which is printed; 141 when the reader of its output has gone, as
        after `mlpreduce list | head -1`; 130 when interrupted.
    """
    try:
        status = _run(body, go_on)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        if not _silence():
            raise  # a pipe of something else
        return _CLOSED_PIPE


def _run(body: Callable[[], int], go_on: Callable[[], str | None] | None) -> int:
    try:
        return body()
    except ReductionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        command = None if go_on is None else go_on()
        more = "" if command is None else f"; all workers have ended. To go on: {command}"
        print(f"\ninterrupted{more}", file=sys.stderr)
        return 130
    except SystemExit as ending:  # argparse: help was printed, or what is wrong
        return ending.code if isinstance(ending.code, int) else int(ending.code is not None)


def _silence() -> bool:
    """Let what is left of the output go nowhere, where its reader has gone; whether it has."""
    gone = [stream for stream in (sys.stdout, sys.stderr) if _has_no_reader(stream)]
    for stream in gone:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    return bool(gone)


def _has_no_reader(stream: TextIO) -> bool:
    """Whether a stream is a pipe that nobody reads any more."""
    try:
        asked = select.poll()
        asked.register(stream.fileno(), select.POLLOUT)
    except (OSError, ValueError):  # not a file of the system
        return False
    return any(told & (select.POLLERR | select.POLLHUP) for _, told in asked.poll(0))
