"""Steps of a reduction, a transform's name and its config: what they look at, draw and cost, as the transform declares it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Any

from mlpreduce.criteria import Criterion, choose
from mlpreduce.errors import ReductionError, call_text, naming
from mlpreduce.registry import origin
from mlpreduce.transforms.registry import Follows, blaming, get_transform
from mlpreduce.words.values import Config, Step

__all__ = [
    "check_criterion",
    "criterion_of",
    "follows",
    "needs_data",
    "seeded",
    "without_data",
    "without_weights",
]


def needs_data(step: Step) -> bool:
    """Whether a step chooses units, groups or factors by calibration data, or repairs what is left with it.

    Example:
        >>> needs_data({"transform": "shallow", "criterion": "nvit"}), needs_data({"transform": "shallow"})
        (True, False)
    """
    criterion = criterion_of(step)
    if step.get("repair", "none") != "none" or (criterion is not None and criterion.of_data):
        return True
    found: bool = _asked(step, "looks_at_data", bool)
    return found


def without_data(step: Step) -> Step:
    """A step of about the same cost that needs neither data nor weights, for a model on the meta device.

    A step that needs no data is returned as it is.

    Example:
        >>> without_data({"transform": "shallow", "ratio": 0.5, "criterion": "nvit", "scope": "global"})
        {'transform': 'shallow', 'ratio': 0.5, 'criterion': 'first', 'scope': 'uniform'}
    """
    if not needs_data(step):
        return step
    plain = {key: "first" if key == "criterion" else value for key, value in step.items() if key != "repair"}
    return {"transform": step["transform"], **_asked(plain, "without_data", Mapping)}


def without_weights(step: Step) -> Step:
    """A step of the same cost that looks at no weights: which units stay, and by what they are multiplied, changes no count."""
    criterion = criterion_of(step)
    if criterion is not None and criterion.needs == "weights":
        step = {**step, "criterion": "first"}
    return {"transform": step["transform"], **_asked(step, "without_weights", Mapping)}


def follows(step: Step) -> Follows | None:
    """The option by which the cost of a step is known only when scores or weights are; None where it is known before."""
    found: Follows | None = _asked(step, "follows", (Follows, NoneType))
    return found


def seeded(step: Step, seed: int) -> Step:
    """Let the random numbers of a step follow the seed of the run, where it draws some and names no seed itself.

    Example:
        >>> seeded({"transform": "low_rank", "init": "new"}, 42)
        {'transform': 'low_rank', 'init': 'new', 'seed': 42}
    """
    transform = get_transform(step["transform"])
    if transform.seeded is not None:
        return {"transform": step["transform"], **_asked(step, "seeded", Mapping, seed)}
    drawn = _asked(step, "draws", bool) or any(criterion.draws for criterion in _criteria_in(step))
    return {**step, "seed": seed} if drawn and "seed" in transform.parameters and "seed" not in step else step


def criterion_of(step: Config) -> Criterion | None:
    """The criterion that a step names; None if it names none, or means something else by it."""
    try:
        return choose(step["criterion"]).criterion if "criterion" in step else None
    except ReductionError:  # the transform will tell
        return None


def check_criterion(step: Step) -> None:
    """Check that the criterion of a step of this package exists. What a foreign transform calls a criterion is its own.

    Raises:
        ReductionError: there is no such criterion, or it has no such option.
    """
    source = origin("transform", step["transform"])
    if "criterion" in step and source is not None and source.kind == "package":
        choose(step["criterion"])


def _asked(step: Step, what: str, wanted: Any, *more: Any) -> Any:
    """What the transform of a step declares of its config.

    Raises:
        ReductionError: a transform of others raises, or gives something else than is wanted.
    """
    name, config = step["transform"], _config(step)
    with naming(call_text(name, config)):
        with blaming(name, f"{what}="):
            found = getattr(get_transform(name), what)(config, *more)
        if not isinstance(found, wanted):
            raise ReductionError(f"{what}= gave {found!r}; docs/transforms.md says what it must give")
    return found


def _config(step: Step) -> dict[str, Any]:
    return {key: value for key, value in step.items() if key != "transform"}


def _criteria_in(config: Any) -> Iterator[Criterion]:
    """The criteria that a step names, by name or as a dictionary, also inside of other options."""
    if isinstance(config, Mapping):
        criterion = criterion_of(config)
        if criterion is not None:
            yield criterion
    nested = config.values() if isinstance(config, Mapping) else config if isinstance(config, (list, tuple)) else ()
    for value in nested:
        yield from _criteria_in(value)
