"""How alike the MLPs of a model are, by what they put out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mlpreduce.errors import ReductionError
from mlpreduce.graph import MLP, find_mlps, module_at, projection
from mlpreduce.train.curvature import CHUNK, undisturbed

__all__ = ["layer_similarity", "linear_cka", "mlps_of"]

_EXAMPLES = 2048  # rows of an MLP's outputs that are compared


def layer_similarity(model: nn.Module, images: torch.Tensor) -> list[list[float]]:
    """Linear CKA between the outputs of all MLPs, in float64.

    The output is that of the contracting layer, before layer scale, drop path and the residual addition. An example is one
    token of one image; where there are more than 2,048, as many evenly spaced tokens of each image are taken as fit. Where
    MLPs have different numbers of tokens, as in stages, an example is the mean over the tokens of one image.

    Args:
        model: maps images to logits.
        images: (batch, channels, height, width), on the model's device.

    Returns:
        A symmetric matrix (uses, uses) of numbers in 0..1, in order of execution as in `find_mlps`; a tied MLP has a row for
        each use. NaN where an MLP gives the same for all examples.

    Raises:
        ReductionError: no image, no MLP, or an MLP that runs otherwise than `find_mlps` says.

    Source:
        Kornblith, Norouzi, Lee and Hinton, "Similarity of Neural Network Representations Revisited", arXiv 1905.00414.
    """
    if not len(images):
        raise ReductionError(f"layer_similarity: images {tuple(images.shape)}; give at least one")
    with undisturbed(model, images.device), torch.no_grad():
        mlps = mlps_of("layer_similarity", model, images)
        most = max(1, _EXAMPLES // len(images))
        chunks = [_outputs(model, mlps, some, most) for some in images.split(CHUNK)]
    return _cka([torch.cat(outputs) for outputs in zip(*chunks, strict=True)])


def linear_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """Linear centred kernel alignment of two sets of features, in float64.

    With centred columns it is ||y'x||^2 / (||x'x|| ||y'y||), Frobenius norms: 1 for equal features, also if rotated or scaled,
    and 0 for uncorrelated ones.

    Args:
        x: (examples, features).
        y: (examples, other features), of the same examples.

    Returns:
        A number in 0..1; NaN where a set of features is constant.

    Raises:
        ReductionError: the examples are not as many.

    Source:
        Kornblith et al., arXiv 1905.00414, section 3.
    """
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y):
        raise ReductionError(
            f"linear_cka: shapes {tuple(x.shape)} and {tuple(y.shape)}; give (examples, features) of the same examples"
        )
    return _cka([x, y])[0][1]


def mlps_of(call: str, model: nn.Module, images: torch.Tensor) -> list[MLP]:
    """The MLPs of a model that takes such images.

    Raises:
        ReductionError: there is none.
    """
    found = find_mlps(model, torch.empty((2, *images.shape[1:]), dtype=images.dtype, device="meta"))
    if not found:
        raise ReductionError(f"{call}({type(model).__name__}): it has 0 MLPs; leave this probe out")
    return found


def _outputs(model: nn.Module, mlps: Sequence[MLP], images: torch.Tensor, most: int) -> list[torch.Tensor]:
    """For each MLP the outputs (examples, features) for some images, at most `most` examples of each image."""
    leaves = [module_at(model, mlp.leaf("fc2").path) for mlp in mlps]
    calls: dict[int, list[torch.Tensor]] = {id(leaf): [] for leaf in leaves}

    def keep(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        layer = projection(module)
        output = output.movedim(-1 if layer is None else layer.features, -1)
        calls[id(module)].append(output.reshape(len(images), -1, output.shape[-1]))

    handles = [leaf.register_forward_hook(keep) for leaf in {id(leaf): leaf for leaf in leaves}.values() if leaf]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    # a tied layer is called once for each use, in the order of the uses
    ordered = {key: iter(outputs) for key, outputs in calls.items()}
    if any(len(outputs) != sum(id(leaf) == key for leaf in leaves) for key, outputs in calls.items()):
        raise ReductionError(
            f"layer_similarity({type(model).__name__}): {len(mlps)} MLPs ran {sum(map(len, calls.values()))} times; leave this "
            f"probe out"
        )
    found = [next(ordered[id(leaf)]) for leaf in leaves]
    counts = {output.shape[1] for output in found}
    if len(counts) > 1:
        return [output.mean(1) for output in found]
    (count,) = counts
    taken = min(most, count)
    tokens = torch.arange(taken, device=images.device) * count // taken
    return [output[:, tokens].flatten(0, 1) for output in found]


def _cka(sets: Sequence[torch.Tensor]) -> list[list[float]]:
    """Linear CKA of all pairs of (examples, features)."""
    centred = [features.double() - features.double().mean(0) for features in sets]
    norms = [torch.linalg.matrix_norm(x.T @ x).item() for x in centred]
    # what rounding leaves of a constant is no variation
    varies = [bool(x.norm() > 1e-10 * features.double().norm()) for x, features in zip(centred, sets, strict=True)]
    table = [[math.nan] * len(sets) for _ in sets]
    for i, x in enumerate(centred):
        for j, y in enumerate(centred[: i + 1]):
            if varies[i] and varies[j]:
                table[i][j] = table[j][i] = (y.T @ x).square().sum().item() / (norms[i] * norms[j])
    return table
