"""`gram_schmidt` against LAPACK's QR with column pivoting, and what must hold of its order."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import pytest
import torch
from scipy import linalg

import mlpreduce
from mlpreduce import ReductionError
from mlpreduce.criteria.gram_schmidt import pivots
from mlpreduce.edits import Slice
from mlpreduce.testing import tiny_vit


def lapack(rows: torch.Tensor) -> list[int]:
    """Round by round, QR with column pivoting of the transposed rows that are left, in their type."""
    matrix, order, left = rows.numpy(), [], list(range(len(rows)))
    while left:
        picks = linalg.qr(matrix[left].T, mode="r", pivoting=True)[1][: rows.shape[1]]
        order += [left[pick] for pick in picks]
        left = [unit for unit in left if unit not in order]
    return order


def published(rows: torch.Tensor, wanted: int) -> list[int]:
    """One round of the loop as METHODS describes it."""
    rest, order = rows.double(), []
    for _ in range(wanted):
        pick = int(rest.norm(dim=1).argmax())
        direction = rest[pick] / rest[pick].norm()
        order.append(pick)
        rest = rest - torch.outer(rest @ direction, direction)
    return order


def tracemalloc_peak(run: Callable[[], object]) -> int:
    """Bytes that numpy held at most."""
    tracemalloc.start()
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def random_rows(units: int, values: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(units, values, dtype=dtype, generator=generator)
    return rows * (3 * torch.rand(units, 1, dtype=dtype, generator=generator)).exp()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("units", "values"), [(192, 48), (300, 64), (1000, 100), (64, 64), (20, 64), (700, 3), (5, 1)])
def test_equals_lapack_round_by_round(units: int, values: int, dtype: torch.dtype) -> None:
    for seed in range(3):
        rows = random_rows(units, values, seed, dtype)
        assert pivots(rows) == lapack(rows)
        assert pivots(rows, dtype="float64") == lapack(rows.double())


def test_equals_the_published_loop() -> None:
    rows = random_rows(256, 64, 0)
    assert pivots(rows)[:64] == published(rows, 64)


def test_at_the_size_of_vit_base() -> None:
    rows = 0.02 * torch.randn(3072, 768)
    first = pivots(rows, 768)[:768]
    assert first == linalg.qr(rows.numpy().T, mode="r", pivoting=True)[1][:768].tolist()
    wide = pivots(rows, 768, "float64")[:768]
    assert wide == linalg.qr(rows.double().numpy().T, mode="r", pivoting=True)[1][:768].tolist()
    assert int(torch.linalg.matrix_rank(rows[first].double())) == 768


def test_what_must_hold_of_the_order() -> None:
    rows = random_rows(160, 32, 5)
    order = pivots(rows)
    assert sorted(order) == list(range(160))
    for start in range(0, 160, 32):
        assert int(torch.linalg.matrix_rank(rows[order[start : start + 32]])) == 32
    for wanted in (1, 31, 32, 33, 100):
        assert pivots(rows, wanted)[:wanted] == order[:wanted]  # narrower choices are nested
    assert pivots(1e-3 * rows) == order == pivots(1e5 * rows)
    turned = rows @ torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64))[0]
    assert pivots(turned) == order


def test_rows_without_rank_end_a_round() -> None:
    for dtype in (torch.float64, torch.float32):
        rows = torch.randn(40, 3, dtype=dtype) @ torch.randn(3, 16, dtype=dtype)
        order = pivots(rows)
        assert sorted(order) == list(range(40))
        for start in range(0, 39, 3):
            assert int(torch.linalg.matrix_rank(rows[order[start : start + 3]])) == 3
    assert pivots(torch.zeros(6, 4)) == list(range(6))
    assert pivots(torch.eye(8).repeat(3, 1)) == list(range(24))  # equal norms
    some = torch.cat([torch.zeros(5, 4), torch.eye(4)])
    assert pivots(some) == [5, 6, 7, 8, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("source", ["fc1", "fc1+bias", "fc1+fc2"])
def test_sources(source: str) -> None:
    model = tiny_vit()
    mlp = model.blocks[2].mlp
    torch.nn.init.normal_(mlp.fc1.bias)
    rows = {
        "fc1": mlp.fc1.weight,
        "fc1+bias": torch.cat([mlp.fc1.weight, mlp.fc1.bias[:, None]], 1),
        "fc1+fc2": torch.cat([mlp.fc1.weight, mlp.fc1.bias[:, None], mlp.fc2.weight.T], 1),
    }[source]
    criterion = {"name": "gram_schmidt", "source": source}
    edit = mlpreduce.plan(model, "shallow", width=50, criterion=criterion).of(Slice)[2]
    assert list(edit.units) == sorted(lapack(rows.detach())[:50])


def test_memory_is_that_of_one_copy() -> None:
    rows = torch.randn(6000, 700)
    pivots(rows[:2])
    numpy_only = tracemalloc_peak(lambda: pivots(rows, 700))
    assert rows.nbytes < numpy_only < 1.2 * rows.nbytes
    assert tracemalloc_peak(lambda: pivots(rows, 700, "float64")) < 2.2 * rows.nbytes


def test_refusals() -> None:
    with pytest.raises(ReductionError, match=r"source is 'fc3'; did you mean 'fc1'\?"):
        mlpreduce.plan(tiny_vit(), "shallow", criterion={"name": "gram_schmidt", "source": "fc3"})
    with pytest.raises(ReductionError, match=r"dtype is 'float16'; did you mean 'float"):
        mlpreduce.plan(tiny_vit(), "shallow", criterion={"name": "gram_schmidt", "dtype": "float16"})
    model = tiny_vit()
    model.blocks[1].mlp.fc1.weight.data[3, 4] = torch.nan
    with pytest.raises(ReductionError, match=r"the weights of blocks\.1\.mlp are not all finite"):
        mlpreduce.plan(model, "shallow", criterion="gram_schmidt")
