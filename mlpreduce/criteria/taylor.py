"""`taylor`: the units whose removal changes the loss most, to first order.

Source: Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference", arXiv 1611.06440,
equation 8: |sum over positions of a dL/da|, averaged over examples, a being what the unit puts out.
"""

from __future__ import annotations

import torch

from mlpreduce.criteria import Seen, register_criterion


@register_criterion("taylor", needs="loss")
def taylor(seen: Seen, *, site: str = "act") -> torch.Tensor:
    """|derivative of an example's loss by a factor on the unit|.

    Args:
        seen: what the units did.
        site: `act` (what fc2 is given, which equals `fc2`: its weights), `fc1` (its weights and bias), or `both`.
    """
    return seen.at(site).abs()
