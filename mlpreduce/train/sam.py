"""Sharpness-aware minimization: the gradient of an update is that of the weights, moved to where the loss is higher nearby.

    loss(model).backward()
    with ascended(model, rho=0.05):
        model.zero_grad()
        loss(model).backward()      # the gradient there
    optimizer.step()                # from where the weights were

Source: Foret et al., arXiv 2010.01412, equation 2 with p = 2; adaptive, Kwon et al., arXiv 2102.11600.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from mlpreduce.errors import ReductionError, check_number

__all__ = ["ascended", "random_states", "second_pass"]

_TINY = 1e-12  # beside the norm, as in both papers' code: a gradient of zero moves nothing


@contextmanager
def ascended(model: nn.Module, rho: float, *, adaptive: bool = False) -> Iterator[torch.Tensor]:
    """Move the weights of a model uphill by their gradients for the block; after it they are what they were, bit for bit.

    With g the gradient of all weights together, they move by rho * g / ||g||, or, adaptive, by rho * w^2 g / || |w| g ||.
    A tied weight counts once. Statistics of BatchNorm stay as they are within the block.

    Args:
        model: has gradients; parameters without are not moved.
        rho: how far; 0.05 is usual, ten times as much if adaptive.
        adaptive: whether each weight moves in proportion to its square, so that the scale of a layer does not matter.

    Yields:
        The norm that the gradients were divided by.

    Raises:
        ReductionError: rho is negative, or there are no gradients.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False, dtype=torch.float64)
        >>> layer.weight.grad = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
        >>> before = layer.weight.detach().clone()
        >>> with ascended(layer, rho=0.5) as norm:
        ...     moved = layer.weight.detach() - before
        >>> norm.item(), moved, torch.equal(layer.weight, before)
        (5.0, tensor([[0.3000, 0.4000]], dtype=torch.float64), True)
    """
    weights = [parameter for parameter in model.parameters() if parameter.grad is not None]
    check_number(f"ascended({type(model).__name__}): rho", rho)
    if not weights:
        raise ReductionError(f"ascended({type(model).__name__}): the model has no gradients; call backward before")
    before = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        slopes = [_wide(weight.grad) for weight in weights if weight.grad is not None]
        steps = (
            [slope * _wide(weight).abs() for slope, weight in zip(slopes, weights, strict=True)] if adaptive else slopes
        )
        norm = nn.utils.get_total_norm(steps)
        factor = rho / (norm + _TINY)
        for weight, step in zip(weights, steps, strict=True):
            weight.add_((step * _wide(weight).abs() if adaptive else step) * factor)
    try:
        with _frozen_statistics(model):
            yield norm
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)


def second_pass(
    model: nn.Module,
    batches: Sequence[tuple[Any, Sequence[torch.Tensor]]],
    backward: Callable[[Any], object],
    rho: float,
    *,
    adaptive: bool = False,
    quiet: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Replace the gradients of an update by those of the moved weights, on the same micro-batches with the same random numbers.

    Args:
        model: has the gradients of the first pass.
        batches: the micro-batches, each with the `random_states` before its first pass.
        backward: computes the loss of a micro-batch and calls backward.
        rho: as of `ascended`.
        adaptive: as of `ascended`.
        quiet: around all micro-batches but the last: DDP's `no_sync`.
    """
    device = next(model.parameters()).device
    with ascended(model, rho, adaptive=adaptive), torch.random.fork_rng(_devices(device), device_type=_type(device)):
        model.zero_grad()
        for number, (batch, states) in enumerate(batches, 1):
            torch.set_rng_state(states[0])
            for state in states[1:]:
                getattr(torch, device.type).set_rng_state(state, device)
            with nullcontext() if number == len(batches) else quiet():
                backward(batch)


def random_states(device: torch.device) -> list[torch.Tensor]:
    """The states of the random numbers that a model on a device draws from."""
    others = [getattr(torch, device.type).get_rng_state(device)] if _devices(device) else []
    return [torch.get_rng_state(), *others]


def _devices(device: torch.device) -> list[torch.device]:
    return [] if device.type == "cpu" else [device]


def _type(device: torch.device) -> str:
    return "cuda" if device.type == "cpu" else device.type  # without devices it is only a name


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in float32 or wider: squares of small gradients are nothing in less."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
def _frozen_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorm computes with the batch's statistics, as in training, and does not write them down."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
