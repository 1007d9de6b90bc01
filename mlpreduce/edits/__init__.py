"""What a reduction does to a model, as data: edits of modules and tensors, and the plan that lists them.

Edits name modules and their tensors by dotted path, say what becomes of them, and do nothing themselves. A plan is carried
out in a fixed order, whatever the order of its edits: `Slice`, `Share`, `Assign`, `Scale`, `Replace`. `Slice`, `Share` and
`Replace` are the structure of the model (shapes, ties and layers), the others and the values of new layers its weights, so a
saved model is rebuilt from structure alone and nothing is scaled twice.
"""

from __future__ import annotations

from mlpreduce.edits.kinds import Assign, Axis, Edit, Replace, Scale, Setting, Share, Slice, Units, as_units
from mlpreduce.edits.plan import History, Plan, Row

__all__ = [
    "Assign",
    "Axis",
    "Edit",
    "History",
    "Plan",
    "Replace",
    "Row",
    "Scale",
    "Setting",
    "Share",
    "Slice",
    "Units",
    "as_units",
]
