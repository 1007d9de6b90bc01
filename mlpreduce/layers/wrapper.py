"""What layers are to the rest of the library: the axes of their tensors that features lie on, and what they wrap."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

__all__ = ["Axes", "StandIn", "Wrapper", "macs_of", "merged"]

Axes = tuple[tuple[str, int], ...]  # name of a tensor, and its axis; names of tensors that a layer lacks are left out


class Layer(nn.Module):
    """A layer of this package, told by its class: attributes of such names mean something else in the layers of others."""

    @property
    def outputs(self) -> Axes:
        """Axes of its own tensors that its outputs lie on; none: they cannot be sliced."""
        return ()

    @property
    def inputs(self) -> Axes:
        """Axes of its own tensors that its inputs lie on; none: they cannot be sliced."""
        return ()

    @property
    def macs(self) -> tuple[int, int]:
        """Multiply-accumulates of its own tensors: for each position, and once for each call."""
        return 0, 0


class StandIn(Layer):
    """A layer that does what a `Linear` does, and turns back into one by `merged()`."""

    @property
    def weight_trains(self) -> bool:
        """Whether a weight in its place would train: as its own do, but for the bias."""
        return any(p.requires_grad for name, p in self._parameters.items() if p is not None and name != "bias")


class Wrapper(Layer):
    """A layer around a module, which stays as it is and may be tied while the rest is this layer's own.

    Attributes:
        base: what is wrapped.
        is_one_layer: whether a graph has the layer as a whole; else it has what is wrapped.
    """

    base: nn.Module
    is_one_layer: ClassVar[bool] = True


def macs_of(module: nn.Module) -> tuple[int, int]:
    """Multiply-accumulates of a layer in evaluation: for each position, and once for each call."""
    if isinstance(module, Wrapper):
        (each, once), (own, own_once) = macs_of(module.base), module.macs
        return each + own, once + own_once
    if isinstance(module, Layer):
        return module.macs
    weight = module._parameters.get("weight")
    return (weight.numel(), 0) if weight is not None and weight.dim() > 1 else (0, 0)


def merged(module: nn.Module) -> nn.Module:
    """A plain module that computes the same: of a layer of this package its `merged()`, any other as it is."""
    merge = getattr(module, "merged", None) if isinstance(module, Layer) else None
    plain: nn.Module = module if merge is None else merge()
    if isinstance(module, StandIn):
        plain.get_parameter("weight").requires_grad_(module.weight_trains)
        if (bias := module._parameters.get("bias")) is not None:
            plain.get_parameter("bias").requires_grad_(bias.requires_grad)
    return plain
