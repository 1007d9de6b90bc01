"""How alike the MLPs of a model are, by what they put out."""

from __future__ import annotations

import torch
from torch import nn

from mlpreduce.calibration.batches import Batch
from mlpreduce.calibration.similarity import cka, linear_cka, outputs_of
from mlpreduce.errors import ReductionError
from mlpreduce.graph import MLP, find_mlps
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
        chunks = [outputs_of(model, mlps, Batch(some), most) for some in images.split(CHUNK)]
    return cka([torch.cat(outputs) for outputs in zip(*chunks, strict=True)])


def mlps_of(call: str, model: nn.Module, images: torch.Tensor) -> list[MLP]:
    """The MLPs of a model that takes such images.

    Raises:
        ReductionError: there is none.
    """
    found = find_mlps(model, torch.empty((2, *images.shape[1:]), dtype=images.dtype, device="meta"))
    if not found:
        raise ReductionError(f"{call}({type(model).__name__}): it has 0 MLPs; leave this probe out")
    return found
