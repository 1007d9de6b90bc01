"""Points valued by a score of the reduced model: repaired from moments at first, and those of the front as by `plan` too."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import nn

from mlpreduce.errors import ReductionError
from mlpreduce.launch import Call
from mlpreduce.records import Mirror
from mlpreduce.search.spaces.goals import Budget
from mlpreduce.search.spaces.hand import ModelInHand
from mlpreduce.search.spaces.points import Point
from mlpreduce.search.spaces.space import Space
from mlpreduce.search.study.jobs import Job, Kind, Outcome
from mlpreduce.search.study.results import Results
from mlpreduce.search.study.settings import StudySettings
from mlpreduce.search.study.study import Study
from mlpreduce.train.events import Event
from mlpreduce.words.values import flatten

__all__ = ["QUICK", "WHOLE", "Score", "Scorer", "Scoring"]

_AGAIN = 3  # points that are repaired again
QUICK, WHOLE = 0, 1  # parts of a point: repaired from moments, and as `plan` repairs
Score = Callable[[nn.Module], float]


class Scorer:
    """Scores points; what a worker does.

    Args:
        hand: the model.
        score: of a reduced model, higher is better.
    """

    def __init__(self, hand: ModelInHand, score: Score) -> None:
        self._hand, self._score = hand, score

    def __call__(self, call: Call, job: Job) -> Outcome:
        """Score the point of a job."""
        began = time.monotonic()
        before = _state(self._hand.model)
        try:
            tree, _ = self._hand.reduced(job.point.steps, quick=job.part == QUICK)
            value = self._valued(tree)
            if _state(self._hand.model) != before:
                raise ReductionError(
                    "score: it changed the model that was given to tune; let it work on what it is given"
                )
        except ReductionError as error:
            return Outcome("failed", str(error))
        run = {"seed": job.part, "score": value, "epochs": 0, "seconds": time.monotonic() - began, "latency": None}
        return Outcome(run=run)

    def _valued(self, tree: nn.Module) -> float:
        before = _state(tree)
        try:
            value: Any = self._score(tree)
        except Exception as error:  # whatever a user's function raises
            raise ReductionError(f"score raised {type(error).__name__}: {error}") from error
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ReductionError(f"score gave {value!r}; it must be a finite number, the higher the better")
        if _state(tree) != before:
            raise ReductionError(
                "score changed the weights of the model that it was given, so its value is of another one"
            )
        return float(value)


def _state(tree: nn.Module) -> list[tuple[str, int, float, float]]:
    """What every tensor is, and two sums of it, by which a change shows."""
    named = [*tree.named_parameters(), *tree.named_buffers()]
    values = [(name, id(tensor), tensor.detach().double()) for name, tensor in named]
    return [(name, number, float(value.sum()), float(value.square().sum())) for name, number, value in values]


class Scoring:
    """Makes jobs of points of a model in hand.

    Args:
        settings: of the study.
        hand: the model.
        references: points that the study is compared with, by name.
        facts: what else the study hangs on, JSON values.
        home: directory of MLflow's store, if the study is tracked.
    """

    parts = (QUICK, WHOLE)
    rungs = ()

    def __init__(
        self,
        settings: StudySettings,
        hand: ModelInHand,
        references: dict[str, Point],
        facts: Mapping[str, Any],
        home: Path | None = None,
    ) -> None:
        self._settings, self._hand, self._facts, self._home = settings, hand, dict(facts), home
        self._mirror: Mirror | None = None
        self._parent = ""
        self._references = references

    def parts_of(self, point: Point) -> Sequence[int]:
        """Both, if they differ."""
        return self.parts if self._hand.is_quick(point.steps) else self.parts[:1]

    def facts(self) -> dict[str, Any]:
        """The model, the data and the score."""
        return {"recipe": {"name": self._hand.name}, "scored": self._facts}

    def differences(self, before: Mapping[str, Any]) -> list[str]:
        """By what the model, the data or the score differ from those that the study began with."""
        known = before.get("scored", {})
        return [
            f"{key}: was {known.get(key)}, is {value}" for key, value in self._facts.items() if known.get(key) != value
        ]

    def references(self) -> dict[str, Point]:
        """Points that the study is compared with, by name."""
        return self._references

    def open(self, study: Study, results: Results, space: Space, budgets: Sequence[Budget]) -> None:
        """The study is there; what is tracked is nested in one run of its own."""
        self._study, self._results = study, results
        if self._home is not None:
            self._mirror = Mirror(self._home, "mlpreduce tune")
            known = self._mirror.resumed(results.get("mlflow_run_id"))
            self._parent = known or self._mirror.begin({"mlflow.runName": self._settings.name})
            if known is None:
                document = {**self._settings.model_dump(mode="json"), **self._facts, "space": space.name}
                self._mirror.log_params(self._parent, flatten(document))
            results.set("mlflow_run_id", self._parent)

    def first(self) -> Job | None:
        """Nothing goes before."""
        return None

    def waits(self, reference: str | None) -> bool:
        """Nothing waits."""
        return False

    def job(self, kind: Kind, name: str, point: Point, part: int) -> Job:
        """A part of a point."""
        label = "repaired in turn" if part == WHOLE else "repaired at once"
        return Job(kind, name, point, part, label, point.key)

    def begin(self, job: Job) -> None:
        """Nothing is written before a score is there."""

    def report(self, job: Job, event: Event) -> bool:
        """There are no epochs."""
        return False

    def screened(self, job: Job, change: float) -> bool:
        """Nothing is screened."""
        return False

    def end(self, job: Job, outcome: Outcome) -> dict[str, Any] | None:
        """The score, if there is one."""
        found = None if outcome.run is None else dict(outcome.run)
        if found is not None:
            found = {**found, "final": job.part == self.parts_of(job.point)[-1]}
        if found is not None and job.part == QUICK and (estimate := self._hand.estimate(job.point.steps)):
            found = {**found, "estimate": estimate}
        if self._mirror is not None:
            self._track(self._mirror, job, outcome, found)
        return found

    def took(self, job: Job, outcome: Outcome) -> None:
        """Nothing goes before."""

    def give_up(self, job: Job, message: str) -> None:
        """A reference, or a point of the front, could not be scored; the whole model must be.

        Raises:
            ReductionError: it was the whole model.
        """
        if not job.point.steps:
            raise ReductionError(f"tune: the whole model cannot be scored: {message}")

    def further(
        self, points: Mapping[str, Point], others: Sequence[Point], failed: Collection[tuple[str, int]]
    ) -> list[tuple[str, int]]:
        """The best points by their first score."""
        best = sorted(points, key=lambda key: -self._results.by_part(key)[QUICK])[:_AGAIN]
        return [
            (key, WHOLE)
            for key in best
            if WHOLE in self.parts_of(points[key])
            and WHOLE not in self._results.by_part(key)
            and (key, WHOLE) not in failed
        ]

    def flush(self) -> None:
        """All is kept at once."""

    def environment(self) -> dict[str, Any] | None:
        """How well the estimate ranks, if enough points tell."""
        runs = [run[str(QUICK)] for name, run in self._results.all_runs().items() if str(QUICK) in run]
        pairs = [(-run["estimate"], run["score"]) for run in runs if run.get("estimate") is not None]
        if len(pairs) < 5:
            return None
        found = float(spearmanr(*zip(*pairs, strict=True))[0])
        return {"rank correlation of the errors of reconstruction with the score": found, "points": len(pairs)}

    def publish(self, metrics: dict[str, float], files: Sequence[Path]) -> None:
        """End the run of the study, with what it came to."""
        if self._mirror is not None and self._parent:
            self._mirror.log_metrics(self._parent, metrics)
            for path in files:
                self._mirror.log_file(self._parent, path)
            self._mirror.end(self._parent, "FINISHED")
            self._parent = ""

    def close(self) -> None:
        """Mark the run of a study that did not end."""
        if self._mirror is not None and self._parent:
            self._mirror.end(self._parent, "KILLED")

    def _track(self, mirror: Mirror, job: Job, outcome: Outcome, found: Mapping[str, Any] | None) -> None:
        """A run for a part of a point: its steps, what it costs, its score."""
        tags = {"mlflow.parentRunId": self._parent, "kind": job.kind, "point": job.key, "part": job.label}
        run_id = mirror.begin({**tags, "mlflow.runName": f"{job.name}, {job.label}"})
        mirror.log_params(run_id, {"steps": json.dumps(job.point.steps), "message": outcome.message})
        costs = {f"model/{name}": float(value) for name, value in asdict(job.point.cost).items()}
        mirror.log_metrics(run_id, costs | ({} if found is None else {"score": found["score"]}))
        mirror.end(run_id, "FAILED" if found is None else "FINISHED")
