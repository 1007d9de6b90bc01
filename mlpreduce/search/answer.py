"""What a study came to, from Optuna's storage alone: the document of its report, and what may be said of it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime
from statistics import fmean
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from mlpreduce.budget import cost_from
from mlpreduce.errors import ReductionError
from mlpreduce.records import SCHEMA, Limit, Objective, PointRun, StudyDocument, StudyPoint, Volume
from mlpreduce.search.spaces.goals import OBJECTIVES, read_budgets, value_of
from mlpreduce.search.spaces.points import Point
from mlpreduce.search.study.front import dominates, front, hypervolume, losses
from mlpreduce.search.study.settings import StudySettings
from mlpreduce.search.study.storage import counts, finished
from mlpreduce.search.supernet.ranking import told_agreement

__all__ = ["describe", "history", "metrics_of", "reference_values"]

_FEWEST = 8  # complete trials below which importances say nothing


def describe(study: optuna.Study) -> StudyDocument:
    """What a study has come to: its settings, all points with costs, values and runs, and what can be said of them.

    Raises:
        ReductionError: the study was not made by a search of this library.
    """
    known = study.user_attrs
    if "settings" not in known:
        raise ReductionError(f"study {study.study_name!r}: it was not made by mlpreduce search")
    settings = StudySettings.model_validate(known["settings"])
    references = [_reference(name, Point.from_json(point), known, settings) for name, point in known["names"].items()]
    trials = [_trial(trial, known, settings) for trial in finished(study)]
    scored = "scored" in known
    on_front = _front_of_scores(trials) if scored else _front_of(trials, settings)
    trials = [point.model_copy(update={"front": point.name in on_front}) for point in trials]
    baseline = next((point for point in references if not point.steps), None)
    budgets = () if baseline is None else read_budgets(settings.budgets, cost_from(baseline.cost))
    ranked = told_agreement(trials) if settings.supernet else None
    return StudyDocument(
        schema=SCHEMA,
        study=study.study_name,
        space=known["space"]["name"],
        recipe=known["recipe"]["name"],
        objectives=tuple(
            Objective(name=n, direction=OBJECTIVES[n][0], unit=OBJECTIVES[n][1])
            for n in dict.fromkeys([*settings.objectives, *(["params"] if scored else [])])
        ),
        budgets=tuple(Limit(text=b.text, cost=b.cost, limit=b.limit) for b in budgets),
        settings=settings.model_dump(mode="json"),
        counts=counts(study),
        environment=known.get("environment", {}),
        seconds=known.get("seconds", 0.0),
        points=(*references, *trials),
        hypervolume=_hypervolume(trials, study, settings) if baseline is not None and baseline.values else None,
        importance=_importance(study, settings),
        supernet=None if ranked is None else {**known.get("supernet", {}), **ranked},
        verdicts=(*_verdicts(references, trials, settings), *([] if ranked is None else [ranked["text"]])),
    )


def history(study: optuna.Study) -> list[tuple[float, tuple[float, ...]]]:
    """The trials of a study in the order of their ends: for each, all that had been spent by then, and its losses.

    What is spent are training multiply-accumulates of trials, those that were ended early too: epochs x MACs of an image, in
    units of one epoch of the baseline. References and further seeds are not counted, nor their values taken.
    """
    known = study.user_attrs
    settings = StudySettings.model_validate(known["settings"])
    whole = _whole(study).cost.macs
    found, total = [], 0.0
    for trial in sorted(finished(study), key=lambda trial: trial.datetime_complete or datetime.min):
        point = Point.from_json(trial.user_attrs["point"])
        run = known.get(f"runs:{point.key}", {}).get(str(settings.seeds[0]))
        total += 0.0 if run is None else run["epochs"] * point.cost.macs / whole
        if trial.state is TrialState.COMPLETE:
            found.append(
                (total, losses(dict(zip(settings.objectives, trial.values, strict=True)), settings.objectives))
            )
    return found


def reference_values(study: optuna.Study) -> dict[str, float]:
    """The worst that counts: a top-1 or score of 0, and of the other objectives the baseline's.

    Raises:
        ReductionError: no baseline was trained beside the study.
    """
    known = study.user_attrs
    settings = StudySettings.model_validate(known["settings"])
    values = _reference("baseline", _whole(study), known, settings).values
    if not values:
        raise ReductionError(f"study {study.study_name}: its baseline has not been trained")
    return {**values, value_of(settings.objectives): 0.0}


def metrics_of(document: StudyDocument) -> dict[str, float]:
    """What a study came to, as numbers for where it is tracked."""
    found = {f"trials/{name}": float(count) for name, count in document.counts.items()}
    volume = document.hypervolume
    return {**found, **({} if volume is None else {"hypervolume": volume.value})}


def _whole(study: optuna.Study) -> Point:
    for point in study.user_attrs["names"].values():
        if not point["steps"]:
            return Point.from_json(point)
    raise ReductionError(f"study {study.study_name}: it has no baseline among its --references to measure costs by")


def _trial(trial: FrozenTrial, known: Mapping[str, Any], settings: StudySettings) -> StudyPoint:
    point = Point.from_json(trial.user_attrs["point"])
    return _point(
        f"trial {trial.number}",
        "trial",
        point,
        known,
        settings,
        number=trial.number,
        state="complete" if trial.state is TrialState.COMPLETE else "pruned",
        params=dict(trial.params),
        **{name: trial.user_attrs[name] for name in ("drawn", "estimate") if name in trial.user_attrs},
    )


def _reference(name: str, point: Point, known: Mapping[str, Any], settings: StudySettings) -> StudyPoint:
    state = "complete" if known.get(f"runs:{point.key}") else "failed"
    return _point(name, "reference", point, known, settings, number=None, state=state, params={})


def _point(
    name: str, kind: str, point: Point, known: Mapping[str, Any], settings: StudySettings, **more: Any
) -> StudyPoint:
    every = known.get(f"runs:{point.key}", {})  # also of seeds that were asked for earlier
    order = {seed: number for number, seed in enumerate(settings.seeds)}
    runs = [PointRun.model_validate(run) for run in every.values()]
    runs.sort(key=lambda run: order.get(run.seed, len(order)))
    scores = [run.score for run in runs if run.score is not None]
    counted = [run for run in runs if run.score == max(scores)][:1] if scores else runs  # of the better repair
    values = {name: _mean(counted, name, point) for name in (settings.objectives if runs else ())}
    document = {
        **point.to_json(),
        "values": values,
        "runs": tuple(runs),
        "feasible": True,
        "front": False,
        "message": "",
    }
    return StudyPoint.model_validate({"name": name, "kind": kind, **document, **more})


def _mean(runs: Sequence[PointRun], objective: str, point: Point) -> float:
    """Of an objective that every run measures; another is a cost."""
    values = [value for run in runs if (value := run.value(objective)) is not None]
    return fmean(values) if len(values) == len(runs) else getattr(point.cost, objective)


def _losses(point: StudyPoint, settings: StudySettings) -> tuple[float, ...]:
    return losses(point.values, settings.objectives)


def _valued(trials: Sequence[StudyPoint]) -> list[StudyPoint]:
    """Trials that have come to their end and have a value."""
    return [point for point in trials if point.state == "complete" and point.values]


def _front_of(trials: Sequence[StudyPoint], settings: StudySettings) -> list[str]:
    return front({point.name: _losses(point, settings) for point in _valued(trials)})


def _front_of_scores(trials: Sequence[StudyPoint]) -> list[str]:
    """Size counts beside the score, which alone was sought."""
    valued = [point for point in trials if point.values]
    whole = [point for point in valued if any(run.final for run in point.runs)] or valued
    return front({point.name: (-point.values["score"], point.cost["params"]) for point in whole})


def _hypervolume(trials: Sequence[StudyPoint], study: optuna.Study, settings: StudySettings) -> Volume:
    worst = reference_values(study)
    found = [_losses(point, settings) for point in _valued(trials)]
    return Volume(value=hypervolume(found, losses(worst, settings.objectives)), reference=worst)


def _importance(study: optuna.Study, settings: StudySettings) -> dict[str, dict[str, float]]:
    """How much each parameter of the space decides whether an objective is good (Optuna's PED-ANOVA)."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(complete) < _FEWEST:
        return {}
    found = {}
    for number, name in enumerate(settings.objectives):
        sign = -1 if OBJECTIVES[name][0] == "maximize" else 1

        def target(trial: FrozenTrial, number: int = number, sign: int = sign) -> float:
            return float(sign * trial.values[number])

        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        with warnings.catch_warnings():  # that less is better is known, and seen to
            warnings.simplefilter("ignore", UserWarning)
            found[name] = optuna.importance.get_param_importances(study, evaluator=evaluator, target=target)
    return found


def _verdicts(references: Sequence[StudyPoint], trials: Sequence[StudyPoint], settings: StudySettings) -> list[str]:
    """For each reference that is a reduction, whether a trial is as good or better in all objectives."""
    value = value_of(settings.objectives)
    others = [name for name in settings.objectives if name != value]
    told = []
    if settings.inherit != "none":
        told.append(
            f"Trials started from trained weights (inherit={settings.inherit}) and references "
            f"{'too, but for the baseline' if settings.inherit == 'baseline' else 'did not'}: compare with care."
        )
    for reference in references:
        if not reference.steps or not reference.values:
            continue
        wanted = _losses(reference, settings)
        better = [trial for trial in _valued(trials) if dominates(_losses(trial, settings), wanted)]
        name = reference.name
        if not better:
            told.append(f"None of {len(trials)} trials dominates {name} ({', '.join(settings.objectives)}).")
            continue
        best = max(better, key=lambda trial: (len(trial.runs), trial.values[value]))
        costs = ", ".join(f"{o} {best.values[o]:,.6g} to {reference.values[o]:,.6g}" for o in others)
        both = [point.values[value] for point in (best, reference)]
        text = "score {:.4f} to {:.4f}" if value == "score" else "top-1 {:.2f} to {:.2f}"
        sure = "" if value == "score" else f" {_paired(best.runs, reference.runs)}"
        told.append(
            f"{len(better)} of {len(trials)} trials dominate {name}; {best.name}: {text.format(*both)}"
            f"{', ' + costs if costs else ''}.{sure}"
        )
    return told


def _paired(ours: Sequence[PointRun], theirs: Sequence[PointRun]) -> str:
    """How sure a difference in top-1 is, over the seeds that both have."""
    from scipy import stats

    by_seed = {run.seed: run.top1 for run in theirs if run.top1 is not None}
    pairs = [(run.top1, by_seed[run.seed]) for run in ours if run.top1 is not None and run.seed in by_seed]
    chosen = "The first seed chose the trial, so its own top-1 there is more likely too high than too low."
    if len(pairs) < 2 or len({round(a - b, 9) for a, b in pairs}) < 2:
        return f"n = {len(pairs)}, too small to conclude. {chosen}"
    p = float(stats.ttest_rel(*zip(*pairs, strict=True)).pvalue)
    small = ", n is too small to conclude" if len(pairs) < 3 else ""
    return f"Paired t-test over {len(pairs)} seeds: p = {p:.2f}{small}. {chosen}"
