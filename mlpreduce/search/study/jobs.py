"""Jobs: a point and a part of it, such as a seed, as what a worker needs to value it; and what they came to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlpreduce.errors import ReductionError
from mlpreduce.launch import LaunchSettings
from mlpreduce.recipe import Recipe, changed, runs
from mlpreduce.search.spaces.points import Point, Pricer, distance
from mlpreduce.search.spaces.space import Suggestion
from mlpreduce.search.spaces.subjects import RecipeModel
from mlpreduce.search.study.settings import REFERENCES, StudySettings
from mlpreduce.train.settings import Run, Step
from mlpreduce.words.notation import as_steps, is_call

__all__ = [
    "Job",
    "Kind",
    "Outcome",
    "Told",
    "Work",
    "job_of",
    "nearest",
    "pricer_of",
    "references_of",
    "runs_of",
    "work_of",
]

Kind = Literal["first", "reference", "trial", "further"]


@dataclass(frozen=True)
class Work:
    """How a point is trained.

    Attributes:
        run: with its seed.
        launch: on how many processes.
        screen: images on which it is tried before, or 0.
        estimate: of a supernet, steps of the points that it estimates.
    """

    run: Run
    launch: LaunchSettings
    screen: int = 0
    estimate: tuple[tuple[Step, ...], ...] = ()


@dataclass(frozen=True)
class Job:
    """A part of a point, to be valued.

    Attributes:
        kind: why.
        name: as it is shown.
        point: what is valued.
        part: a seed, or how it is repaired.
        label: what is shown of the part.
        key: of the point; "supernet" of that.
        work: how it is trained; None where it is scored.
        id: given by the owner, anew for each try.
        number: of the trial, if it is one's.
        fixed: whether it is never ended early.
        retries: how often its worker was lost.
    """

    kind: Kind
    name: str
    point: Point
    part: int
    label: str
    key: str
    work: Work | None = None
    id: int = 0
    number: int | None = None
    fixed: bool = False
    retries: int = 0


@dataclass(frozen=True)
class Outcome:
    """What a worker made of a job.

    Attributes:
        status: "finished", "screened", "stopped" or "failed".
        message: why.
        run: the score, JSON values, where a point is scored.
        training: when training began and ended, in seconds since 1970.
        estimates: of all points of a supernet.
        seconds: that these took.
    """

    status: str = "finished"
    message: str = ""
    run: Mapping[str, Any] | None = None
    training: tuple[float, float] | None = None
    estimates: Sequence[Mapping[str, float]] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Told:
    """What is shown of a job that has ended: also "lost" is a status."""

    job: Job
    status: str
    message: str
    value: float | None = None


def pricer_of(settings: StudySettings, recipe: Recipe) -> Pricer:
    """The pricer of a study whose points are trained.

    Sub-models of a supernet must be the same whatever its weights are, so no space may look at those.
    """
    if settings.supernet:
        return Pricer(RecipeModel(recipe, trained=False))
    return Pricer(RecipeModel(recipe, trained=True if settings.inherit == "baseline" else None))


def references_of(settings: StudySettings, recipe: Recipe, pricer: Pricer) -> dict[str, Point]:
    """Find the points that a study is compared with: variants of the recipe, the paper's, or steps as a person types them.

    Raises:
        ReductionError: there is none of a name, or it cannot be carried out.
    """
    found: dict[str, Point] = {}
    for name in settings.references:
        if name in recipe.variants or name in REFERENCES:
            steps = recipe.variants[name] if name in recipe.variants else REFERENCES[name]
        elif is_call(name):  # a reduction as it is typed, and named so
            steps = tuple(as_steps(name))
        else:
            raise ReductionError(
                f"--references {name}: neither a variant of {recipe.name} nor one of {', '.join(REFERENCES)}; write another "
                f'reduction as in "baseline,grouped(group=4)"'
            )
        try:
            found[name] = pricer.price(Suggestion(tuple(steps), {}))
        except ReductionError as error:
            raise ReductionError(
                f"--references {name}: {error}; leave it out, or give others by --references"
            ) from error
    return found


def runs_of(recipe: Recipe, points: Iterable[Point]) -> list[Run]:
    """Runs of some points with the recipe's first seed, for checks."""
    variants = {point.key: point.steps for point in points}
    return runs(recipe.model_copy(update={"variants": variants, "seeds": recipe.seeds[:1]}), ".")


def job_of(
    kind: Kind,
    name: str,
    point: Point,
    seed: int,
    *,
    settings: StudySettings,
    recipe: Recipe,
    folder: Path,
    weights: str = "",
    inherit: str = "",
) -> Job:
    """A job that trains a point.

    Args:
        kind: "first", "reference", "trial" or "further".
        name: as it is shown.
        point: what is trained.
        seed: of the training.
        settings: of the study.
        recipe: how a point is trained.
        folder: under which all runs lie.
        weights: of the unreduced model, to start from, if not the recipe's.
        inherit: folder of a run whose weights are copied as far as they fit.
    """
    changed_recipe = changed(recipe, point.settings)
    processes = settings.trial_workers if settings.trial_workers > 1 else 0
    launch = changed_recipe.launch.model_copy(update={"workers": processes, "min_workers": 0})
    model = changed_recipe.model.model_copy(update={"weights": weights} if weights else {})
    update = {"variants": {point.key: point.steps}, "seeds": (seed,), "launch": launch, "model": model}
    (run,) = runs(changed_recipe.model_copy(update=update), folder)
    screen = settings.screen if kind == "trial" else 0
    work = Work(run.model_copy(update={"inherit": inherit}), launch, screen)
    return Job(kind, name, point, seed, f"seed {seed}", point.key, work)


def work_of(job: Job) -> Work:
    """How the point of a job is trained."""
    if job.work is None:
        raise TypeError(f"{job.name} is scored, not trained")
    return job.work


def nearest(point: Point, others: Iterable[Point]) -> Point | None:
    """The point whose pattern is nearest; None where no other has as many blocks."""
    alike = [other for other in others if len(other.pattern["blocks"]) == len(point.pattern["blocks"])]
    return min(alike, key=lambda other: distance(other, point), default=None)
