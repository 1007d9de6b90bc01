"""Jobs: a point and a seed, as what a worker needs to train it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mlpreduce.errors import ReductionError
from mlpreduce.launch import Job
from mlpreduce.recipe import Recipe, changed, runs
from mlpreduce.search.points import Point, Pricer, distance
from mlpreduce.search.settings import REFERENCES, StudySettings
from mlpreduce.search.spaces import Suggestion
from mlpreduce.search.subjects import RecipeModel
from mlpreduce.train.settings import Run
from mlpreduce.words.notation import as_steps, is_call

__all__ = ["job_of", "nearest", "pricer_of", "references_of", "runs_of"]


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
    kind: str,
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
    """A job: JSON values.

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
    return {
        "kind": kind,
        "name": name,
        "number": None,
        "fixed": False,
        "key": point.key,
        "part": seed,
        "label": f"seed {seed}",
        "point": point.to_json(),
        "run": run.model_copy(update={"inherit": inherit}).model_dump(mode="json"),
        "launch": launch.model_dump(mode="json"),
        "screen": settings.screen if kind == "trial" else 0,
        "retries": 0,
    }


def nearest(point: Point, others: Iterable[Point]) -> Point | None:
    """The point whose pattern is nearest; None where no other has as many blocks."""
    alike = [other for other in others if len(other.pattern["blocks"]) == len(point.pattern["blocks"])]
    return min(alike, key=lambda other: distance(other, point), default=None)
