"""Ctrl-C, but never inside a record that is being written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["interrupts"]


@contextmanager
def interrupts() -> Iterator[Callable[[], Any]]:
    """Turns SIGINT into KeyboardInterrupt, but not while an event is being recorded: then right after it."""
    state = {"shielded": False, "requests": 0}

    def handler(signum: int, frame: object) -> None:
        state["requests"] += 1
        # The second one is ignored: the workers are being ended, which takes seconds and must not be cut short.
        if state["requests"] != 2 and not state["shielded"]:
            raise KeyboardInterrupt

    @contextmanager
    def shielded() -> Iterator[None]:
        state["shielded"] = True
        try:
            yield
        finally:
            state["shielded"] = False
        if state["requests"]:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield shielded
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield shielded
    finally:
        signal.signal(signal.SIGINT, before)
