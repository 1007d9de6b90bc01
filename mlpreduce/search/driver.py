"""Drives a study: checks all before anything is trained, keeps the workers busy, shows what comes of it, reports."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlpreduce.budget import number
from mlpreduce.errors import ReductionError, call_text, require
from mlpreduce.launch import Lost, Pool, pool
from mlpreduce.recipe import Recipe, changed, load, with_plugins
from mlpreduce.recipe.running import mlflow_lines
from mlpreduce.search.answer import metrics_of
from mlpreduce.search.export import write_best
from mlpreduce.search.spaces.choices import Walker
from mlpreduce.search.spaces.goals import Budget, check_objectives, read_budgets
from mlpreduce.search.spaces.space import Space, Suggestion, load_space
from mlpreduce.search.study.jobs import Told, pricer_of, references_of, runs_of
from mlpreduce.search.study.settings import StudySettings, make_settings
from mlpreduce.search.study.storage import folder_of
from mlpreduce.search.supernet.ranking import Ranking, check_space
from mlpreduce.search.training import training_owner
from mlpreduce.search.trial import carry_out
from mlpreduce.train.names import Name, check_reach, names_of
from mlpreduce.words.addresses import hidden
from mlpreduce.words.console import from_here, screen, wrapped
from mlpreduce.words.markup import shortened

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from mlpreduce.records import StudyDocument
    from mlpreduce.words.pulse import Pulse

__all__ = ["check_budgets", "drive", "run"]

_BEGUN = "study.json"
_LONG = 120  # characters of a reduction in a line
_SOME = 20  # points that are tried as sub-models before a study begins


def run(
    space: str | Path | Callable[..., Any],
    recipe: str | Recipe = "digits",
    *,
    overrides: Sequence[str] = (),
    plugins: Sequence[str | Path] = (),
    storage: str | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    console: Console | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Search a space for reductions, or go on with a study.

    Every suggestion is priced exactly on the meta device before anything trains; those above a budget and those that were
    trained before cost milliseconds. The paper's reductions and the baseline are trained beside the study, outside of
    `trials`. When all trials have ended, the points that may belong to the front are trained with the other seeds.

    Args:
        space: a name of `list_spaces`, a path to a .py, or a function `suggest(trial)` or `suggest(trial, model)`.
        recipe: how a point is trained: a name, a path to a .toml, or a recipe.
        overrides: dotted keys and values that change the recipe, such as `train.epochs=2`.
        plugins: files of your own code besides those of the recipe, relative to the current directory.
        storage: URL of Optuna's storage; by default a SQLite file in `output`.
        output: directory of the study; by default `runs/SPACE-RECIPE`.
        resume: go on with the study in `output`; where there is none, start.
        console: where progress and results are shown.
        **settings: fields of `StudySettings`, such as `trials`, `workers`, `objectives` and `budgets`.

    Returns:
        The document of the study: what `study.json` holds.

    Raises:
        ReductionError: an unknown name, an unreachable budget, a study of other settings, another process that has it.
        KeyboardInterrupt: interrupted; nothing is left running, and `resume` goes on.
    """
    import optuna

    from mlpreduce.words.pulse import Pulse

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it would tell of each walk through the space
    console = console or screen()
    recipe = load(recipe, overrides, plugins) if isinstance(recipe, str) else with_plugins(recipe, plugins)
    found = load_space(space)
    place = Path(output or f"runs/{found.name}-{recipe.name}").resolve()
    wanted = _settings(found, recipe, settings)
    if wanted.workers:
        require(f"workers={wanted.workers}", "ray")
    with Pulse(console, f"{wanted.name}: checking the space and the data"):
        budgets, names = _check(found, recipe, wanted)
    url = storage or f"sqlite:///{place}/optuna.db"
    begun = (place / _BEGUN).is_file() or (storage is None and (place / "optuna.db").is_file())
    if begun and not resume:
        raise ReductionError(f"--output {place}: a study lies there; go on with --resume, or give another --output")
    place.mkdir(parents=True, exist_ok=True)
    limits = [f"{b.cost} <= {b.limit:,}" for b in budgets]
    text = (
        f"{wanted.name}: {wanted.trials} trials of {recipe.train.epochs} epochs, {max(1, wanted.workers)} at a time, for "
        f"{', '.join([*wanted.objectives, *limits])}. Output: {from_here(place)}"
    )
    console.print(wrapped(text, console.width), highlight=False, soft_wrap=True, markup=False)
    for plugin in recipe.plugins:
        console.print(f"plug-in {plugin}", highlight=False, markup=False, soft_wrap=True)
    folders = [str(place), *(str(folder) for folder in [folder_of(url)] if folder not in (None, place))]
    given = space if callable(space) else str(Path(space).resolve()) if str(space).endswith(".py") else str(space)
    documents = wanted.model_dump(mode="json"), recipe.model_dump(mode="json")
    arguments = (*documents, given, url, str(place), resume, names if wanted.workers else ())
    launch = recipe.launch.model_copy(update={"workers": wanted.trial_workers, "min_workers": 0})
    started = time.monotonic()
    progress = _bar(console)
    bar = progress.add_task("", total=wanted.trials)
    with (
        Pulse(console, _starting(wanted), below=progress) as pulse,
        pool(
            wanted.workers,
            training_owner,
            arguments,
            carry_out,
            directories=folders,
            launch=launch,
            cpus=wanted.cpus,
            gpus=wanted.gpus,
        ) as workers,
    ):
        drive(workers, wanted.trials, pulse, lambda trained: progress.update(bar, completed=trained), "training", _top1)
        pulse.now("writing the report")
        document: StudyDocument = workers.call("document", time.monotonic() - started)
        paths = _publish(document, recipe, place)
        workers.call("publish", metrics_of(document), [str(path) for path in paths])
        pulse.now("ending the workers")
    _show(document, place, url, console)
    return document.as_json()


