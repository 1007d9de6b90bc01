"""What a suggestion comes to, before anything is trained: exact cost, pattern, and a key that equal reductions share.

Everything is read off plans on the meta device, well below a second for a model of any size, unless widths follow from weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

import mlpreduce
from mlpreduce.budget import Baseline, Cost, counted, measure
from mlpreduce.edits import Assign, Plan, Replace, Slice
from mlpreduce.errors import ReductionError, call_text
from mlpreduce.graph import Survey, mlps_or_raise, structural_copy, survey
from mlpreduce.outcomes import planned
from mlpreduce.planning import make_plan, plain
from mlpreduce.recipe import Recipe, changed, runs
from mlpreduce.search.spaces import ModelView, Suggestion
from mlpreduce.surgery import carry_out
from mlpreduce.train.calibrated import criterion_of, needs_data, without_data
from mlpreduce.train.parts import build_model, images_of
from mlpreduce.train.settings import Run, Step
from mlpreduce.transforms import is_construction

__all__ = ["Point", "Pricer", "distance"]

_VALUES = (("keep", "align_mean", "mean"), ("scale", "match_forward", "none"))  # of grouped, which take weights
_KEPT = 16  # unreduced models: settings may change what is built


@dataclass(frozen=True)
class Point:
    """A reduction and the settings to train it with.

    Attributes:
        steps: the reduction.
        settings: keys of the recipe that differ, with their values.
        cost: of the reduced model.
        pattern: names of the MLPs in order of execution (`blocks`), for each the index of the one whose weights it uses
            (`owners`) and its hidden features (`widths`).
        key: equal for points that would be trained to the same weights. Unequal ones may still be, where units are chosen
            by weights.
    """

    steps: tuple[Step, ...]
    settings: dict[str, Any]
    cost: Cost
    pattern: dict[str, list[Any]]
    key: str

    def to_json(self) -> dict[str, Any]:
        """The point as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Point:
        """The point that `to_json` wrote."""
        steps = tuple(dict(step) for step in document["steps"])
        return cls(**{**document, "steps": steps, "cost": Cost(**document["cost"])})


def distance(one: Point, other: Point) -> float:
    """How unlike two patterns of equal depth are: 1 for each block with another MLP, and its part of the width that differs."""
    here, there = one.pattern, other.pattern
    largest = max(*here["widths"], *there["widths"])
    owners = sum(a != b for a, b in zip(here["owners"], there["owners"], strict=True))
    return float(owners + sum(abs(a - b) for a, b in zip(here["widths"], there["widths"], strict=True)) / largest)


@dataclass(frozen=True)
class _Known:
    """An unreduced model, and what is known of it."""

    model: nn.Module
    found: Survey
    measured: Baseline
    image: torch.Tensor


