"""Training in this process, which is the driver or a worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from mlpreduce.errors import ReductionError
from mlpreduce.launch.settings import LaunchSettings
from mlpreduce.train.events import Ended, Event
from mlpreduce.train.settings import Run
from mlpreduce.words.waiting import silent

if TYPE_CHECKING:
    import torch

    from mlpreduce.train.runtime import Runtime

__all__ = ["device_of", "in_process", "train_all"]


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
                ended = Ended("failed", str(stopped))
                runtime.report(Event(run.variant, run.seed, run.train.epochs, ended))


def device_of(launch: LaunchSettings) -> torch.device:
    """Where this process trains.

    Raises:
        ReductionError: the settings ask for a GPU, and torch finds none.
    """
    import torch

    cuda = torch.cuda.is_available()
    if launch.device == "cuda" and not cuda:
        raise ReductionError("launch.device='cuda': torch finds no GPU here; use launch.device='cpu'")
    return torch.device("cuda" if cuda and launch.device != "cpu" else "cpu")


def in_process(runs: Sequence[Run], launch: LaunchSettings, receive: Callable[[Event], None]) -> None:
    """Train runs one after the other here, alone; torch's number of threads is afterwards what it was."""
    import torch

    from mlpreduce.train import Runtime

    device, threads = device_of(launch), torch.get_num_threads()
    try:
        train_all(runs, Runtime(device=device, report=receive, threads=launch.threads))
    finally:
        torch.set_num_threads(threads)
