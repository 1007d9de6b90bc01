"""From values to a `Linear`, which layers are made from and merged to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mlpreduce.errors import ReductionError

__all__ = ["decomposed", "linear_of", "place_of", "undisturbed", "weight_of"]


def linear_of(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A `Linear` with these values, copied; its type and place are those of the weight."""
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=bias is not None, device="meta", dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


def place_of(layer: nn.Module) -> dict[str, Any]:
    """What a layer that stands in for another has in common with it: whether there is a bias, type and place."""
    weight = layer.get_parameter("weight")
    return {"bias": layer._parameters.get("bias") is not None, "device": weight.device, "dtype": weight.dtype}


@contextmanager
def undisturbed(weight: torch.Tensor) -> Iterator[None]:
    """Random numbers that are drawn within, where the weight lies, are not missed outside."""
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        yield


def weight_of(layer: nn.Module, call: str) -> torch.Tensor:
    """The weight of a `Linear`, (outputs, inputs).

    Raises:
        ReductionError: it is none.
    """
    if not isinstance(layer, nn.Linear):
        raise ReductionError(f"{call}: {type(layer).__name__} is no torch.nn.Linear")
    return layer.weight.detach()


def decomposed(weight: torch.Tensor, call: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Left singular vectors, values and right singular vectors of a weight, in float64.

    Raises:
        ReductionError: the weight has no values, or some that are not finite.
    """
    if weight.is_meta or not bool(weight.isfinite().all()):
        raise ReductionError(f"{call}: the weight is on the meta device or not finite, and has no singular values")
    return tuple(torch.linalg.svd(weight.double(), full_matrices=False))
