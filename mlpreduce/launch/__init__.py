"""Runs training in this process or in a Ray Train worker group. The only part that imports ray.

One worker group trains all runs of a recipe, one after the other: starting Ray and importing torch and timm in each worker
takes longer than a short run. Events travel from worker 0 to the driver through a queue; the driver alone keeps records.
A search has a pool of workers instead, whose jobs are trials.

    settings     the `[launch]` section
    execution    what callers use: train all runs, here or on Ray
    here         training in this process, which is the driver or a worker
    pools        jobs on warm workers, and one owner of what they report
    teams        workers that keep what they work with, and an owner in this process
    cluster      the connection to Ray, and what it has
    group        the worker group: its trainer, its workers, its events
    sharing      how many workers of a group can share a batch
    locks        one process at a time writes into a run's directory
    interrupts   Ctrl-C, but never while something is being kept
"""

from __future__ import annotations

from mlpreduce.launch.execution import execute
from mlpreduce.launch.here import device_of, train_all
from mlpreduce.launch.pools import Call, Lost, Pool, pool
from mlpreduce.launch.settings import LaunchSettings
from mlpreduce.launch.teams import team

__all__ = ["Call", "LaunchSettings", "Lost", "Pool", "device_of", "execute", "pool", "team", "train_all"]
