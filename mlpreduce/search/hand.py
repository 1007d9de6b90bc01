"""What a study reduces: a model in hand, of whose weights and data all that points ask for is measured once."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

import mlpreduce
from mlpreduce.budget import Budget as Target
from mlpreduce.budget import Slot, measure, price_of, ranked_widths
from mlpreduce.calibration import Answers, Loss
from mlpreduce.criteria import Moments, Ranking, choose
from mlpreduce.edits import Plan, Slice
from mlpreduce.errors import ReductionError, call_text
from mlpreduce.graph import MLP, Inputs, Survey, chains, mlps_or_raise, structural_copy
from mlpreduce.planning import make_plan
from mlpreduce.repair import repaired_from
from mlpreduce.search.goals import Budget
from mlpreduce.search.subjects import Unreduced
from mlpreduce.surgery import carry_out
from mlpreduce.train.calibrated import without_data
from mlpreduce.train.settings import Step

__all__ = ["CRITERION", "ModelInHand", "digest"]

CRITERION = {"name": "reconstruction", "metric": "loss"}  # by which units are worth something
_WORTH = choose(CRITERION)
_UNITS = {"params": "parameters", "mlp_params": "parameters"} | dict.fromkeys(
    ("macs_linear", "macs", "macs_with_attention"), "MACs"
)
_HALVINGS = 40


class ModelInHand:
    """A model, with data that tells which of its units are worth what.

    Args:
        name: as it is shown.
        model: the model; it is not changed.
        batches: calibration data, kept.
        loss: of what the model gives and labels.
        inputs: what the model is called with, for counts.
    """

    def __init__(self, name: str, model: nn.Module, batches: Sequence[Any], loss: Loss | None, inputs: Inputs) -> None:
        self.name, self.model, self.batches, self.loss, self.inputs = name, model, list(batches), loss, inputs
        self.found = mlps_or_raise(model, "tune", inputs)
        self.answers = Answers(model, self.found.mlps, self.batches, loss, refitted=True)
        self.budgets: Sequence[Budget] = ()  # that spaces ask widths for
        self._fits: dict[tuple[str, tuple[int, ...]], dict[str, torch.Tensor]] = {}

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
        plain = {key: value for key, value in without_data(step).items() if key != "transform"}
        if plain.get("scope") == step.get("scope") and step.get("min_score") is None and step.get("energy") is None:
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
                data = self.batches if step != without_data(step) else None
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

    @property
    def longest(self) -> int:
        """Blocks of the longest chain of MLPs that may share."""
        return max(map(len, chains(self.mlps)), default=0)

    def solver(self, begin: str, more: Mapping[str, float], steps: int) -> dict[str, int]:
        """Widths for a space: see `ModelView.widths`."""
        return self.solve(self.budgets, begin, more, steps)

    def solve(self, budgets: Sequence[Budget], begin: str, more: Mapping[str, float], steps: int) -> dict[str, int]:
        """Widths at all budgets: see `ModelView.widths`."""
        owners = [mlp for mlp in self.mlps if mlp.owner == mlp.name and not mlp.fixed]
        cost = self._weightless.measured.cost
        widths: dict[str, int] = {mlp.name: mlp.hidden_features for mlp in owners}
        for budget in budgets:
            unit = _UNITS.get(budget.cost)
            if unit is None:
                raise ReductionError(
                    f"budget {budget.text!r}: no width changes {budget.cost}; search a space of sharing"
                )
            slots = []
            for mlp in owners:
                price = price_of(self._weightless.measured, mlp.name, unit)
                step = max(1, mlp.hidden_features // steps)
                scores = self._scores(mlp) * more.get(mlp.name, 1.0)
                slots.append(Slot.of(mlp, step, price, scores))
            whole = getattr(cost, budget.cost)
            target = Target(slots, whole - sum(slot.price(slot.hidden) for slot in slots), budget.limit, unit)
            if target.cost(widths) > target.target:
                try:
                    found = ranked_widths(target) if begin == "worth" else _alike(target, more)
                except ReductionError as error:
                    raise ReductionError(f"budget {budget.text!r}: {error}") from error
                widths = {name: min(widths[name], width) for name, width in found.items()}
        whole_widths = {mlp.name: mlp.hidden_features for mlp in owners}
        return {name: width for name, width in widths.items() if width < whole_widths[name]}

    def estimate(self, steps: Sequence[Step]) -> float | None:
        """What a point loses by the scores of `reconstruction`; None where a step is no choice of widths by it."""
        total = 0.0
        for step in steps:
            widths = step.get("widths")
            if step["transform"] != "shallow" or not isinstance(widths, Mapping) or step.get("criterion") != CRITERION:
                return None
            for mlp in self.mlps:
                if mlp.name in widths:
                    total += float(self._scores(mlp)[widths[mlp.name] :].sum())
        return total

    def _first(self, step: Step, *, quick: bool) -> Plan:
        """The plan of the first step."""
        if quick and step.get("repair") == "least_squares":
            made = self._planned({**step, "repair": "none"})
            if all(isinstance(edit, Slice) for edit in made.edits):
                made = repaired_from(self.model, self.mlps, made, self._moments, self._fits)
                return replace(made, config={**made.config, "repair": "parallel"})  # which it is
        return self._planned(step)

    def _planned(self, step: Step) -> Plan:
        """A plan of a step of the whole model, with what is known of it."""
        config = {key: value for key, value in step.items() if key != "transform"}
        given: dict[str, Any] = {}
        if step != without_data(step):
            given = {"data": self.batches, "loss": self.loss, "example_inputs": self.inputs, "answers": self.answers}
        return make_plan(self.model, step["transform"], config, found=self.found, **given)[0]

    def _moments(self, mlp: MLP) -> Moments:
        return self.answers.pairs(mlp, _WORTH)

    def _scores(self, mlp: MLP) -> torch.Tensor:
        found = self.answers.of(mlp, _WORTH)
        assert isinstance(found, Ranking)
        return found.scores.cpu().double()

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


def _alike(target: Target, more: Mapping[str, float]) -> dict[str, int]:
    """Widths that are one part of all MLPs, times a factor of each, as large as the target allows."""

    def widths(part: float) -> dict[str, int]:
        return {s.owner: s.rounded(int(s.hidden * min(1.0, part * more.get(s.owner, 1.0)))) for s in target.slots}

    target.check()
    low, high = 0.0, max(1.0 / more.get(slot.owner, 1.0) for slot in target.slots)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if target.cost(widths(middle)) <= target.target else (low, middle)
    return widths(low)


def _shape(mlp: MLP) -> tuple[str, int, str]:
    return mlp.name, mlp.hidden_features, mlp.owner


def _text(step: Step) -> str:
    return call_text(step["transform"], {key: value for key, value in step.items() if key != "transform"})
