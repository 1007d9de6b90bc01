"""`gram_schmidt`: the units whose fc1 rows span the most.

Source: DGMR ("Diversity-Guided MLP Reduction for Efficient Large Vision Transformers", arXiv 2506.08591). A round takes the
row of the largest norm, takes its direction out of all rows, and goes on with what is left of them; after as many units as
rows have values, nothing is left, and the next round starts from the raw rows of the units not yet taken. A round is QR with
column pivoting of the transposed fc1.weight, and gives LAPACK's order.

What is left of a row only gets shorter. So a block of picks is sought among the rows that were the longest, by Cholesky
decomposition of their Gram matrix with pivots, as long as the best of them is longer than any other row was; then the block's
directions are taken out of all norms by one product of matrices, which may be inexact, as it gives but bounds.
"""

from __future__ import annotations

import numpy as np
import torch

from mlpreduce.criteria import HiddenUnits, register_criterion
from mlpreduce.errors import ReductionError, did_you_mean

SOURCES = {
    "fc1": ("fc1.weight",),
    "fc1+bias": ("fc1.weight", "fc1.bias"),
    "fc1+fc2": ("fc1.weight", "fc1.bias", "fc2.weight"),
}
_ROWS = 1024  # converted to float64 at a time
_TIE = 1 - 1e-12  # norms no further apart are equal: none is sought again
_DIGITS = 1e-6  # of a squared norm; less than that of it is not taken from differences


@register_criterion("gram_schmidt")
def gram_schmidt(units: HiddenUnits, *, source: str = "fc1") -> torch.Tensor:
    """Greedy choice of the most diverse units, round by round, in float64.

    Rows that are nothing but combinations of those taken end a round early, and the next one has them again; the released
    code goes on with the noise that rounding leaves of them. Where norms are equal, the lower index goes first.

    Args:
        units: the units.
        source: `fc1` (rows of fc1.weight, as released), `fc1+bias`, or `fc1+fc2`, which also has the fc2 column. The rows of
            a gated MLP have both its halves.
    """
    if source not in SOURCES:
        raise ReductionError(f"criterion gram_schmidt: source is {source!r}{did_you_mean(str(source), SOURCES)}")
    rows = units.weights(*SOURCES[source])
    if not rows.isfinite().all():
        raise ReductionError(f"criterion gram_schmidt: the weights of {units.mlp.name} are not all finite")
    return torch.tensor(pivots(rows, units.wanted), device="cpu")


def pivots(rows: torch.Tensor, wanted: int | None = None) -> list[int]:
    """The order in which rows `(units, values)` are taken.

    Args:
        rows: the matrix; not changed.
        wanted: how many picks matter; the others follow by index. All by default.

    Example:
        >>> pivots(torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.9, 0.5]]))
        [1, 2, 0]
    """
    wanted = len(rows) if wanted is None else min(wanted, len(rows))
    order: list[int] = []
    left = torch.arange(len(rows), device=rows.device)
    while len(order) < wanted:
        picked = _round(rows[left] if order else rows, wanted - len(order))
        if not picked:  # zeros only
            break
        order += left[picked].tolist()
        stays = torch.ones_like(left, dtype=torch.bool)
        stays[picked] = False
        left = left[stays]
    return order + left.tolist()


def _round(rows: torch.Tensor, wanted: int) -> list[int]:
    """Picks of one round: at most as many as rows have values. Norms are squared."""
    values = rows.shape[1]
    basis = rows.new_empty(min(values, len(rows), wanted), values, dtype=torch.float64)  # orthonormal rows
    whole = torch.cat([part.double().square().sum(1) for part in rows.split(_ROWS)])
    nothing = float(whole.max()) * (values * torch.finfo(torch.float64).eps) ** 2
    slack = 8 * values * torch.finfo(rows.dtype).eps  # of what a product of matrices gives
    bounds, count = whole.clone(), max(64, len(rows) // 48)
    picked: list[int] = []
    while len(picked) < len(basis) and bounds.max() > nothing:
        best = torch.sort(bounds, descending=True, stable=True).indices
        bound = float(bounds[best[count]]) if len(best) > count else 0.0
        places = best[:count].sort().values
        known = basis[: len(picked)]
        rest = _without(rows[places].double(), known)
        taken, lengths = _cholesky((rest @ rest.T).cpu().numpy(), bound, nothing, len(basis) - len(picked))
        picks = places[taken]
        new, _ = torch.linalg.qr(_without(rest[taken], known).T)  # once more, as one pass leaves some
        basis[len(picked) : len(picked) + len(taken)] = new.T
        picked += picks.tolist()
        gone = (rows @ new.to(rows.dtype)).square_().sum(1).double()
        bounds -= gone - slack * gone.sqrt() * whole.sqrt()
        bounds[places] = torch.from_numpy(lengths).to(bounds)  # of these it is known
        bounds[picks] = -torch.inf
    return picked


def _cholesky(gram: np.ndarray, bound: float, nothing: float, most: int) -> tuple[list[int], np.ndarray]:
    """Pivots of a Gram matrix as long as none can lie outside, and what is left of the squared norms then.

    It ends where no pivot is as long as `bound` or longer than `nothing`, where digits get few, or after `most`; the first
    pivot may already be too short, as bounds of rows outside are.
    """
    left, start = np.diagonal(gram).copy(), np.diagonal(gram)
    factor = np.empty((min(most, len(gram)), len(gram)))
    taken: list[int] = []
    for count, row in enumerate(factor):
        pivot = int(left.argmax())
        if left[pivot] <= nothing or left[pivot] < max(bound * _TIE, _DIGITS * start[pivot]):
            break
        np.subtract(gram[pivot], factor[:count, pivot] @ factor[:count], out=row)
        row /= np.sqrt(left[pivot])
        left -= row * row
        left[pivot] = -np.inf
        taken.append(pivot)
    return taken, np.maximum(left, 0.0)


def _without(rows: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """What is left of rows without their part in the span of orthonormal `basis` rows."""
    return torch.addmm(rows, rows @ basis.T, basis, alpha=-1)
