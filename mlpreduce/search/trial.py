"""What a worker does: train one point with one seed, and ask the owner after each epoch whether to go on."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from mlpreduce.errors import ReductionError
from mlpreduce.launch import Call, LaunchSettings
from mlpreduce.plugins import run_plugins
from mlpreduce.search.study.jobs import Job, Outcome, Work, work_of
from mlpreduce.train.events import Ended, Event, Progressed
from mlpreduce.train.settings import Run

__all__ = ["carry_out"]


class _Ended(Exception):
    """The owner ends the run after an epoch; its checkpoint is kept."""


def carry_out(call: Call, job: Job) -> Outcome:
    """Train the run of a job.

    Args:
        call: calls the owner.
        job: what is trained, and how.
    """
    work = work_of(job)
    failed: list[str] = []

    def receive(event: Event) -> None:
        match event.what:
            case Progressed():
                return
            case Ended("failed", message):
                failed.append(message)
        if call("report", job.id, event):
            raise _Ended

    began = 0.0
    try:
        run_plugins(work.run.plugins)
        if work.screen:
            from mlpreduce.launch import device_of
            from mlpreduce.train import Runtime
            from mlpreduce.train.sensitivity import sensitivity

            runtime = Runtime(device=device_of(work.launch), threads=work.launch.threads)
            change = sensitivity(work.run, work.screen, runtime)
            if call("screened", job.id, change):
                return Outcome("screened", f"the edit raises the loss by {change:.3g}")
        began = time.time()
        _train(work.run, work.launch, receive)
        outcome = Outcome("failed", failed[-1]) if failed else Outcome()
        outcome = replace(outcome, training=(began, time.time()))
        if work.estimate and not failed:
            outcome = _estimated(outcome, work)
        return outcome
    except _Ended:
        return Outcome("stopped", training=(began, time.time()))
    except ReductionError as error:
        return Outcome("failed", str(error), training=(began, time.time()) if began else None)


def _estimated(outcome: Outcome, work: Work) -> Outcome:
    from mlpreduce.launch import device_of
    from mlpreduce.train import Runtime
    from mlpreduce.train.supernet import estimate

    began = time.perf_counter()
    runtime = Runtime(device=device_of(work.launch), threads=work.launch.threads)
    found = estimate(work.run, work.estimate, runtime=runtime)
    return replace(outcome, estimates=found, seconds=time.perf_counter() - began)


def _train(run: Run, launch: LaunchSettings, receive: Any) -> None:
    from mlpreduce.launch import execute

    execute([run], launch, receive)
