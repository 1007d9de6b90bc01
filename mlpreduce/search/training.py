"""Points valued by training them: runs of a recipe, one for each seed, with records and MLflow's mirror of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlpreduce.errors import ReductionError
from mlpreduce.plugins import run_plugins
from mlpreduce.recipe import Recipe, differences
from mlpreduce.records import Recorder, summary
from mlpreduce.search.owner import Owner
from mlpreduce.search.spaces.goals import Budget
from mlpreduce.search.spaces.points import Point, Pricer
from mlpreduce.search.spaces.space import Space, load_space
from mlpreduce.search.stopping import Rungs
from mlpreduce.search.study.front import next_runs, pooled_deviation
from mlpreduce.search.study.jobs import Job, Kind, Outcome, job_of, nearest, pricer_of, references_of, work_of
from mlpreduce.search.study.results import Results
from mlpreduce.search.study.settings import StudySettings
from mlpreduce.search.study.storage import finished, point_of
from mlpreduce.search.study.study import Study
from mlpreduce.search.supernet.ranking import Ranking
from mlpreduce.train.events import EpochEnded, Event, Started
from mlpreduce.train.names import Name, check_known

__all__ = ["Training", "training_owner"]


def training_owner(
    settings: dict[str, Any],
    recipe: dict[str, Any],
    space: str | Callable[..., Any],
    url: str,
    output: str,
    resume: bool,
    needed: Sequence[Name] = (),
) -> Owner:
    """The owner of a study whose points are trained.

    Args:
        settings: of the study, as JSON values.
        recipe: how a point is trained, likewise.
        space: name, path or function of the search space.
        url: of Optuna's storage.
        output: directory of the study.
        resume: whether the storage may have the study already.
        needed: names that workers must know.
    """
    wanted, how = StudySettings.model_validate(settings), Recipe.model_validate(recipe)
    run_plugins(how.plugins)
    check_known(needed)  # before the space is run: what it registers itself, workers do not know
    pricer = pricer_of(wanted, how)
    return Owner(wanted, load_space(space), pricer, Training(wanted, how, pricer, Path(output)), url, resume)


class Training:
    """Trains points.

    Args:
        settings: of the study.
        recipe: how a point is trained.
        pricer: prices points.
        output: directory of the study.
    """

    def __init__(self, settings: StudySettings, recipe: Recipe, pricer: Pricer, output: Path) -> None:
        self._settings, self._recipe, self._pricer, self._output = settings, recipe, pricer, output
        self.parts = settings.seeds
        self.rungs = settings.rungs(recipe.train.epochs, recipe.train.warmup_epochs)
        self._references = references_of(settings, recipe, pricer)
        self._pending: deque[Event] = deque()  # events that are not recorded yet
        self._published = False

    def parts_of(self, point: Point) -> Sequence[int]:
        """All seeds."""
        return self.parts

    def facts(self) -> dict[str, Any]:
        """The recipe."""
        return {"recipe": self._recipe.model_dump(mode="json")}

    def differences(self, before: Mapping[str, Any]) -> list[str]:
        """Keys of the recipe that differ."""
        return list(differences(before["recipe"], self.facts()["recipe"]))

    def references(self) -> dict[str, Point]:
        """Points that the study is compared with, by name."""
        return self._references

    def open(self, study: Study, results: Results, space: Space, budgets: Sequence[Budget]) -> None:
        """Begin or go on with records and MLflow's runs."""
        self._study, self._results, folder = study, results, self._output / "points"
        document = {**self.facts()["recipe"], "name": self._settings.name}
        self._recorder = Recorder(folder, document, [], home=self._output, experiment="mlpreduce search")
        facts = {**self._settings.model_dump(mode="json"), "space": space.name, "recipe": self._recipe.name}
        parent = self._recorder.nest(self._settings.name, facts, results.get("mlflow_run_id"))
        results.set("mlflow_run_id", parent)
        self._ranking = Ranking(self._settings, self._recipe, space, self._pricer, budgets, folder)
        self._rungs = Rungs(self._settings, self._recipe, study, results, self._recorder)

    def first(self) -> Job | None:
        """The supernet, if its estimates are missing."""
        return self._ranking.job() if self._lacks_estimates() else None

    def waits(self, reference: str | None) -> bool:
        """Whether what is to be inherited is not trained yet, or estimates are missing."""
        if reference is not None:
            return reference != "baseline" and self._lacks_baseline()
        return self._lacks_baseline() or self._lacks_estimates()

    def job(self, kind: Kind, name: str, point: Point, part: int) -> Job:
        """A run with a seed."""
        folder, first = self._output / "points", f"seed{self.parts[0]}"
        weights = inherit = ""
        if self._settings.inherit == "baseline" and name != "baseline":
            weights = str(folder / self._references["baseline"].key / first)
        elif self._settings.inherit == "nearest" and kind != "reference" and (known := self._nearest(point)):
            inherit = str(folder / known / first)
        return job_of(
            kind,
            name,
            point,
            part,
            settings=self._settings,
            recipe=self._recipe,
            folder=folder,
            weights=weights,
            inherit=inherit,
        )

    def begin(self, job: Job) -> None:
        """Expect a record."""
        run = work_of(job).run
        kind = "supernet" if job.kind == "first" else job.kind
        tags = {"mlflow.runName": f"{job.name}-seed{run.seed}", "kind": kind, "point": job.key}
        self._recorder.add(run, tags | ({} if job.number is None else {"trial": str(job.number)}))

    def report(self, job: Job, event: Event) -> bool:
        """Take an event of a run; whether it is to end now."""
        self._pending.append(event)
        match event.what:
            case Started(_, history):
                for entry in history:  # a trial that is gone on with
                    self._rungs.reached(job, entry["epoch"], entry["top1"])
            case EpochEnded(entry):
                return self._rungs.stops(job, entry["epoch"], entry["top1"])
        return False

    def screened(self, job: Job, change: float) -> bool:
        """Take by how much an edit raises the loss of trained weights; whether the trial ends before it is trained."""
        self._rungs.reached(job, 0, -change)
        return self._rungs.stops_screened(job)

    def end(self, job: Job, outcome: Outcome) -> dict[str, Any] | None:
        """What the run's record comes to."""
        run = work_of(job).run
        record = self._recorder.record(run.variant, run.seed)
        if outcome.status == "stopped":
            self._recorder.stopped(run, "ended early: others of no more cost were better")
        if outcome.status == "failed" or record is None or not record.epochs:
            return None
        return {**summary(record).as_json(), "latency": record.profile.latency}

    def took(self, job: Job, outcome: Outcome) -> None:
        """Let the supernet's estimates say which points are trained."""
        self._ranking.enqueue(outcome.estimates, self._study)
        self._results.set("supernet", {"points": len(outcome.estimates), "seconds": outcome.seconds})

    def give_up(self, job: Job, message: str) -> None:
        """A run that is no trial has failed; a resumed study tries it again.

        Raises:
            ReductionError: trials need what it gives.
        """
        if job.name == "baseline" and self._lacks_baseline():
            raise ReductionError(f"--inherit baseline: the baseline failed: {message}")
        if job.kind == "first":
            raise ReductionError(f"--supernet {self._settings.supernet}: it failed: {message}")

    def further(
        self, points: Mapping[str, Point], others: Sequence[Point], failed: Collection[tuple[str, int]]
    ) -> list[tuple[str, int]]:
        """One more seed for points of the front, and for those that chance may have kept from it."""
        tops = {key: self._results.by_part(key) for key in points}
        every = [*tops.values(), *(self._results.by_part(point.key) for point in others)]
        deviation = pooled_deviation({str(number): list(values.values()) for number, values in enumerate(every)})
        costs = {key: self._results.costs(point) for key, point in points.items()}
        return next_runs(tops, costs, self.parts, deviation, failed)

    def flush(self) -> None:
        """Record what has been reported."""
        while self._pending:
            self._recorder.handle(self._pending.popleft())

    def environment(self) -> dict[str, Any] | None:
        """Versions and hardware of the runs."""
        return self._recorder.facts()

    def publish(self, metrics: dict[str, float], files: Sequence[Path]) -> None:
        """Attach the report to the study's MLflow run."""
        self._recorder.close(metrics, list(files), whole=True)
        self._published = True

    def close(self) -> None:
        """Mark what was being trained as interrupted."""
        self.flush()
        self._recorder.interrupt()
        if not self._published:
            self._recorder.close({}, [], whole=False)

    def _nearest(self, point: Point) -> str:
        """The key of the trial whose pattern is nearest, the same each time it is asked for; "" for the first trials."""
        name = f"inherit:{point.key}"
        if self._results.get(name) is None:
            found = nearest(point, (point_of(trial) for trial in finished(self._study.study) if trial.values))
            self._results.set(name, "" if found is None else found.key)
        return str(self._results.get(name))

    def _lacks_estimates(self) -> bool:
        return self._settings.supernet > 0 and self._results.get("supernet") is None

    def _lacks_baseline(self) -> bool:
        """Whether what is to be inherited is not trained yet."""
        if self._settings.inherit != "baseline":
            return False
        return self.parts[0] not in self._results.by_part(self._references["baseline"].key)
