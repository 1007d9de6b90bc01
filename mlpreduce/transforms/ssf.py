"""`ssf`: a scale and a shift for each feature that a layer gives, its own for each use of a tied one.

Source: SSF (arXiv 2210.08823): y = scale * x + shift after each operation. For ViT-B/16, 205,824 parameters at all sites and
92,160 at those of the MLPs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from mlpreduce.criteria import derived_seed
from mlpreduce.edits import Replace
from mlpreduce.errors import check_one_of, naming
from mlpreduce.layers import ScaleShift, is_scalable
from mlpreduce.transforms.layers import check_seed, replacing
from mlpreduce.transforms.parts import Parts
from mlpreduce.transforms.registry import register

__all__ = ["scale_around"]

STD = 0.02  # of the released values


@register("ssf", preserves="at_init", draws=lambda config: config.get("init") == "released")
def ssf(parts: Parts, *, sites: str = "mlp", init: str = "identity", seed: int = 0) -> Iterator[Replace]:
    """Scale and shift what layers give, each feature by its own, of its own for each use of a tied layer.

    A layer without bias has a scale alone, so that `merge` is exact everywhere. Other weights train as they did; freeze them
    as you like (`mlpreduce.layers.adapters`).

    Args:
        parts: the MLPs in scope.
        sites: `mlp` (the expanding and contracting layers of the MLPs in scope), or `all`: also the projections of attention
            and the norms of their blocks, the patch embedding and the last norm, but for what could not be merged, such as
            weight-standardised convolutions.
        init: `identity`, or `released`: normal numbers around 1 and 0, of deviation 0.02.
        seed: of those.

    Raises:
        ReductionError: an option is out of range, or no site can be scaled.
    """
    check_one_of("sites", sites, ("mlp", "all"))
    check_one_of("init", init, ("identity", "released"))
    check_seed(seed)
    for path, layer in _sites(parts, sites):
        with naming(path):
            yield scale_around(path, layer, seed if init == "released" else None)


def _sites(parts: Parts, sites: str) -> Iterator[tuple[str, nn.Module]]:
    seen: set[str] = set()
    for mlp in parts:
        for leaf in mlp.leaves:
            if leaf.role in ("fc1", "fc2"):
                yield leaf.call, parts.module(leaf.call)
        for leaf in parts.beside(mlp) if sites == "all" else ():
            module = parts.module(leaf.path)
            if leaf.path not in seen and is_scalable(module) and not isinstance(module, nn.Conv2d):
                seen.add(leaf.path)
                yield leaf.path, module
    for path, module in parts.outside() if sites == "all" else ():
        if isinstance(module, nn.Conv2d | nn.LayerNorm) and is_scalable(module):
            yield path, module


def scale_around(path: str, layer: nn.Module, seed: int | None = None) -> Replace:
    """The edit that puts a scale and shift around one use of a layer; with a seed, of the released values."""
    made = ScaleShift(layer)
    if seed is not None and not made.scale.is_meta:
        generator = torch.Generator().manual_seed(derived_seed(seed, path))
        with torch.no_grad():
            for parameter in (made.scale, made.shift):
                if parameter is not None:
                    parameter.add_(STD * torch.randn(parameter.shape, generator=generator, device="cpu"))
    return replacing(path, "scale_shift", {}, made)
