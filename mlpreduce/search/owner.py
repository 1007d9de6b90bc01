"""The owner of a study: the only process that writes to Optuna's storage and to MLflow. It decides what is trained next.

All it knows can be read again from the storage and from the records of the runs, so it can end at any moment.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mlpreduce.errors import ReductionError
from mlpreduce.launch import Job
from mlpreduce.plugins import run_plugins
from mlpreduce.recipe import Recipe
from mlpreduce.records import Recorder
from mlpreduce.search.goals import read_budgets
from mlpreduce.search.jobs import job_of, nearest, references_of
from mlpreduce.search.points import Point, Pricer
from mlpreduce.search.racing import next_runs, pooled_deviation
from mlpreduce.search.ranking import Ranking
from mlpreduce.search.results import Results
from mlpreduce.search.rungs import Rungs
from mlpreduce.search.settings import StudySettings
from mlpreduce.search.spaces import Suggestion, load_space
from mlpreduce.search.storage import claim_problem, opened
from mlpreduce.search.study import Study
from mlpreduce.search.told import counts, finished, key_of, point_of
from mlpreduce.train.names import Name, check_known
from mlpreduce.train.settings import Run

__all__ = ["Owner"]

_RETRIES = 2  # of a run whose worker was lost
_FAILURES = 5  # trials that fail one after the other before the study is given up


class Owner:
    """Decides what is trained next, and keeps what is known.

    Args:
        settings: of the study, as JSON values.
        recipe: how a point is trained, likewise.
        space: name, path or function of the search space.
        url: of Optuna's storage.
        output: directory of the study.
        resume: whether the storage may have the study already.
        needed: names that workers must know.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        recipe: dict[str, Any],
        space: str | Callable[..., Any],
        url: str,
        output: str,
        resume: bool,
        needed: Sequence[Name] = (),
    ) -> None:
        self._settings, self._recipe = StudySettings.model_validate(settings), Recipe.model_validate(recipe)
        self._output, self._held = Path(output), ExitStack()
        run_plugins(self._recipe.plugins)
        check_known(needed)  # before the space is run: what it registers itself, workers do not know
        self._pricer = Pricer(self._recipe)
        storage = self._held.enter_context(opened(url, self._settings.name))
        if (problem := claim_problem(storage, self._settings.name, resume)) is not None:
            self._held.close()
            raise ReductionError(problem)
        self._references = references_of(self._settings, self._recipe, self._pricer)
        baseline = self._pricer.price(Suggestion((), {}))
        budgets = read_budgets(self._settings.budgets, baseline.cost)
        found = load_space(space)
        rungs = self._settings.rungs(self._recipe.train.epochs, self._recipe.train.warmup_epochs)
        self._study = Study(self._settings, found, self._pricer, budgets, storage, rungs)
        self._results = Results(self._study.study, self._settings)
        names = {name: point.to_json() for name, point in self._references.items()}
        known = {"recipe": recipe, "space": {"name": found.name, "digest": found.digest}, "names": names}
        try:
            self._results.keep(known)
        except ReductionError:
            self._held.close()
            raise
        document = {**recipe, "name": self._settings.name}
        self._recorder = Recorder(
            self._output / "points", document, [], home=self._output, experiment="mlpreduce search"
        )
        facts = {**settings, "space": found.name, "recipe": recipe["name"]}
        parent = self._recorder.nest(self._settings.name, facts, self._results.get("mlflow_run_id"))
        self._results.set("mlflow_run_id", parent)
        self._ranking = Ranking(self._settings, self._recipe, found, self._pricer, budgets, self._output / "points")
        self._rungs = Rungs(self._settings, self._recipe, self._study, self._results, self._recorder)
        self._pending: deque[dict[str, Any]] = deque()  # events that are not recorded yet
        self._running: dict[int, Job] = {}
        self._again: list[Job] = []  # runs whose workers were lost
        self._failed: set[tuple[str, int]] = set()  # runs besides trials that failed: their points and seeds
        self._aliases: dict[str, int] = {}  # trials that are references, by their key
        self._jobs = self._failures = 0
        self._exhausted = self._closed = self._published = False

    def next_job(self) -> Job | None:
        """What to train now; None where nothing is to begin.

        A supernet if one is asked for, references, then trials, then further seeds for the front.
        """
        job = (
            self._again.pop() if self._again else self._supernet() or self._reference() or self._trial() or self._race()
        )
        if job is not None:
            self._running[job["id"]] = job
            run = Run.model_validate(job["run"])
            tags = {"mlflow.runName": f"{job['name']}-seed{run.seed}", "kind": job["kind"], "point": job["key"]}
            self._recorder.add(run, tags | ({} if job["number"] is None else {"trial": str(job["number"])}))
        return job

    def report(self, job_id: int, event: dict[str, Any]) -> bool:
        """Take an event of a run; whether the run is to end now."""
        job = self._running.get(job_id)
        if job is None or self._closed:
            return False
        self._pending.append(event)
        if event["event"] == "start":
            for entry in event["history"]:  # a trial that is gone on with
                self._rungs.reached(job, entry["epoch"], entry["top1"])
        return event["event"] == "epoch" and self._rungs.stops(job, event["epoch"], event["top1"])

    def screened(self, job_id: int, change: float) -> bool:
        """Take by how much an edit raises the loss of trained weights; whether the trial ends before it is trained."""
        job = self._running.get(job_id)
        if job is None or self._closed:
            return False
        self._study.note(job["number"], "sensitivity", change)
        self._rungs.reached(job, 0, -change)
        return self._rungs.stops_screened(job)

    def done(self, job_id: int, outcome: dict[str, Any]) -> dict[str, Any]:
        """A job has ended; tells what it came to: "name", "status", "top1", "message"."""
        self.flush()
        job = self._running.pop(job_id)
        run = Run.model_validate(job["run"])
        record = self._recorder.record(run.variant, run.seed)
        status, top1 = outcome["status"], None
        if status == "stopped":
            self._recorder.stopped(run, "ended early: others of no more cost were better")
        if status != "failed" and record is not None and record["epochs"]:
            top1 = self._results.add(job["key"], run.seed, record)
        if job["kind"] == "trial":
            self._end_trial(job, outcome, top1)
        elif top1 is None:
            self._give_up(job, outcome["message"])
        elif job["kind"] == "supernet":
            self._ranking.enqueue(outcome["estimates"], self._study)
            self._results.set("supernet", {"points": len(outcome["estimates"]), "seconds": outcome["seconds"]})
        elif job["key"] in self._aliases and run.seed == self._settings.seeds[0]:
            self._study.tell(self._aliases.pop(job["key"]), self._results.values(Point.from_json(job["point"])))
        shown = {"name": job["name"], "kind": job["kind"], "seed": run.seed, "steps": job["point"]["steps"]}
        return {**shown, "status": status, "message": outcome["message"], "top1": top1}

    def lost(self, job_id: int, message: str) -> dict[str, Any]:
        """The worker of a job ended; it is tried again, from its last checkpoint."""
        self.flush()
        job = self._running.pop(job_id)
        if job["kind"] == "trial":
            self._study.fail(job["number"], message, lost=True)
            self._exhausted = False  # its point is tried again
            self._fails(message)
        elif job["retries"] < _RETRIES:
            self._again.append({**job, "id": self._number(), "retries": job["retries"] + 1})
        else:
            self._give_up(job, message)
        return {"name": job["name"], "kind": job["kind"], "status": "lost", "message": message, "top1": None}

    def flush(self) -> None:
        """Record what has been reported."""
        while self._pending:
            self._recorder.handle(self._pending.popleft())

    def counts(self) -> dict[str, int]:
        """How many trials ended how."""
        return counts(self._study.study)

    def document(self, seconds: float) -> dict[str, Any]:
        """What is known of the study, for its report."""
        from mlpreduce.search.answer import describe

        self.flush()
        self._results.set("seconds", self._results.get("seconds", 0.0) + seconds)
        if (facts := self._recorder.facts()) is not None:
            self._results.set("environment", facts)
        return describe(self._study.study)

    def publish(self, metrics: dict[str, float], files: list[str], whole: bool) -> None:
        """Attach the report to the study's MLflow run."""
        self._recorder.close(metrics, [Path(file) for file in files], whole=whole)
        self._published = True

    def close(self) -> None:
        """Leave nothing running, and let go of the storage."""
        if not self._closed:
            self._closed = True
            self.flush()
            self._study.release()
            self._recorder.interrupt()
            if not self._published:
                self._recorder.close({}, [], whole=False)
            self._held.close()

    def _supernet(self) -> Job | None:
        """The supernet, if its estimates are missing."""
        if not self._lacks_estimates() or self._is_busy("supernet", self._settings.seeds[0]):
            return None
        return {**self._ranking.job(), "id": self._number()}

    def _reference(self) -> Job | None:
        """A run of a reference that is missing."""
        for name, point in self._references.items():
            if self._lacks_baseline() and name != "baseline":
                continue
            for seed in self._settings.seeds:
                if seed not in self._results.top1(point.key) and not self._is_busy(point.key, seed):
                    return self._job("reference", name, point, seed)
        return None

    def _trial(self) -> Job | None:
        """A trial, if there are not enough yet."""
        names = {point.key: name for name, point in self._references.items()}
        while not (self._exhausted or self._lacks_baseline() or self._lacks_estimates()):
            running = sum(job["kind"] == "trial" for job in self._running.values())
            if len(finished(self._study.study)) + running >= self._settings.trials:
                return None
            asked = self._study.ask(names)
            if asked is None:
                self._exhausted = True
                return None
            if asked.reference is None:
                return self._job(
                    "trial", f"trial {asked.number}", asked.point, self._settings.seeds[0], asked.number, asked.fixed
                )
            if str(self._settings.seeds[0]) in self._results.runs(asked.point.key):
                self._study.tell(asked.number, self._results.values(asked.point))
            else:
                self._aliases[asked.point.key] = asked.number  # it is being trained as a reference
        return None

    def _race(self) -> Job | None:
        """One more seed for a point of the front, when all trials have ended."""
        if any(job["kind"] == "trial" for job in self._running.values()):
            return None
        points = {
            key_of(trial): (trial.number, point_of(trial)) for trial in finished(self._study.study) if trial.values
        }
        tops = {key: self._results.top1(key) for key in points}
        others = [self._results.top1(point.key) for point in self._references.values()]
        every = {str(n): list(t.values()) for n, t in enumerate([*tops.values(), *others])}
        costs = {key: self._results.costs(point) for key, (_, point) in points.items()}
        wanted = next_runs(tops, costs, self._settings.seeds, pooled_deviation(every), self._failed)
        for key, seed in wanted:
            if not self._is_busy(key, seed):
                number, point = points[key]
                return self._job("seed", f"trial {number}", point, seed, number)
        return None

    def _job(
        self, kind: str, name: str, point: Point, seed: int, number: int | None = None, fixed: bool = False
    ) -> Job:
        folder, first = self._output / "points", f"seed{self._settings.seeds[0]}"
        weights = inherit = ""
        if self._settings.inherit == "baseline" and name != "baseline":
            weights = str(folder / self._references["baseline"].key / first)
        elif self._settings.inherit == "nearest" and kind != "reference" and (known := self._nearest(point)):
            inherit = str(folder / known / first)
        job = job_of(
            kind,
            name,
            point,
            seed,
            settings=self._settings,
            recipe=self._recipe,
            folder=folder,
            weights=weights,
            inherit=inherit,
        )
        return {**job, "id": self._number(), "number": number, "fixed": fixed}

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
        return self._settings.seeds[0] not in self._results.top1(self._references["baseline"].key)

    def _number(self) -> int:
        self._jobs += 1
        return self._jobs

    def _end_trial(self, job: Job, outcome: dict[str, Any], top1: float | None) -> None:
        number, status, message = job["number"], outcome["status"], outcome["message"]
        if "training" in outcome:
            self._study.note(number, "training", outcome["training"])
        if status == "screened":
            self._study.screened(number, message)
        elif top1 is None:
            message = message or "it ended before its first epoch"
            self._study.fail(number, message)
            self._fails(message)
        else:
            self._failures = 0
            self._study.tell(
                number, None if status == "stopped" else self._results.values(Point.from_json(job["point"]))
            )

    def _fails(self, message: str) -> None:
        self._failures += 1
        if self._failures >= _FAILURES:
            raise ReductionError(f"search: {self._failures} trials failed one after the other; the last: {message}")

    def _give_up(self, job: Job, message: str) -> None:
        """Do without a run that is no trial; a resumed study tries it again.

        Raises:
            ReductionError: trials need what it gives.
        """
        self._failed.add((job["key"], job["run"]["seed"]))
        if job["key"] in self._aliases and job["run"]["seed"] == self._settings.seeds[0]:
            self._study.fail(self._aliases.pop(job["key"]), message)
        if job["name"] == "baseline" and self._lacks_baseline():
            raise ReductionError(f"--inherit baseline: the baseline failed: {message}")
        if job["kind"] == "supernet":
            raise ReductionError(f"--supernet {self._settings.supernet}: it failed: {message}")

    def _is_busy(self, key: str, seed: int) -> bool:
        """Whether a run is being trained, or is to be trained again, or failed."""
        waiting = [*self._running.values(), *self._again]
        return (key, seed) in self._failed or any(job["key"] == key and job["run"]["seed"] == seed for job in waiting)
