"""What a block has beside its MLPs: leaf modules of attention, norms and scales, which may be shared as MLPs are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from mlpreduce.graph.mlp import MLP, Leaf
from mlpreduce.graph.rules import projection
from mlpreduce.graph.tracing import is_leaf, module_at

__all__ = ["block_leaves", "leaf_parameters"]


def block_leaves(model: nn.Module, block: str, mlps: Sequence[MLP]) -> list[Leaf]:
    """Leaf modules with parameters of a block that belong to no MLP, in the order in which they are registered.

    The role is `attention` for all leaves of a child of the block that has linear layers and no MLP, whatever its name; `other`
    for the others, such as norms and layer scales. Parameters that a module with children holds itself, as position biases of
    attention, are part of no leaf.

    Args:
        model: the model.
        block: dotted path.
        mlps: all MLPs of the model.
    """
    held = {leaf.path for mlp in mlps for leaf in mlp.leaves}
    module = module_at(model, block)
    leaves = []
    for name, child in module.named_children() if module is not None else ():
        inside = [
            (f"{block}.{name}.{path}".rstrip("."), leaf)
            for path, leaf in child.named_modules()
            if is_leaf(leaf) and leaf._parameters
        ]
        linear = any(projection(leaf) is not None for _, leaf in inside)
        role = "attention" if linear and not held.intersection(path for path, _ in inside) else "other"
        for path, leaf in inside:
            count = sum(parameter.numel() for parameter in leaf.parameters())
            if path not in held and count:
                shareable = not isinstance(leaf, nn.modules.batchnorm._BatchNorm)  # its statistics belong to one depth
                leaves.append(Leaf(path, role, shareable, count, 0))
    return leaves


def leaf_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters of every leaf module by path, of a tied one under its first path only."""
    return {
        path: sum(parameter.numel() for parameter in module.parameters())
        for path, module in model.named_modules()
        if is_leaf(module)
    }
