"""A scale and a shift of each feature, after a projection or a norm.

Source: SSF (arXiv 2210.08823): y = scale * x + shift.
"""

from __future__ import annotations

import torch
from torch import nn

from mlpreduce.errors import ReductionError, check_one_of, check_whole
from mlpreduce.layers.linear import linear_of, weight_of

__all__ = ["ScaleShift"]

STD = 0.02


class ScaleShift(nn.Module):
    """y = scale * x + shift, over the last dimension.

    Attributes:
        scale: (features,).
        shift: (features,).

    Args:
        features: their number.
        init: `identity`, which changes nothing, or `released`: normal numbers around 1 and 0, of deviation 0.02.
        device: where they lie.
        dtype: their type.

    Raises:
        ReductionError: an option is out of range.
    """

    def __init__(
        self,
        features: int,
        init: str = "identity",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_whole("ScaleShift: features", features)
        check_one_of("ScaleShift: init", init, ("identity", "released"))
        self.scale = nn.Parameter(torch.ones(features, device=device, dtype=dtype))
        self.shift = nn.Parameter(torch.zeros(features, device=device, dtype=dtype))
        if init == "released":
            nn.init.normal_(self.scale, mean=1.0, std=STD)
            nn.init.normal_(self.shift, std=STD)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., features), of the same shape."""
        return x * self.scale + self.shift

    def merged_into(self, layer: nn.Module) -> nn.Linear | nn.LayerNorm:
        """The layer before it and it, as one layer of the same kind. The one before stays as it is.

        Raises:
            ReductionError: the layer is neither a `Linear` nor a `LayerNorm` with weights, or has other features.
        """
        call = f"ScaleShift.merged_into({type(layer).__name__})"
        scale, shift = self.scale.detach(), self.shift.detach()
        if isinstance(layer, nn.LayerNorm) and layer.weight is not None and layer.weight.shape == scale.shape:
            bias = 0 if layer.bias is None else layer.bias.detach()
            norm = nn.LayerNorm(layer.normalized_shape, layer.eps, device="meta", dtype=layer.weight.dtype)
            norm.weight = nn.Parameter(scale * layer.weight.detach())
            norm.bias = nn.Parameter(scale * bias + shift)
            return norm
        weight = weight_of(layer, call)
        if len(weight) != len(scale):
            raise ReductionError(f"{call}: the layer has {len(weight)} outputs, and this has {len(scale)} features")
        bias = layer.bias.detach() if layer.bias is not None else torch.zeros_like(shift)  # type: ignore[operator,union-attr]
        return linear_of(scale[:, None] * weight, scale * bias + shift)
