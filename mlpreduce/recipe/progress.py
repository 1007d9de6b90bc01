"""What is shown while a recipe trains: a spinner and a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mlpreduce.launch import LaunchSettings
from mlpreduce.train.events import Ended, Entry, EpochEnded, Event, Progressed, Started
from mlpreduce.train.settings import Run
from mlpreduce.words.pulse import Pulse

__all__ = ["Display", "starting"]

_LINE_EVERY = 5.0  # seconds between two lines of epochs where there is no terminal


def starting(launch: LaunchSettings) -> str:
    """What is going on before the first run begins.

    Example:
        >>> starting(LaunchSettings(workers=2))
        'starting Ray and 2 workers'
    """
    if not launch.workers:
        return "loading the data and the model"
    return f"starting Ray and {launch.workers} worker{'s' if launch.workers > 1 else ''}"


class Display:
    """Shows the events of `mlpreduce.train.fit`.

    Args:
        console: where to.
        runs: the runs that will be trained, in order.
        total: how many runs the recipe has, finished ones included.
        text: what is going on before the first event.
    """

    def __init__(self, console: Console, runs: Sequence[Run], total: int, text: str = "starting the workers") -> None:
        self._console = console
        self._number = {(run.variant, run.seed): total - len(runs) + i for i, run in enumerate(runs, 1)}
        self._total = total
        self._epochs = sum(run.train.epochs for run in runs)
        self._done: dict[tuple[str, int], int] = {}
        self._top1: dict[tuple[str, int], float] = {}
        self._skipped = 0
        self._started = 0.0
        self._told = 0.0
        columns = [BarColumn(20), MofNCompleteColumn(), TextColumn("epochs"), TimeElapsedColumn(), TextColumn("left")]
        self._progress = Progress(*columns, TimeRemainingColumn(), console=console)
        self._all = self._progress.add_task("", total=self._epochs)
        self._pulse = Pulse(console, text, below=self._progress)

    def __enter__(self) -> Display:
        self._pulse.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._pulse.__exit__(*exception)

    def handle(self, event: Event) -> None:
        """Show an event."""
        key = (event.variant, event.seed)
        name = f"run {self._number[key]} of {self._total}: {key[0]}, seed {key[1]}"
        match event.what:
            case Started(_, history, notes):
                self._start(key, name, len(history), notes)
            case EpochEnded(entry):
                self._done[key], self._top1[key] = entry["epoch"], entry["top1"]
                self._epoch(name, event.epochs, entry)
            case Progressed(epoch, fraction, loss, rate):
                self._describe(name, epoch, event.epochs, loss, self._top1.get(key), rate)
                self._progress.update(self._all, completed=sum(self._done.values()) + fraction)
            case Ended(status, message):
                if status == "failed":
                    self._pulse.line(f"{name}: {message}", "red")
                last = self._number[key] == self._total
                self._pulse.now("ending the workers" if last else f"{name}: ended; the next one begins")

    def _start(self, key: tuple[str, int], name: str, done: int, notes: Sequence[str]) -> None:
        if not self._started:
            self._started = time.monotonic()
        if key in self._done:
            self._pulse.line(f"{name}: the workers were started again; going on after epoch {done}")
        elif done:
            self._pulse.line(f"{name}: going on after epoch {done}")
            self._skipped += done
        for note in notes:
            self._pulse.line(f"{name}: {note}", "yellow")
        self._done[key] = done
        self._progress.update(self._all, completed=sum(self._done.values()))
        self._pulse.now(name)

    def _epoch(self, name: str, epochs: int, entry: Entry) -> None:
        epoch = entry["epoch"]
        line = self._describe(name, epoch, epochs, entry["train_loss"], entry["top1"], entry["images_per_s"])
        done = sum(self._done.values())
        self._progress.update(self._all, completed=done)
        if self._console.is_terminal:
            return
        if epoch == epochs or time.monotonic() - self._told > _LINE_EVERY:
            self._told = time.monotonic()
            left = (self._told - self._started) / max(1, done - self._skipped) * (self._epochs - done)
            self._pulse.line(f"{line}, {left / 60:.1f} min left")

    def _describe(self, name: str, epoch: int, epochs: int, loss: float, top1: float | None, rate: float) -> str:
        accuracy = "" if top1 is None else f", top-1 {top1:.2f} %"
        line = f"{name}, epoch {epoch}/{epochs}, loss {loss:.3f}{accuracy}, {rate:,.0f} images/s"
        self._pulse.now(line)
        return line
