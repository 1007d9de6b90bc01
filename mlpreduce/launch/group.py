"""The worker group: its trainer, its workers, their events."""

from __future__ import annotations

import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlpreduce.errors import ReductionError
from mlpreduce.launch.cluster import connection, resources
from mlpreduce.launch.locks import work
from mlpreduce.launch.settings import LaunchSettings
from mlpreduce.launch.sharing import regroup, sharers
from mlpreduce.train.events import Event, Started
from mlpreduce.train.settings import Run

if TYPE_CHECKING:
    from mlpreduce.train.runtime import Runtime

__all__ = ["on_ray"]

Consume = Callable[[Event], None]

_PATIENCE = 10.0  # seconds


@dataclass(frozen=True)
class _Refused:
    """What a worker found that no restart would help."""

    message: str


def on_ray(runs: Sequence[Run], launch: LaunchSettings, text: str, receive: Consume) -> None:
    """Train runs on one worker group, and hand its events to `receive` in this thread.

    Args:
        runs: what to train; this process holds them.
        launch: on how many workers.
        text: what the driver's lock says.
        receive: called with each event.

    Raises:
        ReductionError: no such cluster, a setting that cannot be carried out, or workers lost too often.
    """
    import ray

    with ExitStack() as afterwards, connection(launch):
        use_gpu = resources(launch)
        from ray.util.queue import Empty, Queue
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # Beside the driver: a node that is lost must not take it along.
        queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
        outcome: list[BaseException | None] = []
        with _scratch(runs) as scratch:
            trainer = _trainer(runs, launch, text, queue, use_gpu, scratch)
            # In a thread: Ray's own handler for interrupts would end the process; the main thread keeps the records.
            fitting = threading.Thread(target=_fit, args=(trainer, outcome), name="ray-train", daemon=True)
            fitting.start()
            afterwards.callback(_join, fitting)
            message: str | None = None
            while True:
                ended = not fitting.is_alive()
                try:
                    event = queue.get(timeout=0.5) if not ended else queue.get_nowait()
                except Empty:
                    if ended:
                        break
                    continue
                except ray.exceptions.RayActorError:  # Ray went down; the trainer tells why
                    fitting.join()
                    break
                if isinstance(event, _Refused):
                    message = event.message
                    break  # the other workers may wait for the one that refused; they end with the connection
                receive(event)
        if message is not None:
            raise ReductionError(message)
        error = outcome[0] if outcome else None
        if error is not None:
            raise ReductionError(_failure(launch, error)) from error


@contextmanager
def _scratch(runs: Sequence[Run]) -> Iterator[str]:
    """A folder for what Ray Train wants to write: empty, on storage that all share. Checkpoints are ours, not Ray's."""
    folder = Path(runs[-1].directory) / ".ray"  # that of the last run, so one that a killed driver left is found again
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield str(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _join(fitting: threading.Thread) -> None:
    """Wait for the thread of the trainer after Ray was shut down: in Ray's code at the interpreter's end it may crash it."""
    import ray

    if not ray.is_initialized():  # or Ray is the caller's, and goes on
        fitting.join(_PATIENCE)


def _fit(trainer: Any, outcome: list[BaseException | None]) -> None:
    try:
        trainer.fit()
    except BaseException as error:
        outcome.append(error)


def _trainer(runs: Sequence[Run], launch: LaunchSettings, text: str, queue: Any, use_gpu: bool, scratch: str) -> Any:
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from mlpreduce.train.names import names_of

    workers: Any = (launch.min_workers, launch.workers) if launch.min_workers else launch.workers
    backend = "nccl" if use_gpu else "gloo"
    return TorchTrainer(
        _worker,
        train_loop_config={
            "runs": [run.model_dump(mode="json") for run in runs],
            "names": list(dict.fromkeys(name for run in runs for name in names_of(run))),
            "threads": launch.threads,
            "backend": backend,
            "lock": text,
            "queue": queue,
        },
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": launch.cpus_per_worker, **({"GPU": 1} if use_gpu else {})},
        ),
        torch_config=TorchConfig(backend=backend),
        run_config=RunConfig(  # type: ignore[call-arg]  # mypy reads the signature of Ray Train V1
            name=f"mlpreduce-{uuid.uuid4().hex[:8]}",  # a new name each time: resuming is ours, not Ray's
            storage_path=scratch,
            failure_config=FailureConfig(  # type: ignore[call-arg]
                max_failures=launch.max_failures, controller_failure_limit=launch.controller_failures
            ),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def _worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    import ray.train
    from ray.train.torch import get_device

    from mlpreduce.launch.here import train_all
    from mlpreduce.plugins import run_plugins
    from mlpreduce.train import Runtime
    from mlpreduce.train.names import check_known

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    queue = config["queue"]
    runs = [Run.model_validate(run) for run in config["runs"]]
    team, notes = sharers(runs[0], world), []
    if team < world:
        notes = [f"{world} workers were started and {team} of them train: {world} cannot share a batch evenly"]
        if not regroup(rank, world, team, config["backend"]):
            return

    def report(event: Event) -> None:
        if isinstance(event.what, Started):
            event = replace(event, what=replace(event.what, notes=[*event.what.notes, *notes]))
        queue.put(event)

    runtime = Runtime(rank=rank, world=team, device=get_device(), report=report, threads=config["threads"])
    try:
        for run in runs:
            run_plugins(run.plugins)
        check_known(config["names"])
        train_all(runs, runtime, lambda run: _hold(run, runtime, config["lock"]))
    except ReductionError as error:  # no restart would help
        queue.put(_Refused(str(error)))


@contextmanager
def _hold(run: Run, runtime: Runtime, text: str) -> Iterator[None]:
    """Hold the run's directory; where one worker cannot, none goes on: the others would wait for it."""
    import torch.distributed as dist

    with ExitStack() as stack:
        wrong: str | None = None
        try:
            stack.enter_context(work(run.directory, runtime.rank, text))
        except ReductionError as error:
            wrong = str(error)
        everyone = [wrong] * runtime.world
        if runtime.world > 1:
            dist.all_gather_object(everyone, wrong)
        for told in filter(None, everyone):
            raise ReductionError(told)
        yield


def _failure(launch: LaunchSettings, error: BaseException) -> str:
    causes = getattr(error, "worker_failures", None) or {0: error}
    lines = [line for line in str(next(iter(causes.values()))).strip().splitlines() if line.strip()]
    return (
        f"training was given up (launch.max_failures={launch.max_failures}): {lines[-1] if lines else type(error).__name__}. "
        "Finished runs are kept; --resume goes on from the last checkpoint"
    )
