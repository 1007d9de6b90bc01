"""New weights and bias of fc2 by least squares, from sums over calibration data.

With a what fc2 is given, e what is missing at a place of the stream into which g times its output goes, the change (D, d) of
weight and bias has the least

    sum w |e - g (D a + d)|^2 + ridge |D|^2

over all tokens, images and uses, w a weight of each token. The ridge is a part of mean(g^2) times the mean square of a; it is
the one that does best when each half of the examples is judged by a fit on the other. Nothing is divided by g, so that features
which layer scale nearly shuts stay as they are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from mlpreduce.calibration.sums import gram
from mlpreduce.errors import ReductionError
from mlpreduce.graph import module_at, projection

__all__ = ["RIDGES", "Fit", "add_rows", "check_halves", "chosen", "empty_fit", "fitted", "solved"]

RIDGES = (1e-4, 1e-2, 1.0, math.inf)  # the last refits the bias alone
_SHUT = 1e-6  # of the mean square of g: below it the bias stays as it is


@dataclass(frozen=True)
class Fit:
    """The sums of one fc2 that is refitted, in float64, of each half of the examples. Inputs have a 1 beside them for the bias.

    Attributes:
        layer: fc2 of the reduced model.
        path: its path.
        square: of the inputs with themselves, (2, inputs + 1, inputs + 1).
        cross: of what is missing with the inputs, (2, outputs, inputs + 1).
        wanted: of what is wanted, of its square, and of the square of what is missing, (2, 3, outputs).
        factor: g, (outputs,).
    """

    layer: nn.Module
    path: str
    square: torch.Tensor
    cross: torch.Tensor
    wanted: torch.Tensor
    factor: torch.Tensor


def empty_fit(tree: nn.Module, path: str) -> Fit:
    """No sums yet of the layer at a path.

    Raises:
        ReductionError: it is no layer that can be refitted.
    """
    module = module_at(tree, path)
    layer = projection(module)
    if module is None or layer is None or not layer.dense:
        raise ReductionError(f"repair: {path} is no linear layer or 1 x 1 convolution; exclude it")
    weight = module.get_parameter("weight")
    inputs, outputs = layer.in_features + 1, layer.out_features
    square = weight.new_zeros(2, inputs, inputs, dtype=torch.float64)
    sums = square.new_zeros(2, outputs, inputs), square.new_zeros(2, 3, outputs)
    return Fit(module, path, square, *sums, square.new_ones(outputs))


def add_rows(
    fit: Fit,
    half: int,
    inputs: torch.Tensor,
    missing: torch.Tensor,
    *,
    wanted: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
) -> None:
    """Add rows. Products are of their type, about the mean of the inputs; sums are float64.

    Args:
        fit: the sums.
        half: of the examples.
        inputs: what fc2 is given, (rows, inputs).
        missing: what the stream lacks, (rows, outputs).
        wanted: what it is to get from fc2, (rows, outputs), where what is missing is asked for as a share of it.
        weight: of each row, (rows,); 1 by default.
    """
    inputs, missing = (some.to(torch.promote_types(some.dtype, torch.float32)) for some in (inputs, missing))
    means = inputs.mean(0)
    given = torch.cat([inputs - means, inputs.new_ones(len(inputs), 1)], 1)
    if weight is not None:
        root = weight.to(given.dtype).sqrt()[:, None]
        given, missing = given * root, missing * root
    square, cross = gram(given).double(), (missing.T @ given).double()
    for sums in (square, cross):
        sums[:, :-1] += torch.outer(sums[:, -1], means.double())
    square[:-1] += torch.outer(means.double(), square[-1])
    fit.square[half] += square
    fit.cross[half] += cross
    fit.wanted[half, 2] += missing.square().sum(0, dtype=torch.float64)
    if wanted is not None:
        wanted = wanted.double()
        fit.wanted[half, :2] += torch.stack([wanted.sum(0), wanted.square().sum(0)])


def check_halves(fit: Fit, count: int) -> None:
    """Check that there is something in each half of so many examples.

    Raises:
        ReductionError: there is not.
    """
    if not fit.square[:, -1, -1].all():
        raise ReductionError(
            f"repair fits one half of the examples and judges by the other, and one is empty, with {count} in all; give at "
            f"least 2, better hundreds"
        )


def solved(
    fit: Fit, *, bias_alone: bool = False, start: Mapping[str, torch.Tensor] | None = None
) -> tuple[dict[str, torch.Tensor], float, float]:
    """New values by tensor path, and what was missing and is, as a share of the variance of what is wanted.

    There are no new values where no fit on one half of the examples does better on the other than what there is.

    Args:
        fit: the sums.
        bias_alone: whether the weight stays.
        start: values that are changed in place of those of the layer, by tensor path.

    Raises:
        ReductionError: the sums are not finite.
    """
    wanted, count = fit.wanted.sum(0), fit.square[:, -1, -1].sum()
    total, squares, missing = wanted[0], wanted[1].sum(), wanted[2].sum()
    variance = (squares - total.square().sum() / count).clamp(min=torch.finfo(torch.float64).tiny)
    ridge, gain = chosen(fit, bias_alone=bias_alone, start=start)
    was = float(missing / variance)
    if gain <= 0:
        return {}, was, was
    return fitted(fit, ridge, bias_alone=bias_alone, start=start), was, float((missing - gain) / variance)


def chosen(
    fit: Fit, *, bias_alone: bool = False, start: Mapping[str, torch.Tensor] | None = None
) -> tuple[float, float]:
    """The ridge with which each half of the examples is best judged by a fit on the other, and by how much less is missing.

    Raises:
        ReductionError: as `solved`.
    """
    if not fit.square.isfinite().all() or not fit.cross.isfinite().all():
        raise ReductionError(f"repair: what {fit.path} is given is not finite; look at the model or the data")
    halves = list(zip(fit.square, fit.cross, strict=True))
    here, there = [_from(fit, *half, start) for half in halves], halves[::-1]
    gains = {
        ridge: sum(_gain(change(ridge), *other, fit.factor) for change, other in zip(here, there, strict=True))
        for ridge in (RIDGES[-1:] if bias_alone else RIDGES)
    }
    return max(gains.items(), key=lambda item: item[1])


def fitted(
    fit: Fit, ridge: float, *, bias_alone: bool = False, start: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """New values by tensor path, with a ridge that is known: see `solved`."""
    weight, bias = fit.layer.get_parameter("weight"), fit.layer._parameters.get("bias")
    change = _from(fit, fit.square.sum(0), fit.cross.sum(0), start)(ridge)
    values = {}
    if not bias_alone:
        more = change[:, :-1].T if _turned(fit) else change[:, :-1]
        values[f"{fit.path}.weight"] = (weight.double() + more.reshape(weight.shape)).to(weight.dtype)
    if bias is not None:
        values[f"{fit.path}.bias"] = (bias.double() + change[:, -1]).to(bias.dtype)
    return values


def _turned(fit: Fit) -> bool:
    """Whether inputs are the first axis of the weight."""
    layer = projection(fit.layer)
    return layer is not None and layer.outputs[0] != ("weight", 0)


def _from(
    fit: Fit, square: torch.Tensor, cross: torch.Tensor, start: Mapping[str, torch.Tensor] | None
) -> Callable[[float], torch.Tensor]:
    """What is added to weight and bias by these sums, as a function of the ridge's strength."""
    biased = fit.layer._parameters.get("bias") is not None
    if start is None:
        return _changes(square, cross, biased, fit.factor)
    begun = _as_change(fit, start)
    rest = _changes(square, cross - fit.factor[:, None] * (begun @ square), biased, fit.factor)
    return lambda ridge: begun + rest(ridge)


