"""What a study reduces: here the model that a recipe names, which is built when a point is priced."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from mlpreduce.budget import Baseline, Cost, measure
from mlpreduce.edits import Plan
from mlpreduce.errors import ReductionError, call_text
from mlpreduce.graph import Survey, mlps_or_raise
from mlpreduce.recipe import Recipe, changed, runs
from mlpreduce.reduction.planning import make_plan
from mlpreduce.search.spaces.space import InHand
from mlpreduce.train.parts import build_model, images_of
from mlpreduce.train.settings import Run, Step
from mlpreduce.transforms.steps import follows, needs_data, without_data

__all__ = ["RecipeModel", "Subject", "Unreduced"]

_KEPT = 16  # unreduced models: settings may change what is built


@dataclass(frozen=True)
class Unreduced:
    """An unreduced model, and what is known of it."""

    model: nn.Module
    found: Survey
    measured: Baseline
    inputs: Any


class Subject(Protocol):
    """What a study reduces.

    Attributes:
        trained: whether points start from trained weights.
        hand: what spaces may ask of weights; None where they are not known.
    """

    @property
    def trained(self) -> bool: ...

    @property
    def hand(self) -> InHand | None: ...

    @property
    def name(self) -> str:
        """As it is shown."""

    def unreduced(
        self, settings: Mapping[str, Any], first: Step | None, *, weights: bool = False, seed: int = 0
    ) -> Unreduced:
        """The model before all steps that act on a built model.

        Args:
            settings: of a point, which may change what is built.
            first: a step that acts when the model is built.
            weights: whether steps look at weights.
            seed: of these, where they are random and stand for given ones.
        """

    def plan(self, tree: nn.Module, step: Step, found: Survey) -> Plan:
        """A plan of a step, as far as it decides what the model costs.

        Raises:
            ReductionError: it cannot be carried out, or its cost is not known before.
        """

    def timed(self, cost: Cost, pattern: Mapping[str, Sequence[Any]], plans: Sequence[Plan]) -> Cost:
        """The cost of a point, with its latency where that is known.

        Raises:
            ReductionError: it is wanted, and the plans do what it is not known of.
        """


class RecipeModel:
    """The model of a recipe.

    Args:
        recipe: names the model.
        trained: whether points start from trained weights; by default, whether the recipe gives some.
    """

    def __init__(self, recipe: Recipe, *, trained: bool | None = None) -> None:
        self.recipe, self.trained = recipe, bool(recipe.model.weights) if trained is None else trained
        self._known: dict[str, Unreduced] = {}
        self.hand = None

    @property
    def name(self) -> str:
        """The recipe's."""
        return self.recipe.name

    def unreduced(
        self, settings: Mapping[str, Any], first: Step | None, *, weights: bool = False, seed: int = 0
    ) -> Unreduced:
        """The model before all steps that act on a built model; on the meta device unless weights are looked at."""
        run: Run = runs(changed(self.recipe, settings), ".")[0].model_copy(update={"steps": (first,) if first else ()})
        if weights:  # random ones stand for given ones, which may lie elsewhere
            run = run.model_copy(update={"model": run.model.model_copy(update={"weights": ""}), "seed": seed})
        key = json.dumps([run.model.model_dump(mode="json"), first, weights, seed], sort_keys=True, default=str)
        if key not in self._known:
            if len(self._known) >= _KEPT:
                self._known.pop(next(iter(self._known)))
            model = build_model(run, device=None if weights else "meta")
            image: torch.Tensor = images_of(run, model)
            found = mlps_or_raise(model, f"search({run.model.name})")
            self._known[key] = Unreduced(model, found, measure(model, image, mlps=found.mlps), image)
        return self._known[key]

    def plan(self, tree: nn.Module, step: Step, found: Survey) -> Plan:
        """A plan of a step of the same cost that needs no data.

        Raises:
            ReductionError: it cannot be carried out, or its cost follows from weights or data.
        """
        config = {key: value for key, value in _priced(step).items() if key != "transform"}
        return make_plan(tree, step["transform"], config, found=found)[0]

    def timed(self, cost: Cost, pattern: Mapping[str, Sequence[Any]], plans: Sequence[Plan]) -> Cost:
        """The cost alone: latency is measured in a trial."""
        return cost


def _priced(step: Step) -> Step:
    """A step of the same cost that needs no data.

    Raises:
        ReductionError: its cost follows from the data.
    """
    late = follows(step)
    if late is not None and (needs_data(step) or not late.roughly):
        call = call_text(step["transform"], {key: value for key, value in step.items() if key != "transform"})
        source = "training images" if late.roughly else "given weights"
        raise ReductionError(
            f"{call}: with {late.option}={step.get(late.option)!r} the cost follows from {source}, and a search knows costs "
            f"before; search over {late.instead}"
        )
    return without_data(step)
