"""Steps of a reduction that look at data: which those are, what they are given, and what stands for them without data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import mlpreduce
from mlpreduce.criteria import Criterion, choose
from mlpreduce.data import calibration
from mlpreduce.edits import Plan
from mlpreduce.errors import ReductionError
from mlpreduce.reduction import remember
from mlpreduce.registry import origin
from mlpreduce.surgery import carry_out
from mlpreduce.train.settings import Run, Step
from mlpreduce.transforms import get_transform
from mlpreduce.transforms.patterns import BY_DATA

__all__ = [
    "apply_as_before",
    "apply_step",
    "calibration_data",
    "check_criterion",
    "criterion_of",
    "needs_data",
    "seeded",
    "without_data",
]

_KEPT_BY_DATA = ("auto", "align_activations")  # values of `keep`


def needs_data(step: Step) -> bool:
    """Whether a step chooses units, groups or factors by calibration data, or repairs what is left with it.

    Example:
        >>> needs_data({"transform": "shallow", "criterion": "nvit"}), needs_data({"transform": "shallow"})
        (True, False)
    """
    if step.get("repair", "none") != "none" or step.get("pattern") in BY_DATA or step.get("init") == "data":
        return True
    if step.get("keep") in _KEPT_BY_DATA or _corrects(step):
        return True
    criterion = criterion_of(step)
    return criterion is not None and criterion.of_data


def _corrects(step: Step) -> bool:
    """Whether corrections of the uses of a shared layer start at what it lacks."""
    own = step.get("per_use")
    return isinstance(own, dict) and own.get("init") == "residual"


def criterion_of(step: Mapping[str, Any]) -> Criterion | None:
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


def without_data(step: Step) -> Step:
    """A step of about the same cost that needs neither data nor weights, for a model on the meta device.

    Widths that would follow from scores become those of `scope="uniform"`: a target is met all the same, up to rounding.
    A step that needs no data is returned as it is.

    Example:
        >>> without_data({"transform": "shallow", "ratio": 0.5, "criterion": "nvit", "scope": "global"})
        {'transform': 'shallow', 'ratio': 0.5, 'criterion': 'first', 'scope': 'uniform'}
    """
    if not needs_data(step):
        return step
    kept = {key: value for key, value in step.items() if key not in ("repair", "latency_weight")}
    plain = {"criterion": "first", "scope": "uniform"} | ({"init": "weights"} if step.get("init") == "data" else {})
    if kept.get("keep") in _KEPT_BY_DATA:
        kept["keep"] = "first"
    if _corrects(step):
        kept["per_use"] = {key: value for key, value in kept["per_use"].items() if key != "init"}
    if kept.get("pattern") in BY_DATA:  # as many MLPs are left
        return kept | {"pattern": "cycle"}
    return {key: plain.get(key, value) for key, value in kept.items()}


def calibration_data(run: Run) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """This process's share of `model.calibration_images` training images, with labels, without augmentation.

    Which images, and their order, follow from the data set alone; of several processes in a group, each takes every n-th.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
    return calibration(run.data, run.model.calibration_images, rank=rank, world=world)


def seeded(step: Step, seed: int) -> Step:
    """Let the random numbers of a step follow the seed of the run, where it draws some and names no seed itself.

    Example:
        >>> seeded({"transform": "low_rank", "init": "new"}, 42)
        {'transform': 'low_rank', 'init': 'new', 'seed': 42}
    """
    own = step.get("per_use", "none")
    if own == "lora" or (isinstance(own, dict) and own.get("name") == "lora"):
        return {**step, "per_use": {"name": "lora", "seed": seed} | (own if isinstance(own, dict) else {})}
    drawn = step.get("init") in ("new", "normal", "released") or step.get("cca", "none") != "none"
    drawn = drawn or step["transform"] == "lora" or step.get("pattern") == "random"
    drawn = drawn or any(criterion.draws for criterion in _criteria_in(step))
    takes = "seed" in get_transform(step["transform"]).parameters
    return {**step, "seed": seed} if drawn and takes and "seed" not in step else step


def _criteria_in(config: Any) -> Iterator[Criterion]:
    """The criteria that a step names, by name or as a dictionary, also inside of other options."""
    if isinstance(config, Mapping):
        criterion = criterion_of(config)
        if criterion is not None:
            yield criterion
    nested = config.values() if isinstance(config, Mapping) else config if isinstance(config, (list, tuple)) else ()
    for value in nested:
        yield from _criteria_in(value)


def apply_step(model: nn.Module, step: Step, data: Any = None) -> None:
    """Reduce a model in place by one step."""
    config = {key: value for key, value in step.items() if key != "transform"}
    mlpreduce.apply(model, step["transform"], data=data, **config)


def apply_as_before(model: nn.Module, text: str) -> None:
    """Reduce a model in place by a plan in JSON, which has no values of new weights: a checkpoint does."""
    plan = Plan.from_json(text)
    carry_out(model, plan, weights=False)
    remember(model, plan)
