"""`gram_schmidt`: the units whose fc1 rows span the most.

Source: DGMR ("Diversity-Guided MLP Reduction for Efficient Large Vision Transformers", arXiv 2506.08591). A round takes the
row of the largest norm, takes its direction out of all rows, and goes on with what is left of them; after as many units as
rows have values, nothing is left, and the next round starts from the raw rows of the units not yet taken. A round is QR with
column pivoting of the transposed fc1.weight, so LAPACK does it.
"""

from __future__ import annotations

import numpy as np
import torch

from mlpreduce.criteria import HiddenUnits, register_criterion
from mlpreduce.errors import ReductionError, check_one_of

SOURCES = {
    "fc1": ("fc1.weight",),
    "fc1+bias": ("fc1.weight", "fc1.bias"),
    "fc1+fc2": ("fc1.weight", "fc1.bias", "fc2.weight"),
}
DTYPES = ("float32", "float64")


@register_criterion("gram_schmidt")
def gram_schmidt(units: HiddenUnits, *, source: str = "fc1", dtype: str | None = None) -> torch.Tensor:
    """Greedy choice of the most diverse units, round by round.

    Rows that are nothing but combinations of those taken end a round early, and the next one has them again; the released
    code goes on with the noise that rounding leaves of them.

    Args:
        units: the units.
        source: `fc1` (rows of fc1.weight, as released), `fc1+bias`, or `fc1+fc2`, which also has the fc2 column. The rows of
            a gated MLP have both its halves.
        dtype: `float32` or `float64`; that of the weights by default. In float32 two rows of nearly the same length may be
            taken the other way round on another processor, and other rows from there on; float64 takes twice the memory.
    """
    check_one_of("criterion gram_schmidt: source", source, SOURCES)
    if dtype is not None:
        check_one_of("criterion gram_schmidt: dtype", dtype, DTYPES)
    rows = units.weights(*SOURCES[source])
    if not rows.isfinite().all():
        raise ReductionError(f"criterion gram_schmidt: the weights of {units.mlp.name} are not all finite")
    return torch.tensor(pivots(rows, units.wanted, dtype), device="cpu")


def pivots(rows: torch.Tensor, wanted: int | None = None, dtype: str | None = None) -> list[int]:
    """The order in which rows `(units, values)` are taken.

    Args:
        rows: the matrix; not changed.
        wanted: how many picks matter; the others follow by index. All by default.
        dtype: in which to work; that of `rows` by default.

    Example:
        >>> pivots(torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.9, 0.5]]))
        [1, 2, 0]
    """
    matrix = rows.detach().cpu().numpy()
    wanted = len(matrix) if wanted is None else min(wanted, len(matrix))
    order: list[int] = []
    left = np.arange(len(matrix))
    while len(order) < wanted:
        rest = matrix[left] if order else matrix
        picked = _round(np.array(rest, dtype=dtype, order="C"))
        if not len(picked):  # zeros only
            break
        order += left[picked].tolist()
        left = np.delete(left, picked)
    return order + left.tolist()


def _round(rows: np.ndarray) -> np.ndarray:
    """Picks of one round: as many as rows have values, or as their rank. Overwrites `rows`, for want of memory."""
    from scipy.linalg import lapack

    geqp3 = lapack.get_lapack_funcs(("geqp3",), (rows,))[0]
    size = int(geqp3(rows.T, lwork=-1, overwrite_a=True)[3][0])  # of the workspace with which it works in blocks
    factored, picks, *_ = geqp3(rows.T, lwork=size, overwrite_a=True)
    lengths = np.abs(np.diagonal(factored))  # of what was left of each pick when it was picked
    rank = np.count_nonzero(lengths > lengths[0] * rows.shape[1] * np.finfo(rows.dtype).eps)
    picked: np.ndarray = picks[:rank] - 1
    return picked
