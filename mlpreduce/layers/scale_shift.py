"""A scale and a shift for each feature that a layer gives.

Source: SSF (arXiv 2210.08823): y = scale * x + shift after each operation.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from mlpreduce.errors import ReductionError
from mlpreduce.layers.wrapper import Axes, StandIn, Wrapper, merged

__all__ = ["ScaleShift", "is_scalable"]


def is_scalable(layer: nn.Module) -> bool:
    """Whether a scale and shift of what a layer gives can be part of its weight and bias.

    A layer whose forward makes something else of its weight, such as a weight-standardised convolution, is none.
    """
    if isinstance(layer, nn.LayerNorm):
        return layer.elementwise_affine and len(layer.normalized_shape) == 1
    plain = type(layer).forward in (nn.Linear.forward, nn.Conv2d.forward) and not layer._modules
    return plain or isinstance(layer, StandIn)


class ScaleShift(Wrapper):
    """y = scale * base(x) + shift, one of each for every feature. It starts as the identity.

    Attributes:
        base: a `Linear` or what stands in for one, a `LayerNorm`, or a `Conv2d`.
        scale: (features,).
        shift: (features,), or None where the base has no bias that could take it.

    Args:
        base: the layer.

    Raises:
        ReductionError: it is of another kind.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        plain = base
        while isinstance(plain, Wrapper):
            plain = plain.base
        if not is_scalable(plain):
            raise ReductionError(
                f"ScaleShift: {type(plain).__name__} is no Linear, no Conv2d and no LayerNorm of one dimension with weights"
            )
        features: int
        if isinstance(plain, nn.LayerNorm):
            (features,) = plain.normalized_shape
        else:
            features = getattr(plain, "out_channels" if isinstance(plain, nn.Conv2d) else "out_features")
        first = isinstance(plain, nn.Conv2d) or "2d" in type(plain).__name__  # timm's LayerNorm2d
        self.base, self._dim = base, 1 if first else -1
        like = next(base.parameters())
        self.scale = nn.Parameter(torch.ones(features, device=like.device, dtype=like.dtype))
        biased = plain._parameters.get("bias") is not None
        self.shift = nn.Parameter(torch.zeros_like(self.scale)) if biased else None

    @classmethod
    def in_place_of(cls, module: nn.Module) -> ScaleShift:
        """The layer around a module."""
        return cls(module)

    @property
    def outputs(self) -> Axes:
        """Axes of its own tensors that its outputs lie on."""
        return ("scale", 0), ("shift", 0)

    @property
    def weight(self) -> torch.Tensor:
        """The weight of the base with the scale in it, for modules that read it and do not call the layer."""
        weight: torch.Tensor = self.base.weight  # type: ignore[assignment]
        return weight * self.scale.reshape(-1, *[1] * (weight.dim() - 1))

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias of the base with the scale and the shift in it; None if it has none."""
        bias: torch.Tensor | None = self.base.bias  # type: ignore[assignment]
        return None if bias is None or self.shift is None else bias * self.scale + self.shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the base takes, to what it gives."""
        y: torch.Tensor = self.base(x)
        along = (slice(None), *[None] * (y.dim() - 2)) if self._dim == 1 else slice(None)
        y = y * self.scale[along]
        return y if self.shift is None else y + self.shift[along]

    def merged(self) -> nn.Module:
        """A layer of the kind that the base is, with both in its weights. The base stays as it is."""
        layer = copy.deepcopy(merged(self.base))
        with torch.no_grad():
            weight = layer.get_parameter("weight")
            weight.mul_(self.scale.reshape(-1, *[1] * (weight.dim() - 1)))
            if self.shift is not None:
                layer.get_parameter("bias").mul_(self.scale).add_(self.shift)
        return layer

    def extra_repr(self) -> str:
        """Features, and whether there is a shift."""
        return f"{len(self.scale)}, shift={self.shift is not None}"
