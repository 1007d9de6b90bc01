"""Signs of life: what is going on, said every few seconds."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from mlpreduce.words.console import wrapped

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

__all__ = ["Pulse"]

_EVERY = 3.0  # seconds without a line, after which one is printed


class Pulse:
    """Says what is going on, from the first second on: beside a spinner on a terminal, in lines elsewhere.

    Args:
        console: where to.
        text: what is going on at first.
        below: what a terminal shows under the text, such as a bar.
        every: seconds without a line, after which the text is printed again where there is no terminal.
    """

    def __init__(
        self, console: Console, text: str, *, below: RenderableType | None = None, every: float = _EVERY
    ) -> None:
        from rich.console import Group
        from rich.live import Live
        from rich.spinner import Spinner

        self._console, self._every = console, every
        self._text, self._since, self._timed = text, time.monotonic(), True
        self._told = 0.0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._spinner = Spinner("line", self._shown(text))
        shown = self._spinner if below is None else Group(self._spinner, below)
        self._live = Live(shown, console=console, transient=True, refresh_per_second=8) if console.is_terminal else None

    def __enter__(self) -> Pulse:
        if self._live is not None:
            self._live.start()
            return self
        self.line(self._text)
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._live is not None:
            self._live.stop()

    def now(self, text: str, *, timed: bool = True) -> None:
        """Say from now on that this is going on; `timed`: and for how long."""
        if timed and not (self._timed and text == self._text):
            self._since = time.monotonic()
        self._text, self._timed = text, timed
        self._spinner.update(text=self._shown(text))

    def _shown(self, text: str) -> Text:
        from rich.text import Text

        return Text(wrapped(text, self._console.width - 2), no_wrap=True)  # beside the spinner

    def line(self, text: str, style: str | None = None) -> None:
        """Print a line that stays."""
        self._told = time.monotonic()
        text = wrapped(text, self._console.width)
        self._console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    def _beat(self) -> None:
        with suppress(BrokenPipeError):  # the reader has gone; the next line of the main thread ends the command
            while not self._ended.wait(max(0.05, self._told + self._every - time.monotonic())):
                if time.monotonic() - self._told >= self._every:
                    self.line(f"{self._text} ({time.monotonic() - self._since:.0f} s)" if self._timed else self._text)
