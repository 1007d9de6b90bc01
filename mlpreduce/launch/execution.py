"""Trains runs in this process or on Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mlpreduce.errors import require
from mlpreduce.launch.here import in_process
from mlpreduce.launch.interrupts import interrupts
from mlpreduce.launch.locks import drive
from mlpreduce.launch.settings import LaunchSettings
from mlpreduce.launch.sharing import check_sharing
from mlpreduce.train.events import Event
from mlpreduce.train.settings import Run

__all__ = ["execute"]

Consume = Callable[[Event], None]


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
    with drive([run.directory for run in runs]) as text, interrupts() as shield:

        def receive(event: Event) -> None:
            with shield():
                consume(event)

        if launch.workers == 0:
            in_process(runs, launch, receive)
        else:
            require(f"launch.workers={launch.workers}", "ray")
            from mlpreduce.launch.group import on_ray
            from mlpreduce.train.names import check_reach

            check_reach(runs)
            on_ray(runs, launch, text, receive)
