"""Backward elimination with exact updates: the order in which inputs of a linear layer are missed least, and by how much.

For a layer W (outputs x inputs) that is given a, with C the sum of a a^T over all rows, taking inputs away and refitting the
weights of the others raises

    sum |(W' - W) a|^2 + ridge |W' - W|^2

the least where the input with the smallest e_j = |W_:j|^2 / P_jj goes, P = (C + ridge I)^-1. Then W <- W - W_:j P_j: / P_jj and
P <- P - P_:j P_j: / P_jj, and the next e are of the updated W and P. The sum of e is the raised error of each width, exactly.

Source: the optimal brain surgeon (Hassibi and Stork, 1993) for columns, as ZipLM (arXiv 2302.04089) prunes transformers by it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mlpreduce.errors import ReductionError

__all__ = ["Elimination", "eliminate", "refit_errors", "swapped"]

_PANEL = 48  # removals that are kept as columns before P and W are updated by them


@dataclass(frozen=True)
class Elimination:
    """Inputs by importance.

    Attributes:
        removed: all inputs, the one that goes first first; (inputs,).
        errors: what each removal adds to the error, in that order; (inputs,), float64.
    """

    removed: torch.Tensor
    errors: torch.Tensor

    @property
    def order(self) -> torch.Tensor:
        """The inputs, the most important first."""
        return self.removed.flip(0)

    @property
    def scores(self) -> torch.Tensor:
        """A score of each input that never rises along `removed` backwards, and whose sums are the errors where they can be.

        Single removals may cost less than those before them, as where one of two inputs that are needed together has gone. Such
        ones share what they cost together, so that sums of scores are the greatest convex errors that are nowhere above the
        true ones.
        """
        blocks: list[list[float]] = []  # sum, number
        for error in self.errors.tolist():
            blocks.append([error, 1])
            while len(blocks) > 1 and blocks[-2][0] * blocks[-1][1] >= blocks[-1][0] * blocks[-2][1]:
                total, number = blocks.pop()
                blocks[-1][0] += total
                blocks[-1][1] += number
        shared = [total / number for total, number in blocks for _ in range(int(number))]
        scores = torch.empty_like(self.errors)
        scores[self.removed] = self.errors.new_tensor(shared)
        return scores


def eliminate(
    weight: torch.Tensor, square: torch.Tensor, ridge: float, *, groups: int = 1, least: int = 0
) -> Elimination:
    """Take inputs away one by one, each time the one that is missed least.

    Args:
        weight: (outputs, inputs). To weigh outputs by a positive semidefinite G, give R W with R^T R = G.
        square: sums of a a^T, (inputs, inputs); centred where a bias takes up the means.
        ridge: added to the diagonal of `square`; above 0 where that is singular.
        groups: equal parts that the inputs come in, one after the other; as many of each go.
        least: inputs that need no order: with so many left it ends, and they come last as they lie.

    Returns:
        The order, and the error that each removal adds.

    Raises:
        ReductionError: `square` with the ridge has no inverse.
    """
    size = len(square)
    w, inverse = weight.double().clone(), _inverse(square.double(), ridge)
    alive = torch.arange(size, device=square.device)  # which input each column of w and row of `inverse` is of
    removed: list[int] = []
    errors: list[float] = []
    of_group = torch.arange(size, device=square.device) // (size // groups)
    gone = torch.zeros(groups, dtype=torch.bool, device=square.device)  # of this round
    while len(removed) < size - least:
        steps = min(_PANEL, size - least - len(removed))
        picked, costs = _panel(w, inverse, steps, of_group[alive], gone)
        removed += alive[picked].tolist()
        errors += costs
        stays = torch.ones(len(alive), dtype=torch.bool, device=alive.device)
        stays[picked] = False
        alive, w, inverse = alive[stays], w[:, stays], inverse[stays][:, stays]
    rest = alive.flip(0).tolist()
    return Elimination(
        torch.tensor([*removed, *rest], device=square.device),
        torch.tensor([*errors, *[float("inf")] * len(rest)], dtype=torch.float64, device=square.device),
    )


def _inverse(square: torch.Tensor, ridge: float) -> torch.Tensor:
    ridged = square.clone()
    ridged.diagonal().add_(ridge)
    factor, info = torch.linalg.cholesky_ex(ridged)
    if int(info) or not factor.isfinite().all():
        raise ReductionError(
            f"the second moments of {len(square)} hidden units have no inverse with a ridge of {ridge:.3g}: there are fewer "
            f"rows than units, or units that never change; give more data, or a ridge"
        )
    return torch.cholesky_inverse(factor)


def _panel(
    w: torch.Tensor, inverse: torch.Tensor, steps: int, of_group: torch.Tensor, gone: torch.Tensor
) -> tuple[list[int], list[float]]:
    """So many removals; `w` and `inverse` are brought up to date in place, `gone` is that of the last round.

    Within a panel P stays as it was, and P - U U^T is meant; likewise W - V U^T. Only the column that goes is computed.
    """
    size, groups = inverse.shape[0], len(gone)
    u = w.new_zeros(size, steps)
    v = w.new_zeros(len(w), steps)
    norms, diagonal = w.square().sum(0), inverse.diagonal().clone()
    blocked = torch.zeros(size, dtype=torch.bool, device=w.device)
    picked: list[int] = []
    costs: list[float] = []
    for step in range(steps):
        errors = norms / diagonal
        errors[blocked] = torch.inf
        if groups > 1:
            errors[gone[of_group]] = torch.inf
        j = int(errors.argmin())
        before = u[:, :step]
        column = inverse[:, j] - before @ before[j]
        own = w[:, j] - v[:, :step] @ before[j]
        pivot = float(column[j])
        along = own @ w - (own @ v[:, :step]) @ before.T  # products of the column that goes with all of them
        share = column / pivot
        norms = (norms - 2 * along * share + (own @ own) * share.square()).clamp(min=0)
        u[:, step] = column / pivot**0.5
        v[:, step] = own / pivot**0.5
        diagonal = diagonal - u[:, step].square()
        blocked[j] = True
        picked.append(j)
        costs.append(float(own @ own) / pivot)
        if groups > 1:
            gone[of_group[j]] = True
            if gone.all():
                gone[:] = False
    inverse.addmm_(u, u.T, alpha=-1)
    w.addmm_(v, u.T, alpha=-1)
    return picked, costs


def swapped(
    weight: torch.Tensor, square: torch.Tensor, ridge: float, kept: Sequence[int], most: int, *, groups: int = 1
) -> tuple[list[int], float, float]:
    """Exchange a kept input for one that went, as long as that lowers the error, at most so many times.

    Args:
        weight: as `eliminate`.
        square: as `eliminate`.
        ridge: as `eliminate`.
        kept: the inputs that are kept.
        most: exchanges.
        groups: as `eliminate`; an input is exchanged for one of its group.

    Returns:
        The inputs kept, sorted, and the error before and after.
    """
    w, ridged = weight.double(), square.double().clone()
    ridged.diagonal().add_(ridge)
    wanted, whole = w @ ridged, float((w @ ridged * w).sum())
    inside = list(kept)
    first = error = _error(wanted, ridged, whole, inside)
    for _ in range(most):
        some = torch.tensor(inside, device=w.device)
        out = torch.ones(len(ridged), dtype=torch.bool, device=w.device)
        out[some] = False
        others = out.nonzero().flatten()
        if not len(others):
            break
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(ridged[some][:, some]))
        fitted = wanted[:, some] @ inverse
        cost = fitted.square().sum(0) / inverse.diagonal()  # of taking one away
        cross = inverse @ ridged[some][:, others]
        left = ridged.diagonal()[others] - (ridged[others][:, some] * cross.T).sum(
            1
        )  # of each other, beyond what is kept
        missing = wanted[:, others] - fitted @ ridged[some][:, others]
        # Taking j away changes what each other would bring: both by rank one.
        alone = fitted.T @ missing  # (kept, others)
        share = cross / inverse.diagonal()[:, None]
        gained = missing.square().sum(0) + 2 * share * alone + share.square() * fitted.square().sum(0)[:, None]
        beyond = left + share * cross
        change = cost[:, None] - gained / beyond
        size = len(ridged) // groups
        change[(some // size)[:, None] != (others // size)[None]] = torch.inf
        best = int(change.argmin())
        j, i = divmod(best, len(others))
        trial = [*inside[:j], *inside[j + 1 :], int(others[i])]
        after = _error(wanted, ridged, whole, trial)
        if after >= error * (1 - 1e-12):
            break
        inside, error = trial, after
    return sorted(inside), first, error


def _error(wanted: torch.Tensor, ridged: torch.Tensor, whole: float, kept: Sequence[int]) -> float:
    """The least error with these inputs."""
    some = torch.tensor(list(kept), device=ridged.device)
    if not len(some):
        return whole
    fitted = torch.cholesky_solve(wanted[:, some].T, torch.linalg.cholesky(ridged[some][:, some])).T
    return whole - float((fitted * wanted[:, some]).sum())


def refit_errors(
    weight: torch.Tensor, square: torch.Tensor, ridges: Sequence[float], kept: torch.Tensor, other: torch.Tensor
) -> list[float]:
    """The squared errors on other second moments, of refits on these with some of the inputs.

    Args:
        weight: as `eliminate`.
        square: as `eliminate`.
        ridges: as `eliminate`, one of each refit.
        kept: the inputs.
        other: second moments by which the refits are judged; the error is infinite where there is no refit.
    """
    weight, square, other = weight.double(), square.double(), other.double()
    gone = torch.ones(len(square), dtype=torch.bool, device=square.device)
    gone[kept] = False
    inner, cross = square[kept][:, kept], weight @ square[:, kept]
    lost = weight[:, gone]
    rest, between = float((lost @ other[gone][:, gone] * lost).sum()), lost @ other[gone][:, kept]
    seen, found = other[kept][:, kept], []
    for ridge in ridges:
        ridged = inner.clone()
        ridged.diagonal().add_(ridge)
        factor, info = torch.linalg.cholesky_ex(ridged)
        change = torch.cholesky_solve((cross + ridge * weight[:, kept]).T, factor).T - weight[:, kept]
        error = float((change @ seen * change).sum() - 2 * (change * between).sum()) + rest
        found.append(math.inf if int(info) else error)
    return found
