"""Whether a trial goes on at an epoch: successive halving for several objectives, Optuna's own pruner for one."""

from __future__ import annotations

from mlpreduce.launch import Job
from mlpreduce.recipe import Recipe
from mlpreduce.records import Recorder
from mlpreduce.search.points import Point
from mlpreduce.search.results import Results
from mlpreduce.search.settings import StudySettings
from mlpreduce.search.stopping import Halving
from mlpreduce.search.study import Study
from mlpreduce.search.told import finished, key_of, point_of

__all__ = ["Rungs"]


class Rungs:
    """What trials reached at the epochs that decide, those of earlier processes too.

    Args:
        settings: of the study.
        recipe: how a point is trained.
        study: the trials.
        results: what points cost.
        recorder: the records of their epochs.
    """

    def __init__(
        self, settings: StudySettings, recipe: Recipe, study: Study, results: Results, recorder: Recorder
    ) -> None:
        self._settings, self._epochs, self._study, self._results = settings, recipe.train.epochs, study, results
        after = settings.rungs(recipe.train.epochs, recipe.train.warmup_epochs) if settings.pruner == "asha" else ()
        self._halving = Halving((*((0,) if settings.screen else ()), *after), settings.reduction)
        for trial in study.study.get_trials(deepcopy=False):
            if "sensitivity" in trial.user_attrs:
                self._add(key_of(trial), point_of(trial), 0, -trial.user_attrs["sensitivity"])
        for trial in finished(study.study):
            record = recorder.record(key_of(trial), settings.seeds[0])
            for entry in record["epochs"] if record is not None else ():
                self._add(key_of(trial), point_of(trial), entry["epoch"], entry["top1"])

    def reached(self, job: Job, epoch: int, top1: float) -> None:
        """Remember what a trial reached at an epoch; at epoch 0, by how little the edit raises the loss."""
        if job["kind"] == "trial" and epoch in self._halving.rungs:
            self._add(job["key"], Point.from_json(job["point"]), epoch, top1)

    def stops_screened(self, job: Job) -> bool:
        """Whether a trial that was screened ends before it is trained."""
        return self._halving.stops(job["key"], 0) and not job["fixed"]

    def stops(self, job: Job, epoch: int, top1: float) -> bool:
        """Whether a run is to end now: a trial that others leave behind, but for those of the space's own points."""
        if job["kind"] != "trial" or self._settings.pruner == "none":
            return False
        if len(self._settings.objectives) == 1:
            stops = self._study.report(job["number"], epoch, top1)
        else:
            self.reached(job, epoch, top1)
            stops = self._halving.stops(job["key"], epoch)
        return stops and epoch < self._epochs and not job["fixed"]

    def _add(self, key: str, point: Point, epoch: int, top1: float) -> None:
        self._halving.add(key, epoch, self._results.early_losses(point, top1))
