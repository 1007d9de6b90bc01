"""Takes hidden units out of the tensors of a model, and can put them back.

Until a plan is carried out as a whole, what goes must not be lost, and no memory is spent on it: what stays of a tensor
and what goes are copied apart, and then it is freed. So the model takes no more than one tensor beyond what it holds.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from mlpreduce.edits import Axis, Slice, Units, as_units
from mlpreduce.errors import ReductionError
from mlpreduce.graph import module_at

__all__ = ["find_tensor", "slice_all"]


def find_tensor(model: nn.Module, path: str, call: str) -> tuple[nn.Module, str, torch.Tensor]:
    """The leaf that holds the tensor at `path`, the tensor's name there, and the tensor.

    Raises:
        ReductionError: there is none.
    """
    parent, _, name = path.rpartition(".")
    leaf = module_at(model, parent)
    tensor = getattr(leaf, name, None)
    if leaf is None or not isinstance(tensor, torch.Tensor):
        raise ReductionError(f"{call}: {type(model).__name__} has no tensor {path!r}; the plan is of another model")
    return leaf, name, tensor


def slice_all(model: nn.Module, slices: Sequence[Slice], undo: ExitStack) -> None:
    """Slice MLPs, the largest first, so that a lack of memory shows at once; `undo` gets what puts all back."""

    def size(edit: Slice) -> int:
        return max(find_tensor(model, axis.tensor, edit.mlp)[2].nbytes for axis in edit.axes)

    for edit in sorted(slices, key=size, reverse=True):
        for path in dict.fromkeys(axis.tensor for axis in edit.axes):
            axes = [axis for axis in edit.axes if axis.tensor == path]
            _slice(*find_tensor(model, path, edit.mlp)[:2], axes, edit, undo)
        for setting in edit.settings:
            owner = module_at(model, setting.module)
            sizes = list(getattr(owner, setting.name))
            undo.callback(setattr, owner, setting.name, list(sizes))
            sizes[setting.index] -= edit.hidden - len(edit.units)
            setattr(owner, setting.name, sizes)


def _slice(leaf: nn.Module, name: str, axes: list[Axis], edit: Slice, undo: ExitStack) -> None:
    """Put what is left of one tensor of a leaf in its place."""
    tensor: torch.Tensor = getattr(leaf, name)
    part, rebuild = _cut(tensor, axes, edit)
    if isinstance(tensor, nn.Parameter):
        part = _parameter(part, tensor)
    tensors: dict[str, Any] = leaf._parameters if isinstance(tensor, nn.Parameter) else leaf._buffers
    sizes = dict(vars(leaf))

    def put_back() -> None:
        tensors[name] = rebuild()
        vars(leaf).update(sizes)

    undo.callback(put_back)
    tensors[name] = part
    _set_sizes(leaf)


def _parameter(values: torch.Tensor, like: torch.Tensor) -> nn.Parameter:
    """A parameter with the marks of another, such as timm's _no_weight_decay."""
    parameter = nn.Parameter(values, requires_grad=like.requires_grad)
    vars(parameter).update(vars(like))
    return parameter


def _cut(tensor: torch.Tensor, axes: list[Axis], edit: Slice) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
    """What is left of a tensor, in memory of its own, and what gives the tensor again."""
    values = tensor.detach()
    if len(axes) > 1:  # a grouped convolution: the input axis first, which tells the groups
        for axis in sorted(axes, key=lambda axis: -axis.groups):
            kept = axis.positions(edit.hidden, edit.units)
            values = _of_groups(values, axis, edit) if axis.groups > 1 else _picked(values, axis.dim, kept)
        return values, lambda: tensor
    (axis,) = axes
    kept = axis.positions(edit.hidden, edit.units)
    part = _picked(values, axis.dim, kept)
    hooks = tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None)
    if tensor.is_meta or hooks or not tensor.is_contiguous():  # without memory, or more than values
        return part, lambda: tensor
    gone = _others(kept, axis.size)
    return part, _Old(tensor, axis.dim, ((kept, part), (gone, _picked(values, axis.dim, gone)))).rebuild


class _Old:
    """A tensor, remembered as its parts: what is left of it lies in the model."""

    def __init__(self, tensor: torch.Tensor, dim: int, parts: Sequence[tuple[Units, torch.Tensor]]) -> None:
        self.alive = weakref.ref(tensor)
        self.shape, self.dim, self.parts = tensor.shape, dim, parts
        self.grad = tensor.grad
        empty = tensor.new_empty(0)
        self.like = _parameter(empty, tensor) if isinstance(tensor, nn.Parameter) else empty

    def rebuild(self) -> torch.Tensor:
        """The tensor itself if others hold it, else one that is equal."""
        old = self.alive()
        if old is not None:
            return old
        values = self.like.new_empty(self.shape)
        for positions, part in self.parts:
            values.index_copy_(self.dim, torch.tensor(positions, device=part.device), part)
        if not isinstance(self.like, nn.Parameter):
            return values
        parameter = _parameter(values, self.like)
        parameter.grad = self.grad
        return parameter


def _others(kept: Units, size: int) -> Units:
    if isinstance(kept, range) and kept.start == 0:
        return range(kept.stop, size)
    known = set(kept)
    return as_units([position for position in range(size) if position not in known])


def _picked(tensor: torch.Tensor, dim: int, positions: Units) -> torch.Tensor:
    if isinstance(positions, range):
        part = tensor.narrow(dim, positions.start, len(positions))
        return part.clone(memory_format=torch.contiguous_format)
    return tensor.index_select(dim, torch.tensor(positions, device=tensor.device))


def _of_groups(tensor: torch.Tensor, axis: Axis, edit: Slice) -> torch.Tensor:
    """What is left along the input axis of a grouped convolution: each group of rows has columns of its own."""
    size = edit.hidden // axis.groups
    groups = tensor.unflatten(0, (axis.groups, -1))
    local = [[unit % size for unit in edit.units if unit // size == group] for group in range(axis.groups)]
    index = [torch.tensor(units, device=tensor.device) for units in local]
    return torch.cat([rows.index_select(1, units) for rows, units in zip(groups, index, strict=True)])


def _set_sizes(leaf: nn.Module) -> None:
    """Widths that a leaf keeps beside its tensors: they show in its repr, and some are read in forward."""
    if isinstance(leaf, nn.Linear):
        leaf.out_features, leaf.in_features = leaf.weight.shape
    elif isinstance(leaf, nn.modules.conv._ConvNd):
        if leaf.groups == leaf.in_channels == leaf.out_channels:  # each channel alone, as before
            leaf.groups = leaf.weight.shape[0]
        leaf.out_channels, leaf.in_channels = leaf.weight.shape[0], leaf.weight.shape[1] * leaf.groups
    elif isinstance(leaf, (nn.LayerNorm, nn.RMSNorm)):
        leaf.normalized_shape = tuple(leaf.weight.shape)
    elif isinstance(leaf, nn.modules.batchnorm._BatchNorm):
        running = leaf.running_mean if leaf.running_mean is not None else leaf.weight
        leaf.num_features = running.shape[0]
    elif hasattr(leaf, "nf") and hasattr(leaf, "nx"):  # transformers' Conv1D
        leaf.nx, leaf.nf = leaf.get_parameter("weight").shape  # type: ignore[assignment]
    elif isinstance(getattr(leaf, "normalized_shape", None), tuple):  # timm's norms beside torch's
        leaf.normalized_shape = tuple(leaf.get_parameter("weight").shape)  # type: ignore[assignment]
