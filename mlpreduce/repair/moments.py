"""The repair of every MLP by itself, of plans that slice alone, from second moments that were measured once.

What `repair_alone` adds up for a reduced MLP are parts of the moments of the whole one: its inputs are some of the hidden
units, and what it lacks is what the others gave.
"""

from __future__ import annotations

import torch

from mlpreduce.criteria import Moments
from mlpreduce.repair.fit import Fit

__all__ = ["fill"]


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
