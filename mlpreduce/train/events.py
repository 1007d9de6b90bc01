"""What a run tells while it trains, on worker 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Ended", "EpochEnded", "Event", "Progressed", "Started"]

Entry = Mapping[str, Any]  # of one epoch, as the record of a run has it


@dataclass(frozen=True)
class Started:
    """Training begins, or goes on.

    Attributes:
        facts: what the record of a run keeps of it.
        history: the epochs that were trained before.
        notes: what happened that the user did not ask for.
    """

    facts: Mapping[str, Any]
    history: Sequence[Entry] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Progressed:
    """Every few seconds, within an epoch, from 1: its part that is done, the loss, images per second of all workers."""

    epoch: int
    fraction: float
    loss: float
    images_per_s: float


@dataclass(frozen=True)
class EpochEnded:
    """An epoch was trained and validated, and its checkpoint is written."""

    entry: Entry


@dataclass(frozen=True)
class Ended:
    """A run ended: "finished" or, with a message, "failed"."""

    status: str
    message: str = ""


@dataclass(frozen=True)
class Event:
    """What a run tells, and which run: its variant, its seed, and how many epochs it has."""

    variant: str
    seed: int
    epochs: int
    what: Started | Progressed | EpochEnded | Ended
