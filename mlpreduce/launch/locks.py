"""One group of processes at a time writes into a run's directory.

A process that was killed leaves others behind: Ray ends the workers of a driver that is gone some seconds later, and a
machine that lost its network goes on alone. So the driver and every worker hold a part of the file `<run>/.lock` while
they train: byte 0 is the driver's, byte 1 + rank is a worker's. The system lets go when the process ends, however it ends.
The text of the file names the driver. The locks are those of `fcntl.lockf`: NFS knows them, and the processes that load
data do not inherit them.
"""

from __future__ import annotations

import errno
import os
import socket
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mlpreduce.errors import ReductionError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["drive", "work"]

_PATIENCE = 60.0  # seconds in which what is left of a killed run ends by itself
_SHOWN_WITHIN = 20.0  # seconds within which storage that is shared shows a new file everywhere
_TAKEN = (errno.EACCES, errno.EAGAIN)
_UNKNOWN = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # a file system without locks


@contextmanager
def drive(directories: Sequence[str], patience: float = _PATIENCE) -> Iterator[str]:
    """Hold runs as the one driver that trains them, as soon as no worker of another one is left.

    Args:
        directories: of the runs; made where they do not exist.
        patience: seconds to wait for the workers of a driver that was killed.

    Yields:
        The text of the files, by which workers know them.

    Raises:
        ReductionError: another driver trains one of them, or its workers do not end, or a directory cannot be written.
    """
    text = (
        f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}, {time.time_ns()}"
    )
    with ExitStack() as stack:
        for directory in directories:
            path = Path(directory) / ".lock"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError as error:
                raise ReductionError(
                    f"output {directory}: it cannot be written ({error.strerror}); give another --output"
                ) from error
            stack.callback(os.close, descriptor)
            owner = os.pread(descriptor, 200, 0).decode(errors="replace").rpartition(",")[0] or "a process"
            if not _lock(descriptor, 0, 1, 0.0):
                raise ReductionError(
                    f"{path}: {owner}, trains this run; wait for it or end it, or give another --output"
                )
            if not _lock(descriptor, 1, 0, patience):  # all workers there may be
                raise ReductionError(
                    f"{path}: after {patience:.0f} s, workers of {owner}, still train this run; end them. If there are none (a "
                    f"machine that broke down may seem to hold the lock), delete this file"
                )
            if fcntl is not None:
                fcntl.lockf(descriptor, fcntl.LOCK_UN, 0, 1)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, text.encode(), 0)
        yield text


@contextmanager
def work(directory: str, rank: int, text: str, patience: float = _PATIENCE) -> Iterator[None]:
    """Hold a run as one of its workers, as soon as the same worker of a group that was lost has ended.

    Args:
        directory: of the run.
        rank: number of the worker.
        text: what `drive` gave.
        patience: seconds to wait for another process.

    Raises:
        ReductionError: this worker does not see the driver's file.
        TimeoutError: the other process has not ended.
    """
    path = Path(directory) / ".lock"
    _see(path, text)
    with path.open("r+b") as file:
        if not _lock(file.fileno(), 1 + rank, 1, patience):
            raise TimeoutError(
                f"{path}: after {patience:.0f} s, worker {rank} of the group before still trains this run"
            )
        yield


def _lock(descriptor: int, start: int, length: int, patience: float) -> bool:
    """Whether these bytes are ours now; a length of 0 is all that follow."""
    if fcntl is None:
        return True
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
            return True
        except OSError as error:
            if error.errno in _UNKNOWN:
                warnings.warn(
                    "the file system of the output directory has no locks; train a run once at a time", stacklevel=2
                )
                return True
            if error.errno not in _TAKEN:
                raise
        if time.monotonic() >= until:
            return False
        time.sleep(0.2)


def _see(path: Path, text: str) -> None:
    until = time.monotonic() + _SHOWN_WITHIN
    while True:
        try:
            found = path.read_text(encoding="utf-8")
        except OSError as error:
            found = f"no file ({error.strerror})"
        if found == text:
            return
        if time.monotonic() >= until:
            raise ReductionError(
                f"output {path.parent}: a worker on {socket.gethostname()} does not see what the driver wrote ({path.name}: "
                f"{found!r} instead of {text!r}); --output must lie on storage that all machines share, at the same path"
            )
        time.sleep(0.5)
