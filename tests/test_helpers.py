"""What tests share is tested where a fault in it would hide one."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.stores import put_store
from helpers.two_processes import Failed, Together, pair


def _end(rank: int, code: int) -> None:
    if rank == 1:
        os._exit(code)
    dist.barrier()


def _sleep(rank: int) -> None:
    time.sleep(60 * rank)


def _sum(rank: int, value: float) -> tuple[int, float]:
    total = torch.tensor([value + rank])
    dist.all_reduce(total)
    return os.getpid(), total.item()


@pytest.mark.processes
def test_two_processes_stay_and_each_call_has_a_group_of_its_own(together: Together) -> None:
    (first, one), (second, other) = together(_sum, 2.0)
    assert one == other == 5.0
    assert len({first, second, os.getpid()}) == 3
    assert together(_sum, 3.0) == [(first, 7.0), (second, 7.0)]


@pytest.mark.processes
def test_a_process_that_ends_or_hangs_is_told_and_replaced() -> None:
    with pair(deadline=20) as together:
        with pytest.raises(Failed, match="process 1 ended with code 3"):
            together(_end, 3)
        with pytest.raises(Failed, match=r"process 1 was not done after 20 s"):
            together(_sleep)


def test_a_store_is_migrated_and_empty(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{put_store(tmp_path / 'a')}/mlflow.db")
    assert [one.name for one in client.search_experiments()] == ["Default"]
    client.create_experiment("mine")
    other = MlflowClient(tracking_uri=f"sqlite:///{put_store(tmp_path / 'b')}/mlflow.db")
    assert [one.name for one in other.search_experiments()] == ["Default"]
