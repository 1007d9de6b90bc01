"""`last`: the units in reverse order, the control of `first`."""

from __future__ import annotations

import torch

from mlpreduce.criteria import HiddenUnits, register_criterion


@register_criterion("last", needs="nothing")
def last(units: HiddenUnits) -> torch.Tensor:
    """The last unit, the one before it, ..."""
    return torch.arange(len(units), device="cpu").flip(0)
