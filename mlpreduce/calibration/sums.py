"""Sums over calibration data of what fc2 of each MLP is given: of each hidden unit, and where asked for of all pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mlpreduce.errors import ReductionError
from mlpreduce.graph import MLP, module_at, projection

__all__ = ["UnitSums", "add_calls", "empty_sums", "gram", "halfway", "live_rows", "shared", "take_back"]

_BLOCKS, _BLOCK = 6, 128  # blocks of features at most, and the fewest features in one
_TENSORS = ("rows", "total", "squares", "pairs", "wanted")


@dataclass
class UnitSums:
    """Sums over all positions and examples, each half of the examples by itself, in float64; positions may have weights.

    Attributes:
        rows: how many positions, or their weights, (uses, 2).
        total: sums of a, (uses, 2, hidden units).
        squares: sums of a^2, (uses, 2, hidden units).
        pairs: sums of a a^T over all uses, (2, hidden units, hidden units); None where they were not asked for.
        wanted: sums of g g^T over all uses and both halves, (outputs, outputs), g the gradient of an example's loss by what
            fc2 gives at a position; None where it was not asked for.
        biased: whether fc2 has a bias.
        examples: how many there were.
    """

    rows: torch.Tensor
    total: torch.Tensor
    squares: torch.Tensor
    pairs: torch.Tensor | None
    wanted: torch.Tensor | None
    biased: bool
    examples: int = 0

    def add(self, use: int, half: int, rows: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add inputs of fc2, (positions, hidden units), with weights of positions. Products are of their type, sums float64."""
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if weights is None:
            self.rows[use, half] += len(rows)
            self.total[use, half] += rows.sum(0, dtype=torch.float64)
        else:
            roots = weights.to(rows.dtype).sqrt()[:, None]
            rows = rows * roots  # products of two have the weight once
            self.rows[use, half] += weights.sum()
            self.total[use, half] += (rows * roots).sum(0, dtype=torch.float64)
        self.squares[use, half] += rows.square().sum(0, dtype=torch.float64)
        if self.pairs is not None:
            self.pairs[half] += gram(rows)

    def add_slopes(self, rows: torch.Tensor) -> None:
        """Add gradients by what fc2 gives, (positions, outputs), where they were asked for."""
        if self.wanted is not None:
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            self.wanted += gram(rows)

    def shares(self, norms: torch.Tensor, *, centred: bool) -> torch.Tensor:
        """The part of each unit in the output energy of its MLP, by the use where that is largest; (hidden units,).

        Args:
            norms: squared norms of the columns of fc2, (hidden units,).
            centred: whether the energy is that about the mean.
        """
        rows = self.rows.sum(1)[:, None].clamp(min=1)
        energy = self.squares.sum(1) / rows
        if centred:
            energy = energy - (self.total.sum(1) / rows).square()
        energy = energy.clamp(min=0) * norms
        return (energy / energy.sum(1, keepdim=True).clamp(min=torch.finfo(energy.dtype).tiny)).amax(0)


def empty_sums(
    mlps: Sequence[MLP], tree: nn.Module, *, pairs: bool, slopes: bool, most: float = math.inf
) -> dict[str, UnitSums]:
    """No sums yet, for each MLP whose fc2 projects, by owner; of the first ones alone where all take more than `most` bytes."""
    like = next((p for p in tree.parameters() if p.is_floating_point()), torch.empty(0))
    found: dict[str, UnitSums] = {}
    for mlp in mlps:
        layer = projection(module_at(tree, mlp.leaf("fc2").call))
        if mlp.owner != mlp.name or layer is None:
            continue
        size, width = mlp.hidden_features, layer.out_features
        most -= 8 * (2 * size**2 * pairs + width**2 * slopes)
        if most < 0 and found:  # one always fits
            break
        uses = sum(other.owner == mlp.owner for other in mlps)
        zeros = like.new_zeros(uses, 2, size, dtype=torch.float64)
        biased = any(name.rpartition(".")[2] == "bias" for name, _ in layer.outputs)
        products = zeros.new_zeros(2, size, size) if pairs else None
        wanted = zeros.new_zeros(width, width) if slopes else None
        found[mlp.owner] = UnitSums(zeros.new_zeros(uses, 2), zeros, zeros.clone(), products, wanted, biased)
    return found


def gram(rows: torch.Tensor) -> torch.Tensor:
    """The product of (rows, features) with itself, (features, features), whose lower half is its upper one, by blocks."""
    size = rows.shape[1]
    found = rows.new_empty(size, size)
    step = max(_BLOCK, -(-size // _BLOCKS))
    for start in range(0, size, step):
        stop = min(start + step, size)
        found[start:stop, start:] = rows[:, start:stop].T @ rows[:, start:]
        found[stop:, start:stop] = found[start:stop, stop:].T
    return found


def halfway(squares: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Weights of positions: halfway between 1 and the share of each in squared gradients of this mean; 1 where all are 0."""
    return torch.where(mean > 0, 0.5 + 0.5 * squares / mean, 1.0)


def live_rows(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The rows of values (examples, ..., features), but for positions that are padding; (rows, features)."""
    if mask is not None and values.shape[:-1] == mask.shape:
        return values[mask]
    return values.flatten(0, -2)


def add_calls(
    sums: Mapping[str, UnitSums],
    kept: Mapping[str, Sequence[torch.Tensor]],
    rank: int,
    mask: torch.Tensor | None = None,
    weights: Mapping[str, Sequence[torch.Tensor]] | None = None,
) -> None:
    """Add the inputs of each fc2, without padding.

    Args:
        sums: by owner.
        kept: the inputs, (examples, positions, hidden units), by owner and call.
        rank: of this process.
        mask: which positions are no padding, (examples, positions); all by default.
        weights: of positions, (examples, positions), by owner and call; 1 by default.
    """

    def rows(values: torch.Tensor, some: slice) -> torch.Tensor:
        return live_rows(values[some], None if mask is None else mask[some])

    for owner, calls in kept.items():
        for number, hidden in enumerate(calls if owner in sums else ()):
            for half in range(2):
                pick = slice((half + rank) % 2, None, 2)  # so that one example in each process is enough
                if len(hidden[pick]):
                    given = rows(hidden.detach(), pick)
                    weight = rows(weights[owner][number][..., None], pick)[:, 0] if weights is not None else None
                    sums[owner].add(min(number, len(sums[owner].rows) - 1), half, given, weight)


def shared(sums: Mapping[str, UnitSums]) -> dict[Any, torch.Tensor]:
    """The tensors that processes add up."""
    every = {(owner, name): getattr(one, name) for owner, one in sums.items() for name in _TENSORS}
    return {key: value for key, value in every.items() if value is not None}


def take_back(sums: Mapping[str, UnitSums], every: Mapping[Any, torch.Tensor], examples: int) -> None:
    """Take what they add up to.

    Raises:
        ReductionError: something is not finite.
    """
    for owner, one in sums.items():
        one.examples = examples
        for name in _TENSORS:
            if (owner, name) in every:
                setattr(one, name, every[owner, name])
                if not every[owner, name].isfinite().all():
                    what = "the gradient of the loss at what fc2 gives" if name == "wanted" else "what fc2 is given"
                    raise ReductionError(f"{owner}: {what} is not finite; look at the weights and the data")
