"""A test that starts programs says so by a marker."""

from __future__ import annotations

import multiprocessing.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

MARKERS = ("processes", "ray", "postgres")

# Fixtures whose programs run on after the test that was the first to ask for them.
SHARED = ("together", "local_ray")

# What Python tells an audit hook before it starts a program. A fork that runs none, such as a DataLoader's, is cheap.
_EVENTS = ("subprocess.Popen", "os.posix_spawn", "os.spawn", "os.system", "os.exec", "mlpreduce.tests.spawn")

# What the standard library's `platform` asks the system for, once.
_ASKED = ("uname",)

_listening: list[list[str]] = []


@contextmanager
def started() -> Iterator[list[str]]:
    """The programs that this process starts in the meantime."""
    programs: list[str] = []
    _listening.append(programs)
    try:
        yield programs
    finally:
        _listening[:] = [other for other in _listening if other is not programs]  # two that are empty are equal


def unmarked(item: pytest.Item, programs: list[str]) -> list[str]:
    """What a test has started, or was given, without a marker that says so."""
    if any(item.get_closest_marker(name) for name in MARKERS):
        return []
    return programs + [name for name in SHARED if name in getattr(item, "fixturenames", ())]


def install() -> None:
    """Listen from now on: an audit hook cannot be taken away again."""
    original = multiprocessing.util.spawnv_passfds  # type: ignore[attr-defined]

    def spawn(path: Any, args: Any, passfds: Any) -> int:
        sys.audit("mlpreduce.tests.spawn", path, args)  # Python says nothing here
        return original(path, args, passfds)

    multiprocessing.util.spawnv_passfds = spawn  # type: ignore[attr-defined]
    sys.addaudithook(_hear)


def _hear(event: str, args: tuple[Any, ...]) -> None:
    if _listening and event in _EVENTS and args[0] not in _ASKED:
        for programs in _listening:
            programs.append(f"{event}: {args[:2]}"[:300])
