"""The edits themselves: what becomes of leaf modules and tensors, named by dotted path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from mlpreduce.words.values import Config

if TYPE_CHECKING:
    import torch

    from mlpreduce.registry import Origin

__all__ = ["Assign", "Axis", "Edit", "Replace", "Scale", "Setting", "Share", "Slice", "Units", "as_units"]

Units: TypeAlias = "range | tuple[int, ...]"


def as_units(indices: Sequence[int]) -> Units:
    """Hidden units in their compact form: a range when they are contiguous, else a sorted tuple.

    Example:
        >>> as_units([2, 0, 1]), as_units([3, 0])
        (range(0, 3), (0, 3))
    """
    units = sorted(map(int, indices))
    if units and units == list(range(units[0], units[-1] + 1)):
        return range(units[0], units[-1] + 1)
    return tuple(units)


@dataclass(frozen=True)
class Axis:
    """One tensor axis along which the hidden units of an MLP lie.

    Attributes:
        tensor: dotted path of the parameter or buffer.
        dim: the axis.
        size: length of the axis before slicing.
        offsets: unit `j` lies at `offset + j` for each offset; a packed gate has two. Other positions of the axis
            belong to something else and stay.
        groups: of the input axis of a grouped convolution: the axis has the units of one group, and which of them
            they are depends on the group of the output. As many units of each group are kept.
    """

    tensor: str
    dim: int
    size: int
    offsets: tuple[int, ...] = (0,)
    groups: int = 1

    def positions(self, hidden: int, units: Units) -> Units:
        """Positions of the axis that stay when `units` of `hidden` hidden units are kept."""
        if self.offsets == (0,) and self.size == hidden:
            return units
        taken = {offset + unit for offset in self.offsets for unit in range(hidden)}
        kept = {offset + unit for offset in self.offsets for unit in units}
        return as_units([p for p in range(self.size) if p in kept or p not in taken])


@dataclass(frozen=True)
class Setting:
    """A plain attribute that holds the hidden width, and is read when the model runs.

    Attributes:
        module: dotted path of the module that has it.
        name: its name there; the value is a list.
        index: which entry is the width.
    """

    module: str
    name: str
    index: int


@dataclass(frozen=True)
class Slice:
    """Keep only `units` of the `hidden` hidden units of the MLP `mlp`, on every axis they run through."""

    mlp: str
    hidden: int
    units: Units
    axes: tuple[Axis, ...]
    settings: tuple[Setting, ...] = ()


@dataclass(frozen=True)
class Share:
    """Let the leaf module at `target` become the one at `source`: one module, called twice."""

    source: str
    target: str


@dataclass(frozen=True)
class Replace:
    """Put a layer of `mlpreduce.layers` in the place of a module.

    A layer that wraps takes this place alone, with what was there as its `base`: each use of a tied module can have one of its
    own. Any other takes all places of the module.

    Attributes:
        module: dotted path of what it replaces. A wrapped module is found below it afterwards, at `module.base`.
        layer: name of the layer, as in `mlpreduce.layers.LAYERS`.
        config: what it is made with, JSON values.
        values: its parameters and buffers by name; those that are not given start as the layer makes them. In a history,
            and read from JSON alone, it has none.
        source: where the layer was registered when the edit was written, if not by this package.
    """

    module: str
    layer: str
    config: Config = field(default_factory=dict)
    values: Mapping[str, torch.Tensor] | None = field(default=None, compare=False, repr=False)
    source: Origin | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Scale:
    """Multiply a tensor by a factor, in place."""

    tensor: str
    factor: float


@dataclass(frozen=True)
class Assign:
    """Give a tensor new values of the same shape. In a history, and read from JSON alone, it has no values."""

    tensor: str
    value: torch.Tensor | None = field(default=None, compare=False, repr=False)


Edit: TypeAlias = Slice | Share | Replace | Assign | Scale
