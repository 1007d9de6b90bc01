"""The repair of every MLP by itself, of plans that slice alone, from second moments that were measured once.

What `repair_alone` adds up for a reduced MLP are parts of the moments of the whole one: its inputs are some of the hidden
units, and what it lacks is what the others gave.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from mlpreduce.criteria import Moments
from mlpreduce.graph import MLP
from mlpreduce.repair.fit import Fit, chosen, empty_fit, fitted

__all__ = ["Refits"]


class Refits:
    """Values of fc2 of MLPs with some of their units, each refitted once.

    Args:
        moments: of an MLP, with pairs.

    Attributes:
        near: whether an MLP takes the ridge of the nearest width that was fitted before, which spares all but one solution.
    """

    def __init__(self, moments: Callable[[MLP], Moments]) -> None:
        self._moments, self.near = moments, False
        self._known: dict[tuple[str, tuple[int, ...]], dict[str, torch.Tensor]] = {}
        self._ridges: dict[str, dict[int, float]] = {}

    def of(self, mlp: MLP, units: Sequence[int], reduced: Callable[[], nn.Module]) -> Mapping[str, torch.Tensor]:
        """The values, by tensor path; none where those that there are do as well.

        Args:
            mlp: the MLP.
            units: that stay.
            reduced: makes the reduced model; called only for units that were not asked for before.

        Raises:
            ReductionError: the layer cannot be refitted, or there are no moments of pairs.
        """
        key, ridges = (mlp.name, tuple(units)), self._ridges.setdefault(mlp.name, {})
        if key not in self._known:
            fit, seen = empty_fit(reduced(), mlp.leaf("fc2").path), self._moments(mlp)
            kept = torch.tensor(units, device=seen.weight.device)
            fill(fit, seen, kept)
            if self.near and ridges:
                self._known[key] = fitted(fit, ridges[min(ridges, key=lambda width: abs(width - len(units)))])
            else:
                ridge, gain = chosen(fit)
                self._known[key] = fitted(fit, ridge) if gain > 0 else {}
                ridges[len(units)] = ridge
        return self._known[key]


def fill(fit: Fit, seen: Moments, kept: torch.Tensor) -> None:
    """Fill the sums of an fc2 that keeps some of its inputs. Those of what is wanted stay 0: they only tell how good a fit is.

    Args:
        fit: of the layer that is left, without sums.
        seen: moments of the whole MLP, with pairs.
        kept: the hidden units that are left, in their order.

    Raises:
        ReductionError: there are no moments of pairs.
    """
    gone = torch.ones(seen.weight.shape[1], dtype=torch.bool, device=seen.weight.device)
    gone[kept] = False
    lost = seen.weight[:, gone]
    for half in range(2):
        rows, total = seen.rows[half], seen.total[half]
        pairs = seen.products(centred=False, half=half) * rows
        square, cross = fit.square[half], fit.cross[half]
        square[:-1, :-1] = pairs[kept][:, kept]
        square[:-1, -1] = square[-1, :-1] = total[kept]
        square[-1, -1] = rows
        cross[:, :-1] = lost @ pairs[gone][:, kept]
        cross[:, -1] = lost @ total[gone]
