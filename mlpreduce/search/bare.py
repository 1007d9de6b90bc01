"""What the bench compares a study with: the clocks of its trials, and the same points by Optuna alone.

Times are seconds of the wall clock since 1970, on the machine that noted them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna

from mlpreduce.errors import ReductionError
from mlpreduce.launch import execute
from mlpreduce.recipe import Recipe, changed, runs
from mlpreduce.search.spaces.points import Pricer
from mlpreduce.search.spaces.space import Space, Suggestion
from mlpreduce.search.spaces.subjects import RecipeModel
from mlpreduce.search.study.storage import finished, point_of
from mlpreduce.train.events import Ended, EpochEnded, Event, Started
from mlpreduce.train.settings import Step

__all__ = ["Clock", "clocks", "train_bare"]


@dataclass(frozen=True)
class Clock:
    """When what happened to a trial.

    Attributes:
        params: its choices, by parameter of the space.
        steps: the reduction that was trained.
        top1: of its best epoch, in percent.
        asked: Optuna made it.
        began: its training began, where it was trained.
        ended: its training ended.
        told: Optuna was told its values.
    """

    params: dict[str, Any]
    steps: tuple[Step, ...]
    top1: float
    asked: float
    began: float
    ended: float
    told: float


def clocks(study: optuna.Study) -> list[Clock]:
    """The trials of a study of ours that were trained to their end, in the order in which they were asked for.

    Raises:
        ReductionError: it was kept by a version that does not note when a trial was trained, or its first objective is not
            top1.
    """
    settings = study.user_attrs.get("settings", {})
    if tuple(settings.get("objectives", ()))[:1] != ("top1",):
        raise ReductionError(f"study {study.study_name!r}: clocks are read of studies whose first objective is top1")
    found = []
    for trial in finished(study):
        if not trial.values:
            continue
        if "training" not in trial.user_attrs:
            raise ReductionError(
                f"study {study.study_name!r}: trial {trial.number} does not say when it was trained; search again with this "
                f"version"
            )
        found.append(_clock(trial, point_of(trial).steps, *trial.user_attrs["training"]))
    return sorted(found, key=lambda clock: clock.asked)


def train_bare(
    space: Space, recipe: Recipe, points: Sequence[Mapping[str, Any]], folder: Path, *, seed: int = 0
) -> list[Clock]:
    """Ask Optuna for points, train each with the recipe's first seed in this process, and tell it: no Ray, no MLflow.

    The baseline is trained before, and not counted, so that all that a first training imports is there.

    Args:
        space: suggests the points.
        recipe: how they are trained.
        points: choices by parameter, which are enqueued; as many trials are made.
        folder: where Optuna's SQLite file and the checkpoints are written.
        seed: of the sampler.

    Returns:
        The clocks of the trials, in order.

    Raises:
        ReductionError: a point cannot be trained.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=f"sqlite:///{folder}/optuna.db",
        sampler=optuna.samplers.RandomSampler(seed=seed),
        directions=["maximize", "minimize"],
    )
    for choices in points:
        study.enqueue_trial(dict(choices))
    model = Pricer(RecipeModel(recipe)).model
    _train(Suggestion((), {}), recipe, folder / "baseline")
    found = []
    for number in range(len(points)):
        trial = study.ask()
        suggestion = space.suggest(trial, model)
        began = time.time()
        values = _train(suggestion, recipe, folder / str(number))
        ended = time.time()
        frozen = study.tell(trial, values)
        steps = tuple(json.loads(json.dumps(suggestion.steps)))
        found.append(_clock(frozen, steps, began, ended))
    return found


def _clock(trial: optuna.trial.FrozenTrial, steps: tuple[Step, ...], began: float, ended: float) -> Clock:
    asked, told = trial.datetime_start, trial.datetime_complete
    if asked is None or told is None:
        raise ReductionError(f"bench search: Optuna has no times of trial {trial.number}, which has ended")
    return Clock(dict(trial.params), steps, trial.values[0], asked.timestamp(), began, ended, told.timestamp())


def _train(suggestion: Suggestion, recipe: Recipe, folder: Path) -> tuple[float, float]:
    """Train a point in this process: its top-1 and its parameters."""
    recipe = changed(recipe, suggestion.settings)
    launch = recipe.launch.model_copy(update={"workers": 0, "min_workers": 0})
    one = {"variants": {"point": suggestion.steps}, "seeds": recipe.seeds[:1], "launch": launch}
    (run,) = runs(recipe.model_copy(update=one), folder)
    events: list[Event] = []
    execute([run], launch, events.append)
    told = [event.what for event in events]
    if not isinstance(told[-1], Ended) or told[-1].status != "finished":
        raise ReductionError(f"bench search: Optuna alone: {getattr(told[-1], 'message', 'the training did not end')}")
    params = next(what.facts["profile"]["params"] for what in told if isinstance(what, Started))
    return max(what.entry["top1"] for what in told if isinstance(what, EpochEnded)), float(params)
