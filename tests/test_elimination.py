"""The exact removal order of inputs of a linear layer, against brute force and least squares."""

from __future__ import annotations

import itertools

import pytest
import torch

from mlpreduce.criteria.elimination import eliminate, swapped
from mlpreduce.errors import ReductionError


def rows(count: int, size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.randn(count, size, generator=generator, dtype=torch.float64) @ mixed


def least(weight: torch.Tensor, a: torch.Tensor, ridge: float, kept: list[int]) -> float:
    """The least sum of |(W' - W) a|^2 + ridge |W' - W|^2 with these inputs, by lstsq on the rows and sqrt(ridge) I."""
    size = weight.shape[1]
    every = torch.cat([a, ridge**0.5 * torch.eye(size, dtype=torch.float64)])
    wanted = every @ weight.T
    if not kept:
        return float(wanted.square().sum())
    found = torch.linalg.lstsq(every[:, kept], wanted, driver="gelsd").solution
    return float((every[:, kept] @ found - wanted).square().sum())


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("groups", [1, 2])
def test_each_removal_is_the_least_of_all(ridge: float, groups: int) -> None:
    size, weight, a = 10, torch.randn(4, 10, dtype=torch.float64), rows(50, 10)
    found = eliminate(weight, a.T @ a, ridge, groups=groups)
    kept, gone, error = list(range(size)), set[int](), 0.0
    for j, added in zip(found.removed.tolist(), found.errors.tolist(), strict=True):
        open_ones = [i for i in kept if i * groups // size not in gone]
        each = {i: least(weight, a, ridge, [k for k in kept if k != i]) for i in open_ones}
        assert j == min(each, key=lambda i: each[i])
        assert added == pytest.approx(each[j] - error, rel=1e-8, abs=1e-8 * each[j])
        error = each[j]
        kept.remove(j)
        gone.add(j * groups // size)
        gone = set() if len(gone) == groups else gone
    assert not kept


@pytest.mark.parametrize("size", [60, 130])  # more than one panel
def test_the_sum_of_errors_is_that_of_least_squares(size: int) -> None:
    weight, a = torch.randn(20, size, dtype=torch.float64), rows(300, size)
    ridge = 1e-2 * float(a.square().sum(0).mean())
    found = eliminate(weight, a.T @ a, ridge)
    for width in (size - 1, size // 2, size // 10):
        gone = size - width
        kept = found.order[:width].tolist()
        assert float(found.errors[:gone].sum()) == pytest.approx(least(weight, a, ridge, kept), rel=1e-8)


def test_what_does_not_matter_goes_first() -> None:
    weight, a = torch.randn(6, 8, dtype=torch.float64), rows(40, 8)
    weight[:, 5] = 0
    found = eliminate(weight, a.T @ a, 1e-3)
    assert int(found.removed[0]) == 5
    assert float(found.errors[0]) == 0
    a[:, 2] = a[:, 6]  # a copy
    found = eliminate(torch.randn(6, 8, dtype=torch.float64), a.T @ a, 1e-9 * float(a.square().sum()))
    assert int(found.removed[0]) in (2, 6)
    assert float(found.errors[0]) < 1e-6 * float(found.errors.sum())


def test_outputs_may_be_turned() -> None:
    weight, a = torch.randn(7, 12, dtype=torch.float64), rows(60, 12)
    turn = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64)).Q
    one, other = (eliminate(w, a.T @ a, 0.1) for w in (weight, turn @ weight))
    assert torch.equal(one.removed, other.removed)
    torch.testing.assert_close(one.errors, other.errors)


def test_scores_fall_along_the_order_and_are_nowhere_above_the_errors() -> None:
    weight, a = torch.randn(5, 40, dtype=torch.float64), rows(45, 40)
    found = eliminate(weight, a.T @ a, 1e-3)
    along = found.scores[found.removed]
    assert (along.diff() >= 0).all()
    assert not torch.equal(along, found.errors)  # else the test shows nothing
    sums, errors = along.cumsum(0), found.errors.cumsum(0)
    assert (sums <= errors * (1 + 1e-9)).all()
    torch.testing.assert_close(sums[-1], errors[-1])


def test_swaps_find_the_best_pair_of_exchanges() -> None:
    weight, a = torch.randn(3, 8, dtype=torch.float64), rows(30, 8, seed=3)
    square, ridge = a.T @ a, 0.2
    for kept in ([0, 1, 2], [5, 6, 7], [1, 4, 6]):
        best = min(
            least(weight, a, ridge, sorted({*kept} - {j} | {i}))
            for j, i in itertools.product(kept, set(range(8)) - {*kept})
        )
        start = least(weight, a, ridge, kept)
        _, before, after = swapped(weight, square, ridge, kept, 1)
        assert before == pytest.approx(start, rel=1e-8)
        assert after == pytest.approx(min(best, start), rel=1e-8)
    kept, _, after = swapped(weight, square, ridge, [0, 1, 2], 100)
    assert after == pytest.approx(least(weight, a, ridge, kept), rel=1e-8)
    for j, i in itertools.product(kept, set(range(8)) - {*kept}):  # none is left that would lower it
        assert least(weight, a, ridge, sorted({*kept} - {j} | {i})) >= after * (1 - 1e-9)


def test_singular_moments_are_told() -> None:
    a = rows(5, 8)
    with pytest.raises(ReductionError, match="second moments of 8 hidden units have no inverse with a ridge of 0"):
        eliminate(torch.randn(3, 8), a.T @ a, 0.0)