class Pricer:
    """Prices suggestions for one recipe. Models are built once, on the meta device.

    Args:
        recipe: names the model.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._known: dict[str, _Known] = {}
        self._priced: dict[str, Point] = {}

    @cached_property
    def model(self) -> ModelView:
        """What spaces may know of the unreduced model.

        Raises:
            ReductionError: it has no MLPs, or the model cannot be built.
        """
        known = self._unreduced(self.recipe, None, device="meta")
        try:
            every = make_plan(known.model, "grouped", {"remainder": "own"}, found=known.found)[0]
        except ReductionError:
            return ModelView(tuple(known.found.mlps), ())
        chain = {mlp.name: mlp.chain for mlp in known.found.mlps}
        chains: dict[Any, list[int]] = {}
        for number, row in enumerate(every.rows):
            chains.setdefault(chain[row.mlp], []).append(number)
        return ModelView(tuple(known.found.mlps), tuple(map(tuple, chains.values())))

    def price(self, suggestion: Suggestion) -> Point:
        """The point of a suggestion.

        Raises:
            ReductionError: it cannot be carried out.
        """
        call = f"search({self.recipe.name})"
        suggestion = replace(suggestion, steps=plain(suggestion.steps, call), settings=plain(suggestion.settings, call))
        asked = json.dumps([suggestion.steps, suggestion.settings], sort_keys=True)
        if asked not in self._priced:
            self._priced[asked] = self._price(suggestion)
        return self._priced[asked]

    def _price(self, suggestion: Suggestion) -> Point:
        recipe = changed(self.recipe, suggestion.settings)
        steps = tuple(suggestion.steps)
        alike = tuple(map(_weightless, steps))
        try:
            plans, cost, after = self._plans(recipe, alike, "meta")
            others = plans
        except ReductionError:  # some widths follow from weights
            alike = steps
            plans, cost, after = self._plans(recipe, steps, None)
            others, _, _ = self._plans(recipe, steps, None, seed=1)
        index = {name: number for number, name in enumerate(after)}
        pattern: dict[str, list[Any]] = {
            "blocks": list(after),
            "owners": [index[owner] for _, owner in after.values()],
            "widths": [hidden for hidden, _ in after.values()],
        }
        identity = [
            list(map(_identity, plans, others)),
            sorted(suggestion.settings.items()),
            *(step for step, other in zip(steps, alike, strict=True) if step != other or needs_data(step)),
        ]
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        return Point(steps, suggestion.settings, cost, pattern, key)

    def _plans(
        self, recipe: Recipe, steps: Sequence[Step], device: str | None, seed: int = 0
    ) -> tuple[list[Plan], Cost, dict[str, tuple[int, str]]]:
        """The plans of all steps, and after them the cost, and of each MLP its hidden features and owner, by name."""
        rest = [dict(step) for step in steps]
        first = rest.pop(0) if rest and is_construction(rest[0]["transform"]) else None
        known = self._unreduced(recipe, first, device, seed)
        model, found, measured = known.model, replace(known.found, tree=None), known.measured
        plans = [] if first is None else mlpreduce.history(model)
        if not rest:
            return plans, measured.cost, {mlp.name: (mlp.hidden_features, mlp.owner) for mlp in found.mlps}
        tree = structural_copy(model, device=device)
        for number, step in enumerate(rest, 1):
            config = {key: value for key, value in _priced(step).items() if key != "transform"}
            plan, _ = make_plan(tree, step["transform"], config, found=found)
            plans.append(plan)
            cost, after = planned(tree, measured, plan, known.image)
            if number < len(rest):  # what follows needs the structure; no value is looked at where one was changed
                carry_out(tree, plan, weights=False)
                if plan.replaced is None:
                    found = replace(survey(tree), tree=None)
                else:
                    found = replace(found, mlps=list(plan.replaced.values()))
                positions = {mlp.name: p for mlp, p in zip(measured.mlps, measured.positions, strict=True)}
                now = tuple(positions[mlp.name] for mlp in found.mlps)
                measured = replace(counted(tree, found.mlps), cost=cost, positions=now)
        return plans, cost, after

    def _unreduced(self, recipe: Recipe, first: Step | None, device: str | None, seed: int = 0) -> _Known:
        """The model before all steps that act on a built model; `seed` is of its random weights."""
        run: Run = runs(recipe, ".")[0].model_copy(update={"steps": (first,) if first else ()})
        if device is None:  # random weights stand for given ones, which may lie elsewhere
            run = run.model_copy(update={"model": run.model.model_copy(update={"weights": ""}), "seed": seed})
        key = json.dumps([run.model.model_dump(mode="json"), first, device, seed], sort_keys=True, default=str)
        if key not in self._known:
            if len(self._known) >= _KEPT:
                self._known.pop(next(iter(self._known)))
            model = build_model(run, device=device)
            image = images_of(run, model)
            found = mlps_or_raise(model, f"search({run.model.name})")
            self._known[key] = _Known(model, found, measure(model, image, mlps=found.mlps), image)
        return self._known[key]


def _weightless(step: Step) -> Step:
    """A step of the same cost that looks at no weights: which units stay, and by what they are multiplied, changes no count."""
    other = dict(step)
    criterion = criterion_of(step)
    if criterion is not None and criterion.needs == "weights":
        other["criterion"] = "first"
    return other | {key: plain for key, given, plain in _VALUES if step.get(key) == given}


def _priced(step: Step) -> Step:
    """A step of the same cost that needs no data.

    Raises:
        ReductionError: its cost follows from the data.
    """
    plain = without_data(step)
    call = call_text(step["transform"], {key: value for key, value in step.items() if key != "transform"})
    for key, other in (("min_score", "ratio or widths"), ("energy", "ratio or rank")):
        if step.get(key) is not None:
            raise ReductionError(
                f"{call}: with {key} the cost follows from given weights, and a search knows costs before; search over {other}"
            )
    if plain.get("scope") != step.get("scope"):
        raise ReductionError(
            f"{call}: the widths, and so the cost, follow from training images, and a search knows costs before; search with "
            f'scope="uniform", or the width of each block (width_per_block)'
        )
    return plain


def _identity(plan: Plan, other: Plan) -> Any:
    """What of a plan decides the reduced model: its edits; where they depend on weights or hold some, its config too.

    Args:
        plan: the plan.
        other: the same for a model of other weights.
    """
    edits = json.loads(plan.to_json())["edits"]
    if edits and plan.edits == other.edits and not plan.of(Assign, Replace):
        return edits
    for edit, entry in zip(plan.edits, edits, strict=True):
        if isinstance(edit, Slice):
            entry["units"] = len(edit.units)
    return [plan.transform, plan.config, edits]
