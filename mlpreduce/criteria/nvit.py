"""`nvit`: the squared first-order change of the loss, by the weights of fc1.

Source: NViT (Yang et al., "Global Vision Transformer Pruning with Hessian-Aware Saliency", arXiv 2110.04869): the square of
the sum of w dL/dw over a unit's fc1 row and bias, averaged over batches. Here every image is a batch of its own, so that the
order does not depend on how images are batched. Its penalty on latency is `latency_weight` of `shallow`.
"""

from __future__ import annotations

import torch

from mlpreduce.criteria import Seen, register_criterion


@register_criterion("nvit", needs="loss")
def nvit(seen: Seen, *, site: str = "fc1") -> torch.Tensor:
    """(derivative of an example's loss by a factor on the unit)^2.

    Args:
        seen: what the units did.
        site: `fc1` (its weights and bias, as published), `act` or `fc2` (what fc2 is given, or its weights, which is the
            same), or `both`: all weights of the unit. The sites rank differently.
    """
    return seen.at(site).square()
