"""The connection to Ray, and what it has."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlpreduce.errors import ReductionError
from mlpreduce.launch.settings import LaunchSettings

__all__ = ["connection", "resources"]

# Defaults for the driver's environment; what the user has set stays.
_RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_worker_niceness": "0",  # Ray would yield to whatever else runs
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@contextmanager
def connection(launch: LaunchSettings) -> Iterator[None]:
    """A connection to Ray: the cluster of RAY_ADDRESS, or a local one that ends with us."""
    environment = {**_RAY_ENVIRONMENT, "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": str(launch.collective_timeout_s)}
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    import ray

    package = Path(__file__).resolve().parents[1]
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if ray.is_initialized():
        yield
        return
    try:
        address = os.environ.get("RAY_ADDRESS", "")
        if address and address != "local":
            _preflight(address)
            _join(address, {**quiet, "runtime_env": {"py_modules": [str(package)]}})
        else:
            cpus = max(os.cpu_count() or 1, launch.workers * launch.cpus_per_worker)
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes this machine away
            with _python_path(package.parent):
                ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
        yield
    finally:
        ray.shutdown()


def _join(address: str, options: dict[str, Any]) -> None:
    import ray

    try:
        ray.init(**options)
    except (ray.exceptions.RayError, OSError, RuntimeError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ReductionError(
            f"RAY_ADDRESS={address!r}: the Ray cluster there does not let this process in: {lines[0]} The cluster's version of "
            f"Ray and Python must be those of this environment, and its token must be in RAY_AUTH_TOKEN (with "
            f"RAY_AUTH_MODE=token)"
        ) from error


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
            "RAY_ADDRESS (or leave out --address) to train on this machine"
        ) from error


def resources(launch: LaunchSettings) -> bool:
    """Whether GPUs are used. Raises where Ray would wait for ever for what the cluster does not have."""
    import ray

    fewest = launch.fewest
    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cpus, gpus = int(total.get("CPU", 0)), int(total.get("GPU", 0))
    use_gpu = launch.device == "cuda" or (launch.device == "auto" and gpus >= fewest)
    if use_gpu and gpus < fewest:
        raise ReductionError(
            f"launch.device='cuda', launch.workers={launch.workers}: Ray has {gpus} GPU(s), and each worker needs one; use "
            f"launch.workers={gpus or 1}{'' if gpus else ' and launch.device=cpu'}"
        )
    if cpus < fewest * launch.cpus_per_worker:
        raise ReductionError(
            f"launch.workers={launch.workers}, launch.cpus_per_worker={launch.cpus_per_worker}: the cluster has {cpus} CPU(s); "
            f"use at most {cpus // launch.cpus_per_worker} worker(s)"
        )
    return use_gpu
