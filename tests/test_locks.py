"""The locks of a run: waited for as long as is said, and let go where workers need them."""

from __future__ import annotations

import errno
import time
from pathlib import Path
from typing import Any

import pytest

from mlpreduce.errors import ReductionError
from mlpreduce.launch import locks


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is asked of the system after the descriptor, which goes on to answer; nothing sleeps."""
    asked: list[tuple[Any, ...]] = []
    lockf = locks.fcntl.lockf
    monkeypatch.setattr(locks.fcntl, "lockf", lambda descriptor, *what: asked.append(what) or lockf(descriptor, *what))
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: None)
    return asked


def test_a_driver_keeps_its_byte_and_lets_go_of_those_of_workers(tmp_path: Path, calls: list[tuple[Any, ...]]) -> None:
    taken = locks.fcntl.LOCK_EX | locks.fcntl.LOCK_NB
    with locks.drive([str(tmp_path)]) as text:
        assert calls == [(taken, 1, 0), (taken, 0, 1), (locks.fcntl.LOCK_UN, 0, 1)]  # length, then start
        with locks.work(str(tmp_path), 3, text):
            assert calls[-1] == (taken, 1, 4)


def test_what_is_taken_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: None)
    refusals = [3]

    def busy(*what: Any) -> None:
        if what[1] != locks.fcntl.LOCK_UN and what[2:] == (0, 1) and refusals[0]:
            refusals[0] -= 1
            raise OSError(errno.EAGAIN, "taken")

    monkeypatch.setattr(locks.fcntl, "lockf", busy)
    with locks.drive([str(tmp_path)], patience=60):  # the workers of another driver end meanwhile
        assert refusals == [0]
    refusals[0] = 10**9
    start = time.monotonic()
    with pytest.raises(ReductionError, match="after 0 s, workers of"), locks.drive([str(tmp_path)], patience=0.05):
        pass
    assert 0.05 <= time.monotonic() - start < 30
