"""`first`: the units in their own order.

Source: Krishna Kumar, "Parameter Reduction Improves Vision Transformers", arXiv 2512.01059, equation 2.
"""

from __future__ import annotations

import torch

from mlpreduce.criteria import HiddenUnits, register_criterion


@register_criterion("first", needs="nothing")
def first(units: HiddenUnits) -> torch.Tensor:
    """Units 0, 1, 2, ...; at random initialisation as good as any choice."""
    return torch.arange(len(units), device="cpu")
