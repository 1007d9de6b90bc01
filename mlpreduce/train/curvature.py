"""Gradient and Hessian of the mean cross entropy of a model, a few images at a time, with nothing of the model changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from mlpreduce.calibration import (
    CHECKPOINTING,
    CHUNK,
    check_twice_differentiable,
    full_precision,
    undisturbed_randomness,
)
from mlpreduce.errors import ReductionError

__all__ = ["CHUNK", "Vector", "gradient", "hessian_product", "length", "power_iteration", "sam_gap", "undisturbed"]


Vector = list[torch.Tensor]  # one tensor for each parameter


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode and full float32 precision; afterwards modes and random states are as they were."""
    modes = [(module, module.training) for module in model.modules()]
    # the reentrant kind does not work with torch.autograd.grad
    flags = [(m, name) for m, _ in modes for name in CHECKPOINTING if m.__dict__.get(name) is True]
    with undisturbed_randomness(device), full_precision(device):
        try:
            _forget_kept(model)
            for module, name in flags:
                setattr(module, name, False)
            yield
        finally:
            for module, name in flags:
                setattr(module, name, True)
            _forget_kept(model)
            for module, mode in modes:
                module.training = mode


def gradient(model: nn.Module, parameters: Vector, images: torch.Tensor, targets: torch.Tensor) -> Vector:
    """The gradient of the mean cross entropy, shaped as the parameters; `.grad` stays as it is."""
    total = [torch.zeros_like(parameter, requires_grad=False) for parameter in parameters]
    for loss in _losses(model, images, targets):
        _add(total, torch.autograd.grad(loss, parameters, materialize_grads=True))
    return total


def hessian_product(
    model: nn.Module, parameters: Vector, images: torch.Tensor, targets: torch.Tensor, vector: Vector
) -> Vector:
    """The Hessian of the mean cross entropy times a vector, by differentiating their gradient's product with it.

    Raises:
        ReductionError: an operation of the model has no second derivative.

    Source:
        Pearlmutter, "Fast Exact Multiplication by the Hessian", Neural Computation 6(1), 1994.
    """
    total = [torch.zeros_like(values) for values in vector]
    for loss in _losses(model, images, targets):
        try:
            slopes = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
            along = torch.stack([(s * v).sum() for s, v in zip(slopes, vector, strict=True)]).sum()
            check_twice_differentiable(along)
            _add(total, torch.autograd.grad(along, parameters, materialize_grads=True))
        except RuntimeError as error:
            if "is not implemented" not in str(error):
                raise
            raise ReductionError(
                f"sharpness({type(model).__name__}): an operation of the model has no second derivative "
                f"({str(error).splitlines()[0]}); leave this probe out"
            ) from error
    return total


def power_iteration(
    multiply: Callable[[Vector], Vector], start: Vector, iterations: int, tolerance: float
) -> tuple[float, float]:
    """The eigenvalue of largest magnitude of a symmetric matrix, and ||Hv - lambda v|| of its unit vector v.

    Args:
        multiply: the product of the matrix with a vector.
        start: a vector; its length does not matter.
        iterations: most products.
        tolerance: relative change of the eigenvalue at which it ends.
    """
    norm = length(start)
    vector = [values / norm for values in start]
    value = residual = math.inf
    for _ in range(iterations):
        product = multiply(vector)
        before, value, norm = value, _dot(vector, product), length(product)
        residual = math.sqrt(max(norm * norm - value * value, 0.0)) if math.isfinite(norm) else norm
        if not math.isfinite(norm) or norm == 0 or abs(value - before) <= tolerance * abs(value):
            break
        vector = [values / norm for values in product]
    return value, residual


@torch.no_grad()
def sam_gap(
    model: nn.Module, parameters: Vector, images: torch.Tensor, targets: torch.Tensor, slopes: Vector, rho: float
) -> float:
    """How much the mean cross entropy grows over a step of length `rho` along the gradient; the weights come back exactly."""
    norm = length(slopes)
    if norm == 0:
        return 0.0
    before = sum(loss.item() for loss in _losses(model, images, targets))
    kept = [parameter.clone() for parameter in parameters]
    try:
        for parameter, slope in zip(parameters, slopes, strict=True):
            parameter.add_(slope, alpha=rho / norm)
        after = sum(loss.item() for loss in _losses(model, images, targets))
    finally:
        for parameter, values in zip(parameters, kept, strict=True):
            parameter.copy_(values)
    return after - before


def length(vector: Vector) -> float:
    """The L2 norm over all tensors, in float64."""
    return math.sqrt(_dot(vector, vector))


def _losses(model: nn.Module, images: torch.Tensor, targets: torch.Tensor) -> Iterator[torch.Tensor]:
    """Parts of the mean cross entropy that add up to it; of float32 logits in float64, so that differences stay exact."""
    for some, labels in zip(images.split(CHUNK), targets.split(CHUNK), strict=True):
        _forget_kept(model)
        yield nn.functional.cross_entropy(model(some).double(), labels, reduction="sum") / len(images)


def _forget_kept(model: nn.Module) -> None:
    """Eval mode anew: what modules keep in it, as timm's attention biases by position, is of other weights or another graph."""
    model.train()
    model.eval()


def _add(total: Vector, more: tuple[torch.Tensor, ...]) -> None:
    for values, others in zip(total, more, strict=True):
        values.add_(others.detach())


def _dot(one: Vector, two: Vector) -> float:
    return math.fsum((a.double() * b.double()).sum().item() for a, b in zip(one, two, strict=True))
