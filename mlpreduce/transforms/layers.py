"""What transforms that put layers in place of others have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from mlpreduce.criteria import derived_seed
from mlpreduce.edits import Replace
from mlpreduce.errors import ReductionError
from mlpreduce.graph import MLP, Leaf
from mlpreduce.transforms.parts import Parts
from mlpreduce.words.values import Config

__all__ = ["LAYERS", "check_seed", "linears", "replacing", "uses_of_linears"]

LAYERS = ("fc1", "fc2")


def replacing(path: str, name: str, config: Config, layer: nn.Module) -> Replace:
    """The edit that puts a layer of this name, with the values of one like it, in the place of a module."""
    tensors = {**layer._parameters, **layer._buffers}
    values = {key: tensor.detach() for key, tensor in tensors.items() if tensor is not None}
    return Replace(path, name, dict(config), values)


def check_seed(seed: int) -> None:
    """Whether a seed is one, also where nothing is drawn by it.

    Raises:
        ReductionError: it is no whole number.
    """
    derived_seed(seed, "")


def linears(parts: Parts, name: str, layers: str | Sequence[str] = LAYERS) -> Iterator[tuple[MLP, Leaf, nn.Linear]]:
    """The expanding and contracting layers of all MLPs in scope, a tied one once.

    Args:
        parts: the MLPs in scope.
        name: of what they become, for messages.
        layers: `fc1`, `fc2`, or both.

    Raises:
        ReductionError: unknown layers, or one is no `Linear` of the MLP alone.
    """
    seen: set[int] = set()
    names = {mlp.name for mlp in parts}
    for mlp in parts:
        outside = [use.name for use in parts.uses(mlp) if use.name not in names]
        if outside:
            raise ReductionError(
                f"{mlp.name} is tied to {', '.join(outside)}, which is not in scope; include all or none"
            )
    for mlp, leaf, layer in uses_of_linears(parts, name, layers):
        if id(layer) not in seen:
            seen.add(id(layer))
            yield mlp, leaf, layer


def uses_of_linears(
    parts: Parts, name: str, layers: str | Sequence[str] = LAYERS
) -> Iterator[tuple[MLP, Leaf, nn.Linear]]:
    """The same, a tied one for each of its uses."""
    wanted = [layers] if isinstance(layers, str) else layers
    known = isinstance(wanted, (list, tuple)) and all(isinstance(name, str) and name in LAYERS for name in wanted)
    if not wanted or not known:
        raise ReductionError(f"layers is {layers!r}; give 'fc1', 'fc2', or both")
    for mlp in parts:
        for leaf in mlp.leaves:
            if leaf.role not in wanted:
                continue
            layer = parts.module(leaf.path)
            if not isinstance(layer, nn.Linear) or not leaf.shareable:
                what = type(layer).__name__ if leaf.shareable else "layer of attention too"
                raise ReductionError(
                    f"{leaf.path} is a {what}, and only a Linear of the MLP alone becomes {name}; merge the model, or "
                    f"exclude {mlp.name}"
                )
            yield mlp, leaf, layer
