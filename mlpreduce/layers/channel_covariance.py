"""A branch beside an MLP that mixes channels by their covariance, while the model trains.

Source: the channel covariance attention of SCHEME (arXiv 2312.00412).
"""

from __future__ import annotations

import torch
from torch import nn

from mlpreduce.errors import check_one_of, check_whole
from mlpreduce.layers.wrapper import Wrapper

__all__ = ["ChannelCovariance"]


class ChannelCovariance(Wrapper):
    """While training, alpha * base(x) + (1 - alpha) * A x, with (alpha, 1 - alpha) = softmax(mix); in evaluation base(x).

    A, (channels, channels), is the softmax of X X^T / sqrt(hidden) along its rows, X the input, (channels, tokens). It lets the
    groups of a block-diagonal MLP see each other while they learn.

    Attributes:
        base: the MLP.
        mix: (2,), before the softmax.

    Args:
        base: the MLP, from (images, tokens, channels) to the same shape.
        hidden: its hidden units.
        variant: `covariance`, or `as_released`, where X^T is X's memory read as (tokens, channels), so that it is no covariance
            and not symmetric.

    Raises:
        ReductionError: an option is out of range.
    """

    is_one_layer = False

    def __init__(self, base: nn.Module, hidden: int, variant: str = "covariance") -> None:
        super().__init__()
        check_whole("ChannelCovariance: hidden", hidden)
        check_one_of("ChannelCovariance: variant", variant, ("covariance", "as_released"))
        self.base, self.hidden, self.variant = base, hidden, variant
        like = next(base.parameters(), torch.empty(0))
        self.mix = nn.Parameter(torch.randn(2, device=like.device, dtype=like.dtype))

    @classmethod
    def in_place_of(cls, module: nn.Module, hidden: int, variant: str = "covariance") -> ChannelCovariance:
        """The layer around a module."""
        return cls(module, hidden, variant)

    @property
    def alpha(self) -> float:
        """The share of the MLP while training. Training and evaluation agree only where it is 1."""
        return float(self.mix.detach().softmax(0)[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(images, tokens, channels), of the same shape."""
        y: torch.Tensor = self.base(x)
        if not self.training:
            return y
        tokens = x.flatten(1, -2)  # (images, height, width, channels) are tokens too
        channels = tokens.transpose(1, 2).contiguous()
        other = channels.transpose(1, 2) if self.variant == "covariance" else channels.view(tokens.shape)
        attention = (channels * self.hidden**-0.5 @ other).softmax(-1)
        alpha, rest = self.mix.softmax(0)
        mixed: torch.Tensor = (attention @ channels).transpose(1, 2).reshape(x.shape)
        return torch.add(alpha * y, rest * mixed)

    def merged(self) -> nn.Module:
        """The MLP alone: what it is in evaluation."""
        return self.base