def _settings(space: Space, recipe: Recipe, given: dict[str, Any]) -> StudySettings:
    """The settings of a study, with what follows from the recipe.

    Raises:
        ReductionError: a key or a value that there is not.
    """
    known = {"name": f"{space.name}-{recipe.name}", "seeds": recipe.seeds}
    settings = make_settings("search", {**known, **{key: value for key, value in given.items() if value is not None}})
    check_objectives(settings.objectives)
    if settings.pruner == "median" and len(settings.objectives) > 1:
        raise ReductionError(
            f"--pruner median: it compares one objective, and there are {len(settings.objectives)}; use asha or none, or "
            f"--objectives top1 with a --budget"
        )
    if not settings.seeds or len(set(settings.seeds)) < len(settings.seeds):
        raise ReductionError(f"--seeds {','.join(map(str, settings.seeds))}: give at least one, each once")
    if settings.inherit == "baseline" and "baseline" not in settings.references:
        raise ReductionError("--inherit baseline: the baseline is not trained; add it to --references")
    if settings.inherit == "baseline" and recipe.model.weights:
        raise ReductionError("--inherit baseline: model.weights are given, and trials start from those; leave one out")
    if settings.screen and settings.inherit != "baseline" and not recipe.model.weights:
        raise ReductionError(
            f"--screen {settings.screen}: untrained weights tell nothing; add --inherit baseline, or give model.weights"
        )
    if settings.supernet and settings.trial_workers > 1:
        raise ReductionError(f"--supernet {settings.supernet}: it is trained by one process; leave --trial-workers out")
    if recipe.sweep:
        raise ReductionError(
            f"--recipe {recipe.name}: it is a sweep; search one of its points: 'sweep={{}}' leaves the recipe itself"
        )
    return settings


def _check(space: Space, recipe: Recipe, settings: StudySettings) -> tuple[tuple[Budget, ...], list[Name]]:
    """Try the space and the references before anything is trained; the budgets, and the names that workers must know.

    Raises:
        ReductionError: a name that does not exist, a reference that cannot be made, a budget that no point keeps.
    """
    from mlpreduce.data import check

    if not os.environ.get("RAY_ADDRESS"):  # a cluster may see what this machine does not
        check(recipe.data)
    pricer = pricer_of(settings, recipe)
    walker = Walker(space, pricer)
    points = walker.check()
    for point in points:
        changed(recipe, point.settings)
    points += references_of(settings, recipe, pricer).values()
    trained = runs_of(recipe, points)
    if settings.workers:
        check_reach(trained)
    budgets = read_budgets(settings.budgets, pricer.price(Suggestion((), {})).cost)
    check_budgets(space, walker, budgets)
    if settings.supernet:
        some = settings.model_copy(update={"supernet_points": min(settings.supernet_points, _SOME)})
        check_space(Ranking(some, recipe, space, pricer, budgets, Path()))
    return budgets, list(dict.fromkeys(name for run in trained for name in names_of(run)))


def check_budgets(space: Space, walker: Walker, budgets: Sequence[Budget]) -> None:
    """Whether a space has a point that keeps all budgets.

    Raises:
        ReductionError: it has none, with the least that it reaches.
    """
    for budget in budgets:
        _, least = walker.cheapest(budget.cost)
        if budget.excess(least.cost) > 0:
            raise ReductionError(
                f"budget {budget.text!r}: it allows {number(budget.limit)}, and the smallest that {space.name} reaches is "
                f"{number(budget.of(least.cost))}: {_text(least.steps)}"
            )
    if len(budgets) > 1:
        _, least = walker.cheapest(budgets[0].cost, budgets)
        if over := [budget for budget in budgets if budget.excess(least.cost) > 0]:
            near = ", ".join(f"{budget.cost} {number(budget.of(least.cost))}" for budget in budgets)
            raise ReductionError(
                f"budget {over[0].text!r}: no point of {space.name} was found that keeps all budgets; the nearest has "
                f"{near}: {_text(least.steps)}"
            )


