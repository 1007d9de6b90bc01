"""`l2`: the units with the largest weights.

Source: the magnitude baseline of structured pruning. The norm runs over fc1 row, bias and fc2 column, as they go
together; other codes take the fc1 row alone.
"""

from __future__ import annotations

import torch

from mlpreduce.criteria import HiddenUnits, register_criterion


@register_criterion("l2")
def l2(units: HiddenUnits) -> torch.Tensor:
    """The Euclidean norm of the unit's weights."""
    norms: torch.Tensor = torch.linalg.vector_norm(units.weights(), dim=1)
    return norms
