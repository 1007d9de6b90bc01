"""What layers are to the rest of the library: the axes of their tensors that features lie on, and what they wrap."""

from __future__ import annotations

from typing import ClassVar, Protocol, runtime_checkable

from torch import nn

__all__ = ["Axes", "StandIn", "Wrapper", "macs_of", "merged"]

Axes = tuple[tuple[str, int], ...]  # name of a tensor, and its axis; names of tensors that a layer lacks are left out


@runtime_checkable
class StandIn(Protocol):
    """A layer that does what a `Linear` does.

    Attributes:
        outputs: axes of its own tensors that its outputs lie on.
        inputs: the same of its inputs.
    """

    @property
    def outputs(self) -> Axes: ...

    @property
    def inputs(self) -> Axes: ...

    def merged(self) -> nn.Module: ...


class Wrapper(nn.Module):
    """A layer around a module, which stays as it is and may be tied while the rest is this layer's own.

    Attributes:
        base: what is wrapped.
        is_one_layer: whether a graph has the layer as a whole; else it has what is wrapped.
    """

    base: nn.Module
    is_one_layer: ClassVar[bool] = True


def macs_of(module: nn.Module) -> tuple[int, int]:
    """Multiply-accumulates of a layer in evaluation: for each position, and once for each call."""
    own: tuple[int, int] = getattr(module, "macs", (0, 0))
    if isinstance(module, Wrapper):
        return tuple(map(sum, zip(own, macs_of(module.base), strict=True)))  # type: ignore[return-value]
    weight = module._parameters.get("weight")
    return (weight.numel(), 0) if not hasattr(module, "macs") and weight is not None and weight.dim() > 1 else own


def merged(module: nn.Module) -> nn.Module:
    """A plain module that computes the same: of a layer of this package its `merged()`, any other as it is."""
    merge = getattr(module, "merged", None)
    plain: nn.Module = module if merge is None else merge()
    return plain
