"""Two processes of one group, started once for all tests of what two processes do together."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

DEADLINE = 300.0

Together = Callable[..., list[Any]]


class Failed(Exception):
    """One of the two processes raised, ended, or was not done in time."""


@contextmanager
def pair() -> Iterator[Together]:
    """Give `together(function, *args)`, which calls `function(rank, *args)` in two processes and returns both results.

    It fails when they are not done after `deadline=` seconds. The function must be defined at the top of a module, and finds
    a new gloo group, one thread and a fixed seed. The processes start with the first call and stay. After a failure both are
    killed, and the next call starts new ones: a process that waits for one that is gone would wait for ever.
    """
    workers: list[tuple[BaseProcess, Connection]] = []

    def together(function: Callable[..., Any], *args: Any, deadline: float = DEADLINE) -> list[Any]:
        try:
            if not workers:
                workers.extend(_start(rank) for rank in range(2))
                _answers(workers, DEADLINE)  # that they have started
            with tempfile.TemporaryDirectory() as folder:
                for _, pipe in workers:
                    pipe.send((function, args, f"{folder}/group"))
                return _answers(workers, deadline)
        except BaseException:
            _end(workers, kill=True)
            raise

    try:
        yield together
    finally:
        _end(workers)


def _start(rank: int) -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _end(workers: list[tuple[BaseProcess, Connection]], kill: bool = False) -> None:
    for process, pipe in workers:
        if kill:
            process.kill()
        pipe.close()  # which ends one that waits for its next task
    for process, _ in workers:
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()
        process.close()
    workers.clear()


def _answers(workers: list[tuple[BaseProcess, Connection]], deadline: float) -> list[Any]:
    end = time.monotonic() + deadline
    found: dict[int, Any] = {}
    while len(found) < len(workers):
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(workers) if rank not in found}
        ready = wait(list(waiting), timeout=max(0.0, end - time.monotonic()))
        if not ready:
            raise Failed(f"process {', '.join(map(str, waiting.values()))} was not done after {deadline} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting[pipe]
            try:
                raised, value = pipe.recv()
            except (EOFError, ConnectionResetError):
                workers[rank][0].join(10)
                raise Failed(f"process {rank} ended with code {workers[rank][0].exitcode}") from None
            if raised:
                raise Failed(f"process {rank} raised:\n{raised}")
            found[rank] = value
    return [found[rank] for rank in range(len(workers))]


def _serve(rank: int, pipe: Connection) -> None:
    try:
        pipe.send(("", None))
        while True:
            try:
                function, args, file = pipe.recv()
            except EOFError:  # the parent has closed its end, or is gone
                return
            torch.set_num_threads(1)
            torch.manual_seed(0)
            limit = timedelta(seconds=DEADLINE)
            dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2, timeout=limit)
            result = function(rank, *args)
            if dist.is_initialized():
                dist.destroy_process_group()
            pipe.send(("", result))
    except BaseException:
        pipe.send((traceback.format_exc(), None))
        # The group stays until the parent ends both, or the other would fail as well, and might be heard first.
        time.sleep(DEADLINE)
