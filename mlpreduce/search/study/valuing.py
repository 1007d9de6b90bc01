"""How a study values points: what its owner asks of trainings, and of scores alike."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mlpreduce.search.spaces.goals import Budget
from mlpreduce.search.spaces.points import Point
from mlpreduce.search.spaces.space import Space
from mlpreduce.search.study.jobs import Job, Kind, Outcome
from mlpreduce.search.study.results import Results
from mlpreduce.search.study.study import Study
from mlpreduce.train.events import Event

__all__ = ["Valuer"]


class Valuer(Protocol):
    """Makes jobs of points, and says what they came to. A point is valued in parts, such as trainings with several seeds."""

    @property
    def parts(self) -> Sequence[int]:
        """Of a point; the first for all trials, the others for those that `further` names."""

    def parts_of(self, point: Point) -> Sequence[int]:
        """Those of a reference."""

    @property
    def rungs(self) -> Sequence[int]:
        """Epochs after which a trial may end early."""

    def facts(self) -> dict[str, Any]:
        """What a study is besides its settings and its space, as JSON values."""

    def differences(self, before: Mapping[str, Any]) -> list[str]:
        """By what these facts differ from those of the study that is gone on with."""

    def references(self) -> dict[str, Point]:
        """Points that the study is compared with, by name."""

    def open(self, study: Study, results: Results, space: Space, budgets: Sequence[Budget]) -> None:
        """The study is there, and is this one."""

    def first(self) -> Job | None:
        """A job that goes before all others, if one is missing. The owner numbers it."""

    def waits(self, reference: str | None) -> bool:
        """Whether a reference, or trials, must wait for what another job comes to."""

    def job(self, kind: Kind, name: str, point: Point, part: int) -> Job:
        """A job, without what the owner adds: its number, and that of its trial."""

    def begin(self, job: Job) -> None:
        """A job goes to a worker."""

    def report(self, job: Job, event: Event) -> bool:
        """Take an event of a job; whether it is to end now."""

    def screened(self, job: Job, change: float) -> bool:
        """Take by how much an edit raises the loss of trained weights; whether the job ends there."""

    def end(self, job: Job, outcome: Outcome) -> dict[str, Any] | None:
        """What a job came to, with a value for each objective that is no cost; None where it has no value."""

    def took(self, job: Job, outcome: Outcome) -> None:
        """The job that went before all others has ended well."""

    def give_up(self, job: Job, message: str) -> None:
        """A job that is no trial has failed for good.

        Raises:
            ReductionError: others need what it gives.
        """

    def further(
        self, points: Mapping[str, Point], others: Sequence[Point], failed: Collection[tuple[str, int]]
    ) -> list[tuple[str, int]]:
        """Keys and parts that are still to be valued once all trials have ended.

        Args:
            points: of the trials, by key.
            others: the references.
            failed: what is not tried again.
        """

    def flush(self) -> None:
        """Keep what has been reported."""

    def environment(self) -> dict[str, Any] | None:
        """Versions and hardware, if they are known."""

    def publish(self, metrics: dict[str, float], files: Sequence[Path]) -> None:
        """Attach the report to where the study is tracked."""

    def close(self) -> None:
        """Leave nothing running."""
