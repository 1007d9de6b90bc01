"""Trains runs in this process or on Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from mlpreduce.errors import ReductionError, require
from mlpreduce.launch.interrupts import interrupts
from mlpreduce.launch.locks import drive
from mlpreduce.launch.settings import LaunchSettings
from mlpreduce.launch.sharing import check_sharing
from mlpreduce.train.settings import Run
from mlpreduce.words.waiting import silent

if TYPE_CHECKING:
    import torch

    from mlpreduce.train.runtime import Runtime

__all__ = ["device_of", "execute", "train_all"]

Consume = Callable[[dict[str, Any]], None]


def execute(runs: Sequence[Run], launch: LaunchSettings, consume: Consume) -> None:
    """Train all runs, one after the other, on one group of workers.

    A lost worker restarts the group, with fewer workers where `launch.min_workers` allows it; the interrupted run goes on
    from its last checkpoint. With `launch.workers=0` all happens in this process, without Ray. With RAY_ADDRESS set, the
    workers are those of that cluster, which must share the storage of the output directory; otherwise a local Ray is
    started, and ended again.

    Args:
        runs: what to train; their `workers` must be `launch.world`.
        launch: on how many processes.
        consume: called in the main thread with each event, in order; an interrupt never cuts into it.

    Raises:
        ReductionError: a setting that cannot be carried out, no such cluster, another process that trains these runs, or
            workers lost too often.
        KeyboardInterrupt: interrupted; all workers have ended.
    """
    if not runs:
        return
    launch.check()
    check_sharing(runs[0], launch.fewest or 1, launch.world)
    with drive([run.directory for run in runs]) as text, interrupts() as shielded:

        def receive(event: dict[str, Any]) -> None:
            with shielded():
                consume(event)

        if launch.workers == 0:
            _in_process(runs, launch, receive)
        else:
            require(f"launch.workers={launch.workers}", "ray")
            from mlpreduce.launch.group import on_ray
            from mlpreduce.train.names import check_reach

            check_reach(runs)
            on_ray(runs, launch, text, receive)


def train_all(
    runs: Sequence[Run],
    runtime: Runtime,
    holding: Callable[[Run], AbstractContextManager[None]] = lambda run: nullcontext(),
) -> None:
    """Train runs one after the other in this process or worker; a run whose loss diverges is reported, the next one begins.

    Args:
        runs: what to train.
        runtime: where.
        holding: gives what is held while a run is trained.
    """
    from mlpreduce.train import TrainingStopped, fit

    for run in runs:
        try:
            with holding(run), silent():  # whoever trains them shows progress
                fit(run, runtime)
        except TrainingStopped as stopped:
            if runtime.rank == 0:
                failed = {"event": "end", "status": "failed", "message": str(stopped)}
                runtime.report({**failed, "variant": run.variant, "seed": run.seed, "epochs": run.train.epochs})


def device_of(launch: LaunchSettings) -> torch.device:
    """Where this process trains.

    Raises:
        ReductionError: a GPU is asked for, and there is none.
    """
    import torch

    cuda = torch.cuda.is_available()
    if launch.device == "cuda" and not cuda:
        raise ReductionError("launch.device='cuda': torch finds no GPU here; use launch.device='cpu'")
    return torch.device("cuda" if cuda and launch.device != "cpu" else "cpu")


def _in_process(runs: Sequence[Run], launch: LaunchSettings, receive: Consume) -> None:
    import torch

    from mlpreduce.train import Runtime

    device, threads = device_of(launch), torch.get_num_threads()
    try:
        train_all(runs, Runtime(device=device, report=receive, threads=launch.threads))
    finally:
        torch.set_num_threads(threads)
