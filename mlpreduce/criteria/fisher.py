"""`fisher`: the units whose removal changes the loss most, to second order, by the empirical Fisher information.

Source: Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", arXiv 1801.05787, equation 8: half the
mean over examples of the squared derivative of the example's loss by a factor on the unit's output.
"""

from __future__ import annotations

import torch

from mlpreduce.criteria import Seen, register_criterion


@register_criterion("fisher", needs="loss")
def fisher(seen: Seen) -> torch.Tensor:
    """Half the squared derivative of an example's loss by a factor on what the unit puts out."""
    return seen.at("act").square() / 2
