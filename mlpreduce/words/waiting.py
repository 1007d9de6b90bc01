"""Progress of work that takes long: one line on stderr, for someone who is looking.

Nothing is shown where stderr is not a terminal or notebook, in the first two seconds, in workers, or within another such line.
There is no thread: the line is drawn when a step ends, between two steps, so that nothing that is timed or computed is
disturbed.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["silent", "steps"]

DELAY = 2.0  # seconds before anything is shown
_EVERY = 0.2  # seconds between two drawings

_lock = threading.Lock()
_busy = 0  # lines that are shown, and blocks in which none may be, of all threads


@contextmanager
def silent() -> Iterator[None]:
    """Show nothing inside the block, because something else shows progress or nobody is looking."""
    global _busy
    with _lock:
        _busy += 1
    try:
        yield
    finally:  # blocks of several threads end in any order
        with _lock:
            _busy -= 1


@contextmanager
def steps(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show how far some work is.

    Args:
        what: what is done, in a few words.
        total: how many steps there are; None if that is not known.

    Yields:
        A function to call after some steps, with their number.

    Example:
        >>> with steps("counting", 3) as advance:
        ...     for _ in range(3):
        ...         advance(1)
    """
    if _busy or not _is_watched():
        yield lambda number: None
        return
    with silent():  # work within this work
        line = _Line(what, total)
        try:
            yield line.advance
        finally:
            line.stop()


class _Line:
    """A line of rich's that appears after a while, and goes when the work is done."""

    def __init__(self, what: str, total: int | None) -> None:
        self._what, self._total, self._done = what, total, 0
        self._begun = self._drawn = time.monotonic()
        self._progress: Any = None

    def advance(self, number: int) -> None:
        self._done += number
        now = time.monotonic()
        if now - self._begun < DELAY or (self._progress is not None and now - self._drawn < _EVERY):
            return
        if self._progress is None:
            self._progress, self._task = _shown(self._what, self._total, self._done, self._begun)
        self._drawn = now
        self._progress.update(self._task, completed=self._done)
        self._progress.refresh()

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()


def _shown(what: str, total: int | None, done: int, begun: float) -> tuple[Any, Any]:
    """A line that is drawn, and its task, which began at a time of `time.monotonic`."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = [TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    if total is not None:
        columns += [TextColumn("left"), TimeRemainingColumn()]
    progress = Progress(
        *columns, console=Console(stderr=True), get_time=time.monotonic, auto_refresh=False, transient=True
    )
    task = progress.add_task(what, total=total, completed=done)
    progress.tasks[0].start_time = begun
    progress.start()
    return progress, task


def _is_watched() -> bool:
    """Whether somebody would see a line: stderr is a terminal, or this is a notebook that has widgets."""
    stream = sys.stderr
    if stream is not None and stream.isatty():
        return True
    kernel = "ipykernel" in sys.modules and type(stream).__module__.startswith("ipykernel")
    return kernel and importlib.util.find_spec("ipywidgets") is not None  # what rich draws with in a notebook
