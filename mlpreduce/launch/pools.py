"""Jobs on warm workers, and one owner of what they report: a Ray actor beside the driver, or an object in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from mlpreduce.errors import ReductionError, require
from mlpreduce.launch.cluster import connection
from mlpreduce.launch.interrupts import Shield, interrupts
from mlpreduce.launch.locks import drive, work
from mlpreduce.launch.settings import LaunchSettings

__all__ = ["Call", "Here", "Job", "Lost", "Pool", "ended", "owned", "pool"]

Job = Any  # the caller's: the pool hands it on
Call = Callable[..., Any]  # (method of the owner, *arguments) -> what it returns
Work = Callable[[Call, Job], Any]  # carries out a job; top level, so that a worker can import it


@dataclass(frozen=True)
class Lost:
    """What is left of a job whose worker ended."""

    message: str


class Pool(Protocol):
    """Workers, and the owner of what they report."""

    size: int  # jobs at a time

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the owner."""

    def start(self, job: Job) -> None:
        """Begin a job on a worker."""

    def wait(self) -> list[tuple[Job, Any]]:
        """Jobs that have ended, and what each returned, or `Lost`; after a second without any, none."""


@contextmanager
def pool(
    workers: int,
    owner: Callable[..., Any],
    arguments: Sequence[Any],
    work: Work,
    *,
    directories: Sequence[str],
    launch: LaunchSettings,
    cpus: float = 1.0,
    gpus: float = 0.0,
) -> Iterator[Pool]:
    """Workers for jobs, and an owner; both end with the block.

    With RAY_ADDRESS set, the workers are those of that cluster; otherwise a local Ray is started. While the block runs, the
    directories are held: another driver is refused, also when this one was killed and its workers have not ended yet.

    Args:
        workers: jobs at a time; 0 = one, in this process, without Ray.
        owner: makes the owner from `arguments`; it has a method `close`.
        arguments: of `owner`.
        work: carries out one job.
        directories: that the jobs and the owner write to.
        launch: the processes of one job. With one, the job is a Ray task; with more, they are a Ray Train group.
        cpus: that Ray reserves for each process; a part of one is possible.
        gpus: likewise.

    Raises:
        ReductionError: another process holds a directory; the cluster does not have what is asked for; the owner is lost.
        KeyboardInterrupt: interrupted; all workers have ended.
    """
    with drive(directories) as text, interrupts() as shield, ExitStack() as stack:
        if workers == 0:
            yield Here(stack.enter_context(owned(lambda: owner(*arguments), shield)), work)
            return
        require(f"pool(workers={workers})", "ray")
        group = launch.model_copy(update={"workers": launch.workers * workers})
        stack.enter_context(connection(group))
        _check_resources(workers, launch.workers, cpus, gpus)
        yield stack.enter_context(
            _on_ray(workers, owner, arguments, work, directories[0], text, launch.workers, cpus, gpus)
        )


@contextmanager
def owned(make: Callable[[], Any], shield: Shield) -> Iterator[Call]:
    """An owner in this process: what it keeps, it keeps whole, whenever Ctrl-C comes."""
    with ExitStack() as stack:
        with shield():
            owner = make()

            def call(method: str, *arguments: Any) -> Any:
                with shield():
                    return getattr(owner, method)(*arguments)

            stack.callback(call, "close")
        yield call


class Here:
    """Jobs in this process, one at a time."""

    size = 1

    def __init__(self, call: Call, work: Work) -> None:
        self.call, self._work = call, work
        self._ended: list[tuple[Job, Any]] = []

    def start(self, job: Job) -> None:
        self._ended.append((job, self._work(self.call, job)))

    def wait(self) -> list[tuple[Job, Any]]:
        ended, self._ended = self._ended, []
        return ended


