"""Which trials are ended early: successive halving for several objectives, Optuna's own pruner for one.

Source: asynchronous successive halving (Li et al., arXiv 1810.05934), for several objectives by the number of trials that
dominate one (Schmucker et al., arXiv 2106.12639). Here the other objectives are costs and known exactly; only top-1 changes
from rung to rung, so a small model is never ended for being less accurate than a large one.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlpreduce.recipe import Recipe
from mlpreduce.records import Recorder
from mlpreduce.search.spaces.points import Point
from mlpreduce.search.study.front import dominates
from mlpreduce.search.study.jobs import Job
from mlpreduce.search.study.results import Results
from mlpreduce.search.study.settings import StudySettings
from mlpreduce.search.study.storage import finished, key_of, point_of
from mlpreduce.search.study.study import Study

__all__ = ["Halving", "Rungs"]


class Halving:
    """Decides at rungs which trials go on.

    Args:
        rungs: epochs after which it decides.
        reduction: one of so many goes on.
    """

    def __init__(self, rungs: Sequence[int], reduction: int) -> None:
        self.rungs, self._reduction = tuple(rungs), reduction
        self._losses: dict[int, dict[str, tuple[float, ...]]] = {rung: {} for rung in self.rungs}

    def add(self, key: str, epoch: int, losses: Sequence[float]) -> None:
        """Remember what a trial reached at a rung."""
        if epoch in self._losses:
            self._losses[epoch][key] = tuple(losses)

    def stops(self, key: str, epoch: int) -> bool:
        """Whether a trial ends at this epoch, among those that have reached it so far.

        Example:
            >>> halving = Halving([3, 9], reduction=3)
            >>> for number, loss in enumerate((0.5, 0.4, 0.3, 0.6)):
            ...     halving.add(str(number), 3, (loss, 100))
            >>> [halving.stops(str(number), 3) for number in range(4)]
            [True, True, False, True]
        """
        reached = self._losses.get(epoch, {})
        if key not in reached or len(reached) < self._reduction:
            return False
        above = {name: sum(dominates(other, mine) for other in reached.values()) for name, mine in reached.items()}
        better = sum(count < above[key] for count in above.values())
        return above[key] > 0 and better >= max(1, len(reached) // self._reduction)


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
            for entry in record.epochs if record is not None else ():
                self._add(key_of(trial), point_of(trial), entry.epoch, entry.top1)

    def reached(self, job: Job, epoch: int, top1: float) -> None:
        """Remember what a trial reached at an epoch; at epoch 0, by how little the edit raises the loss."""
        if job.kind == "trial" and epoch in self._halving.rungs:
            self._add(job.key, job.point, epoch, top1)

    def stops_screened(self, job: Job) -> bool:
        """Whether a trial that was screened ends before it is trained."""
        return self._halving.stops(job.key, 0) and not job.fixed

    def stops(self, job: Job, epoch: int, top1: float) -> bool:
        """Whether a run is to end now: a trial that others leave behind, but for those of the space's own points."""
        if job.kind != "trial" or job.number is None or self._settings.pruner == "none":
            return False
        if len(self._settings.objectives) == 1:
            stops = self._study.report(job.number, epoch, top1)
        else:
            self.reached(job, epoch, top1)
            stops = self._halving.stops(job.key, epoch)
        return stops and epoch < self._epochs and not job.fixed

    def _add(self, key: str, point: Point, epoch: int, top1: float) -> None:
        self._halving.add(key, epoch, self._results.early_losses(point, top1))
