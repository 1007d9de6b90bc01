"""What a study reduces: a model in hand, of whose weights and data all that points ask for is measured once."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

import mlpreduce
from mlpreduce.budget import Cost, LatencyTable, TimedCost, measure
from mlpreduce.calibration import Answers, Loss
from mlpreduce.criteria import choose
from mlpreduce.edits import Plan, Replace
from mlpreduce.errors import ReductionError, call_text
from mlpreduce.graph import MLP, Inputs, Survey, mlps_or_raise, structural_copy
from mlpreduce.reduction.planning import make_plan
from mlpreduce.repair import Refits, distances, repaired_from
from mlpreduce.search.spaces.allotting import PARTS, Allotment
from mlpreduce.search.spaces.goals import Budget
from mlpreduce.search.spaces.space import InHand
from mlpreduce.search.spaces.subjects import Unreduced
from mlpreduce.surgery.operation import carry_out
from mlpreduce.train.settings import Step
from mlpreduce.transforms.steps import follows, needs_data, without_data

__all__ = ["CRITERION", "ModelInHand", "digest", "sliced"]

CRITERION = {"name": "reconstruction", "metric": "loss"}  # by which units are worth something
_WORTH = choose(CRITERION)
_TIMED = 8  # examples of a batch whose latency is measured


class ModelInHand:
    """A model, with data that tells which of its units are worth what.

    Args:
        name: as it is shown.
        model: the model; it is not changed.
        batches: calibration data, kept.
        loss: of what the model gives and labels.
        inputs: what the model is called with, for counts.
        held: data by which nothing is fitted; on the first examples of it MLPs are tried, each alone.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        batches: Sequence[Any],
        loss: Loss | None,
        inputs: Inputs,
        held: Sequence[Any],
    ) -> None:
        self.name, self.model, self.batches, self.loss, self.inputs = name, model, list(batches), loss, inputs
        self.held = list(held)
        self.found = mlps_or_raise(model, "tune", inputs)
        self.answers = Answers(model, self.found.mlps, self.batches, loss, refitted=True)
        self.budgets: Sequence[Budget] = ()  # that spaces ask widths for
        self.table: LatencyTable | None = None  # where latency is asked for
        self._refits = Refits(lambda mlp: self.answers.pairs(mlp, _WORTH))

    @property
    def mlps(self) -> list[MLP]:
        """Its MLPs, all uses."""
        return self.found.mlps

    @cached_property
    def digest(self) -> str:
        """Of its tensors, by name."""
        return digest(self.model.state_dict())

    def unreduced(
        self, settings: Mapping[str, Any], first: Step | None, *, weights: bool = False, seed: int = 0
    ) -> Unreduced:
        """The model, or a copy on the meta device.

        Raises:
            ReductionError: settings or steps that act before it is built.
        """
        if settings:
            raise ReductionError(
                f"tune: the space sets {', '.join(settings)}, and nothing is trained; leave settings out"
            )
        if first is not None:
            raise ReductionError(f"tune: {first['transform']} acts when a model is built, and this one is")
        return self._weighed if weights else self._weightless

    def plan(self, tree: nn.Module, step: Step, found: Survey) -> Plan:
        """A plan of a step, as far as it decides what the model costs.

        Widths that follow from the data are those of the whole model; after other steps they are not known.

        Raises:
            ReductionError: it cannot be carried out.
        """
        late = follows(step)
        if late is None or (late.roughly and not needs_data(step)):
            plain = {key: value for key, value in without_data(step).items() if key != "transform"}
            return make_plan(tree, step["transform"], plain, found=found)[0]
        if any(parameter.is_meta for parameter in tree.parameters()):
            raise ReductionError(f"{_text(step)}: its widths follow from weights")  # the pricer asks again with some
        if [_shape(mlp) for mlp in found.mlps] != [_shape(mlp) for mlp in self.mlps]:
            raise ReductionError(
                f"{_text(step)}: its widths follow from the data, which is known of the whole model only; put it first"
            )
        return self._planned({**step, "repair": "none"} if "repair" in step else step)

    def reduced(self, steps: Sequence[Step], *, quick: bool) -> tuple[nn.Module, list[Plan]]:
        """A copy of the model that is reduced, and the plans that did it.

        Args:
            steps: the reduction.
            quick: whether a repair by least squares is made from moments, each MLP by itself, where steps slice alone.

        Raises:
            ReductionError: it cannot be carried out.
        """
        tree, plans = copy.deepcopy(self.model), []
        for number, step in enumerate(steps):
            if number:  # nothing is known of what earlier steps have made
                config = {key: value for key, value in step.items() if key != "transform"}
                data = self.batches if needs_data(step) else None
                made = mlpreduce.plan(
                    tree,
                    step["transform"],
                    data=data,
                    loss=self.loss if data else None,
                    example_inputs=self.inputs,
                    **config,
                )
            else:
                made = self._first(step, quick=quick)
            carry_out(tree, made)
            plans.append(made)
        return tree, plans

    def is_quick(self, steps: Sequence[Step]) -> bool:
        """Whether `reduced` may repair these in two ways."""
        return bool(steps) and steps[0]["transform"] == "shallow" and steps[0].get("repair") == "least_squares"

    @property
    def trained(self) -> bool:
        """Its weights are what points start from."""
        return True

    @property
    def hand(self) -> InHand:
        """What spaces may ask."""
        return self

    def widths(self, begin: str, more: Mapping[str, float], steps: int) -> dict[str, int]:
        """Widths for a space: see `ModelView.widths`."""
        return self.allotment.widths(self.budgets, begin, more, steps)

    def limit(self, cost: str) -> float | None:
        """See `ModelView.limit`."""
        return next((budget.limit for budget in self.budgets if budget.cost == cost), None)

    @cached_property
    def allotment(self) -> Allotment:
        """Finds widths."""
        owners = [mlp for mlp in self.mlps if mlp.owner == mlp.name and not mlp.fixed]
        return Allotment(owners, self._weightless.measured, lambda: self._losses(owners), self.table)

    def measure_latency(self) -> None:
        """Time the model at some widths, so that costs have the latency from now on."""
        self.table = LatencyTable.measure(self.model, example_inputs=self.batches[0][0][:_TIMED].inputs)

    def timed(self, cost: Cost, pattern: Mapping[str, Sequence[Any]], plans: Sequence[Plan]) -> Cost:
        """The cost, with the latency by its table where that was measured.

        Raises:
            ReductionError: layers are changed, of which the table knows nothing.
        """
        if self.table is None:
            return cost
        if any(made.of(Replace) for made in plans):
            raise ReductionError("a budget of latency is kept by widths, and this changes layers")
        whole = {mlp.name for mlp in self.mlps if mlp.owner == mlp.name}
        widths = {n: w for n, w in zip(pattern["blocks"], pattern["widths"], strict=True) if n in whole}
        return TimedCost(**asdict(cost), latency=self.table.predict(widths))

    def estimate(self, steps: Sequence[Step]) -> float | None:
        """What a point loses if what each MLP alone loses adds up; None where that is not known, or a step does more."""
        total = 0.0
        for step in steps if self.allotment.known else ():
            widths = step.get("widths")
            if step["transform"] != "shallow" or not isinstance(widths, Mapping) or step.get("criterion") != CRITERION:
                return None
            total += self.allotment.estimate(widths)
        return total if self.allotment.known else None

    def _losses(self, mlps: Sequence[MLP]) -> dict[str, dict[int, float]]:
        """How far what the model gives moves with each MLP alone at some widths, refitted."""
        trials = {}
        for mlp in mlps:
            for part in PARTS:
                width = max(1, int(part * mlp.hidden_features)) // mlp.groups * mlp.groups
                if 0 < width < mlp.hidden_features:
                    trials[mlp.name, width] = self._first(sliced({mlp.name: width}), quick=True).edits
        self._refits.near = True
        moved, _ = distances(self.model, trials, self.held)
        found: dict[str, dict[int, float]] = {}
        for (name, width), distance in moved.items():
            found.setdefault(name, {})[width] = distance
        return found

    def _first(self, step: Step, *, quick: bool) -> Plan:
        """The plan of the first step."""
        if not (quick and self.is_quick([step])):
            return self._planned(step)
        made = self._planned({**step, "repair": "none"})
        made = repaired_from(self.model, self.mlps, made, self._refits)
        return replace(made, config={**made.config, "repair": "parallel"})  # which it is

    def _planned(self, step: Step) -> Plan:
        """A plan of a step of the whole model, with what is known of it."""
        config = {key: value for key, value in step.items() if key != "transform"}
        given: dict[str, Any] = {}
        if needs_data(step):
            given = {"data": self.batches, "loss": self.loss, "example_inputs": self.inputs, "answers": self.answers}
        return make_plan(self.model, step["transform"], config, found=self.found, **given)[0]

    @cached_property
    def _weightless(self) -> Unreduced:
        return self._measured(structural_copy(self.model, device="meta"))

    @cached_property
    def _weighed(self) -> Unreduced:
        return self._measured(self.model)

    def _measured(self, model: nn.Module) -> Unreduced:
        found = mlps_or_raise(model, "tune", self.inputs)
        return Unreduced(
            model, found, measure(structural_copy(model, device="meta"), self.inputs, found.mlps), self.inputs
        )


def digest(named: Mapping[str, torch.Tensor]) -> str:
    """Of tensors, by name."""
    found = hashlib.sha256()
    for name, tensor in sorted(named.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def sliced(widths: Mapping[str, int]) -> Step:
    """The step that slices MLPs to these widths, by name, and repairs them."""
    return {"transform": "shallow", "widths": dict(widths), "criterion": CRITERION, "repair": "least_squares"}


def _shape(mlp: MLP) -> tuple[str, int, str]:
    return mlp.name, mlp.hidden_features, mlp.owner


def _text(step: Step) -> str:
    return call_text(step["transform"], {key: value for key, value in step.items() if key != "transform"})