def _starting(settings: StudySettings) -> str:
    """What is going on before the first trial."""
    if not settings.workers:
        return "opening the study"
    return f"starting Ray and {settings.workers} worker{'s' if settings.workers > 1 else ''}"


def _bar(console: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(BarColumn(20), MofNCompleteColumn(), TextColumn("trials"), TimeElapsedColumn(), console=console)


def drive(
    workers: Pool,
    trials: int,
    pulse: Pulse,
    advance: Callable[[int], object],
    doing: str,
    shown: Callable[[float], str],
    until: float = math.inf,
) -> None:
    """Keep the workers busy until nothing is left to do.

    Args:
        workers: carry out jobs.
        trials: how many are wanted.
        pulse: shows what is going on.
        advance: is told how many trials have ended.
        doing: what workers do with a point, in a word.
        shown: writes a value.
        until: no trial begins after this time of `time.monotonic`.
    """
    running: dict[int, str] = {}
    counts = workers.call("counts")
    late = False
    while True:
        if not late and time.monotonic() > until:
            late = True
            workers.call("ask_no_more")
        while len(running) < workers.size and (job := workers.call("next_job")) is not None:
            running[job.id] = f"{job.name}, {job.label}"
            pulse.now(f"[{counts['trained']}/{trials}] {doing} {'; '.join(running.values())}")
            workers.start(job)
        if not running:
            if counts["trained"] < trials and not late:
                pulse.line(f"no other point of the space was found: {counts['trained']} were trained", "yellow")
            return
        ended = workers.wait()
        if not ended:
            workers.call("flush")  # so that MLflow shows what is being trained
        for job, outcome in ended:
            running.pop(job.id, None)
            if isinstance(outcome, Lost):
                told = workers.call("lost", job.id, outcome.message)
            else:
                told = workers.call("done", job.id, outcome)
            counts = workers.call("counts")
            advance(counts["trained"])
            pulse.line(_line(told, counts, trials, shown))


def _top1(value: float) -> str:
    return f"top-1 {value:.2f} %"


def _line(told: Told, counts: dict[str, int], trials: int, shown: Callable[[float], str]) -> str:
    """What became of a job, in one line."""
    job, value = told.job, "" if told.value is None else f", {shown(told.value)}"
    how = {
        "finished": "",
        "stopped": ", ended early",
        "screened": ", not trained",
        "failed": ", failed",
        "lost": ", its worker was lost; once more",
    }
    known = told.status != "lost"
    what = f": {shortened(_text(job.point.steps), _LONG)}" if known and job.kind != "first" else ""
    part = f", {job.label}" if known and job.kind != "trial" else ""
    message = f" ({told.message})" if told.message else ""
    return f"[{counts['trained']}/{trials}] {job.name}{part}{what}{value}{how[told.status]}{message}"


def _text(steps: Sequence[dict[str, Any]]) -> str:
    """A reduction in one line."""
    named = [(step["transform"], {key: value for key, value in step.items() if key != "transform"}) for step in steps]
    return ", ".join(call_text(name, config) for name, config in named) or "as it is"


def _publish(document: StudyDocument, recipe: Recipe, place: Path) -> list[Path]:
    """Write the document, the report and the recipes of the front."""
    from mlpreduce.records import store
    from mlpreduce.report.search import build_search

    store(place, _BEGUN, document.as_json())
    return [place / _BEGUN, *build_search(document, place), *write_best(document, recipe, place / "best")]


def _show(document: StudyDocument, place: Path, url: str, console: Console) -> None:
    from mlpreduce.records import tracking_uri
    from mlpreduce.report.search import console_table

    console.print(console_table(document))
    for verdict in document.verdicts:
        console.print(wrapped(verdict, console.width), highlight=False, markup=False, soft_wrap=True)
    best = [point for point in document.points if point.front]
    here = from_here(place)
    lines = [
        f"report   {here / 'report.html'}",
        f"         {here / 'report.md'}",
        *(f"recipes  {here / 'best'}/: {len(best)} that run as they are" for _ in best[:1]),
        f"study    {here / _BEGUN}; Optuna: {_optuna(url, place, here)}, {json.dumps(document.study)}",
        *mlflow_lines(tracking_uri(place), here, console.width),
    ]
    text = "\n".join(wrapped(line, console.width, " " * 9) for line in lines[:-1])
    console.print(f"{text}\n{lines[-1]}", highlight=False, soft_wrap=True, markup=False)


def _optuna(url: str, place: Path, here: Path) -> str:
    """The URL of Optuna's storage to show: without a password, and as a file in the output directory is named from here."""
    return f"sqlite:///{here / 'optuna.db'}" if url == f"sqlite:///{place / 'optuna.db'}" else hidden(url)
