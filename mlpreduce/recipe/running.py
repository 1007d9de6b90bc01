"""Trains a recipe: all its runs on Ray or in this process, recorded, shown and reported."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlpreduce.errors import ReductionError, require
from mlpreduce.recipe.schema import Recipe, differences, points, runs
from mlpreduce.train.events import Event, Started
from mlpreduce.words.console import command_line, from_here, screen, wrapped

if TYPE_CHECKING:
    from rich.console import Console

    from mlpreduce.records import Results

__all__ = ["mlflow_lines", "train"]


def train(recipe: Recipe, output: Path, *, resume: bool = False, console: Console | None = None) -> int:
    """Train all variants and seeds of a recipe, at all points of its sweep, and report.

    Args:
        recipe: what to train.
        output: directory of records, checkpoints and report; each point of a sweep has a folder of its own in it.
        resume: go on with what lies in `output`; where nothing does, start.
        console: where progress and results are shown.

    Returns:
        0, or 1 when the loss of a run diverged.

    Raises:
        ReductionError: it cannot be carried out, or `output` holds runs and `resume` is not given, or differs.
        KeyboardInterrupt: interrupted; the records are marked, the workers have ended.
    """
    require(f"recipe {recipe.name}", "mlflow", "matplotlib", *(["ray"] if recipe.launch.workers else []))
    from mlpreduce import report
    from mlpreduce.data import check
    from mlpreduce.recipe.describe import check_names
    from mlpreduce.records import store
    from mlpreduce.train.weights import locate
    from mlpreduce.words.pulse import Pulse

    console = console or screen()
    output = output.resolve()
    document = recipe.model_dump(mode="json")
    every = {output / name: point for name, point in points(recipe).items()}
    _check_output(output, document, resume)
    if not os.environ.get("RAY_ADDRESS"):  # a cluster may see what this machine does not
        with Pulse(console, f"{recipe.name}: checking the data"):
            for point in every.values():
                check(point.data)
                if (weights := point.model.weights_path) is not None:
                    locate(weights)
    for plugin in recipe.plugins:
        console.print(f"plug-in {plugin}", highlight=False, markup=False, soft_wrap=True)
    check_names(list(every.values()))
    store(output, "recipe.json", document)
    outcomes = [_train(point, place, output, console) for place, point in every.items()]
    documents = [document for document, _ in outcomes if document is not None]
    if not documents:
        console.print("no run finished; there is nothing to report", style="red")
        return 1
    _show(report.build(output) if recipe.sweep else documents[0], output, console)
    return 0 if all(whole for _, whole in outcomes) else 1


def _check_output(output: Path, document: dict[str, Any], resume: bool) -> None:
    patterns = [f"{place}/seed*/{what}" for place in ("*", "*/*") for what in ("record.json", "checkpoints")]
    begun = {path.parent for pattern in patterns for path in output.glob(pattern)}
    if not begun:
        return
    if not resume:
        raise ReductionError(
            f"output {output} holds {len(begun)} finished or interrupted run(s); go on with --resume, or start in another "
            "--output DIR"
        )
    known = output / "recipe.json"
    try:
        before = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else {}
    except ValueError as error:  # no JSON, or no UTF-8
        raise ReductionError(
            f"--resume: {known} is damaged: {error}; put it back from a copy: any record.json below has it as its recipe"
        ) from error
    changed = differences(before, document)
    if changed:
        raise ReductionError(
            "--resume: the recipe differs from that of the output; repeat its settings, or start in another --output "
            "DIR:\n  " + "\n  ".join(changed)
        )


def _train(recipe: Recipe, place: Path, home: Path, console: Console) -> tuple[Results | None, bool]:
    """Train the runs of one point into `place`, and report; `home` has MLflow's store.

    Returns:
        What `results.json` holds, or None where no run has finished; and whether all have.
    """
    from mlpreduce import report
    from mlpreduce.launch import execute
    from mlpreduce.recipe.progress import Display, starting
    from mlpreduce.records import Recorder
    from mlpreduce.words.pulse import Pulse

    every = runs(recipe, place)
    told: set[str] = set()  # warnings that were shown: most are the same for all runs
    with Pulse(console, f"{recipe.name}: opening the records"):
        recorder = Recorder(place, recipe.model_dump(mode="json"), every, home=home)
    todo = [run for run in every if not recorder.finished(run)]
    where = f"{recipe.launch.workers} workers" if recipe.launch.workers else "this process"
    text = (
        f"{recipe.name}: {len(every)} runs ({len(recipe.variants)} variants x {len(recipe.seeds)} seeds) of "
        f"{recipe.train.epochs} epochs on {where}; {len(every) - len(todo)} finished before. Output: {from_here(place)}"
    )
    console.print(wrapped(text, console.width), highlight=False, soft_wrap=True, markup=False)
    try:
        with Display(console, todo, len(every), starting(recipe.launch)) as display:

            def consume(event: Event) -> None:
                if isinstance(event.what, Started):
                    _warn(event.what.facts.get("warnings", ()), told, console)
                recorder.handle(event)
                display.handle(event)

            execute(todo, recipe.launch, consume)
    finally:
        recorder.interrupt()  # marks what is still running: nothing, unless something was raised
    whole = all(recorder.finished(run) for run in every)
    with Pulse(console, f"{recipe.name}: writing the report"):
        try:
            document = report.build(place)
        except ReductionError:
            if whole:
                raise
            return None, False
        recorder.log_files([place / name for name in report.FILES if (place / name).is_file()])
    return document, whole


def _warn(warnings: Sequence[str], told: set[str], console: Console) -> None:
    """Show the warnings that a run begins with, each once."""
    for text in warnings:
        if text not in told:
            told.add(text)
            console.print(f"warning: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def _show(document: Results, output: Path, console: Console) -> None:
    from mlpreduce import report
    from mlpreduce.records import tracking_uri

    console.print(report.console_table(document))
    here = from_here(output)
    point = "<point>/" if document.points else ""
    lines = [
        f"results  {here / 'results.json'}",
        f"report   {here / 'report.html'}",
        f"         {here / 'report.md'}",
        f"figure   {here / 'curves.png'}",
        f"runs     {here}/{point}<variant>/seed<seed>/",
        *mlflow_lines(tracking_uri(output), here, console.width),
    ]
    console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)


def mlflow_lines(uri: str, here: Path, columns: int) -> list[str]:
    """How the runs are looked at in MLflow: the command to paste, or where they are.

    Args:
        uri: of its store.
        here: the output directory, as it is named from here.
        columns: of the console.
    """
    if not uri.startswith("sqlite:"):
        return [f"MLflow   {uri}"]
    near = f"sqlite:///{here / 'mlflow.db'}" if uri == f"sqlite:///{here.resolve() / 'mlflow.db'}" else uri
    return [command_line(["mlflow", "ui", "--backend-store-uri", near], columns)]
