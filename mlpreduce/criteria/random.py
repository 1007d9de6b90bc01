"""`random`: a random choice, without replacement."""

from __future__ import annotations

import torch

from mlpreduce.criteria import HiddenUnits, register_criterion


@register_criterion("random", needs="nothing", draws=True)
def random(units: HiddenUnits) -> torch.Tensor:
    """A permutation from a generator of its own: the global random state is not touched."""
    return torch.randperm(len(units), generator=torch.Generator().manual_seed(units.seed), device="cpu")
