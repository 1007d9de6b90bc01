"""How alike MLPs are, by what they put out: linear centred kernel alignment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mlpreduce.calibration.batches import Batch
from mlpreduce.calibration.measure import Measured, telling
from mlpreduce.calibration.quiet import quiet_copy, running
from mlpreduce.calibration.samples import Samples, together
from mlpreduce.errors import ReductionError
from mlpreduce.graph import MLP, module_at, projection

__all__ = ["cka", "linear_cka", "measure_similarity", "outputs_of"]

_TOKENS = 4  # of each image
_IMAGES = 512  # of each process that are compared; the others are only read


def measure_similarity(
    model: nn.Module, mlps: Sequence[MLP], data: Any
) -> tuple[dict[tuple[str, str], float], Measured]:
    """Linear CKA between the outputs of MLPs on calibration data, in float64.

    An example is one of 4 evenly spaced tokens of an image, or, where MLPs have different numbers of tokens, their mean; the
    first 512 images of each process count.

    Args:
        model: the model; it is not changed.
        mlps: its MLPs, all uses of each.
        data: an iterable of batches of images.

    Returns:
        A number in 0..1 for each pair of names, NaN where one of them gives the same for all examples; and which data was read,
        without scores.

    Raises:
        ReductionError: as `measure_scores`.
    """
    samples = Samples(data, model, labels=False)
    kept: list[list[torch.Tensor]] = [[] for _ in mlps]
    problem: Exception | None = None
    with running(samples.device, gradients=False), samples.shown("similarity of the MLPs"):
        tree = quiet_copy(model)
        try:
            for batch, _ in samples.chunks():
                if kept and sum(map(len, kept[0])) >= _TOKENS * _IMAGES:
                    continue
                with telling(batch):
                    for rows, output in zip(kept, outputs_of(tree, mlps, batch, _TOKENS), strict=True):
                        rows.append(output.cpu())
        except Exception as error:  # whatever the data raises, or the model: the other processes are told
            problem = error
        samples.finish({}, problem)
    every = together([torch.cat(rows) if rows else None for rows in kept])
    sets = [torch.cat([rows for rows in parts if rows is not None]) for parts in zip(*every, strict=True)]
    table = cka(sets)
    names = [mlp.name for mlp in mlps]
    pairs = {(one, other): table[i][j] for i, one in enumerate(names) for j, other in enumerate(names)}
    return pairs, Measured({}, samples.count, samples.fingerprint)


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
    return cka([x, y])[0][1]


def outputs_of(model: nn.Module, mlps: Sequence[MLP], batch: Batch, most: int) -> list[torch.Tensor]:
    """For each MLP the outputs (examples, features) for some examples, at most `most` positions of each."""
    leaves = [module_at(model, mlp.leaf("fc2").call) for mlp in mlps]
    calls: dict[int, list[torch.Tensor]] = {id(leaf): [] for leaf in leaves}

    def keep(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        layer = projection(module)
        output = output.movedim(-1 if layer is None else layer.features, -1)
        calls[id(module)].append(output.reshape(len(batch), -1, output.shape[-1]))

    handles = [leaf.register_forward_hook(keep) for leaf in {id(leaf): leaf for leaf in leaves}.values() if leaf]
    try:
        batch.run(model)
    finally:
        for handle in handles:
            handle.remove()
    # a tied layer is called once for each use, in the order of the uses
    ordered = {key: iter(outputs) for key, outputs in calls.items()}
    if any(len(outputs) != sum(id(leaf) == key for leaf in leaves) for key, outputs in calls.items()):
        raise ReductionError(
            f"{len(mlps)} MLPs ran {sum(map(len, calls.values()))} times, so that their outputs cannot be told apart"
        )
    found = [next(ordered[id(leaf)]) for leaf in leaves]
    counts = {output.shape[1] for output in found}
    if len(counts) > 1:
        return [output.mean(1) for output in found]
    (count,) = counts
    taken = min(most, count)
    tokens = torch.arange(taken, device=found[0].device) * count // taken
    return [output[:, tokens].flatten(0, 1) for output in found]


def cka(sets: Sequence[torch.Tensor]) -> list[list[float]]:
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
