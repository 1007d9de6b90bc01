"""What a worker does: train one point with one seed, and ask the owner after each epoch whether to go on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from mlpreduce.errors import ReductionError
from mlpreduce.launch import Call, Job, LaunchSettings
from mlpreduce.plugins import run_plugins
from mlpreduce.train.events import Ended, Event, Progressed
from mlpreduce.train.settings import Run, Step

__all__ = ["carry_out"]


class _Ended(Exception):
    """The owner ends the run after an epoch; its checkpoint is kept."""


def carry_out(call: Call, job: Job) -> dict[str, Any]:
    """Train the run of a job.

    Args:
        call: calls the owner.
        job: its `run`; `launch`: how it is trained; `screen`: images on which it is tried before, or 0; of a supernet,
            `estimate`: the points that it estimates.

    Returns:
        "status" ("finished", "screened", "stopped" or "failed"), "message"; where it was trained "training": when that began
        and ended, in seconds since 1970; of a supernet "estimates" of all points, and the "seconds" that these took.
    """
    run, launch = Run.model_validate(job["run"]), LaunchSettings.model_validate(job["launch"])
    outcome: dict[str, Any] = {"status": "finished", "message": ""}

    def receive(event: Event) -> None:
        match event.what:
            case Progressed():
                return
            case Ended("failed", message):
                outcome.update(status="failed", message=message)
        if call("report", job["id"], event):
            raise _Ended

    try:
        run_plugins(run.plugins)
        if job["screen"]:
            from mlpreduce.launch import device_of
            from mlpreduce.train import Runtime
            from mlpreduce.train.sensitivity import sensitivity

            runtime = Runtime(device=device_of(launch), threads=launch.threads)
            change = sensitivity(run, job["screen"], runtime)
            if call("screened", job["id"], change):
                return {"status": "screened", "message": f"the edit raises the loss by {change:.3g}"}
        began = time.time()
        try:
            _train(run, launch, receive)
        finally:
            outcome["training"] = [began, time.time()]
        if "estimate" in job and outcome["status"] == "finished":
            outcome |= _estimates(run, launch, job["estimate"])
    except _Ended:
        outcome.update(status="stopped")
    except ReductionError as error:
        outcome.update(status="failed", message=str(error))
    return outcome


def _estimates(run: Run, launch: LaunchSettings, points: Sequence[Sequence[Step]]) -> dict[str, Any]:
    from mlpreduce.launch import device_of
    from mlpreduce.train import Runtime
    from mlpreduce.train.supernet import estimate

    began = time.perf_counter()
    found = estimate(run, points, runtime=Runtime(device=device_of(launch), threads=launch.threads))
    return {"estimates": found, "seconds": time.perf_counter() - began}


def _train(run: Run, launch: LaunchSettings, receive: Any) -> None:
    from mlpreduce.launch import execute

    execute([run], launch, receive)
