"""What a model gives for each example, by which a reduced one is compared with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from mlpreduce.calibration import Batch
from mlpreduce.errors import ReductionError

__all__ = ["output_of"]

_OUTPUTS = ("logits", "pooler_output", "last_hidden_state")
_OF_TEXT = (
    "logits",
    "last_hidden_state",
    "pooler_output",
)  # many encoders of text have a pooler that was never trained


def output_of(given: Any, batch: Batch) -> torch.Tensor:
    """What the model gives for each example, (examples, values).

    Those are its logits or features if they have a name, else all that it gives for each. What it gives for each token of a
    text is averaged over those that are no padding.

    Raises:
        ReductionError: it gives nothing for each.
    """
    for name in _OUTPUTS if batch.floats else _OF_TEXT:
        named = given.get(name) if isinstance(given, Mapping) else getattr(given, name, None)
        if isinstance(named, torch.Tensor):
            given = named
            break
    values = [value for value in tree_leaves(given) if isinstance(value, torch.Tensor) and value.is_floating_point()]
    found = []
    for value in (value.double() for value in values if value.dim() > 1 and len(value) == len(batch)):
        if value.dim() == 3 and not batch.floats:
            mask = batch.mask
            live = value.new_ones(value.shape[:2]) if mask is None or mask.shape != value.shape[:2] else mask.to(value)
            value = (value * live[..., None]).sum(1) / live.sum(1, keepdim=True).clamp(min=1)
        found.append(value.flatten(1))
    if not found:
        raise ReductionError(
            f"the model gives a {type(given).__name__} without a tensor of {len(batch)} examples and their values, by which "
            f"the reduced one is compared with it; wrap it so that it gives one (repair='parallel' does without)"
        )
    return torch.cat(found, 1)
