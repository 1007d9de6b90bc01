"""`l1`: the units with the largest sum of absolute weights.

Source: the rule by which S2ViTE (Chen et al., "Chasing Sparsity in Vision Transformers", arXiv 2106.04533) drops neurons:
||fc1 row||_1 + ||fc2 column||_1. Here fc1's bias counts too, as it goes with the
unit; norms and convolutions between fc1 and fc2 do not.
"""

from __future__ import annotations

import torch

from mlpreduce.criteria import HiddenUnits, register_criterion


@register_criterion("l1")
def l1(units: HiddenUnits) -> torch.Tensor:
    """The sum of the absolute values of the unit's weights."""
    return units.weights().abs().sum(dim=1)
