"""What a suggestion comes to, before anything is trained: exact cost, pattern, and a key that equal reductions share.

Everything is read off plans on the meta device, well below a second for a model of any size, unless widths follow from weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import mlpreduce
from mlpreduce.budget import Cost, cost_from, counted
from mlpreduce.edits import Assign, Plan, Replace, Slice
from mlpreduce.errors import ReductionError
from mlpreduce.graph import structural_copy, survey
from mlpreduce.reduction.outcomes import planned
from mlpreduce.reduction.planning import make_plan, plain
from mlpreduce.search.spaces.space import ModelView, Suggestion
from mlpreduce.search.spaces.subjects import Subject
from mlpreduce.surgery.operation import carry_out
from mlpreduce.train.settings import Step
from mlpreduce.transforms import is_construction
from mlpreduce.transforms.steps import needs_data, without_weights

__all__ = ["Point", "Pricer", "distance"]


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
        return cls(**{**document, "steps": steps, "cost": cost_from(document["cost"])})


def distance(one: Point, other: Point) -> float:
    """How unlike two patterns of equal depth are: 1 for each block with another MLP, and its part of the width that differs."""
    here, there = one.pattern, other.pattern
    largest = max(*here["widths"], *there["widths"])
    owners = sum(a != b for a, b in zip(here["owners"], there["owners"], strict=True))
    return float(owners + sum(abs(a - b) for a, b in zip(here["widths"], there["widths"], strict=True)) / largest)


class Pricer:
    """Prices suggestions.

    Args:
        subject: what is reduced.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._priced: dict[str, Point] = {}

    @cached_property
    def model(self) -> ModelView:
        """What spaces may know of the unreduced model.

        Raises:
            ReductionError: it has no MLPs, or the model cannot be built.
        """
        known = self.subject.unreduced({}, None)
        try:
            every = make_plan(known.model, "grouped", {"remainder": "own"}, found=known.found)[0]
        except ReductionError:
            return ModelView(tuple(known.found.mlps), (), self.subject.trained, self.subject.hand)
        chain = {mlp.name: mlp.chain for mlp in known.found.mlps}
        chains: dict[Any, list[int]] = {}
        for number, row in enumerate(every.rows):
            chains.setdefault(chain[row.mlp], []).append(number)
        rows = tuple(map(tuple, chains.values()))
        return ModelView(tuple(known.found.mlps), rows, self.subject.trained, self.subject.hand)

    def price(self, suggestion: Suggestion) -> Point:
        """The point of a suggestion.

        Raises:
            ReductionError: it cannot be carried out.
        """
        call = f"search({self.subject.name})"
        suggestion = replace(suggestion, steps=plain(suggestion.steps, call), settings=plain(suggestion.settings, call))
        asked = json.dumps([suggestion.steps, suggestion.settings], sort_keys=True)
        if asked not in self._priced:
            self._priced[asked] = self._price(suggestion)
        return self._priced[asked]

    def _price(self, suggestion: Suggestion) -> Point:
        steps, settings = tuple(suggestion.steps), suggestion.settings
        alike = tuple(map(without_weights, steps))
        try:
            plans, cost, after = self._plans(settings, alike)
            others = plans
        except ReductionError:  # some widths follow from weights
            alike = steps
            plans, cost, after = self._plans(settings, steps, weights=True)
            others, _, _ = self._plans(settings, steps, weights=True, seed=1)
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
        return Point(steps, suggestion.settings, self.subject.timed(cost, pattern, plans), pattern, key)

    def _plans(
        self, settings: Mapping[str, Any], steps: Sequence[Step], *, weights: bool = False, seed: int = 0
    ) -> tuple[list[Plan], Cost, dict[str, tuple[int, str]]]:
        """The plans of all steps, and after them the cost, and of each MLP its hidden features and owner, by name."""
        rest = [dict(step) for step in steps]
        first = rest.pop(0) if rest and is_construction(rest[0]["transform"]) else None
        known = self.subject.unreduced(settings, first, weights=weights, seed=seed)
        model, found, measured = known.model, replace(known.found, tree=None), known.measured
        plans = [] if first is None else mlpreduce.history(model)
        if not rest:
            return plans, measured.cost, {mlp.name: (mlp.hidden_features, mlp.owner) for mlp in found.mlps}
        tree = structural_copy(model, device=None if weights else "meta")
        for number, step in enumerate(rest, 1):
            plan = self.subject.plan(tree, step, found)
            plans.append(plan)
            cost, after = planned(tree, measured, plan, known.inputs)
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
