"""Where a run is carried out: the little that the training loop knows of its surroundings."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch

import mlpreduce
from mlpreduce.train.events import Event
from mlpreduce.train.settings import TrainSettings

__all__ = ["Runtime", "environment", "precision"]

_PACKAGES = ("torch", "timm", "numpy", "ray", "mlflow")


def _ignore(event: Event) -> None:
    """The default receiver of events."""


@dataclass(frozen=True)
class Runtime:
    """Where a run is carried out.

    Attributes:
        rank: number of this worker.
        world: number of workers that train together.
        device: what this worker computes on.
        report: receives events on worker 0.
        threads: CPU threads of torch in this worker; 0 leaves torch's choice.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    report: Callable[[Event], None] = _ignore
    threads: int = 0


@contextmanager
def precision(train: TrainSettings) -> Iterator[None]:
    """The precision and the algorithms that a run asks for, for as long as it trains."""
    before = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    cudnn = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    torch.set_float32_matmul_precision("high" if train.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = train.tf32
    torch.backends.cudnn.benchmark = not train.deterministic
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = cudnn
        torch.use_deterministic_algorithms(before[1])


def environment(runtime: Runtime) -> dict[str, Any]:
    """Versions and hardware, for the record of a run."""
    if runtime.device.type == "cuda":
        device = torch.cuda.get_device_name(runtime.device)
    else:
        device = f"CPU ({torch.backends.cpu.get_cpu_capability()})"
    versions = {name: version for name in _PACKAGES if (version := _version(name)) is not None}
    return {
        "versions": {
            "mlpreduce": mlpreduce.__version__,
            "python": platform.python_version(),
            **versions,
        },
        "hardware": {
            "device": device,
            "device_type": runtime.device.type,
            "machine": platform.machine(),
            "workers": runtime.world,
            "cpu_cores": os.cpu_count(),
            "threads_per_worker": torch.get_num_threads(),
            "system": platform.platform(),
        },
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
