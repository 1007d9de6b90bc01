"""What each use of a shared MLP has of its own, and which tensors of shared layers a scale rule meets.

Sources: a scale and shift for each use, SSF (arXiv 2210.08823); a correction of low rank for each use, relaxed recursive
transformers (arXiv 2410.20672); norms of their own and a depthwise convolution before each use, MiniViT (arXiv 2204.07154).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mlpreduce.edits import Edit, Replace
from mlpreduce.errors import ReductionError, check_number, check_one_of, did_you_mean
from mlpreduce.graph import MLP, Leaf
from mlpreduce.layers import BlockDiagonalLinear, LowRankLinear, StandIn, TokenConvolution, layer_of
from mlpreduce.transforms.lora import lora_around
from mlpreduce.transforms.merging import ALIGNED, MEANS, Merge
from mlpreduce.transforms.parts import Parts
from mlpreduce.transforms.ssf import scale_around
from mlpreduce.words.values import Config

__all__ = ["check_per_use", "multiplies", "scaled_tensor", "uses_of_their_own", "with_rank"]

KINDS = ("none", "ssf", "lora", "norm", "conv")
OPTIONS = {
    "lora": ("rank", "alpha", "seed", "init", "target_params"),
    "ssf": (),
    "norm": (),
    "none": (),
    "conv": ("kernel",),
}


def check_per_use(parts: Parts, per_use: str | Config | None, share: str, keep: str) -> None:
    """Whether what uses are to have of their own can be, beside what is shared and kept.

    Raises:
        ReductionError: an unknown kind or option, nothing that it could be of, or weights that have no mean.
    """
    kind, options = _chosen(per_use)
    check_one_of("per_use", kind, KINDS)
    for option in options:
        if option not in OPTIONS[kind]:
            raise ReductionError(f"per_use={kind!r} has no option {option!r}{did_you_mean(str(option), OPTIONS[kind])}")
    if share == "attention" and kind in ("ssf", "lora", "conv"):
        raise ReductionError(f"per_use={kind!r} is of shared MLPs, and share='attention' leaves each block its own")
    if "target_params" in options and share != "mlp":
        raise ReductionError(f"per_use: target_params counts shared MLPs alone, and share={share!r}; give a rank")
    orders: dict[str, nn.Module] = {}  # by role, the first layer
    for mlp in parts if keep in MEANS and share != "attention" else ():
        for leaf in mlp.leaves:
            layer = parts.module(leaf.path)
            if leaf.around and keep in ALIGNED:
                raise ReductionError(
                    f"keep={keep!r}: {leaf.around} is a layer around {leaf.path} and knows its units in their order; share "
                    f"first, or merge the model"
                )
            ordered = isinstance(layer, BlockDiagonalLinear) and not _ordered_alike(
                orders.setdefault(leaf.role, layer), layer
            )
            if (
                leaf.shareable
                and isinstance(layer, StandIn)
                and (ordered or not isinstance(layer, BlockDiagonalLinear))
            ):
                what = "blocks of unlike features have none" if ordered else "the mean of factors is no mean of weights"
                raise ReductionError(
                    f"keep={keep!r}: {leaf.path} is a {type(layer).__name__}, and {what}; share first, or merge the model"
                )


def _ordered_alike(first: nn.Module, other: nn.Module) -> bool:
    """Whether two layers have the same orders of features, as far as they have values."""
    ours, theirs = list(first.buffers()), list(other.buffers())
    return len(ours) == len(theirs) and all(
        order.is_meta or torch.equal(order, its) for order, its in zip(ours, theirs, strict=True)
    )


def with_rank(parts: Parts, shared: Sequence[Sequence[MLP]], per_use: str | Config | None) -> str | Config | None:
    """The same with the highest rank that keeps the model within `target_params`, where that is given.

    Raises:
        ReductionError: both are given, or no rank does.
    """
    kind, options = _chosen(per_use)
    if kind != "lora" or (target := options.get("target_params")) is None or not shared:
        return per_use
    if "rank" in options:
        raise ReductionError("per_use: rank and target_params both say the size; give one of them")
    check_number("per_use: target_params", target, above=True)
    present = parts.counts.cost.params
    most = int(target * present) if target <= 1 else int(target)
    saved = sum(
        (len(members) - 1) * sum(leaf.parameters for leaf in members[0].leaves if leaf.shareable) for members in shared
    )
    shapes = [_linear(parts, leaf).weight.shape for leaf in _corrected(shared)]
    each, highest = sum(map(sum, shapes)), min(min(shape) for shape in shapes)
    rank = min((most - present + saved) // each, highest)
    if rank < 1:
        raise ReductionError(
            f"per_use: target_params={target}: the model has {present - saved:,} parameters with these MLPs shared, and "
            f"{each:,} more for each rank of the corrections, of at most {most:,}; share among more blocks"
        )
    return {"name": kind, **{key: value for key, value in options.items() if key != "target_params"}, "rank": rank}


def _linear(parts: Parts, leaf: Leaf) -> nn.Linear:
    """The layer that a correction is put around.

    Raises:
        ReductionError: it is no `Linear`.
    """
    layer = parts.module(leaf.path)
    if not isinstance(layer, nn.Linear):
        raise ReductionError(f"per_use='lora': {leaf.path} is a {type(layer).__name__}, and no Linear")
    return layer


def _corrected(shared: Sequence[Sequence[MLP]]) -> Iterator[Leaf]:
    """The layers of all uses that a correction is of."""
    for mlp in (mlp for members in shared for mlp in members):
        yield from (leaf for leaf in mlp.leaves if leaf.role in ("fc1", "fc2") and leaf.shareable)


def uses_of_their_own(
    parts: Parts, merge: Merge, factors: Mapping[str, float], per_use: str | Config | None
) -> Iterator[Edit]:
    """The edits that give each member something of its own around its shared layers, whose tensors have those factors."""
    kind, options = _chosen(per_use)
    members = merge.members
    for mlp in members if kind == "conv" else ():
        config = {"features": mlp.in_features, "kernel": options.get("kernel", 3), "grid": parts.grid(mlp)}
        made = layer_of(TokenConvolution, parts.whole(mlp), config)
        values = {"convolution.weight": made.convolution.weight.detach()}
        yield Replace(mlp.name, "token_convolution", config, values)
    for number, mlp in enumerate(members if kind in ("ssf", "lora") else ()):
        for place, leaf in enumerate(mlp.leaves):
            if leaf.role in ("fc1", "fc2") and leaf.shareable:
                if kind == "ssf":
                    yield scale_around(leaf.path, parts.module(leaf.path))
                else:
                    layer = _linear(parts, leaf)
                    init = options.get("init", "zero")
                    check_one_of("per_use='lora': init", init, ("zero", "residual"))
                    beside = {key: value for key, value in options.items() if key != "init"}
                    factor = factors.get(f"{leaf.role}.weight", 1.0)
                    missing = _missing(parts, merge, number, place, factor) if init == "residual" else None
                    yield lora_around(leaf, layer, **beside, missing=missing)


def _missing(parts: Parts, merge: Merge, number: int, place: int, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer of a member had and the shared one lacks, and sums of products of what the layer is given."""
    leaf, kept = merge.members[number].leaves[place], f"{merge.keeper.leaves[place].path}.weight"
    shared = merge.values[kept] if kept in merge.values else parts.tensor(kept).detach()
    return merge.own(parts, number, leaf).double() - factor * shared.double(), merge.moments(parts, number, leaf)


