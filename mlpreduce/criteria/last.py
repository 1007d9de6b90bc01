"""`last`: the units in reverse order, the control of `first`."""

from __future__ import annotations

import torch

from mlpreduce.criteria import register_criterion


@register_criterion("last", weights=False)
def last(weights: torch.Tensor, seed: int) -> torch.Tensor:
    """The last unit, the one before it, ..."""
    return torch.arange(weights.shape[0], device="cpu").flip(0)
