"""Hidden widths that meet a target exactly: no more than it, and nothing that fits is left out.

A cost is a sum of one for each unique MLP, which only depends on its width. Widths are multiples of a step, at least one, or
the full width.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch

from mlpreduce.budget.costs import Baseline
from mlpreduce.errors import ReductionError
from mlpreduce.graph import MLP

__all__ = [
    "Budget",
    "Slot",
    "budget_of",
    "filled",
    "number",
    "price_of",
    "ranked_widths",
    "staged_widths",
    "uniform_widths",
]

Widths = dict[str, int]
Price = Callable[[int], float]


@dataclass(frozen=True)
class Slot:
    """One unique MLP whose width is sought.

    Attributes:
        owner: its name.
        hidden: its hidden features.
        step: what its width is a multiple of.
        price: what it costs, by width, in all its uses; it must not fall as the width grows.
        stage: the stage it belongs to.
        scores: (hidden units,), of the most important first; MLPs are compared by them.
        penalty: what is taken from a score for a width, as latency is in NViT.
    """

    owner: str
    hidden: int
    step: int
    price: Price
    stage: str = ""
    scores: torch.Tensor | None = None
    penalty: Price | None = None

    @classmethod
    def of(
        cls, mlp: MLP, round_to: int, price: Price, scores: torch.Tensor | None = None, penalty: Price | None = None
    ) -> Slot:
        """That of an MLP whose width is a multiple of `round_to` and of its groups.

        Raises:
            ReductionError: no width is.
        """
        step = math.lcm(round_to, mlp.groups)
        if step > mlp.hidden_features:
            raise ReductionError(
                f"{mlp.name} has {mlp.hidden_features} hidden units, and its width is to be a multiple of {step}; a smaller "
                f"round_to would help"
            )
        return cls(mlp.name, mlp.hidden_features, step, price, mlp.stage, scores, penalty)

    def rounded(self, width: int) -> int:
        """The width, down to a multiple of the step, at least one; the full width stays."""
        return self.hidden if width >= self.hidden else max(width // self.step, 1) * self.step

    def below(self, width: int) -> int:
        """The next narrower width; 0 if there is none."""
        return (width - 1) // self.step * self.step

    def above(self, width: int) -> int:
        """The next wider width, at most the full one."""
        return min((width // self.step + 1) * self.step, self.hidden)


@dataclass(frozen=True)
class Budget:
    """What a model may cost.

    Attributes:
        slots: the MLPs whose widths are sought.
        base: the cost of all else.
        target: the most it may cost.
        unit: of the costs, for messages.
    """

    slots: Sequence[Slot]
    base: float
    target: float
    unit: str

    def cost(self, widths: Mapping[str, int]) -> float:
        """The cost of the model with these widths, by owner."""
        return self.base + sum(slot.price(widths[slot.owner]) for slot in self.slots)

    def check(self) -> None:
        """Whether the target can be reached.

        Raises:
            ReductionError: it cannot; the message has the range.
        """
        least = self.cost({slot.owner: slot.rounded(1) for slot in self.slots})
        most = self.cost({slot.owner: slot.hidden for slot in self.slots})
        if not least <= self.target <= most:
            raise ReductionError(
                f"a target of {number(self.target)} {self.unit} cannot be reached by slicing {len(self.slots)} MLPs; the "
                f"range is {number(least)} to {number(most)}"
            )


def budget_of(slots: Sequence[Slot], present: float, name: str, target: object, unit: str) -> Budget:
    """The budget of a model that costs `present` as it is.

    Args:
        slots: the MLPs whose widths are sought.
        present: the cost of the model.
        name: of the target, for messages.
        target: at most 1: a fraction of `present`; above it absolute. Only milliseconds need not be whole.
        unit: of the costs.

    Raises:
        ReductionError: the target is no positive number.
    """
    if isinstance(target, bool) or not isinstance(target, (int, float)) or not 0 < target < math.inf:
        raise ReductionError(
            f"{name} is {target!r}; it must be a positive number: at most 1 a fraction, above it absolute"
        )
    most = target * present if target <= 1 else target
    base = present - sum(slot.price(slot.hidden) for slot in slots)
    return Budget(slots, base, most if unit == "ms" else math.floor(most), unit)


def price_of(baseline: Baseline, owner: str, unit: str) -> Price:
    """What an MLP costs in all its uses, by width: "parameters", or "MACs" in the convention of `Cost.macs`."""
    uses = [(m, count) for m, count in zip(baseline.mlps, baseline.positions, strict=True) if m.owner == owner]
    if unit == "parameters":
        return lambda width: sum(mlp.params(width, owned=mlp.name == owner) for mlp, _ in uses)
    return lambda width: -sum(baseline.macs_gone(mlp, count, width) for mlp, count in uses)


def uniform_widths(budget: Budget) -> Widths:
    """The largest fraction of all MLPs alike, rounded down to steps, whose cost is no more than the target.

    Raises:
        ReductionError: the target cannot be reached.
    """
    budget.check()

    def widths(fraction: Fraction) -> Widths:
        return {slot.owner: slot.rounded(int(slot.hidden * fraction)) for slot in budget.slots}

    kinds = {(slot.hidden, slot.step) for slot in budget.slots}
    fractions = sorted({Fraction(width, size) for size, step in kinds for width in (*range(step, size, step), size)})
    low, high = 0, len(fractions) - 1  # the first is within the target
    while low < high:
        middle = (low + high + 1) // 2
        if budget.cost(widths(fractions[middle])) <= budget.target:
            low = middle
        else:
            high = middle - 1
    return widths(fractions[low])


def ranked_widths(budget: Budget) -> Widths:
    """Widths by scores over all MLPs: steps of least score go until the cost is no more than the target.

    A step is the last units in the order of their MLP, as many as its width is a multiple of; its score is their sum. What
    the last one leaves free is filled with the best steps that fit.

    Raises:
        ReductionError: the target cannot be reached.

    Source:
        The global ranking in groups of NViT, arXiv 2110.04869.
    """
    budget.check()
    gains = {slot.owner: _gain(slot) for slot in budget.slots}
    widths = {slot.owner: slot.hidden for slot in budget.slots}

    def least(index: int) -> tuple[float, int]:
        slot = budget.slots[index]
        width = widths[slot.owner]
        return gains[slot.owner](slot.below(width), width), index

    waiting = [least(index) for index, slot in enumerate(budget.slots) if slot.below(slot.hidden)]
    heapq.heapify(waiting)
    cost = budget.cost(widths)
    while cost > budget.target:
        _, index = heapq.heappop(waiting)
        slot = budget.slots[index]
        narrow = slot.below(widths[slot.owner])
        cost += slot.price(narrow) - slot.price(widths[slot.owner])
        widths[slot.owner] = narrow
        if slot.below(narrow):
            heapq.heappush(waiting, least(index))
        if cost <= budget.target or not waiting:  # free of the rounding of many sums
            cost = budget.cost(widths)
    return filled(budget, widths)


def staged_widths(budget: Budget) -> Widths:
    """Widths by scores within each stage, which costs no more than when all MLPs keep the same fraction.

    What that leaves free is filled with the best steps of any stage.

    Raises:
        ReductionError: the target cannot be reached.
    """
    widths = even = uniform_widths(budget)
    for stage in {slot.stage: None for slot in budget.slots}:
        own = replace(budget, slots=[slot for slot in budget.slots if slot.stage == stage], base=0)
        widths = widths | ranked_widths(replace(own, target=own.cost(even)))
    return filled(budget, widths)


def filled(budget: Budget, widths: Widths) -> Widths:
    """Widened where a step still fits, the best score first."""
    widths = dict(widths)
    gains = {slot.owner: _gain(slot) for slot in budget.slots}
    while True:
        wider = {slot.owner: slot.above(widths[slot.owner]) for slot in budget.slots}
        fitting = [
            owner
            for owner, width in wider.items()
            if width > widths[owner] and budget.cost({**widths, owner: width}) <= budget.target
        ]
        if not fitting:
            return widths
        best = max(fitting, key=lambda owner: gains[owner](widths[owner], wider[owner]))
        widths[best] = wider[best]


def _gain(slot: Slot) -> Callable[[int, int], float]:
    """What the units between two widths are worth."""
    if slot.scores is None:
        raise ReductionError(f"{slot.owner} has no scores")
    sums = [0.0, *slot.scores.double().cumsum(0).tolist()]

    def gain(narrow: int, wide: int) -> float:
        worth: float = sums[wide] - sums[narrow]
        return worth if slot.penalty is None else worth - (slot.penalty(wide) - slot.penalty(narrow))

    return gain


def number(value: float) -> str:
    """A cost for messages."""
    return f"{value:,.0f}" if value == int(value) else f"{value:,.6g}"
