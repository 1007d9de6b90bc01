"""The names that a run needs, and whether workers in other processes will know them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import timm

from mlpreduce.criteria import get_criterion
from mlpreduce.errors import ReductionError
from mlpreduce.models import is_model
from mlpreduce.registry import Origin, origin, origin_of
from mlpreduce.train.settings import Run
from mlpreduce.transforms import get_transform
from mlpreduce.transforms.steps import criterion_of

__all__ = ["REMEDY", "Name", "check_known", "check_reach", "is_own", "names_of"]

Name = tuple[str, str]  # "transform", "criterion" or "model", and the name itself

REMEDY = 'put the code into a file, and name it in the recipe, plugins = ["FILE.py"], or on the command line, --plugin FILE.py'


def names_of(run: Run) -> list[Name]:
    """The names that a run needs: of its model, its transforms and their criteria."""
    return list(dict.fromkeys(_names(run)))


def _names(run: Run) -> Iterator[Name]:
    yield "model", run.model.name.partition(".")[0]
    nets = () if run.supernet is None else (*run.supernet.points, run.supernet.smallest)
    for step in (step for steps in (run.steps, *nets) for step in steps):
        yield "transform", step["transform"]
        if (criterion := criterion_of(step)) is not None:
            yield "criterion", criterion.name


def check_reach(runs: Iterable[Run]) -> None:
    """Check, before Ray starts, that its workers will know all names: those of this package and of packages with entry points.

    Runs with plug-ins are left to `check_known` in the workers: a plug-in may import there what this process has imported
    already, so this process cannot tell.

    Raises:
        ReductionError: a name was registered in this process only.
    """
    for run in (run for run in runs if not run.plugins):
        for kind, name in names_of(run):
            source = _source(kind, name)
            if source is None or source.kind in ("package", "entry points"):
                continue
            by = (
                f"the plug-in {source}, which the recipe does not name,"
                if source.digest
                else f"{source} in this process,"
            )
            raise ReductionError(
                f"train({run.label}): the {kind} {name!r} was registered by {by} so Ray's workers do not have it; {REMEDY}. "
                f"Runs without Ray (launch.workers=0, or search --workers 0) need no file"
            )


def check_known(names: Sequence[Name]) -> None:
    """Check in a worker, or in another process that has run the plug-ins and nothing else, that it knows all names.

    Raises:
        ReductionError: it does not know one.
    """
    for kind, name in names:
        try:
            _look_up(kind, name)
        except ReductionError as error:
            raise ReductionError(f"a worker does not know the {kind} {name!r}: {error}; {REMEDY}") from error


def is_own(run: Run) -> bool:
    """Whether a run needs a name that one of its plug-ins has registered."""
    sources = [_source(kind, name) for kind, name in names_of(run)]
    return any(source is not None and source.kind == "plug-in" for source in sources)


def _source(kind: str, name: str) -> Origin | None:
    """Where a name comes from; None if from timm, or if there is none."""
    if (noted := origin(kind, name)) is not None or kind != "model" or not timm.is_model(name):
        return noted
    entry = timm.model_entrypoint(name)  # registered by timm's own function
    return None if entry.__module__.partition(".")[0] == "timm" else origin_of(entry)


def _look_up(kind: str, name: str) -> None:
    if kind == "transform":
        get_transform(name)
    elif kind == "criterion":
        get_criterion(name)
    elif not is_model(name):
        import mlpreduce.timm_models  # noqa: F401  (its names may stand in recipes)

        if not is_model(name):
            raise ReductionError(f"timm has no architecture {name!r}")
