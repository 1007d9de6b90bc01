"""What reductions cost, before anything is changed, and the hidden widths that meet a budget.

- `measure` counts a model once; a `Baseline` then has the exact `Cost` of every plan.
- `uniform_widths`, `staged_widths` and `ranked_widths` solve for a target; `LatencyTable` predicts latency from measurements.
- `Loss` finds the widths that the loss hardly notices; `PrimalDual` learns widths while a model trains.
"""

from __future__ import annotations

from mlpreduce.budget.costs import COSTS, Baseline, Cost, TimedCost, cost_from, counted, measure, outcome
from mlpreduce.budget.latency import LatencyTable
from mlpreduce.budget.loss import Loss
from mlpreduce.budget.primal_dual import PrimalDual
from mlpreduce.budget.solve import (
    Budget,
    Slot,
    budget_of,
    number,
    price_of,
    ranked_widths,
    staged_widths,
    uniform_widths,
)

__all__ = [
    "COSTS",
    "Baseline",
    "Budget",
    "Cost",
    "LatencyTable",
    "Loss",
    "PrimalDual",
    "Slot",
    "TimedCost",
    "budget_of",
    "cost_from",
    "counted",
    "measure",
    "number",
    "outcome",
    "price_of",
    "ranked_widths",
    "staged_widths",
    "uniform_widths",
]
