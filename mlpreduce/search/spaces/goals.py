"""What a study wants: objectives, and budgets of exact counts."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from mlpreduce.budget import COSTS, Cost
from mlpreduce.errors import ReductionError, did_you_mean

__all__ = ["OBJECTIVES", "Budget", "check_objectives", "read_budgets", "value_of"]

Direction = Literal["minimize", "maximize"]

OBJECTIVES: dict[str, tuple[Direction, str]] = {  # name -> direction, unit
    "top1": ("maximize", "%"),
    "score": ("maximize", ""),  # of a model in hand
    **{cost: ("minimize", "") for cost in COSTS},
    "latency": ("minimize", "ms"),  # of one image, measured in the trial
}
_BUDGET = re.compile(r"\s*(\w+)\s*(<=|>=|<|>|=)?\s*([\d_.eE+-]*)\s*")


@dataclass(frozen=True)
class Budget:
    """The most that a reduced model may cost.

    Attributes:
        text: as the user wrote it.
        cost: a field of `Cost`, or of `TimedCost`.
        limit: the largest whole number that is allowed; of a latency milliseconds.
    """

    text: str
    cost: str
    limit: float

    def of(self, cost: Cost) -> float:
        """What a model costs of it."""
        return float(getattr(cost, self.cost)) if self.cost == "latency" else int(getattr(cost, self.cost))

    def excess(self, cost: Cost) -> float:
        """By how much a model is above the budget; 0 or less where it keeps it."""
        return self.of(cost) - self.limit


def read_budgets(texts: Sequence[str], baseline: Cost) -> tuple[Budget, ...]:
    """Budgets as they are written on the command line.

    Args:
        texts: each "<cost><=<number>"; a number up to 1 is a fraction of the baseline, one above it is absolute.
        baseline: cost of the unreduced model.

    Raises:
        ReductionError: another form, an unknown cost, or two budgets of one.

    Example:
        >>> baseline = Cost(1000, 800, 4, 10, 10, 10)
        >>> [budget.limit for budget in read_budgets(["params<=0.673", "mlp_params<=500"], baseline)]
        [673, 500]
    """
    budgets: dict[str, Budget] = {}
    for text in texts:
        found = _BUDGET.fullmatch(text)
        cost, sign, number = found.groups() if found else ("", "", "")
        if sign != "<=" or not number:
            raise ReductionError(
                f"budget {text!r}: write <cost><=<number>, for instance params<=0.7 (a fraction of the baseline) or "
                f"params<=60e6; costs: {', '.join(COSTS)}"
            )
        whole = asdict(baseline).get(cost)
        if whole is None:
            known = "; latency is known after a trial only, take it as an objective" if cost == "latency" else ""
            raise ReductionError(f"budget {text!r}: no such cost{known or did_you_mean(cost, COSTS)}")
        try:
            value = float(number)
        except ValueError as error:
            raise ReductionError(f"budget {text!r}: {number!r} is no number") from error
        if not 0 < value < math.inf:
            raise ReductionError(f"budget {text!r}: the number must be above 0")
        if cost in budgets:
            raise ReductionError(f"budget {text!r}: {cost} has a budget already: {budgets[cost].text!r}")
        most = value * whole if value <= 1 else value
        budgets[cost] = Budget(text, cost, most if cost == "latency" else math.floor(most + 1e-9))
    return tuple(budgets.values())


def value_of(names: Sequence[str]) -> str:
    """The objective that a point must be valued for: what is no cost."""
    return next(name for name in names if OBJECTIVES[name][0] == "maximize")


def check_objectives(names: Sequence[str]) -> None:
    """Whether the objectives of a search that trains are known, each once, and the accuracy is one of them.

    Raises:
        ReductionError: they are not.
    """
    for name in names:
        if name not in OBJECTIVES or name == "score":
            raise ReductionError(f"--objectives {','.join(names)}: {name!r}{did_you_mean(name, OBJECTIVES)}")
    if len(set(names)) < len(names) or "top1" not in names:
        raise ReductionError(
            f"--objectives {','.join(names)}: each once, and top1 among them; costs alone need no training: a budget and "
            f"mlpreduce plan tell them"
        )
