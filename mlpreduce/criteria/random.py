"""`random`: a random choice, without replacement."""

from __future__ import annotations

import torch

from mlpreduce.criteria import register_criterion


@register_criterion("random", weights=False)
def random(weights: torch.Tensor, seed: int) -> torch.Tensor:
    """A permutation from a generator of its own: the global random state is not touched."""
    return torch.randperm(weights.shape[0], generator=torch.Generator().manual_seed(seed), device="cpu")
