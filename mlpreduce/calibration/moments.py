"""What layers are given on calibration data: sums of products of their inputs, with a 1 beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mlpreduce.calibration.measure import Measured, telling
from mlpreduce.calibration.quiet import quiet_copy, running
from mlpreduce.calibration.samples import Samples
from mlpreduce.calibration.sums import live_rows
from mlpreduce.errors import ReductionError
from mlpreduce.graph import MLP, module_at, projection

__all__ = ["measure_moments"]


def measure_moments(model: nn.Module, mlps: Sequence[MLP], data: Any) -> tuple[dict[str, torch.Tensor], Measured]:
    """Sums of x x^T over all positions, x the inputs of an MLP's expanding and contracting layers and a 1, in float64.

    Args:
        model: the model; it is not changed.
        mlps: its MLPs, all uses of each: those of a tied layer are added.
        data: an iterable of batches of images.

    Returns:
        (inputs + 1, inputs + 1) by path of the layer, and which data was read, without scores.

    Raises:
        ReductionError: as `measure_scores`; what a layer is given is not finite.
    """
    samples = Samples(data, model, labels=False)
    problem: Exception | None = None
    with running(samples.device, gradients=False), samples.shown("inputs of the layers"):
        tree = quiet_copy(model)
        sums: dict[int, torch.Tensor] = {}
        paths: dict[str, int] = {}
        mask: list[torch.Tensor | None] = []
        for leaf in (leaf for mlp in mlps for leaf in mlp.leaves if leaf.role in ("fc1", "fc2")):
            module = module_at(tree, leaf.path)  # inside of layers around it, which give it what they are given
            layer = projection(module)
            if module is None or layer is None:
                continue
            paths[leaf.path] = id(module)
            if id(module) not in sums:
                like = next(module.parameters())
                sums[id(module)] = like.new_zeros(layer.in_features + 1, layer.in_features + 1, dtype=torch.float64)

                def add(module: nn.Module, args: Any, dim: int = layer.features) -> None:
                    rows = live_rows(args[0].movedim(dim, -1), mask[-1]).double()
                    rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
                    sums[id(module)].addmm_(rows.T, rows)

                module.register_forward_pre_hook(add)
        try:
            for batch, _ in samples.chunks():
                mask.append(batch.mask)
                with telling(batch):
                    batch.run(tree)
        except Exception as error:  # whatever the data raises, or the model: the other processes are told
            problem = error
        every = samples.finish({path: sums[key] for path, key in paths.items()}, problem)
    for path, values in every.items():
        if not values.isfinite().all():
            raise ReductionError(f"what {path} is given is not finite; look at the weights and the data")
    return every, Measured({}, samples.count, samples.fingerprint)
