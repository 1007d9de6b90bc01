"""Optuna's study: asks it for points that are worth training, and tells it what became of them.

Points above a budget, points that cannot be carried out and points that were trained before are told as failed at once,
with the reason, and another one is asked for.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from mlpreduce.budget import number
from mlpreduce.errors import ReductionError
from mlpreduce.search.spaces.choices import Walker
from mlpreduce.search.spaces.goals import OBJECTIVES, Budget
from mlpreduce.search.spaces.points import Point, Pricer
from mlpreduce.search.spaces.space import Space
from mlpreduce.search.study.settings import StudySettings
from mlpreduce.search.study.storage import key_of

__all__ = ["Asked", "Study", "create_sampler"]

_COSTLY = 3  # suggestions above the budget before one near them is sought that keeps it
_PATIENCE = 50  # suggestions without a new point after which there is none
_RETRIES = 2  # of a trial whose worker was lost


@dataclass(frozen=True)
class Asked:
    """A trial that is to be trained.

    Attributes:
        number: Optuna's.
        point: what is trained.
        reference: the name of the reference that it is, which is trained anyway.
        fixed: whether it is one of the space's own points, which are never ended early.
    """

    number: int
    point: Point
    reference: str | None
    fixed: bool


class Study:
    """A study over a search space. It alone writes to Optuna's storage.

    Args:
        settings: of the study.
        space: what is searched.
        pricer: prices the points.
        budgets: what a point must keep.
        storage: where the study is kept.
        rungs: epochs after which a trial may end early.
    """

    def __init__(
        self,
        settings: StudySettings,
        space: Space,
        pricer: Pricer,
        budgets: Sequence[Budget],
        storage: optuna.storages.BaseStorage,
        rungs: Sequence[int],
    ) -> None:
        self._settings, self._space, self._pricer, self._budgets = settings, space, pricer, tuple(budgets)
        self._walker, self._model = Walker(space, pricer), pricer.model
        self._storage = storage
        self._cheap: tuple[dict[str, Any], Point] | None = None
        self._asked: dict[int, Trial] = {}
        self.study = optuna.create_study(
            study_name=settings.name,
            storage=storage,
            directions=[OBJECTIVES[name][0] for name in settings.objectives],
            load_if_exists=True,
        )
        with warnings.catch_warnings():  # Optuna's tools show them; marked experimental since long
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.study.set_metric_names(list(settings.objectives))
        before = self.study.get_trials(deepcopy=False)
        # a sampler made again from the same seed would suggest the same again
        self.study.sampler = create_sampler(settings, seed=settings.seed + len(before))
        if len(settings.objectives) == 1:
            self.study.pruner = _pruner(settings, rungs)
        for trial in before:
            if trial.state is TrialState.RUNNING:  # of a process that has ended: nobody else owns the study
                self._give_up(trial, "the process that trained it has ended", retry="key" in trial.user_attrs)
        if not before:
            for choices in space.starts(self._model):
                self.study.enqueue_trial(choices, user_attrs={"fixed": True})

    def ask(self, references: Mapping[str, str]) -> Asked | None:
        """The next point to train; None where no other was found in the space.

        Args:
            references: names of the references by the keys of their points.
        """
        known = self._known()
        generator = random.Random(self._settings.seed + len(self.study.get_trials(deepcopy=False)))
        costly = 0
        for _ in range(_PATIENCE):
            try:
                trial = self.study.ask()
            except (ValueError, RuntimeError, ImportError) as error:
                raise ReductionError(
                    f"sampler {self._settings.sampler}: Optuna cannot suggest a point: {error}"
                ) from error
            try:
                point = self._pricer.price(self._space.suggest(trial, self._model))
            except Exception as error:  # ours, or whatever the user's function raises
                said = str(error) if isinstance(error, ReductionError) else f"{type(error).__name__}: {error}"
                why = "infeasible"
                self._reject(trial, why, said)
            else:
                why, said = self._objection(trial, point, known)
                if not why:
                    return self._begin(trial, point, references)
                self._reject(trial, why, said)
            costly += why == "infeasible"
            if why == "duplicate" or costly >= _COSTLY:  # a sampler may suggest again and again what it found best
                choices = self._near(trial.params, known, generator)
                if choices is None:
                    return None
                self.study.enqueue_trial(choices)
        return None

    def enqueue(self, choices: Mapping[str, Any], **attributes: Any) -> None:
        """Let choices be asked for before any others; `attributes` are kept with the trial."""
        self.study.enqueue_trial(dict(choices), user_attrs=attributes)

    def report(self, number: int, epoch: int, top1: float) -> bool:
        """Hand an epoch's accuracy to Optuna's pruner, with one objective; whether to end the trial."""
        trial = self._asked[number]
        trial.report(top1, epoch)
        return trial.should_prune()

    def note(self, number: int, name: str, value: Any) -> None:
        """Keep something with a trial that is being trained."""
        self._asked[number].set_user_attr(name, value)

    def screened(self, number: int, message: str) -> None:
        """End a trial before it is trained."""
        self.note(number, "screened", True)
        self.note(number, "message", message)
        self.tell(number, None)

    def tell(self, number: int, values: Sequence[float] | None) -> None:
        """End a trial: with its values, or early without."""
        state = TrialState.PRUNED if values is None else TrialState.COMPLETE
        self.study.tell(number, values, state=state, skip_if_finished=True)
        self._asked.pop(number, None)

    def fail(self, number: int, message: str, *, lost: bool = False) -> None:
        """End a trial that failed; of one whose worker was lost, the point is tried again."""
        frozen = next(trial for trial in self.study.get_trials(deepcopy=False) if trial.number == number)
        retries = frozen.user_attrs.get("retries", 0)
        retry = lost and retries < _RETRIES
        self._give_up(frozen, message, retry=retry, retries=retries + 1, why="lost" if retry else "failed")

    def release(self) -> None:
        """Give up all trials that are being trained, so that none is left running; they are the first of a resumed study."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self._give_up(trial, "interrupted", retry="key" in trial.user_attrs)

    def _give_up(self, trial: FrozenTrial, message: str, *, retry: bool, retries: int = 0, why: str = "lost") -> None:
        kept: dict[str, Any] = {
            name: trial.user_attrs[name]
            for name in ("fixed", "drawn", "estimate", "retries")
            if name in trial.user_attrs
        }
        self._mark(trial.number, why, message)
        self.study.tell(trial.number, state=TrialState.FAIL)
        self._asked.pop(trial.number, None)
        if retry:
            more = {"retry_of": trial.number, **({"retries": retries} if retries else {})}
            self.study.enqueue_trial(dict(trial.params), user_attrs={**kept, **more})

    def _reject(self, trial: Trial, why: str, message: str) -> None:
        self._mark(trial.number, why, message)
        self.study.tell(trial, state=TrialState.FAIL)

    def _mark(self, number: int, why: str, message: str) -> None:
        known = self._storage.get_study_id_from_name(self._settings.name)
        trial = self._storage.get_trial_id_from_study_id_trial_number(known, number)
        self._storage.set_trial_user_attr(trial, "why", why)
        self._storage.set_trial_user_attr(trial, "message", message)

    def _known(self) -> dict[str, str]:
        """What is not to be trained again: a trial that has it, by the keys of points."""
        return {
            key: f"trial {trial.number}"
            for trial in self.study.get_trials(deepcopy=False)
            if (key := key_of(trial))
            and (trial.state is not TrialState.FAIL or trial.user_attrs.get("why") == "failed")
        }

    def _objection(self, trial: Trial, point: Point, known: Mapping[str, str]) -> tuple[str, str]:
        """Why a point is not to be trained, in one word and at length; empty where it is."""
        over = []
        for budget in self._budgets:
            trial.set_constraint(budget.text, float(budget.excess(point.cost)))
            if budget.excess(point.cost) > 0:
                over.append(f"{budget.text} allows {number(budget.limit)}, it has {number(budget.of(point.cost))}")
        if over:
            return "infeasible", ", ".join(over)
        return ("duplicate", f"the point of {known[point.key]}") if point.key in known else ("", "")

    def _begin(self, trial: Trial, point: Point, references: Mapping[str, str]) -> Asked:
        reference = references.get(point.key)
        trial.set_user_attr("point", point.to_json())
        if reference is not None:
            trial.set_user_attr("reference", reference)
        trial.set_user_attr("key", point.key)  # last: a trial without it has not begun
        self._asked[trial.number] = trial
        return Asked(trial.number, point, reference, bool(trial.user_attrs.get("fixed")))

    def _near(
        self, choices: Mapping[str, Any], known: Mapping[str, str], generator: random.Random
    ) -> dict[str, Any] | None:
        """Choices of a new point within the budgets, near others; None where there is none."""

        def wanted(point: Point) -> bool:
            return point.key not in known and all(budget.excess(point.cost) <= 0 for budget in self._budgets)

        if self._budgets and self._cheap is None:
            self._cheap = self._walker.cheapest(self._budgets[0].cost, self._budgets)
        found = self._walker.near(choices, wanted, generator, self._cheap[0] if self._cheap else None)
        if found is None and self._cheap is not None and wanted(self._cheap[1]):
            return self._cheap[0]
        return found


def create_sampler(settings: StudySettings, seed: int) -> optuna.samplers.BaseSampler:
    """Optuna's sampler of a study; `auto` is TPE, which learns from few trials and from those that still run."""
    first = max(5, min(10, settings.trials // 4))  # points before anything is learnt
    if settings.sampler == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=max(2 * first, settings.workers))
    if settings.sampler == "gp":
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=first)
    if settings.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if settings.sampler == "grid":
        with warnings.catch_warnings():  # it is marked experimental since long
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return _Exhaustive(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=first, multivariate=True, constant_liar=True)


class _Exhaustive(optuna.samplers.BruteForceSampler):
    """Optuna's exhaustive sampler, for a study that is asked; when all is tried it would stop `Study.optimize`."""

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        pass


def _pruner(settings: StudySettings, rungs: Sequence[int]) -> optuna.pruners.BasePruner:
    if not rungs or settings.pruner == "none":
        return optuna.pruners.NopPruner()
    if settings.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=rungs[0])
    return optuna.pruners.SuccessiveHalvingPruner(min_resource=rungs[0], reduction_factor=settings.reduction)
