"""A supernet in a study: trained first, then its estimates say which points are trained.

Some trials are drawn at random from the estimated points and trained to their end, so that the report can tell how well the
estimates rank; without them nothing is known of that. Then up to half of the trials are the estimated front.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mlpreduce.recipe import Recipe
from mlpreduce.records import StudyPoint
from mlpreduce.search.spaces.choices import Walker
from mlpreduce.search.spaces.goals import Budget
from mlpreduce.search.spaces.points import Pricer
from mlpreduce.search.spaces.space import Space, Suggestion
from mlpreduce.search.study.jobs import Job, job_of, work_of
from mlpreduce.search.study.settings import StudySettings
from mlpreduce.search.study.study import Study
from mlpreduce.search.supernet.candidates import Candidate, agreement, front_of, sample, supernet_of

__all__ = ["Ranking", "check_space", "told_agreement"]

_FEWEST = 5  # random points, unless there are fewer trials


class Ranking:
    """The points that a supernet estimates, and the trials that come of them.

    Args:
        settings: of the study; `supernet` epochs and `supernet_points`.
        recipe: how a point is trained.
        space: what is searched.
        pricer: prices its points.
        budgets: what a point must keep.
        folder: under which all runs lie.
    """

    def __init__(
        self,
        settings: StudySettings,
        recipe: Recipe,
        space: Space,
        pricer: Pricer,
        budgets: Sequence[Budget],
        folder: Path,
    ) -> None:
        self._settings, self._recipe, self._folder = settings, recipe, folder
        self._pricer, self._budgets, self._walker = pricer, budgets, Walker(space, pricer)

    @cached_property
    def candidates(self) -> list[Candidate]:
        """The points, the same for the same settings."""
        return sample(
            self._walker, self._pricer, self._budgets, self._settings.supernet_points, seed=self._settings.seed
        )

    def job(self) -> Job:
        """The job that trains the supernet and estimates the points: `estimate` has their steps.

        Raises:
            ReductionError: no point keeps the budgets, or the space sets how a point is trained.
        """
        train = self._recipe.train.model_copy(update={"epochs": self._settings.supernet})
        whole = self._pricer.price(Suggestion((), {}))
        job = job_of(
            "first",
            f"supernet of {len(self.candidates)} points",
            whole,
            self._settings.seeds[0],
            settings=self._settings,
            recipe=self._recipe.model_copy(update={"train": train}),
            folder=self._folder,
        )
        supernet = supernet_of(self._walker, self.candidates)
        directory = self._folder / "supernet" / f"seed{self._settings.seeds[0]}"
        changes = {"variant": "supernet", "supernet": supernet, "directory": str(directory)}
        points = tuple(candidate.point.steps for candidate in self.candidates)
        work = replace(work_of(job), run=work_of(job).run.model_copy(update=changes), estimate=points)
        return replace(job, key="supernet", work=work)

    def enqueue(self, estimates: Sequence[Mapping[str, float]], study: Study) -> None:
        """Let a study begin with random points, then with the estimated front."""
        some = min(max(_FEWEST, self._settings.trials // 4), self._settings.trials)
        half = self._settings.trials // 2
        best = front_of(self.candidates, estimates, self._settings.objectives, half + some)
        stride = max(1, len(self.candidates) // some)  # they were drawn at random, over all costs
        drawn = list(range(0, len(self.candidates), stride))[:some]
        for number in drawn:
            study.enqueue(self.candidates[number].choices, fixed=True, drawn="random", estimate=estimates[number])
        for number in [number for number in best if number not in drawn][:half]:
            study.enqueue(self.candidates[number].choices, drawn="front", estimate=estimates[number])


def check_space(ranking: Ranking) -> None:
    """Try some points as sub-models, before anything is trained.

    Raises:
        ReductionError: one cannot be a sub-model, or is trained in a way of its own.
    """
    from mlpreduce.train.supernet import check_points

    check_points(work_of(ranking.job()).run)


def told_agreement(trials: Sequence[StudyPoint]) -> dict[str, Any]:
    """How well a supernet ranks, from the trials of a study that were drawn at random and trained to their end.

    Args:
        trials: points of a study's document; of those that a supernet estimated, `estimate` and `drawn`.

    Returns:
        The fields of `Agreement`, and `text`: a sentence that has them.
    """
    every = [(trial, trial.runs[0].top1) for trial in trials if trial.drawn == "random" and trial.state == "complete"]
    rows = [(trial, top1) for trial, top1 in every if top1 is not None]
    found = agreement(
        [trial.estimate["loss"] for trial, _ in rows],
        [top1 for _, top1 in rows],
        [trial.cost["params"] for trial, _ in rows],
    )
    parts = []
    if found.spearman is not None:
        interval = "" if found.low is None else f" (95 % interval {found.low:.2f} to {found.high:.2f})"
        parts.append(
            f"Spearman {found.spearman:.2f}{interval}, Kendall {found.kendall:.2f}, p = {found.p_value:.2f} for no agreement"
        )
    if found.size_spearman is not None:
        parts.append(f"parameters alone: Spearman {found.size_spearman:.2f}, Kendall {found.size_kendall:.2f}")
    measured = "; ".join([*parts, *filter(None, [found.reason])])
    text = (
        f"Rank correlation of the supernet's loss with top-1 trained alone, over {found.n} random points: {measured}."
    )
    return {**vars(found), "text": text}