def _as_change(fit: Fit, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What values add to weight and bias, (outputs, inputs + 1)."""
    found = torch.zeros_like(fit.cross[0])
    for name, place in (("weight", found[:, :-1]), ("bias", found[:, -1:])):
        if (value := values.get(f"{fit.path}.{name}")) is not None:
            change = value.double() - fit.layer.get_parameter(name).double()
            turn = name == "weight" and _turned(fit)
            place.copy_(change.reshape(place.T.shape).T if turn else change.reshape(place.shape))
    return found


def _changes(
    square: torch.Tensor, cross: torch.Tensor, biased: bool, factor: torch.Tensor
) -> Callable[[float], torch.Tensor]:
    """What is added to weight and bias, (outputs, inputs + 1), by sums as of `Fit`, as a function of the ridge's strength."""
    count = square[-1, -1]
    inner, outer = square[:-1, :-1], cross[:, :-1]
    means, rest = square[-1, :-1] / count, cross[:, -1] / count
    if biased:  # the bias takes the means, and has no ridge
        inner = inner - count * torch.outer(means, means)
        outer = outer - count * torch.outer(rest, means)
    scale = factor.square().mean()
    noise = torch.finfo(inner.dtype).eps * len(inner) * square.diagonal()[:-1].max()  # of the means' subtraction
    alike = bool((factor == factor[0]).all())

    @functools.cache
    def turned() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        values, vectors = torch.linalg.eigh(inner)
        return values.clamp(min=0), vectors, factor[:, None] * (outer @ vectors)

    def change(strength: float) -> torch.Tensor:
        found = cross.new_zeros(cross.shape)
        ridge = scale * (strength * inner.diagonal().mean() + noise)
        if 0 < ridge < math.inf:
            if alike:
                eye = torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
                factored, failed = torch.linalg.cholesky_ex(inner * factor[0].square() + ridge * eye)
                if not failed:
                    found[:, :-1] = torch.cholesky_solve(outer.T * factor[0], factored).T
            if not alike or failed:  # each output has its own factor, or rounding left no root
                values, vectors, there = turned()
                found[:, :-1] = (there / (factor.square()[:, None] * values + ridge)) @ vectors.T
        if biased:
            found[:, -1] = factor * rest / factor.square().clamp(min=_SHUT * scale) - found[:, :-1] @ means
        return found

    return change


def _gain(change: torch.Tensor, square: torch.Tensor, cross: torch.Tensor, factor: torch.Tensor) -> float:
    """By how much a change brings what is missing down, in sums of squares over the examples of `square` and `cross`."""
    weighed = factor[:, None] * change
    return float(2 * (weighed * cross).sum() - ((weighed @ square) * weighed).sum())