class _Owner:
    """The owner as a Ray actor. It holds a part of the directory's lock, and lets go when its process ends."""

    def __init__(self, directory: str, text: str, owner: Callable[..., Any], arguments: Sequence[Any]) -> None:
        self._held = ExitStack()
        self._held.enter_context(work(directory, 0, text))
        self._refusal: ReductionError | None = None
        try:
            self._owner = owner(*arguments)
        except ReductionError as error:
            self._refusal = error

    def call(self, method: str, *arguments: Any) -> Any:
        if self._refusal is not None:
            return self._refusal
        try:
            return getattr(self._owner, method)(*arguments)
        except ReductionError as error:
            return error  # raised by the caller: Ray would wrap it


def _task(owner: Any, carry_out: Work, directory: str, text: str, slot: int, job: Job) -> Any:
    """What a worker runs. It holds the byte `slot` of the directory's lock meanwhile."""
    with work(directory, slot, text):
        return carry_out(_caller(owner), job)


def _caller(owner: Any) -> Call:
    import ray

    def call(method: str, *arguments: Any) -> Any:
        found = ray.get(owner.call.remote(method, *arguments))
        if isinstance(found, ReductionError):
            raise found
        return found

    return call


class _OnRay:
    """Jobs as Ray tasks."""

    def __init__(self, size: int, call: Call, submit: Callable[[int, Job], Any]) -> None:
        self.size, self.call, self._submit = size, call, submit
        self._running: dict[Any, Job] = {}
        self._slot = 0

    def start(self, job: Job) -> None:
        self._slot += 1
        self._running[self._submit(self._slot, job)] = job

    def wait(self) -> list[tuple[Job, Any]]:
        return [(self._running.pop(reference), outcome) for reference, outcome in ended(list(self._running))]


def ended(references: Sequence[Any]) -> list[tuple[Any, Any]]:
    """What has ended of calls to Ray, each with what it returned, or `Lost`; after a second without any, none."""
    import ray

    found = []
    for reference in ray.wait(list(references), num_returns=1, timeout=1.0)[0]:
        try:
            found.append((reference, ray.get(reference)))
        except ray.exceptions.RayTaskError as error:
            raise error.as_instanceof_cause() from error  # type: ignore[no-untyped-call]
        except ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines() or [""]
            found.append((reference, Lost(f"{type(error).__name__}: {lines[0]}")))
    return found


@contextmanager
def _on_ray(
    workers: int,
    owner: Callable[..., Any],
    arguments: Sequence[Any],
    carry_out: Work,
    directory: str,
    text: str,
    processes: int,
    cpus: float,
    gpus: float,
) -> Iterator[Pool]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # files are local
    made = ray.remote(_Owner).options(num_cpus=0, scheduling_strategy=here).remote(directory, text, owner, arguments)
    call = _caller(made)
    # A group of processes reserves for itself. The process that starts it serves once: its group ends with it.
    alone = {"num_cpus": cpus, "num_gpus": gpus} if processes == 1 else {"num_cpus": 0, "max_calls": 1}
    remote = ray.remote(max_retries=0, **alone)(_task)

    def guarded(method: str, *given: Any) -> Any:
        try:
            return call(method, *given)
        except ray.exceptions.RayActorError as error:
            lines = str(error).strip().splitlines()
            raise ReductionError(
                f"the process that keeps the study is lost ({lines[-1] if lines else 'no reason is known'}); --resume goes on"
            ) from error

    try:
        yield _OnRay(workers, guarded, lambda slot, job: remote.remote(made, carry_out, directory, text, slot, job))
    finally:
        with suppress(ray.exceptions.RayError, ReductionError):  # it is gone, or never began; what it kept is on disk
            call("close")


def _check_resources(workers: int, processes: int, cpus: float, gpus: float) -> None:
    import ray

    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for name, each in (("CPU", cpus), ("GPU", gpus)):
        there = total.get(name, 0.0)
        if each * processes > there:
            raise ReductionError(
                f"--{name.lower()}s {each:g}: a trial of {processes} process(es) needs {each * processes:g} {name}s, and Ray "
                f"has {there:g}"
            )
        if each * processes * workers > there:
            raise ReductionError(
                f"--workers {workers}: so many trials need {each * processes * workers:g} {name}s, and Ray has {there:g}; use "
                f"--workers {int(there // (each * processes))}, or less for each by --{name.lower()}s"
            )
