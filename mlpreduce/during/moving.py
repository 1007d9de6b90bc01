"""The mask of one MLP's hidden units, and how it moves."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from mlpreduce.during.units import indices, parameter, projections
from mlpreduce.edits import Axis, Slice
from mlpreduce.errors import ReductionError
from mlpreduce.graph import MLP, module_at

__all__ = ["Masked", "check_alone", "mask_of", "moved_mask", "tensor_of"]


@dataclass
class Masked:
    """The mask of one MLP.

    Attributes:
        hidden: number of its hidden units.
        zeroed: axes where masked units are zero.
        held: axes where they stay as they were when they were masked.
        active: which units are not masked, (hidden,), on the CPU.
        aside: what masked units have on each axis, by the path of the tensor.
        places: where they lie on it.
    """

    hidden: int
    zeroed: list[Axis]
    held: list[Axis]
    active: torch.Tensor
    aside: dict[str, torch.Tensor] = field(default_factory=dict)
    places: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def axes(self) -> list[Axis]:
        return [*self.zeroed, *self.held]

    def choose(self, active: torch.Tensor) -> None:
        """Set which units are active."""
        self.active, masked = active, torch.nonzero(~active).flatten()
        self.places = {axis.tensor: indices(axis, masked) for axis in self.axes}

    def on(self, axis: Axis, tensor: torch.Tensor) -> torch.Tensor:
        """Where masked units lie on an axis, on the device of a tensor; that of the model is remembered."""
        place = self.places[axis.tensor]
        if place.device != tensor.device:
            place = self.places[axis.tensor] = place.to(tensor.device)
        return place

    def cover(self, model: nn.Module) -> None:
        """Lay aside what the masked units of a model have, and mask them."""
        with torch.no_grad():
            for axis in self.axes:
                tensor = tensor_of(model, axis)
                self.aside[axis.tensor] = tensor.detach().index_select(axis.dim, self.on(axis, tensor))
        self.hold(model)

    def uncover(self, model: nn.Module) -> None:
        """Give the masked units of a model what they had."""
        with torch.no_grad():
            for axis in self.axes:
                tensor = tensor_of(model, axis)
                tensor.index_copy_(axis.dim, self.on(axis, tensor), self.aside[axis.tensor].to(tensor))

    def uncover_zeros(self, model: nn.Module) -> None:
        """Give masked units that still are zero what they had; others have been loaded since they were masked."""
        with torch.no_grad():
            for axis in self.zeroed:
                tensor = tensor_of(model, axis)
                now = tensor.index_select(axis.dim, self.on(axis, tensor))
                zero = (now == 0).movedim(axis.dim, 0).flatten(1).all(1)
                zero = zero.reshape([-1 if dim == axis.dim else 1 for dim in range(now.dim())])
                values = torch.where(zero, self.aside[axis.tensor].to(now), now)
                tensor.index_copy_(axis.dim, self.on(axis, tensor), values)

    def hold(self, model: nn.Module, *, held: bool = True) -> None:
        """Make the masked units of a model what they must be: zero and, with `held`, elsewhere as they were."""
        with torch.no_grad():
            for axis in self.zeroed:
                tensor = tensor_of(model, axis)
                tensor.index_fill_(axis.dim, self.on(axis, tensor), 0)
            for axis in self.held if held else ():
                tensor = tensor_of(model, axis)
                tensor.index_copy_(axis.dim, self.on(axis, tensor), self.aside[axis.tensor].to(tensor))

    def shape(self, tensor: torch.Tensor, axis: Axis) -> tuple[int, ...]:
        """The shape of what masked units have in a tensor."""
        count = len(axis.offsets) * int((~self.active).sum())
        return tuple(count if dim == axis.dim else size for dim, size in enumerate(tensor.shape))


def tensor_of(model: nn.Module, axis: Axis) -> nn.Parameter:
    """The tensor of an axis.

    Raises:
        ReductionError: it no longer has the width that the mask was made for.
    """
    tensor = parameter(model, axis.tensor, "PruneAndGrow")
    if tensor.shape[axis.dim] != axis.size:
        raise ReductionError(
            f"PruneAndGrow: {axis.tensor} has shape {tuple(tensor.shape)}, and the mask was made for {axis.size} at dimension "
            f"{axis.dim}: something else has reduced the model; make a new PruneAndGrow of it"
        )
    return tensor


def moved_mask(active: torch.Tensor, weights: torch.Tensor, slopes: torch.Tensor, rate: float) -> torch.Tensor:
    """The mask after one move: as many units are active as before.

    Args:
        active: which units are active, (hidden,).
        weights: norms of the units' weights; the active units with the least are dropped.
        slopes: norms of their gradients; the units with the largest, of all that are then inactive, are grown.
        rate: fraction of the active units to drop, rounded up.

    Example:
        >>> active = torch.tensor([True, True, False, False])
        >>> moved_mask(active, torch.tensor([3.0, 1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 2.0, 0.0]), 0.5).tolist()
        [True, False, True, False]
    """
    moved, on = active.clone(), torch.nonzero(active).flatten()
    count = math.ceil(rate * len(on))
    moved[on[torch.sort(weights[on], stable=True).indices[:count]]] = False
    off = torch.nonzero(~moved).flatten()
    moved[off[torch.sort(slopes[off], descending=True, stable=True).indices[:count]]] = True
    return moved


def mask_of(mlp: MLP, edit: Slice, site: str) -> Masked:
    fc1, fc2 = projections(mlp)
    active = torch.zeros(mlp.hidden_features, dtype=torch.bool)
    active[list(edit.units)] = True
    zeroed, held = ([*fc1, fc2], []) if site == "both" else ([fc2], fc1)
    mask = Masked(mlp.hidden_features, zeroed, held, active)
    mask.choose(active)
    return mask


def check_alone(model: nn.Module, mlp: MLP, call: str) -> None:
    """Whether each hidden unit is by itself between fc1 and fc2, so that a masked unit is as good as none.

    Raises:
        ReductionError: a norm there takes all units together.
    """
    for leaf in mlp.leaves:
        module = module_at(model, leaf.path)
        alone = isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.PReLU))
        if leaf.role == "norm" and not alone:
            raise ReductionError(
                f"{call}: {leaf.path} ({type(module).__name__}) is a norm over the hidden units of {mlp.name}, in whose "
                f"statistics masked units would count; exclude={mlp.name!r} leaves it out"
            )
    if mlp.groups > 1:
        raise ReductionError(
            f"{call}: {mlp.name} has a convolution in {mlp.groups} groups, through which masked units reach others; "
            f"exclude={mlp.name!r} leaves it out"
        )
