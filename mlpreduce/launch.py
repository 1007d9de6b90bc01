"""Runs training in this process or in a Ray Train worker group. The only module that imports ray.

One worker group trains all runs of a recipe, one after the other: starting Ray and importing torch and timm in each worker
takes longer than a short run. Events travel from worker 0 to the driver through a queue; the driver alone keeps records.
"""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mlpreduce.errors import ReductionError
from mlpreduce.train.settings import Run

if TYPE_CHECKING:
    from mlpreduce.train.runtime import Runtime

__all__ = ["LaunchSettings", "execute", "train_all"]

Consume = Callable[[dict[str, Any]], None]

# Defaults for the driver's environment; what the user has set stays.
_RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_worker_niceness": "0",  # Ray would yield to whatever else runs
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class LaunchSettings(BaseModel):
    """The `[launch]` section: on how many processes, and what happens when one is lost."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workers: Annotated[int, Field(ge=0)] = 2  # processes that train together; 0 = in this process, without Ray
    threads: Annotated[int, Field(ge=0)] = 1  # CPU threads of torch per worker; 0 = torch's own choice
    cpus_per_worker: Annotated[int, Field(ge=1)] = 1  # CPUs that Ray reserves for each worker
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: GPUs where there is one for each worker
    max_failures: Annotated[int, Field(ge=0)] = 2  # lost workers after which training is given up
    controller_failures: Annotated[int, Field(ge=0)] = 2  # failed starts of the worker group before giving up
    collective_timeout_s: Annotated[int, Field(ge=1)] = 600  # seconds that Ray Train waits for a worker that lags

    @property
    def world(self) -> int:
        """Processes that share a batch; 1 where training runs in this process."""
        return max(1, self.workers)


def execute(runs: Sequence[Run], launch: LaunchSettings, consume: Consume) -> None:
    """Train all runs, one after the other, on one group of workers.

    A lost worker restarts the group; the interrupted run goes on from its last checkpoint. With `launch.workers=0` all
    happens in this process, without Ray. With RAY_ADDRESS set, the workers are those of that cluster, which must share the
    storage of the output directory; otherwise a local Ray is started, and ended again.

    Args:
        runs: what to train; their `workers` must be `launch.world`.
        launch: on how many processes.
        consume: called in the main thread with each event, in order; an interrupt never cuts into it.

    Raises:
        ReductionError: a setting that cannot be carried out, no such cluster, or workers lost too often.
        KeyboardInterrupt: interrupted; all workers have ended.
    """
    if not runs:
        return
    with _interrupts() as shielded:

        def receive(event: dict[str, Any]) -> None:
            with shielded():
                consume(event)

        if launch.workers == 0:
            _in_process(runs, launch, receive)
        else:
            _on_ray(runs, launch, receive)


def train_all(runs: Sequence[Run], runtime: Runtime) -> None:
    """Train runs one after the other in this process or worker; a run whose loss diverges is reported, the next one begins."""
    from mlpreduce.train import TrainingStopped, fit

    for run in runs:
        try:
            fit(run, runtime)
        except TrainingStopped as stopped:
            if runtime.rank == 0:
                failed = {"event": "end", "status": "failed", "message": str(stopped)}
                runtime.report({**failed, "variant": run.variant, "seed": run.seed, "epochs": run.train.epochs})


def _in_process(runs: Sequence[Run], launch: LaunchSettings, receive: Consume) -> None:
    import torch

    from mlpreduce.train import Runtime

    cuda = torch.cuda.is_available()
    if launch.device == "cuda" and not cuda:
        raise ReductionError("launch.device='cuda': torch finds no GPU here; use launch.device='cpu'")
    device = torch.device("cuda" if cuda and launch.device != "cpu" else "cpu")
    threads = torch.get_num_threads()
    try:
        train_all(runs, Runtime(device=device, report=receive, threads=launch.threads))
    finally:
        torch.set_num_threads(threads)


def _on_ray(runs: Sequence[Run], launch: LaunchSettings, receive: Consume) -> None:
    import ray

    with _ray(launch):
        use_gpu = _resources(launch)
        from ray.util.queue import Empty, Queue

        queue = Queue(actor_options={"num_cpus": 0})
        outcome: list[BaseException | None] = []
        output = Path(os.path.commonpath([run.directory for run in runs]))  # the one place that all nodes share
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".ray-", dir=output, ignore_cleanup_errors=True) as scratch:
            trainer = _trainer(runs, launch, queue, use_gpu, scratch)
            # In a thread: Ray's own handler for interrupts would end the process; the main thread keeps the records.
            fitting = threading.Thread(target=_fit, args=(trainer, outcome), name="ray-train", daemon=True)
            fitting.start()
            message: str | None = None
            while True:
                ended = not fitting.is_alive()
                try:
                    event = queue.get(timeout=0.5) if not ended else queue.get_nowait()
                except Empty:
                    if ended:
                        break
                    continue
                except ray.exceptions.RayActorError:  # the queue went down with its node; the trainer tells why
                    fitting.join()
                    break
                if event["event"] == "refused":
                    message = event["message"]
                else:
                    receive(event)
        if message is not None:
            raise ReductionError(message)
        error = outcome[0] if outcome else None
        if error is not None:
            raise ReductionError(_failure(launch, error)) from error


def _fit(trainer: Any, outcome: list[BaseException | None]) -> None:
    try:
        trainer.fit()
    except BaseException as error:
        outcome.append(error)


def _trainer(runs: Sequence[Run], launch: LaunchSettings, queue: Any, use_gpu: bool, scratch: str) -> Any:
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    resources = {"CPU": launch.cpus_per_worker, **({"GPU": 1} if use_gpu else {})}
    return TorchTrainer(
        _worker,
        train_loop_config={
            "runs": [run.model_dump(mode="json") for run in runs],
            "threads": launch.threads,
            "queue": queue,
        },
        scaling_config=ScalingConfig(num_workers=launch.workers, use_gpu=use_gpu, resources_per_worker=resources),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
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

    from mlpreduce.train import Runtime

    context = ray.train.get_context()
    queue = config["queue"]
    runtime = Runtime(
        rank=context.get_world_rank(),
        world=context.get_world_size(),
        device=get_device(),
        report=queue.put,
        threads=config["threads"],
    )
    try:
        train_all([Run.model_validate(run) for run in config["runs"]], runtime)
    except ReductionError as error:  # no restart would help
        queue.put({"event": "refused", "message": str(error)})


@contextmanager
def _ray(launch: LaunchSettings) -> Iterator[None]:
    """A connection to Ray: the cluster of RAY_ADDRESS, or a local one that ends with us."""
    environment = {**_RAY_ENVIRONMENT, "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": str(launch.collective_timeout_s)}
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    import ray

    package = Path(__file__).resolve().parent
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if ray.is_initialized():
        yield
        return
    try:
        address = os.environ.get("RAY_ADDRESS", "")
        if address and address != "local":
            _preflight(address)
            ray.init(**quiet, runtime_env={"py_modules": [str(package)]})
        else:
            cpus = max(os.cpu_count() or 1, launch.workers * launch.cpus_per_worker)
            with _python_path(package.parent):
                ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
        yield
    finally:
        ray.shutdown()


@contextmanager
def _python_path(folder: Path) -> Iterator[None]:
    """Processes started inside import this very package, installed or run from a checkout."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [before])])
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _preflight(address: str) -> None:
    """Whether something listens at RAY_ADDRESS; Ray itself would wait for minutes."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=3).close()
    except (OSError, ValueError) as error:
        raise ReductionError(
            f"RAY_ADDRESS={address!r}: no Ray cluster answers there ({error}); start it, correct the address, or unset "
            "RAY_ADDRESS to train on this machine"
        ) from error


def _resources(launch: LaunchSettings) -> bool:
    """Whether GPUs are used. Raises where Ray would wait for ever for what the cluster does not have."""
    import ray

    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cpus, gpus = int(total.get("CPU", 0)), int(total.get("GPU", 0))
    use_gpu = launch.device == "cuda" or (launch.device == "auto" and gpus >= launch.workers)
    if use_gpu and gpus < launch.workers:
        raise ReductionError(
            f"launch.device='cuda', launch.workers={launch.workers}: Ray has {gpus} GPU(s), and each worker needs one; use "
            f"launch.workers={gpus or 1}{'' if gpus else ' and launch.device=cpu'}"
        )
    if cpus < launch.workers * launch.cpus_per_worker:
        raise ReductionError(
            f"launch.workers={launch.workers}, launch.cpus_per_worker={launch.cpus_per_worker}: the cluster has {cpus} CPU(s); "
            f"use at most {cpus // launch.cpus_per_worker} worker(s)"
        )
    return use_gpu


def _failure(launch: LaunchSettings, error: BaseException) -> str:
    causes = getattr(error, "worker_failures", None) or {0: error}
    lines = [line for line in str(next(iter(causes.values()))).strip().splitlines() if line.strip()]
    return (
        f"training was given up (launch.max_failures={launch.max_failures}): {lines[-1] if lines else type(error).__name__}. "
        "Finished runs are kept; --resume goes on from the last checkpoint"
    )


@contextmanager
def _interrupts() -> Iterator[Callable[[], Any]]:
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
