"""A projection with a low-rank correction beside it, which trains instead of it.

Source: LoRA (arXiv 2106.09685): y = W x + b + (alpha / rank) up (down x).
"""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from mlpreduce.errors import ReductionError, check_number, check_whole
from mlpreduce.layers.linear import weight_of
from mlpreduce.layers.wrapper import Axes, Wrapper, merged

__all__ = ["LoraLinear"]


class LoraLinear(Wrapper):
    """y = base(x) + (alpha / rank) up (down x). `up` starts at 0, so at first it is the base.

    Several of them may have one base: what a tied layer is for all its uses, each corrects for itself.

    Attributes:
        base: the dense layer; it trains or not as it did.
        down: (rank, inputs).
        up: (outputs, rank).

    Args:
        base: the dense layer.
        rank: features between.
        alpha: scale of the correction, divided by the rank; the rank itself by default.

    Raises:
        ReductionError: a rank out of range, or the base is no `Linear`.
    """

    def __init__(self, base: nn.Module, rank: int = 4, alpha: float | None = None) -> None:
        super().__init__()
        weight = weight_of(base, "LoraLinear")
        check_whole("LoraLinear: rank", rank)
        if rank > min(weight.shape):
            raise ReductionError(f"LoraLinear: rank is {rank}; it is at most {min(weight.shape)}")
        alpha = float(rank) if alpha is None else alpha
        check_number("LoraLinear: alpha", alpha, above=True)
        self.base, self.scale = base, alpha / rank
        self.down = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.up = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    @classmethod
    def in_place_of(cls, module: nn.Module, rank: int, alpha: float | None = None) -> LoraLinear:
        """The layer around a module."""
        return cls(module, rank, alpha)

    @property
    def macs(self) -> tuple[int, int]:
        """Multiply-accumulates for each position, and once for each call."""
        return self.down.numel() + self.up.numel(), 0

    @property
    def outputs(self) -> Axes:
        """Axes of its own tensors that its outputs lie on."""
        return (("up", 0),)

    @property
    def inputs(self) -> Axes:
        """Axes of its own tensors that its inputs lie on."""
        return (("down", 1),)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., inputs) to (..., outputs)."""
        correction = nn.functional.linear(nn.functional.linear(x, self.down), self.up)
        y: torch.Tensor = self.base(x)
        return y + self.scale * correction

    def merged(self) -> nn.Module:
        """The dense layer that computes the same; the base stays as it is."""
        layer = copy.deepcopy(merged(self.base))
        with torch.no_grad():
            layer.get_parameter("weight").add_(self.scale * (self.up @ self.down))
        return layer

    def extra_repr(self) -> str:
        """Rank and scale."""
        return f"rank={self.down.shape[0]}, scale={self.scale:g}"
