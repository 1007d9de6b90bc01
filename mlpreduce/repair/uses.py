"""The calls of layers that are refitted, and the blocks around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from mlpreduce.calibration import Batch
from mlpreduce.errors import ReductionError
from mlpreduce.graph import MLP, module_at, projection
from mlpreduce.repair.streams import Joint, Joints

__all__ = ["Model", "Use", "blocks_of", "uses_of"]

Model = tuple[nn.Module, Sequence[MLP]]  # with its MLPs that are repaired, all uses


@dataclass(frozen=True)
class Use:
    """One call of an fc2 that is refitted: where it joins the stream in either model, the number of its block, the dimension of
    features, and whether tokens count by the norm that follows."""

    name: str
    dense: Joint
    reduced: Joint
    block: int
    dim: int
    weighed: bool


def blocks_of(tree: nn.Module, mlps: Sequence[MLP], batch: Batch) -> tuple[list[str], list[str]]:
    """Paths and stages of the blocks of MLPs, in order, if each is a module that is called once, and none lies in another."""
    found = {mlp.block: mlp.stage for mlp in mlps}
    calls: list[str] = []
    handles = []
    for path in found:
        module = module_at(tree, path) if path else None
        if module is None:
            return [], []
        handles.append(module.register_forward_pre_hook(lambda m, args, path=path: calls.append(path)))
    try:
        batch.run(tree)
    finally:
        for handle in handles:
            handle.remove()
    nested = any(one != other and one.startswith(f"{other}.") for one in found for other in found)
    return ([], []) if calls != list(found) or nested else (list(found), list(found.values()))


def uses_of(before: Model, after: Model, blocks: Sequence[str], batch: Batch) -> dict[str, list[Use]]:
    """Calls of each fc2 that is refitted, by its path in the reduced model."""
    found: dict[str, list[Use]] = {}
    paths: dict[int, str] = {}
    dense_calls: dict[int, int] = {}
    joints = [Joints(tree, [mlp.block for mlp in mlps], batch) for tree, mlps in (before, after)]
    for order, (ours, theirs) in enumerate(zip(before[1], after[1], strict=True)):
        leaf = theirs.leaf("fc2")  # a layer around it may be of each use, and is not refitted
        modules = module_at(before[0], ours.leaf("fc2").call), module_at(after[0], leaf.path)
        layer = projection(modules[1])
        if layer is None:
            raise ReductionError(f"repair: {leaf.path} is no linear layer or 1 x 1 convolution; exclude it")
        path = paths.setdefault(id(modules[1]), leaf.path)
        call = dense_calls[id(modules[0])] = dense_calls.get(id(modules[0]), -1) + 1
        joint = joints[0].find(ours.leaf("fc2").call, call, ours.block, layer.features)
        mine = joints[1].find(path, len(found.get(path, ())), theirs.block, layer.features)
        if (joint.place, joint.output, joint.order) != (mine.place, mine.output, mine.order) or not joint.followed:
            joint, mine = (
                replace(one, place=one.leaf, at=one.call, output=True, factor=torch.ones_like(one.factor), order=())
                for one in (joint, mine)
            )
        block = blocks.index(ours.block) if blocks else order
        weighed = joint.followed and ours.norm_follows and list(joint.order) == sorted(joint.order)
        found.setdefault(path, []).append(Use(ours.name, joint, mine, block, layer.features, weighed))
    return found
