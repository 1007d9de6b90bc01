"""`energy`: the units that put most into what the MLP gives.

Source: as FLAP (arXiv 2312.11983) weighs fluctuations, and Wanda (arXiv 2306.11695) activations, by norms of weights; here of
the columns of fc2.
"""

from __future__ import annotations

import torch

from mlpreduce.criteria import Moments, register_criterion
from mlpreduce.errors import check_one_of


@register_criterion("energy", needs="moments")
def energy(seen: Moments, *, about: str = "auto") -> torch.Tensor:
    """The mean square of what a unit gives, times the squared norm of its fc2 column.

    Of uses of a tied MLP it is that of all positions together, so differences between uses count.

    Args:
        seen: the moments.
        about: `mean` (the variance: where a repair or a bias takes up what a unit gives on average), `zero` (the mean square),
            or `auto`: the mean where a repair follows and fc2 has a bias.
    """
    check_one_of("criterion energy: about", about, ("auto", "mean", "zero"))
    centred = seen.folded if about == "auto" else about == "mean"
    return seen.mean_square(centred=centred) * seen.weight.square().sum(0)
