"""The owner of a study: the only process that writes to Optuna's storage and to MLflow. It decides what is valued next.

All it knows can be read again from the storage and from what its valuer keeps, so it can end at any moment.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from mlpreduce.errors import ReductionError
from mlpreduce.records import StudyDocument
from mlpreduce.search.spaces.goals import read_budgets
from mlpreduce.search.spaces.points import Point, Pricer
from mlpreduce.search.spaces.space import Space, Suggestion
from mlpreduce.search.study.jobs import Job, Kind, Outcome, Told
from mlpreduce.search.study.results import Results
from mlpreduce.search.study.settings import StudySettings
from mlpreduce.search.study.storage import claim_problem, counts, finished, key_of, opened, point_of
from mlpreduce.search.study.study import Study
from mlpreduce.search.study.valuing import Valuer
from mlpreduce.train.events import Event

__all__ = ["Owner"]

_RETRIES = 2  # of a job whose worker was lost
_FAILURES = 5  # trials that fail one after the other before the study is given up


class Owner:
    """Decides what is valued next, and keeps what is known.

    Args:
        settings: of the study.
        space: what is searched.
        pricer: prices points.
        valuer: makes jobs of points.
        url: of Optuna's storage.
        resume: whether the storage may have the study already.
    """

    def __init__(
        self, settings: StudySettings, space: Space, pricer: Pricer, valuer: Valuer, url: str, resume: bool
    ) -> None:
        self._settings, self._valuer, self._held = settings, valuer, ExitStack()
        storage = self._held.enter_context(opened(url, settings.name))
        if (problem := claim_problem(storage, settings.name, resume)) is not None:
            self._held.close()
            raise ReductionError(problem)
        self._references = valuer.references()
        budgets = read_budgets(settings.budgets, pricer.price(Suggestion((), {})).cost)
        self._study = Study(settings, space, pricer, budgets, storage, valuer.rungs)
        self._results = Results(self._study.study, settings)
        names = {name: point.to_json() for name, point in self._references.items()}
        known = {**valuer.facts(), "space": {"name": space.name, "digest": space.digest}, "names": names}
        try:
            self._results.keep(known, valuer.differences)
        except ReductionError:
            self._held.close()
            raise
        valuer.open(self._study, self._results, space, budgets)
        self._running: dict[int, Job] = {}
        self._again: list[Job] = []  # jobs whose workers were lost
        self._failed: set[tuple[str, int]] = set()  # jobs besides trials that failed: their points and parts
        self._aliases: dict[str, int] = {}  # trials that are references, by their key
        self._jobs = self._failures = 0
        self._exhausted = self._closed = False

    def next_job(self) -> Job | None:
        """What to do now; None where nothing is to begin.

        What goes before all others, references, trials, then further parts for the front.
        """
        job = (
            self._again.pop() if self._again else self._first() or self._reference() or self._trial() or self._further()
        )
        if job is not None:
            self._running[job.id] = job
            self._valuer.begin(job)
        return job

    def report(self, job_id: int, event: Event) -> bool:
        """Take an event of a job; whether it is to end now."""
        job = self._running.get(job_id)
        return job is not None and not self._closed and self._valuer.report(job, event)

    def screened(self, job_id: int, change: float) -> bool:
        """Take by how much an edit raises the loss of trained weights; whether the trial ends before it is trained."""
        job = self._running.get(job_id)
        if job is None or self._closed:
            return False
        if job.number is not None:
            self._study.note(job.number, "sensitivity", change)
        return self._valuer.screened(job, change)

    def done(self, job_id: int, outcome: Outcome) -> Told:
        """A job has ended; tells what it came to."""
        self.flush()
        job = self._running.pop(job_id)
        found = self._valuer.end(job, outcome)
        value = None if found is None else self._results.add(job.key, job.part, found)
        if job.number is not None and job.kind == "trial":
            self._end_trial(job.number, job, outcome, value)
        elif value is None:
            self._give_up(job, outcome.message)
        elif job.kind == "first":
            self._valuer.took(job, outcome)
        elif job.key in self._aliases and job.part == self._valuer.parts[0]:
            self._study.tell(self._aliases.pop(job.key), self._results.values(job.point))
        return Told(job, outcome.status, outcome.message, value)

    def lost(self, job_id: int, message: str) -> Told:
        """The worker of a job ended; it is tried again, from where it was."""
        self.flush()
        job = self._running.pop(job_id)
        if job.number is not None and job.kind == "trial":
            self._study.fail(job.number, message, lost=True)
            self._exhausted = False  # its point is tried again
            self._fails(message)
        elif job.retries < _RETRIES:
            self._again.append(replace(job, id=self._number(), retries=job.retries + 1))
        else:
            self._give_up(job, message)
        return Told(job, "lost", message)

    def ask_no_more(self) -> None:
        """Begin no further trial."""
        self._exhausted = True

    def flush(self) -> None:
        """Keep what has been reported."""
        self._valuer.flush()

    def counts(self) -> dict[str, int]:
        """How many trials ended how."""
        return counts(self._study.study)

    def document(self, seconds: float) -> StudyDocument:
        """What is known of the study, for its report."""
        from mlpreduce.search.answer import describe

        self.flush()
        self._results.set("seconds", self._results.get("seconds", 0.0) + seconds)
        if (facts := self._valuer.environment()) is not None:
            self._results.set("environment", facts)
        return describe(self._study.study)

    def publish(self, metrics: dict[str, float], files: list[str]) -> None:
        """Attach the report to where the study is tracked."""
        self._valuer.publish(metrics, [Path(file) for file in files])

    def close(self) -> None:
        """Leave nothing running, and let go of the storage."""
        if not self._closed:
            self._closed = True
            self.flush()
            self._study.release()
            self._valuer.close()
            self._held.close()

    def _first(self) -> Job | None:
        """What goes before all others, if it is missing."""
        job = self._valuer.first()
        return None if job is None or self._is_busy(job.key, job.part) else replace(job, id=self._number())

    def _reference(self) -> Job | None:
        """A part of a reference that is missing."""
        for name, point in self._references.items():
            if self._valuer.waits(name):
                continue
            for part in self._valuer.parts_of(point):
                if part not in self._results.by_part(point.key) and not self._is_busy(point.key, part):
                    return self._job("reference", name, point, part)
        return None

    def _trial(self) -> Job | None:
        """A trial, if there are not enough yet."""
        names, first = {point.key: name for name, point in self._references.items()}, self._valuer.parts[0]
        while not (self._exhausted or self._valuer.waits(None)):
            running = sum(job.kind == "trial" for job in self._running.values())
            if len(finished(self._study.study)) + running >= self._settings.trials:
                return None
            asked = self._study.ask(names)
            if asked is None:
                self._exhausted = True
                return None
            if asked.reference is None:
                return self._job("trial", f"trial {asked.number}", asked.point, first, asked.number, asked.fixed)
            if first in self._results.by_part(asked.point.key):
                self._study.tell(asked.number, self._results.values(asked.point))
            else:
                self._aliases[asked.point.key] = asked.number  # it is being valued as a reference
        return None

    def _further(self) -> Job | None:
        """A further part of a point, when all trials have ended."""
        if any(job.kind == "trial" for job in self._running.values()):
            return None
        trials = {key_of(trial): trial for trial in finished(self._study.study) if trial.values}
        points = {key: point_of(trial) for key, trial in trials.items()}
        for key, part in self._valuer.further(points, list(self._references.values()), self._failed):
            if not self._is_busy(key, part):
                return self._job("further", f"trial {trials[key].number}", points[key], part, trials[key].number)
        return None

    def _job(
        self, kind: Kind, name: str, point: Point, part: int, number: int | None = None, fixed: bool = False
    ) -> Job:
        return replace(self._valuer.job(kind, name, point, part), id=self._number(), number=number, fixed=fixed)

    def _number(self) -> int:
        self._jobs += 1
        return self._jobs

    def _end_trial(self, number: int, job: Job, outcome: Outcome, value: float | None) -> None:
        status, message = outcome.status, outcome.message
        if outcome.training is not None:
            self._study.note(number, "training", list(outcome.training))
        if status == "screened":
            self._study.screened(number, message)
        elif value is None:
            message = message or "it ended before its first epoch"
            self._study.fail(number, message)
            self._fails(message)
        else:
            self._failures = 0
            self._study.tell(number, None if status == "stopped" else self._results.values(job.point))

    def _fails(self, message: str) -> None:
        self._failures += 1
        if self._failures >= _FAILURES:
            raise ReductionError(f"search: {self._failures} trials failed one after the other; the last: {message}")

    def _give_up(self, job: Job, message: str) -> None:
        """Do without a job that is no trial.

        Raises:
            ReductionError: others need what it gives.
        """
        self._failed.add((job.key, job.part))
        if job.key in self._aliases and job.part == self._valuer.parts[0]:
            self._study.fail(self._aliases.pop(job.key), message)
        self._valuer.give_up(job, message)

    def _is_busy(self, key: str, part: int) -> bool:
        """Whether a part is being valued, or is to be tried again, or failed."""
        waiting = [*self._running.values(), *self._again]
        return (key, part) in self._failed or any(job.key == key and job.part == part for job in waiting)
