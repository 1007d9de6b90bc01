"""`hessian_diag`: the units with the largest second derivative of the loss.

Source: the saliency of LeCun, Denker and Solla, "Optimal Brain Damage" (1989), h w^2 / 2, for a factor on a unit's output in
place of a weight. The diagonal is estimated from products of the Hessian with random signs v, whose v * Hv it is on average
(Bekas, Kokiopoulou and Saad, "An estimator for the diagonal of a matrix", 2007); the signs are the same for all examples.
"""

from __future__ import annotations

import torch

from mlpreduce.criteria import Seen, register_criterion


@register_criterion("hessian_diag", needs="loss", probes=8)
def hessian_diag(seen: Seen) -> torch.Tensor:
    """Half the second derivative of an example's loss by a factor on what the unit puts out."""
    return seen.bend["fc2"] / 2
