"""How many workers of a group can share a batch. Ray Train may start any number between the fewest and the most."""

from __future__ import annotations

import os
from typing import Any

from mlpreduce.errors import ReductionError
from mlpreduce.train.settings import Run

__all__ = ["check_sharing", "regroup", "sharers"]


def sharers(run: Run, world: int) -> int:
    """The largest number of `world` workers that can share a batch evenly.

    Example:
        >>> run = Run(recipe="any", variant="baseline", workers=8, directory="/any")
        >>> [sharers(run, world) for world in (8, 7, 4, 3)]
        [8, 4, 4, 2]
    """
    return next(number for number in range(world, 0, -1) if _can_share(run, number))


def check_sharing(run: Run, fewest: int, most: int) -> None:
    """Whether a group of any size from `fewest` to `most` has at least `fewest` workers that share a batch.

    Raises:
        ReductionError: a group of some size has not.
    """
    wrong = [world for world in range(fewest, most + 1) if sharers(run, world) < fewest]
    if wrong:
        parts, could = run.workers * run.train.accum_steps, sharers(run, fewest - 1)
        raise ReductionError(
            f"launch.min_workers={fewest}, launch.workers={most}: of {' or '.join(map(str, wrong))} workers, which Ray may "
            f"start, only {sharers(run, wrong[0])} can share the {parts} micro-batches of an update evenly; use "
            f"launch.min_workers={could}, or a train.accum_steps with which launch.workers x train.accum_steps is a multiple "
            f"of each of these numbers"
        )


def regroup(rank: int, world: int, team: int, backend: str) -> bool:
    """Let the first `team` of `world` workers form the group; every worker calls it.

    Returns:
        Whether this worker is one of them.
    """
    import torch.distributed as dist

    host = os.environ["MASTER_ADDR"]  # worker 0's, as the other workers see it
    open_store: Any = dist.TCPStore  # type: ignore[attr-defined]
    store = open_store(host, 0, is_master=True, wait_for_workers=False) if rank == 0 else None  # at any free port
    port = [store.port if store else 0]
    dist.broadcast_object_list(port)
    dist.destroy_process_group()
    if rank < team and team > 1:
        store = store or open_store(host, port[0], is_master=False)
        dist.init_process_group(backend, store=store, rank=rank, world_size=team)
    return rank < team


def _can_share(run: Run, world: int) -> bool:
    try:
        run.accumulation(world)
    except ReductionError:
        return False
    return True
