"""A small convolution over the grid of tokens before a shared MLP, of its own for each use.

Source: the transformation of shared weights in MiniViT (arXiv 2204.07154), which puts a depthwise convolution before each
use of a shared MLP. Here it starts as nothing, and class and register tokens pass by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mlpreduce.errors import ReductionError, check_whole
from mlpreduce.layers.wrapper import Wrapper

__all__ = ["TokenConvolution"]


class GridConvolution(nn.Conv2d):
    """A depthwise convolution, without bias, over tokens that form a grid; it starts at 0."""

    def __init__(self, features: int, kernel: int, grid: tuple[int, ...] | None, like: torch.Tensor) -> None:
        place: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        super().__init__(features, features, kernel, padding=kernel // 2, groups=features, bias=False, **place)
        self.grid = grid
        nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(images, tokens, features) with the grid, or (images, height, width, features) without, of the same shape."""
        if self.grid is None:
            return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        others, height, width = self.grid
        if x.shape[1] != others + height * width:
            raise ReductionError(
                f"TokenConvolution: given {x.shape[1]} tokens, but made for {others} and a grid of {height} x {width}; images "
                f"must have the size that the model was reduced with"
            )
        grid = x[:, others:].transpose(1, 2).unflatten(2, (height, width))
        return nn.functional.pad(super().forward(grid).flatten(2).transpose(1, 2), (0, 0, others, 0))


class TokenConvolution(Wrapper):
    """y = base(x + convolution(x)), each channel alone. At first it is the base.

    Attributes:
        base: the MLP.
        convolution: over kernel x kernel tokens.

    Args:
        base: the MLP.
        features: its inputs.
        kernel: an odd number of tokens.
        grid: how many tokens (class and register tokens) come before the others, and height and width of those; None for a base
            that is given (images, height, width, features).

    Raises:
        ReductionError: an even kernel.
    """

    is_one_layer = False

    def __init__(self, base: nn.Module, features: int, kernel: int = 3, grid: Sequence[int] | None = None) -> None:
        super().__init__()
        check_whole("TokenConvolution: features", features)
        check_whole("TokenConvolution: kernel", kernel)
        if kernel % 2 == 0:
            raise ReductionError(f"TokenConvolution: kernel is {kernel}; it must be odd, so that tokens stay in place")
        self.base = base
        if grid is not None and len(grid) != 3:
            raise ReductionError(f"TokenConvolution: grid is {grid!r}; give the tokens before, height and width")
        self.convolution = GridConvolution(
            features, kernel, None if grid is None else tuple(map(int, grid)), next(base.parameters())
        )

    @classmethod
    def in_place_of(
        cls, module: nn.Module, features: int, kernel: int = 3, grid: Sequence[int] | None = None
    ) -> TokenConvolution:
        """The layer around a module."""
        return cls(module, features, kernel, grid)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the base takes: (images, tokens, features), or (images, height, width, features)."""
        y: torch.Tensor = self.base(x + self.convolution(x))
        return y
