"""What is shown while a recipe trains: a bar on a terminal, a line every few epochs elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mlpreduce.train.settings import Run

__all__ = ["Display"]

_LINE_EVERY = 5.0  # seconds between two lines where there is no terminal


class Display:
    """Shows the events of `mlpreduce.train.fit`.

    Args:
        console: where to.
        runs: the runs that will be trained, in order.
        total: how many runs the recipe has, finished ones included.
    """

    def __init__(self, console: Console, runs: Sequence[Run], total: int) -> None:
        self._console = console
        self._number = {(run.variant, run.seed): total - len(runs) + i for i, run in enumerate(runs, 1)}
        self._total = total
        self._epochs = sum(run.train.epochs for run in runs)
        self._done: dict[tuple[str, int], int] = {}
        self._top1: dict[tuple[str, int], float] = {}
        self._skipped = 0
        self._started = 0.0
        self._told = 0.0
        columns: list[ProgressColumn] = [
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("epochs"),
        ]
        columns += [TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()]
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._all = self._progress.add_task("starting the workers", total=self._epochs)

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def handle(self, event: dict[str, Any]) -> None:
        """Show an event."""
        key = (event["variant"], event["seed"])
        name = f"run {self._number[key]} of {self._total}: {key[0]}, seed {key[1]}"
        if event["event"] == "start":
            self._start(key, name, len(event["history"]), event.get("notes", ()))
        elif event["event"] == "epoch":
            self._done[key], self._top1[key] = event["epoch"], event["top1"]
            self._epoch(name, event)
        elif event["event"] == "progress":
            self._describe(
                name, event["epoch"], event["epochs"], event["loss"], self._top1.get(key), event["images_per_s"]
            )
            self._progress.update(self._all, completed=sum(self._done.values()) + event["fraction"])
        elif event["status"] == "failed":
            self._console.print(f"{name}: {event['message']}", style="red", highlight=False, markup=False)

    def _start(self, key: tuple[str, int], name: str, done: int, notes: Sequence[str]) -> None:
        if not self._started:
            self._started = time.monotonic()
        if key in self._done:
            self._console.print(f"{name}: the workers were started again; going on after epoch {done}", highlight=False)
        elif done:
            self._console.print(f"{name}: going on after epoch {done}", highlight=False)
            self._skipped += done
        for note in notes:
            self._console.print(f"{name}: {note}", style="yellow", highlight=False, markup=False, soft_wrap=True)
        self._done[key] = done
        self._progress.update(self._all, completed=sum(self._done.values()), description=name)

    def _epoch(self, name: str, event: dict[str, Any]) -> None:
        epoch, epochs = event["epoch"], event["epochs"]
        line = self._describe(name, epoch, epochs, event["train_loss"], event["top1"], event["images_per_s"])
        done = sum(self._done.values())
        self._progress.update(self._all, completed=done)
        if self._console.is_terminal:
            return
        if epoch == epochs or time.monotonic() - self._told > _LINE_EVERY:
            self._told = time.monotonic()
            left = (self._told - self._started) / max(1, done - self._skipped) * (self._epochs - done)
            self._console.print(f"{line}, {left / 60:.1f} min left", highlight=False, soft_wrap=True)

    def _describe(self, name: str, epoch: int, epochs: int, loss: float, top1: float | None, rate: float) -> str:
        accuracy = "" if top1 is None else f", top-1 {top1:.2f} %"
        line = f"{name}, epoch {epoch}/{epochs}, loss {loss:.3f}{accuracy}, {rate:,.0f} images/s"
        self._progress.update(self._all, description=line)
        return line
