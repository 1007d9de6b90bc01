"""Widths of the MLPs of a model in hand at its budgets: equal parts, or where narrowing an MLP costs least.

What a width costs is measured: of each MLP alone, at a few widths, repaired, how far what the model gives moves (see
`repair.distances`). As long as a model stays near the whole one these losses add up to what it loses, so the widths of least
sum at a budget follow. Scores of single units do not tell as much: of what comes behind an MLP they know a gradient alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from scipy.optimize import isotonic_regression

from mlpreduce.budget import Baseline, LatencyTable, Slot, price_of, ranked_widths
from mlpreduce.budget import Budget as Target
from mlpreduce.errors import ReductionError, naming
from mlpreduce.graph import MLP
from mlpreduce.search.spaces.goals import Budget

__all__ = ["PARTS", "Allotment"]

PARTS = (0.125, 0.25, 0.5, 0.75)  # of the hidden units, at which an MLP is measured
_UNITS = {"params": "parameters", "mlp_params": "parameters"} | dict.fromkeys(
    ("macs_linear", "macs", "macs_with_attention"), "MACs"
)
_HALVINGS = 40
_LEAST = 1e-9  # of a loss, below which rounding decides

Losses = dict[str, dict[int, float]]  # by MLP, then by its width


class Allotment:
    """Widths by budget.

    Args:
        mlps: those that may change, each with weights of its own.
        measured: what the model costs.
        losses: measures what widths of MLPs cost, each alone; asked at most once.
        table: of the latency, if that was measured.
    """

    def __init__(
        self, mlps: Sequence[MLP], measured: Baseline, losses: Callable[[], Losses], table: LatencyTable | None = None
    ) -> None:
        self._mlps, self._measured, self._measure, self._table = list(mlps), measured, losses, table

    def widths(self, budgets: Sequence[Budget], begin: str, more: Mapping[str, float], steps: int) -> dict[str, int]:
        """Widths at all budgets: see `ModelView.widths`.

        Raises:
            ReductionError: a budget cannot be reached by widths.
        """
        whole = {mlp.name: mlp.hidden_features for mlp in self._mlps}
        widths = dict(whole)
        for budget in budgets:
            target = self._target(budget, begin, more, steps)
            if target.cost(widths) > target.target:
                with naming(f"budget {budget.text!r}"):
                    found = ranked_widths(target) if begin == "worth" else _alike(target, more)
                widths = {name: min(widths[name], width) for name, width in found.items()}
        return {name: width for name, width in widths.items() if width < whole[name]}

    @property
    def known(self) -> bool:
        """Whether losses were measured, since widths by them were asked for."""
        return "_curves" in vars(self)

    def estimate(self, widths: Mapping[str, int]) -> float:
        """What a model with these widths loses: the sum of what each MLP alone does."""
        return sum(float(self._curves[name][width] - self._curves[name][-1]) for name, width in widths.items())

    def _target(self, budget: Budget, begin: str, more: Mapping[str, float], steps: int) -> Target:
        unit, price, whole = self._prices(budget)
        slots = []
        for mlp in self._mlps:
            worth = None
            if begin == "worth":
                worth = torch.tensor(_worth(self._curves[mlp.name]) * more.get(mlp.name, 1.0))
            slots.append(Slot.of(mlp, max(1, mlp.hidden_features // steps), price(mlp.name), worth))
        return Target(slots, whole - sum(slot.price(slot.hidden) for slot in slots), budget.limit, unit)

    def _prices(self, budget: Budget) -> tuple[str, Callable[[str], Callable[[int], float]], float]:
        """The unit of a budget, what each MLP costs by its width, and what the whole model does.

        Raises:
            ReductionError: widths do not change that cost.
        """
        if budget.cost == "latency" and self._table is not None:
            return "ms", partial(partial, self._table.of), self._table.predict({})
        if (unit := _UNITS.get(budget.cost)) is None:
            raise ReductionError(f"budget {budget.text!r}: no width changes {budget.cost}; search a space of sharing")
        return unit, lambda owner: price_of(self._measured, owner, unit), getattr(self._measured.cost, budget.cost)

    @cached_property
    def _curves(self) -> dict[str, np.ndarray]:
        hidden = {mlp.name: mlp.hidden_features for mlp in self._mlps}
        return {name: _curve(found, hidden[name]) for name, found in self._measure().items()}


def _curve(found: Mapping[int, float], hidden: int) -> np.ndarray:
    """What each width from 0 to `hidden` loses, (hidden + 1,): falling, its logarithm smooth between what was measured."""
    widths = np.array(sorted(found))
    logs = np.log(np.maximum(isotonic_regression([found[width] for width in widths], increasing=False).x, _LEAST))
    if len(widths) == 1:
        return np.full(hidden + 1, np.exp(logs[0]))
    # straight lines would have a bend at each of these widths, where all MLPs would stay
    between = PchipInterpolator(widths, logs)
    every = np.arange(hidden + 1)
    inside = np.clip(every, widths[0], widths[-1])
    curve = between(inside) + np.minimum(0.0, between.derivative()(inside)) * (every - inside)
    return np.asarray(np.exp(curve))


def _worth(curve: np.ndarray) -> np.ndarray:
    """What each further unit is worth, (hidden,), of the largest convex curve below: those that go first are worth least."""
    return np.array(isotonic_regression(curve[:-1] - curve[1:], increasing=False).x)


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
