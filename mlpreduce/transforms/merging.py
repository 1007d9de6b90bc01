"""What is left of the weights of MLPs that share one: those of one of them, or a mean, after units were matched.

An MLP computes the same for any order of its hidden units, so trained ones differ in it by chance. Units are matched by their
weights, or by what they do on calibration data: the correlations of what fc2 is given at the same positions, as a linear
assignment (as for merging models: Ainsworth et al., "Git Re-Basin", arXiv 2209.04836, weights and activations).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mlpreduce.criteria import unit_weights
from mlpreduce.errors import ReductionError
from mlpreduce.graph import MLP, Leaf
from mlpreduce.transforms.parts import Parts

__all__ = ["ALIGNED", "KEEPS", "KEPT_BY_DATA", "MEANS", "Merge", "merge_of"]

ALIGNED = ("align_mean", "align_activations")
MEANS = ("mean", *ALIGNED)
KEEPS = ("first", "last", *MEANS, "auto")
KEPT_BY_DATA = ("auto", "align_activations")


@dataclass(frozen=True)
class Merge:
    """One MLP for several.

    Attributes:
        members: the MLPs.
        keeper: whose tensors stay.
        values: new values of those, by path; the others stay as they are.
        orders: of the units of each member, in which they meet those of the keeper; None where they do as they lie.
    """

    members: tuple[MLP, ...]
    keeper: MLP
    values: Mapping[str, torch.Tensor]
    orders: tuple[torch.Tensor | None, ...]

    def own(self, parts: Parts, number: int, leaf: Leaf) -> torch.Tensor:
        """The weight of a layer of a member, with its units in the order of the keeper's."""
        return _ordered(parts, self.members[number], self.orders[number], f"{leaf.path}.weight")

    def moments(self, parts: Parts, number: int, leaf: Leaf) -> torch.Tensor:
        """Sums of products of what a layer of a member is given, in the same order: see `Parts.moments`."""
        found, order = parts.moments(leaf), self.orders[number]
        if leaf.role == "fc2" and order is not None:
            index = torch.cat([order, torch.tensor([len(order)])]).to(found.device)
            found = found[index][:, index]
        return found


def merge_of(parts: Parts, members: Sequence[MLP], keep: str) -> Merge:
    """What is kept of MLPs that share, in order of execution.

    Args:
        parts: the MLPs in scope.
        members: the MLPs.
        keep: one of `KEEPS`, but `auto`.

    Raises:
        ReductionError: units that cannot trade places, weights that are not finite, or no data to match units by.
    """
    first = members[0]
    none: tuple[torch.Tensor | None, ...] = (None,) * len(members)
    if keep not in MEANS:
        return Merge(tuple(members), members[-1] if keep == "last" else first, {}, none)
    if keep in ALIGNED and first.groups > 1:
        raise ReductionError(
            f"keep={keep!r}: {first.name} has units in {first.groups} groups, which cannot trade places; use keep='mean'"
        )
    orders = (None, *(_matching(parts, first, member, keep) for member in members[1:])) if keep in ALIGNED else none
    values = {}
    for position, leaf in enumerate(first.leaves):
        for path in parts.tensors_of(leaf) if leaf.shareable else ():
            name = path[len(leaf.path) :]
            found = [
                _ordered(parts, member, order, f"{member.leaves[position].path}{name}")
                for member, order in zip(members, orders, strict=True)
            ]
            values[path] = torch.stack(found).mean(0)
    return Merge(tuple(members), first, values, orders)


def _ordered(parts: Parts, mlp: MLP, order: torch.Tensor | None, path: str) -> torch.Tensor:
    """A tensor of an MLP with its units in an order."""
    value = parts.tensor(path).detach()
    for axis in mlp.axes if order is not None else ():
        if axis.tensor == path and order is not None:
            index = torch.cat([order + offset for offset in axis.offsets])
            value = value.index_select(axis.dim, index.to(value.device))
    return value


def _matching(parts: Parts, first: MLP, member: MLP, keep: str) -> torch.Tensor:
    """Units of `member` in the order in which each comes closest to its unit of `first`, as a linear assignment."""
    from scipy import optimize

    if keep == "align_activations":
        gain = parts.correlations(first, member)
    else:
        gain = unit_weights(first, parts.tensor) @ unit_weights(member, parts.tensor).T
    if not gain.isfinite().all():
        raise ReductionError(f"keep={keep!r}: the weights of {first.name} or {member.name} are not finite")
    return torch.from_numpy(optimize.linear_sum_assignment(gain.cpu().numpy(), maximize=True)[1])
