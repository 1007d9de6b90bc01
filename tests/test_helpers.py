"""What tests share is tested where a fault in it would hide one."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import guard, two_processes
from helpers.runs import TIMES, same
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
    with pair() as together:
        with pytest.raises(Failed, match="process 1 ended with code 3"):
            together(_end, 3)
        with pytest.raises(Failed, match=r"process (0, )?1 was not done after 2.0 s"):
            together(_sleep, deadline=2.0)


@pytest.mark.slow
def test_a_store_is_migrated_and_empty(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{put_store(tmp_path / 'a')}/mlflow.db")
    assert [one.name for one in client.search_experiments()] == ["Default"]
    client.create_experiment("mine")
    other = MlflowClient(tracking_uri=f"sqlite:///{put_store(tmp_path / 'b')}/mlflow.db")
    assert [one.name for one in other.search_experiments()] == ["Default"]


class _Pipe:
    """Gives tasks, then is closed, and keeps what is sent."""

    def __init__(self, *tasks: Any) -> None:
        self.tasks, self.sent = list(tasks), list[Any]()

    def recv(self) -> Any:
        if not self.tasks:
            raise EOFError
        return self.tasks.pop(0)

    def send(self, answer: Any) -> None:
        self.sent.append(answer)


def _read_too_far(rank: int) -> None:
    raise EOFError("Ran out of input")


def test_an_end_of_file_in_a_test_is_a_failure(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    group = SimpleNamespace(init_process_group=lambda *_, **__: None, is_initialized=lambda: False)
    monkeypatch.setattr(two_processes, "dist", group)
    monkeypatch.setattr(two_processes, "time", SimpleNamespace(sleep=lambda seconds: None))
    pipe = _Pipe((_read_too_far, (), "/group"))
    two_processes._serve(0, pipe)  # type: ignore[arg-type]
    (_, (raised, _)) = pipe.sent
    assert raised.endswith("EOFError: Ran out of input\n")
    closed = _Pipe()
    two_processes._serve(0, closed)  # type: ignore[arg-type]
    assert closed.sent == [("", None)]  # that it has started


def test_listening_may_be_nested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_listening", [])  # what is heard here is not what this test starts
    with guard.started() as outer:
        with guard.started() as inner:
            pass
        guard._hear("os.system", ("ls",))
        assert (len(outer), len(inner)) == (1, 0)
    guard._hear("os.system", ("ls",))
    assert (len(outer), len(inner)) == (1, 0)


def test_states_are_the_same_to_the_last_bit() -> None:
    state = {"model": {"a": torch.zeros(2)}, "history": [{"top1": 1.0, TIMES[0]: 3.0}], "facts": "x"}
    same(state, {**state, "history": [{"top1": 1.0, TIMES[0]: 4.0}], "facts": "y"})
    for other in (
        {**state, "model": {"a": torch.zeros(2, dtype=torch.float64)}},
        {**state, "model": {"a": torch.tensor([0.0, 1e-30])}},
        {**state, "history": [{"top1": 1.5}]},
        {**state, "history": ({"top1": 1.0},)},
        {"model": state["model"]},
    ):
        with pytest.raises(AssertionError):
            same(state, other)
