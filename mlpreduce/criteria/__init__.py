"""Importance criteria: which hidden units of an MLP stay. One criterion a file, all of them an order of the units.

A criterion is a function of one MLP. Its keyword parameters are its options, written `criterion={"name": "taylor",
"site": "fc1"}`. It is given

- `HiddenUnits`, if it needs nothing or the weights, and returns scores of the units (floating point, the larger the more
  important) or their order (integers, the most important first);
- `Seen`, if it needs images or a loss: what the units did for a few examples. It returns a value of each unit for each
  example; the score is the mean over all examples;
- `Moments`, if it needs moments or pairs: means and variances of what the units give over all examples. It returns scores,
  an order, or a `Ranking`, which is both;
- gates of the units, learned on data, if it needs gates.

An order serves every width, so narrower choices are nested. Only scores can be compared between MLPs.
"""

from __future__ import annotations

import importlib
import pkgutil

from mlpreduce.criteria.given import (
    SITES,
    HiddenUnits,
    Moments,
    Ranking,
    Seen,
    as_order,
    derived_seed,
    unit_weights,
)
from mlpreduce.criteria.guard import Guarded, check_guard, guard_notes, guarded
from mlpreduce.criteria.registry import (
    Choice,
    Criterion,
    choose,
    get_criterion,
    list_criteria,
    register_criterion,
)

__all__ = [
    "SITES",
    "Choice",
    "Criterion",
    "Guarded",
    "HiddenUnits",
    "Moments",
    "Ranking",
    "Seen",
    "as_order",
    "check_guard",
    "choose",
    "derived_seed",
    "get_criterion",
    "guard_notes",
    "guarded",
    "list_criteria",
    "register_criterion",
    "unit_weights",
]

for _found in pkgutil.iter_modules(__path__):  # they register themselves
    importlib.import_module(f"{__name__}.{_found.name}")
