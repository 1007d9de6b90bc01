"""`lora`: a correction of low rank beside MLP projections, its own for each use of a tied one.

Source: LoRA (arXiv 2106.09685); for tied layers, relaxed recursive transformers (arXiv 2410.20672).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from mlpreduce.criteria import derived_seed
from mlpreduce.edits import Replace
from mlpreduce.graph import Leaf
from mlpreduce.layers import LoraLinear, layer_of, nearest_factors
from mlpreduce.transforms.layers import LAYERS, replacing, uses_of_linears
from mlpreduce.transforms.parts import Parts
from mlpreduce.transforms.registry import register

__all__ = ["lora_around"]


@register("lora", preserves="at_init", draws=lambda config: True)
def lora(
    parts: Parts,
    *,
    rank: int = 4,
    alpha: float | None = None,
    layers: Sequence[str] = LAYERS,
    seed: int = 0,
) -> Iterator[Replace]:
    """Add a correction of low rank to MLP projections, its own for each use of a tied one. It starts at 0.

    It adds rank (inputs + outputs) parameters for each use of a layer; `merge` makes plain layers of them. Other weights train
    as they did; freeze them as you like (`mlpreduce.layers.adapters`).

    Args:
        parts: the MLPs in scope.
        rank: of the correction.
        alpha: its scale is alpha / rank; the rank itself by default.
        layers: `fc1`, `fc2`, or both.
        seed: of its first factor.

    Raises:
        ReductionError: an option is out of range, or a layer is no `Linear`.
    """
    for _, leaf, layer in uses_of_linears(parts, "lora", layers):
        yield lora_around(leaf, layer, rank, alpha, seed)


def lora_around(
    leaf: Leaf,
    layer: torch.nn.Linear,
    rank: int = 4,
    alpha: float | None = None,
    seed: int = 0,
    missing: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Replace:
    """The edit that puts a correction around one use of a layer.

    Args:
        leaf: the layer.
        layer: it.
        rank: as of `lora`.
        alpha: as of `lora`.
        seed: as of `lora`.
        missing: a weight that the correction is to be nearest to, and sums of products of what the layer is given.
    """
    config = {"rank": rank, "alpha": alpha}
    made = layer_of(LoraLinear, layer, config)
    if not made.down.is_meta:
        bound = layer.in_features**-0.5
        generator = torch.Generator().manual_seed(derived_seed(seed, leaf.path))
        drawn = torch.rand(made.down.shape, generator=generator, device="cpu")
        with torch.no_grad():
            made.down.copy_((2 * drawn - 1) * bound)
            if missing is not None and bool(missing[0].any()):  # else it would never train
                near = nearest_factors(missing[0], rank, moments=missing[1], call="lora")
                made.up.copy_(near.up / made.scale)
                made.down.copy_(near.down)
    return replacing(leaf.path, "lora", config, made)
