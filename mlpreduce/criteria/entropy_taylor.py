"""`entropy_taylor`: the units whose removal changes most what the model finds alike, to first order; no labels are needed.

Source: the successor of DGMR, arXiv 2603.08100, of which this is written from a one-line description: |a dL/da| of a unit, L
being the entropy of the softmax over the similarities of an image's features to those of all images, times 15. Here the
similarity is the cosine, the images are those looked at together (see `mlpreduce.calibration`), and features are what the
model gives: logits, if it has a classifier.
"""

from __future__ import annotations

import torch
from torch import nn

from mlpreduce.criteria import Seen, register_criterion
from mlpreduce.errors import ReductionError
from mlpreduce.graph import tensor_of

INVERSE_TEMPERATURE = 15.0


def entropy(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Mean entropy, in nats, of each image's softmax over its similarities to all images of the batch, itself too."""
    if len(images) < 2:
        raise ReductionError(
            f"criterion entropy_taylor compares images with each other, and was given {len(images)}; give at least 2, in "
            f"each process"
        )
    output = tensor_of(model(images), ("logits", "pooler_output", "last_hidden_state"))
    if output.dim() == 3:  # tokens (images, tokens, features)
        output = output.mean(1)
    elif output.dim() > 3:  # a map (images, features, height, width)
        output = output.flatten(2).mean(-1)
    features = nn.functional.normalize(output, dim=-1)
    log_shares = (INVERSE_TEMPERATURE * features @ features.T).log_softmax(-1)
    return -(log_shares.exp() * log_shares).sum(-1).mean()


@register_criterion("entropy_taylor", needs="loss", objective=entropy)
def entropy_taylor(seen: Seen, *, site: str = "act") -> torch.Tensor:
    """|derivative of the entropy by a factor on what the unit puts out for an example|.

    Args:
        seen: what the units did.
        site: as of `taylor`.
    """
    return seen.at(site).abs()
