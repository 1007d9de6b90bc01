"""`activation`: the units that are active most.

Source: statistics of activations as in Hu et al., "Network Trimming", arXiv 1607.03250 (how often a unit is not zero), and the
mean of absolute activations; of what fc2 is given, after gates and norms.
"""

from __future__ import annotations

import math

import torch

from mlpreduce.criteria import Seen, register_criterion
from mlpreduce.errors import check_number, check_one_of


@register_criterion("activation", needs="images")
def activation(seen: Seen, *, statistic: str = "mean", threshold: float = 0.0) -> torch.Tensor:
    """The mean of |a| over positions, or how often it is above a threshold.

    Args:
        seen: what the units did.
        statistic: `mean`, or `frequency`: the share of positions with a > `threshold`.
        threshold: of `frequency`. GELU is below 0 for all negative inputs, so 0 counts the positive ones.
    """
    check_one_of("criterion activation: statistic", statistic, ("mean", "frequency"))
    check_number("criterion activation: threshold", threshold, least=-math.inf)
    hidden = seen.activations
    return hidden.abs().mean(1) if statistic == "mean" else (hidden > threshold).to(hidden.dtype).mean(1)
