"""`thin`: build the model with a smaller MLP ratio.

Source: ThinMLP, in the code of Krishna Kumar, "Parameter Reduction Improves Vision Transformers", arXiv 2512.01059
(not in the paper). Under timm's default initialisation the weights have the distribution of `shallow`'s, from another
random stream: other layers start from other values too, which makes it the control of `shallow`.
"""

from __future__ import annotations

import math

from mlpreduce.errors import ReductionError
from mlpreduce.transforms.registry import register


@register("thin", construction=True)
def thin(*, mlp_ratio: float = 2.0) -> dict[str, float]:
    """Build every MLP with hidden width int(width * mlp_ratio).

    Args:
        mlp_ratio: hidden width over embedding width; timm's ViTs have 4.

    Raises:
        ReductionError: not a positive number.
    """
    if isinstance(mlp_ratio, bool) or not isinstance(mlp_ratio, (int, float)) or not 0 < mlp_ratio < math.inf:
        raise ReductionError(f"mlp_ratio is {mlp_ratio!r}; it must be a positive number, 4 in most ViTs")
    return {"mlp_ratio": mlp_ratio}
