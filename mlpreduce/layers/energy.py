"""Which features of a trained MLP belong in which block, so that blocks keep most of its weights' energy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mlpreduce.errors import ReductionError, check_whole

__all__ = ["BlockOrders", "block_orders"]

ROUNDS = 20  # it ends earlier, as each round keeps at least as much


@dataclass(frozen=True, eq=False)
class BlockOrders:
    """Orders of features in which those of one block lie together, and what the blocks keep.

    Attributes:
        inputs: (inputs,), of the MLP.
        hidden: (hidden,), units.
        outputs: (outputs,), of the MLP.
        kept: share of the sum of squares of all weights that lies in the blocks, 0..1.
        kept_before: the same of the features as they are.
    """

    inputs: torch.Tensor
    hidden: torch.Tensor
    outputs: torch.Tensor
    kept: float
    kept_before: float


def block_orders(
    expand: Sequence[torch.Tensor], contract: torch.Tensor, groups: int, *, features: bool = True
) -> BlockOrders:
    """Divide inputs, hidden units and outputs into groups of equal size, so that the blocks keep most energy.

    Each of the three is divided best for the other two, in turn, as a linear assignment, until nothing is gained: a local
    optimum, from the features as they are. An order of the hidden units costs nothing when the model runs.

    Args:
        expand: weights (hidden, inputs) of the expanding layers, two of a gated MLP.
        contract: (outputs, hidden), the weight of the contracting layer.
        groups: blocks; they divide all three.
        features: whether inputs and outputs are divided too, and not just the hidden units.

    Raises:
        ReductionError: weights that do not fit together or are not finite, or groups that do not divide the widths.
    """
    check_whole("block_orders: groups", groups)
    shapes = [tuple(weight.shape) for weight in expand]
    if not shapes or len(set(shapes)) > 1 or contract.dim() != 2 or shapes[0][:1] != tuple(contract.shape[1:]):
        raise ReductionError(
            f"block_orders: weights are {shapes} and {tuple(contract.shape)}; give (hidden, inputs) alike and (outputs, hidden)"
        )
    first = torch.stack([weight.detach().double().square() for weight in expand]).sum(0)
    second = contract.detach().double().square()
    sizes = (first.shape[1], first.shape[0], second.shape[0])
    if any(size % groups for size in sizes):
        raise ReductionError(f"block_orders: {groups} groups do not divide the widths {', '.join(map(str, sizes))}")
    up, down = first.cpu().numpy(), second.cpu().numpy()  # (hidden, inputs), (outputs, hidden)
    whole = up.sum() + down.sum()
    if not np.isfinite(whole) or whole == 0:
        raise ReductionError("block_orders: the weights are all zero, or not finite")
    of_inputs, of_hidden, of_outputs = (np.repeat(np.arange(groups), size // groups) for size in sizes)

    def kept() -> float:
        inside = up[of_hidden[:, None] == of_inputs].sum() + down[of_outputs[:, None] == of_hidden].sum()
        return float(inside / whole)

    before = best = kept()
    for _ in range(ROUNDS):
        of_hidden = _divided(up @ _members(of_inputs, groups) + down.T @ _members(of_outputs, groups))
        if features:
            of_inputs = _divided(up.T @ _members(of_hidden, groups))
            of_outputs = _divided(down @ _members(of_hidden, groups))
        now = kept()
        if now <= best + 1e-12:
            break
        best = now
    inputs, hidden, outputs = (
        torch.from_numpy(np.argsort(of, kind="stable")) for of in (of_inputs, of_hidden, of_outputs)
    )
    return BlockOrders(inputs, hidden, outputs, kept(), before)


def _members(of: np.ndarray, groups: int) -> np.ndarray:
    """(things, groups), 1 where a thing is of a group."""
    members: np.ndarray = of[:, None] == np.arange(groups)
    return members.astype(np.float64)


def _divided(gains: np.ndarray) -> np.ndarray:
    """The group of each thing, as many of each, with the highest sum of `gains` (things, groups)."""
    from scipy import optimize

    places = len(gains) // gains.shape[1]
    place = optimize.linear_sum_assignment(np.repeat(gains, places, axis=1), maximize=True)[1]
    groups: np.ndarray = place // places
    return groups