def multiplies(parts: Parts, leaf: Leaf) -> bool:
    """Whether a leaf has a matrix, as projections have and norms and layer scales have not."""
    return any(parameter.squeeze().dim() > 1 for parameter in parts.module(leaf.path).parameters())


def scaled_tensor(parts: Parts, leaf: Leaf, name: str) -> str | None:
    """The tensor to multiply so that the weight or bias of a layer is multiplied; None where there is none.

    Raises:
        ReductionError: the weight is none that can be scaled.
    """
    layer = parts.module(leaf.path)
    if name == "weight" and isinstance(layer, StandIn) and not isinstance(layer, BlockDiagonalLinear):
        if not isinstance(layer, LowRankLinear):
            raise ReductionError(f"{leaf.path} is a {type(layer).__name__}, which no factor scales; use scale='none'")
        name = "up"
    path = f"{leaf.path}.{name}"
    return path if path in parts.tensors_of(leaf) else None


def _chosen(per_use: str | Config | None) -> tuple[str, dict[str, Any]]:
    """A kind, and its options."""
    if per_use is None:
        return "none", {}
    if isinstance(per_use, str):
        return per_use, {}
    if not isinstance(per_use, Mapping) or not isinstance(per_use.get("name"), str):
        raise ReductionError(
            f'per_use is {per_use!r}; give a name, or a name with options: {{"name": "lora", "rank": 8}}'
        )
    return per_use["name"], {key: value for key, value in per_use.items() if key != "name"}
