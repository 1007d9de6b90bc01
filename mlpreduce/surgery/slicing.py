"""Takes hidden units out of the tensors of a model, and can put them back.

Until a plan is carried out as a whole, what goes must not be lost, and no memory is spent on it: what stays of a tensor
and what goes are copied apart, and then it is freed. So the model takes no more than one tensor beyond what it holds.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

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
            before = getattr(owner, setting.name)
            undo.callback(setattr, owner, setting.name, before)
            sizes = list(before)
            sizes[setting.index] -= edit.hidden - len(edit.units)
            setattr(owner, setting.name, sizes)


def _slice(leaf: nn.Module, name: str, axes: list[Axis], edit: Slice, undo: ExitStack) -> None:
    """Put what is left of one tensor of a leaf in its place."""
    whole: torch.Tensor | None = getattr(leaf, name)
    part, apart = _cut(cast(torch.Tensor, whole), axes, edit)
    tensors: dict[str, Any] = leaf._parameters if isinstance(part, nn.Parameter) else leaf._buffers
    sizes = dict(vars(leaf))

    def put_back() -> None:
        tensors[name] = apart.together() if whole is None and apart is not None else whole
        vars(leaf).update(sizes)

    undo.callback(put_back)
    tensors[name] = part
    if apart is not None:
        alive = weakref.ref(cast(torch.Tensor, whole))
        whole = None
        whole = alive()  # None: nobody else held it, and its memory is free
        apart = None if whole is not None else apart
    _set_sizes(leaf)


def _like(values: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Values as the kind of tensor that another is, with its marks, such as timm's _no_weight_decay."""
    if isinstance(tensor, nn.Parameter):
        values = nn.Parameter(values, requires_grad=tensor.requires_grad)
    vars(values).update(vars(tensor))
    return values


@dataclass(frozen=True)
class _Apart:
    """What a tensor that is freed can be made of again."""

    like: torch.Tensor  # empty, of its type and with its marks
    shape: torch.Size
    grad: torch.Tensor | None
    dim: int
    parts: Sequence[tuple[Units, torch.Tensor]]

    def together(self) -> torch.Tensor:
        values = self.like.new_empty(self.shape).detach()
        for positions, part in self.parts:
            values.index_copy_(self.dim, _index(positions, part), part.detach())
        tensor = _like(values, self.like)
        tensor.grad = self.grad
        return tensor


def _cut(tensor: torch.Tensor, axes: list[Axis], edit: Slice) -> tuple[torch.Tensor, _Apart | None]:
    """What is left of a tensor, in memory of its own; and what to make the tensor of again, where that can be told."""
    values = tensor.detach()
    if any(axis.groups > 1 for axis in axes):  # that axis first, by which rows belong to groups
        for axis in sorted(axes, key=lambda axis: -axis.groups):
            kept = axis.positions(edit.hidden, edit.units)
            values = _of_groups(values, axis, edit) if axis.groups > 1 else _picked(values, axis.dim, kept)
        return _like(values, tensor), None
    (axis,) = axes
    kept = axis.positions(edit.hidden, edit.units)
    part, apart = _picked(values, axis.dim, kept), None
    if _is_plain(tensor):
        gone = _others(kept, axis.size)
        like = _like(tensor.new_empty(0).detach(), tensor)
        parts = ((kept, part), (gone, _picked(values, axis.dim, gone)))
        apart = _Apart(like, tensor.shape, tensor.grad, axis.dim, parts)
    return _like(part, tensor), apart


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is its values, grad and marks, and no more: no hooks, no views, nothing on its memory."""
    return (
        type(tensor) in (torch.Tensor, nn.Parameter)
        and tensor.dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
        and not tensor.is_meta
        and not (tensor.device.type == "cpu" and tensor.is_shared())  # on GPUs it is said of every tensor
        and not (tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None))
        and tensor.stride() == torch.empty(tensor.shape, device="meta").stride()
        and tensor.untyped_storage().nbytes() == tensor.nbytes
    )


def _index(positions: Sequence[int], tensor: torch.Tensor) -> torch.Tensor:
    return torch.tensor(positions, dtype=torch.long, device=tensor.device)


def _others(kept: Units, size: int) -> Units:
    if isinstance(kept, range) and kept.start == 0:
        return range(kept.stop, size)
    known = set(kept)
    return as_units([position for position in range(size) if position not in known])


def _picked(tensor: torch.Tensor, dim: int, positions: Units) -> torch.Tensor:
    if isinstance(positions, range):
        part = tensor.narrow(dim, positions.start, len(positions))
        return part.clone(memory_format=torch.contiguous_format)
    return tensor.index_select(dim, _index(positions, tensor))


def _of_groups(tensor: torch.Tensor, axis: Axis, edit: Slice) -> torch.Tensor:
    """What is left along the input axis of a grouped convolution: each group of rows has columns of its own."""
    size = edit.hidden // axis.groups
    groups = tensor.unflatten(0, (axis.groups, -1))
    local = [[unit % size for unit in edit.units if unit // size == group] for group in range(axis.groups)]
    index = [_index(units, tensor) for units in local]
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
