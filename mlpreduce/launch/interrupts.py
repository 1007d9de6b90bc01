"""Ctrl-C, but never while something is being kept: a record, or a row of Optuna's storage."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from mlpreduce.errors import ReductionError

__all__ = ["Shield", "interrupts"]


Shield = Callable[[], AbstractContextManager[None]]


@contextmanager
def interrupts() -> Iterator[Shield]:
    """Turns SIGINT into KeyboardInterrupt, but not inside a block of what it yields: then right after it.

    A database that is left within a write stays locked for whoever asks next, also for what would end the work in order. Who
    asks again while the first still waits, waits no longer. Once an interrupt was raised the next one is ignored: the workers
    are being ended, which takes seconds and must not be cut short.
    """
    shielded = pending = raised = ignored = False

    def handler(signum: int, frame: object) -> None:
        nonlocal pending, raised, ignored
        if raised and not ignored:
            ignored = True
        elif shielded and not pending:
            pending = True
        else:
            pending, raised = False, True
            raise KeyboardInterrupt

    @contextmanager
    def shield() -> Iterator[None]:
        nonlocal shielded, pending, raised
        if shielded:
            yield
            return
        shielded = True
        try:
            yield
        except ReductionError:
            pending = False  # the work ends with it, and who asked for that is to read why
            raise
        finally:
            shielded = False
            if pending:
                pending, raised = False, True
                raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield shield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield shield
    finally:
        signal.signal(signal.SIGINT, before)
