"""Workers that keep what they work with, for jobs that report nothing while they run; their owner stays in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from mlpreduce.errors import ReductionError, require
from mlpreduce.launch.cluster import connection
from mlpreduce.launch.interrupts import interrupts
from mlpreduce.launch.locks import drive
from mlpreduce.launch.pools import Call, Here, Job, Lost, Pool, ended, owned
from mlpreduce.launch.settings import LaunchSettings

__all__ = ["team"]


@contextmanager
def team(
    workers: int, owner: Callable[[], Any], work: Callable[..., Any], *, directories: Sequence[str]
) -> Iterator[Pool]:
    """Workers for jobs, and their owner; both end with the block. While it runs, the directories are held.

    Args:
        workers: jobs at a time, each a process of Ray with a core; 0 = one, in this process, without Ray.
        owner: makes the owner, which has a method `close`.
        work: `(None, job) -> outcome`; it travels to each worker once, with all that it holds.
        directories: that the owner writes to.

    Raises:
        ReductionError: another process holds a directory; Ray does not have so many cores.
        KeyboardInterrupt: interrupted; all workers have ended.
    """
    with drive(directories), interrupts() as shield, ExitStack() as stack:
        if workers:
            require(f"workers={workers}", "ray")
            stack.enter_context(connection(LaunchSettings(workers=workers)))
        call = stack.enter_context(owned(owner, shield))
        yield stack.enter_context(_on_ray(workers, call, work)) if workers else Here(call, work)


class _Member:
    """A worker as a Ray actor."""

    def __init__(self, work: Callable[..., Any]) -> None:
        self._work = work

    def carry_out(self, job: Job) -> Any:
        return self._work(None, job)


class _Team:
    """Jobs as calls of actors, one at a time for each."""

    def __init__(self, size: int, call: Call, hire: Callable[[], Any]) -> None:
        self.size, self.call, self._hire = size, call, hire
        self.members = [hire() for _ in range(size)]
        self._free = list(self.members)
        self._running: dict[Any, tuple[Job, Any]] = {}

    def start(self, job: Job) -> None:
        member = self._free.pop()
        self._running[member.carry_out.remote(job)] = job, member

    def wait(self) -> list[tuple[Job, Any]]:
        found = []
        for reference, outcome in ended(list(self._running)):
            job, member = self._running.pop(reference)
            if isinstance(outcome, Lost):
                self.members.remove(member)
                member = self._hire()
                self.members.append(member)
            self._free.append(member)
            found.append((job, outcome))
        return found


@contextmanager
def _on_ray(workers: int, call: Call, work: Callable[..., Any]) -> Iterator[Pool]:
    import ray

    there = int(ray.cluster_resources().get("CPU", 0))  # type: ignore[no-untyped-call]
    if workers > there:
        raise ReductionError(f"workers={workers}: each takes a core, and Ray has {there}; use workers={there}")
    try:
        kept = ray.put(work)
    except (TypeError, AttributeError, ray.cloudpickle.PicklingError) as error:  # type: ignore[attr-defined]
        raise ReductionError(
            f"workers={workers}: the model, the data or the score cannot be sent to another process: {error}; use workers=0"
        ) from error
    remote = ray.remote(_Member).options(num_cpus=1)
    found = _Team(workers, call, lambda: remote.remote(kept))
    try:
        yield found
    finally:
        with suppress(ray.exceptions.RayError):  # Ray itself is gone, and they with it
            for member in found.members:
                ray.kill(member)
