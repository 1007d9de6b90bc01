"""What criteria are given of hidden units, and what they may answer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlpreduce.errors import ReductionError, did_you_mean

if TYPE_CHECKING:
    import torch

    from mlpreduce.graph import MLP

__all__ = ["SITES", "HiddenUnits", "Moments", "Ranking", "Seen", "as_order", "derived_seed", "unit_weights"]

# where a unit is looked at, and the leaves at which that is: what comes out of fc1, or goes into fc2
SITES = {"fc1": ("fc1",), "act": ("fc2",), "fc2": ("fc2",), "both": ("fc1", "fc2")}
UNIT_WEIGHTS = ("fc1.weight", "fc1.bias", "fc2.weight")


@dataclass(frozen=True)
class HiddenUnits:
    """The hidden units of one MLP.

    Attributes:
        mlp: the MLP.
        tensor: gives the values of a parameter or buffer by its path.
        seed: for random choices; another one for each MLP.
        wanted: how many units of the order matter.
    """

    mlp: MLP
    tensor: Callable[[str], torch.Tensor]
    seed: int = 0
    wanted: int | None = None

    def __len__(self) -> int:
        return self.mlp.hidden_features

    def weights(self, *names: str) -> torch.Tensor:
        """What each unit is made of: see `unit_weights`."""
        return unit_weights(self.mlp, self.tensor, names or UNIT_WEIGHTS)


@dataclass(frozen=True)
class Seen:
    """What the hidden units of one MLP did for a few examples; of a tied MLP, in all its uses.

    Attributes:
        hidden: what fc2 was given, (examples, positions, hidden units); None unless images alone are needed.
        change: at each site, (examples, hidden units): the derivative of an example's loss by a factor on all a unit puts
            out there. By Euler's identity it is the sum over positions of z dL/dz at `fc1`, which equals the sum of w dL/dw
            over the unit's fc1 row and bias, and the sum of a dL/da at `fc2`, which equals that over its fc2 column.
        bend: at each site, an estimate of the second derivative by that factor, if the criterion asks for probes.
    """

    hidden: torch.Tensor | None
    change: Mapping[str, torch.Tensor]
    bend: Mapping[str, torch.Tensor]

    @property
    def activations(self) -> torch.Tensor:
        """What fc2 was given.

        Raises:
            ReductionError: the criterion was registered for something else.
        """
        if self.hidden is None:
            raise ReductionError('the activations were not kept; register the criterion with needs="images"')
        return self.hidden

    def at(self, site: str) -> torch.Tensor:
        """The change at `fc1`, `act` or `fc2`, or the sum over `both`: that over all weights of a unit."""
        return sum(self.change[leaf] for leaf in SITES[site])  # type: ignore[return-value]


@dataclass(frozen=True)
class Ranking:
    """Units in an order, with scores that do not rise along it and may be equal.

    Attributes:
        order: (hidden units,) whole numbers, the most important first.
        scores: (hidden units,) in floating point, which can be compared between MLPs.
        refine: makes a better choice of the units that an order keeps at a width that is final, as many of each group; None if
            the order is all there is. Such choices are not nested.
    """

    order: torch.Tensor
    scores: torch.Tensor
    refine: Callable[[list[int]], list[int]] | None = None


@dataclass(frozen=True)
class Moments:
    """What fc2 of one MLP is given over all calibration data, all positions and, of a tied MLP, all uses; in float64.

    Attributes:
        units: the hidden units.
        weight: fc2's, (outputs, hidden units).
        rows: positions in each half of the examples, (2,).
        total: sums of a in each half, (2, hidden units).
        squares: sums of a^2, (2, hidden units).
        pairs: sums of a a^T, (2, hidden units, hidden units), if the criterion needs pairs.
        wanted: the mean over the examples of sums of g g^T, (outputs, outputs), g the gradient of an example's loss by what fc2
            gives at a position, if it looks at a loss.
        folded: whether a repair follows and fc2 has a bias, which then takes up the means of the units that go.
    """

    units: HiddenUnits
    weight: torch.Tensor
    rows: torch.Tensor
    total: torch.Tensor
    squares: torch.Tensor
    pairs: torch.Tensor | None = None
    wanted: torch.Tensor | None = None
    folded: bool = False

    def mean_square(self, *, centred: bool) -> torch.Tensor:
        """Of each unit over all positions; about its mean where centred."""
        found = self.squares.sum(0) / self.rows.sum()
        if centred:
            found = found - (self.total.sum(0) / self.rows.sum()).square()
        return found.clamp(min=0)

    def products(self, *, centred: bool, half: int | None = None) -> torch.Tensor:
        """Means of a a^T, (hidden units, hidden units), of all or of one half; of a without its mean where centred.

        Raises:
            ReductionError: the criterion is not registered with needs="pairs".
        """
        if self.pairs is None:
            raise ReductionError('pairs of units were not looked at; register the criterion with needs="pairs"')
        some = slice(None) if half is None else slice(half, half + 1)
        rows = self.rows[some].sum()
        found = self.pairs[some].sum(0) / rows
        if centred:
            mean = self.total[some].sum(0) / rows
            found = found - mean.outer(mean)
        return found


def derived_seed(seed: int, name: str) -> int:
    """A seed for one of several random choices that are to have nothing in common, whatever the seed they follow from."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ReductionError(f"seed is {seed!r}; it must be a whole number")
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7])


def as_order(answer: torch.Tensor | Ranking) -> list[int]:
    """Units by importance from what a criterion returns; where scores are equal, the lower index first."""
    import torch

    if isinstance(answer, Ranking):
        answer = answer.order
    if answer.is_floating_point():
        answer = torch.sort(answer, descending=True, stable=True).indices
    order: list[int] = answer.tolist()
    return order


def unit_weights(mlp: MLP, tensor: Callable[[str], torch.Tensor], names: Sequence[str] = UNIT_WEIGHTS) -> torch.Tensor:
    """What each hidden unit is made of: fc1 rows (both halves of a gate), biases, fc2 columns, in float32 or wider.

    What lies between fc1 and fc2, norms and convolutions, is of another scale and counts only if it is named.

    Args:
        mlp: the MLP.
        tensor: gives the values of a tensor by its path.
        names: such as "fc1.weight" or "norm.weight". Those that the MLP lacks are left out.

    Returns:
        A matrix (hidden units, values).

    Raises:
        ReductionError: the MLP has none of them.
    """
    import torch

    roles = {leaf.path: leaf.role for leaf in mlp.leaves}
    calls = {leaf.path: leaf.call for leaf in mlp.leaves}  # the layer around it, if there is one
    parts = []
    known = []
    for axis in mlp.axes:
        path, _, name = axis.tensor.rpartition(".")
        if roles.get(path) in ("fc1", "fc2") and name not in ("weight", "bias"):
            name = "weight"  # of a layer that is a product of factors
        known.append(f"{roles.get(path)}.{name}")
        if known[-1] not in names:
            continue
        values = tensor(f"{calls.get(path, path)}.{name}").detach()
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        if axis.groups > 1 and values.shape[axis.dim] == axis.size:  # inputs of a grouped convolution, not yet dense
            values = values.unflatten(0, (axis.groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)
        else:
            values = values.movedim(axis.dim, 0).reshape(values.shape[axis.dim], -1)
        parts += [values[offset : offset + mlp.hidden_features] for offset in axis.offsets]
    if not parts:
        near = did_you_mean(str(names[0]) if names else "", known)
        raise ReductionError(
            f"{mlp.name} has none of {', '.join(map(str, names)) or 'no names'} on its hidden axis{near}"
        )
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
