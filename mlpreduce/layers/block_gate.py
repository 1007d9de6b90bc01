"""A gate on what an MLP gives, and what is left of an MLP whose gate is shut.

Source: ADA-DEFT (as described in DEFT's reviews): a learned weight for each MLP; those of small weight are skipped.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from mlpreduce.errors import ReductionError
from mlpreduce.layers.wrapper import Wrapper, merged

__all__ = ["BlockGate", "NoMlp"]


class BlockGate(Wrapper):
    """y = g base(x), g = gate kept within 0..1. It starts at 1, which changes nothing.

    Attributes:
        base: the contracting layer of an MLP.
        gate: (1,), as FSDP takes no scalars.

    Args:
        base: the layer.

    Raises:
        ReductionError: it has no weight that could take the gate.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        like = next(base.parameters(), None)
        if like is None:
            raise ReductionError(f"BlockGate: {type(base).__name__} has no weights to take a gate")
        inner = base
        while isinstance(inner, Wrapper):
            if isinstance(inner, BlockGate):
                raise ReductionError("BlockGate: there is a gate already")
            inner = inner.base
        self.base = base
        self.gate = nn.Parameter(torch.ones(1, device=like.device, dtype=like.dtype))

    @classmethod
    def in_place_of(cls, module: nn.Module) -> BlockGate:
        """The layer around a module."""
        return cls(module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the base takes, to what it gives."""
        y: torch.Tensor = self.base(x)
        return y * self.gate.clamp(0, 1)

    def merged(self) -> nn.Module:
        """A layer of the kind that the base is, with the gate in its weights. The base stays as it is."""
        layer = copy.deepcopy(merged(self.base))
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.mul_(self.gate.clamp(0, 1))
        return layer


class NoMlp(nn.Module):
    """Nothing in the place of an MLP: it gives zeros, so that the residual stream goes on as it is.

    They are a product with 0: what lies before, such as a norm, still has a gradient, as DDP wants.
    """

    @classmethod
    def in_place_of(cls, module: nn.Module) -> NoMlp:
        """The layer in place of a module."""
        return cls()

    def forward(self, x: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
        """Zeros of the shape of what it is given; what else an MLP may be given makes no difference."""
        return x * 0
