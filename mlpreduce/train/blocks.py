"""Blocks that remember their last output, so that sub-models that begin alike compute their first blocks once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from mlpreduce.graph import MLP, module_at
from mlpreduce.train.submodels import Part, View

__all__ = ["Remembering"]


class Remembering:
    """Lets the blocks of a model remember what they gave last; that is given again where weights and inputs are the same.

    Attributes:
        order: the sub-models, by number, so that those with the same first blocks follow each other. One output a block is
            then enough.

    Args:
        model: in evaluation mode; its blocks are changed.
        mlps: its MLPs, in order of execution, which name the blocks.
        views: the sub-models that will be run.
    """

    def __init__(self, model: nn.Module, mlps: Sequence[MLP], views: Sequence[View]) -> None:
        named = dict.fromkeys(mlp.block for mlp in mlps)
        paths = [path for path in named if not any(path.startswith(f"{other}.") for other in named)]
        below = {path: f"{path}." for path in paths}
        kinds: dict[tuple[str, frozenset[tuple[str, Part]]], int] = {}
        self._kinds: list[tuple[int, ...]] = []
        for view in views:
            rest = {(name, part) for name, part in view.items() if not name.startswith(tuple(below.values()))}
            own = [
                frozenset(rest | {(name, part) for name, part in view.items() if name.startswith(start)})
                for start in below.values()
            ]
            self._kinds.append(tuple(kinds.setdefault(key, len(kinds)) for key in zip(paths, own, strict=True)))
        self.order = sorted(range(len(views)), key=lambda number: self._kinds[number])
        self._blocks = [_Block(module) for path in paths if (module := module_at(model, path)) is not None]

    def choose(self, number: int) -> None:
        """Tell the blocks which sub-model is run next."""
        for block, kind in zip(self._blocks, self._kinds[number], strict=True):
            block.kind = kind


class _Block:
    """Stands for the forward of a block."""

    def __init__(self, module: nn.Module) -> None:
        self.kind = -1  # equal for sub-models in which the block has the same tensors
        self._forward, self._last = module.forward, (-1, [], [], None)
        module.forward = self  # type: ignore[method-assign,assignment]

    _last: tuple[int, list[Any], list[int], Any]  # kind, inputs, versions of inputs and output, output

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = tree_leaves([args, kwargs])
        kind, inputs, versions, output = self._last
        if kind == self.kind and versions == _versions([*inputs, output]) and _same(inputs, given):
            return output
        output = self._forward(*args, **kwargs)
        self._last = self.kind, given, _versions([*given, output]), output
        return output


def _versions(values: Sequence[Any]) -> list[int]:
    """How often tensors were changed in place."""
    return [value._version for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def _same(values: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(values) == len(others) and all(_equal(one, other) for one, other in zip(values, others, strict=True))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one is other or (one.shape == other.shape and torch.equal(one, other))
    return one is other or (isinstance(one, (bool, int, float, str)) and type(one) is type(other) and one == other)
