"""A projection through fewer features than it has inputs or outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from mlpreduce.errors import ReductionError, check_number, check_whole
from mlpreduce.layers.linear import decomposed, linear_of, place_of, undisturbed, weight_of
from mlpreduce.layers.wrapper import Axes, StandIn

__all__ = ["Factors", "LowRankLinear", "nearest_factors"]

RIDGE = 1e-6  # of the mean second moment, so that inputs that never vary divide nothing by zero


class LowRankLinear(StandIn):
    """y = up (down x) + b. It has fewer weights than a dense layer where rank < inputs * outputs / (inputs + outputs).

    Attributes:
        down: (rank, inputs).
        up: (outputs, rank).
        bias: (outputs,), or None.
        kept: share of the energy of the layer that `from_linear` made it of, 0..1: of its weight, or of what it gives for
            the inputs whose moments were given. 1 of any other; the plan of a transform tells it in a note.

    Args:
        in_features: inputs.
        out_features: outputs.
        rank: features between, at most the lesser of both.
        bias: whether there is one.
        device: where the weights lie.
        dtype: their type.

    Raises:
        ReductionError: a rank out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        call = f"LowRankLinear({in_features}, {out_features}, {rank})"
        for name, value in (("in_features", in_features), ("out_features", out_features), ("rank", rank)):
            check_whole(f"{call}: {name}", value)
        if rank > min(in_features, out_features):
            raise ReductionError(f"{call}: rank is at most {min(in_features, out_features)}")
        self.down = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self._kept = 1.0
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """New values: the product has entries of the variance that those of a new `torch.nn.Linear` have."""
        inputs, rank = self.down.shape[1], self.down.shape[0]
        std = (1 / (3 * inputs * rank)) ** 0.25
        nn.init.normal_(self.down, std=std)
        nn.init.normal_(self.up, std=std)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs))

    @classmethod
    def in_place_of(cls, module: nn.Module, rank: int) -> LowRankLinear:
        """A new layer of the widths of a `Linear`, its type and place."""
        outputs, inputs = weight_of(module, "LowRankLinear.in_place_of").shape
        return cls(inputs, outputs, rank, **place_of(module))

    @property
    def in_features(self) -> int:
        """Inputs."""
        return self.down.shape[1]

    @property
    def out_features(self) -> int:
        """Outputs."""
        return self.up.shape[0]

    @property
    def kept(self) -> float:
        """Share of the energy of the layer that it was made of."""
        return self._kept

    @property
    def macs(self) -> tuple[int, int]:
        """Multiply-accumulates for each position, and once for each call."""
        return self.down.numel() + self.up.numel(), 0

    @property
    def outputs(self) -> Axes:
        """Axes of its tensors that its outputs lie on."""
        return ("up", 0), ("bias", 0)

    @property
    def inputs(self) -> Axes:
        """Axes of its tensors that its inputs lie on."""
        return (("down", 1),)

    @classmethod
    def from_linear(
        cls,
        layer: nn.Linear,
        rank: int | None = None,
        *,
        energy: float | None = None,
        moments: torch.Tensor | None = None,
    ) -> LowRankLinear:
        """The nearest layer of a rank: a truncated singular value decomposition, in float64.

        Args:
            layer: the dense layer.
            rank: features between.
            energy: in place of the rank, the share of the energy to keep, in (0, 1]; the rank is the least that does.
            moments: (inputs, inputs), sums of products of the inputs. With them what is nearest is W x over those inputs, and
                not W. Or (inputs + 1, inputs + 1), of the inputs with a 1 beside them, as calibration gives them: then the bias
                takes up the means, and what varies is nearest.

        Raises:
            ReductionError: neither or both of rank and energy, one out of range, or moments of another size.
        """
        call = "LowRankLinear.from_linear"
        weight = weight_of(layer, call).double()
        near = nearest_factors(weight, rank, energy=energy, moments=moments, biased=layer.bias is not None, call=call)
        with undisturbed(weight):
            made = cls.in_place_of(layer, len(near.down) if rank is None else rank)
        with torch.no_grad():
            made.up.copy_(near.up)
            made.down.copy_(near.down)
            if made.bias is not None:
                made.bias.copy_(layer.bias.double() + (weight - made.up.double() @ made.down.double()) @ near.mean)
        made._kept = near.kept
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., inputs) to (..., outputs)."""
        return nn.functional.linear(nn.functional.linear(x, self.down), self.up, self.bias)

    def merged(self) -> nn.Linear:
        """The dense layer that computes the same."""
        weight = (self.up.detach().double() @ self.down.detach().double()).to(self.up.dtype)
        return linear_of(weight, self.bias)

    def extra_repr(self) -> str:
        """Widths, rank and whether there is a bias."""
        return f"{self.down.shape[1]}, {self.up.shape[0]}, rank={self.down.shape[0]}, bias={self.bias is not None}"


@dataclass(frozen=True)
class Factors:
    """A product of two thin matrices that is near to a weight.

    Attributes:
        up: (outputs, rank).
        down: (rank, inputs).
        mean: of the inputs, (inputs,), which a bias takes up; 0 where there is none, or it is not known.
        kept: share of the energy, 0..1.
    """

    up: torch.Tensor
    down: torch.Tensor
    mean: torch.Tensor
    kept: float


def nearest_factors(
    weight: torch.Tensor,
    rank: int | None = None,
    *,
    energy: float | None = None,
    moments: torch.Tensor | None = None,
    biased: bool = False,
    call: str,
) -> Factors:
    """Factors of the nearest weight of a rank: a truncated singular value decomposition, in float64.

    Args:
        weight: (outputs, inputs), in float64.
        rank: features between.
        energy: as of `LowRankLinear.from_linear`.
        moments: as of it.
        biased: whether a bias takes up the means of the inputs.
        call: what asks, for messages.

    Raises:
        ReductionError: as of it.
    """
    if (rank is None) == (energy is None):
        raise ReductionError(f"{call}: give one of rank and energy")
    root, mean = None, weight.new_zeros(weight.shape[1])
    if moments is not None:
        inputs = weight.shape[1]
        if moments.shape not in ((inputs,) * 2, (inputs + 1,) * 2) or not bool(moments.isfinite().all()):
            raise ReductionError(f"{call}: moments are {tuple(moments.shape)}; give finite ones of {inputs} inputs")
        sums = moments.to(weight)[:inputs, :inputs]
        lost = torch.finfo(torch.float64).eps * inputs * sums.diagonal().max()  # by taking the means away
        if len(moments) > inputs and biased:
            mean = moments.to(weight)[:-1, -1] / moments[-1, -1]
            sums = sums - moments[-1, -1].double() * torch.outer(mean, mean)
        ridge = RIDGE * sums.diagonal().mean() + lost + torch.finfo(torch.float64).tiny
        root, failed = torch.linalg.cholesky_ex(sums + ridge * torch.eye(len(sums)).to(sums))
        if failed:
            raise ReductionError(f"{call}: moments are no sums of products of inputs: they have a negative eigenvalue")
    left, values, right = decomposed(weight if root is None else weight @ root, call)
    shares = values.square().cumsum(0) / values.square().sum()
    if rank is None:
        check_number(f"{call}: energy", energy, most=1, above=True)
        rank = min(int((shares < (energy or 0.0) * (1 - 1e-12)).sum()) + 1, len(values))
    scale, down = values[:rank].sqrt(), right[:rank]
    if root is not None:
        down = torch.linalg.solve_triangular(root, down, upper=False, left=False)
    kept = float(shares[min(rank, len(shares)) - 1]) if bool(values.any()) else 1.0
    return Factors(left[:, :rank] * scale, scale[:, None] * down, mean, kept)
