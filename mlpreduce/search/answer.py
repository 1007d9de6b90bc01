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
from mlpreduce.search.front import dominates, front, hypervolume, losses
from mlpreduce.search.goals import OBJECTIVES, read_budgets, value_of
from mlpreduce.search.points import Point
from mlpreduce.search.ranking import told_agreement
from mlpreduce.search.settings import StudySettings
from mlpreduce.search.storage import counts, finished

__all__ = ["SCHEMA", "describe", "history", "metrics_of", "reference_values"]

SCHEMA = 1
_FEWEST = 8  # complete trials below which importances say nothing


def describe(study: optuna.Study) -> dict[str, Any]:
    """The document of a study: its settings, all points with costs, values and runs, and what can be said of them.

    Raises:
        ReductionError: the study was not made by a search of this library.
    """
    known = study.user_attrs
    if "settings" not in known:
        raise ReductionError(f"study {study.study_name!r}: it was not made by mlpreduce search")
    settings = StudySettings.model_validate(known["settings"])
    references = [_reference(name, Point.from_json(point), known, settings) for name, point in known["names"].items()]
    trials = [_trial(trial, known, settings) for trial in finished(study)]
    baseline = next((point for point in references if not point["steps"]), None)
    points = [*references, *trials]
    ranked = told_agreement(trials) if settings.supernet else None
    scored = "scored" in known
    if scored:  # size counts beside the score, which alone was sought
        valued = [point for point in trials if point["values"]]
        whole = [point for point in valued if any(run.get("final") for run in point["runs"])] or valued
        for name in front({p["name"]: (-p["values"]["score"], p["cost"]["params"]) for p in whole}):
            next(point for point in trials if point["name"] == name)["front"] = True
    for name in [] if scored else _front_of(trials, settings):
        next(point for point in trials if point["name"] == name)["front"] = True
    costs = None if baseline is None else cost_from(baseline["cost"])
    budgets = read_budgets(settings.budgets, costs) if costs is not None else ()
    return {
        "schema": SCHEMA,
        "study": study.study_name,
        "space": known["space"]["name"],
        "recipe": known["recipe"]["name"],
        "objectives": [
            {"name": n, "direction": OBJECTIVES[n][0], "unit": OBJECTIVES[n][1]}
            for n in dict.fromkeys([*settings.objectives, *(["params"] if scored else [])])
        ],
        "budgets": [{"text": b.text, "cost": b.cost, "limit": b.limit} for b in budgets],
        "settings": settings.model_dump(mode="json"),
        "counts": counts(study),
        "environment": known.get("environment", {}),
        "seconds": known.get("seconds", 0.0),
        "points": points,
        "hypervolume": _hypervolume(trials, study, settings) if baseline is not None and baseline["values"] else None,
        "importance": _importance(study, settings),
        "supernet": None if ranked is None else {**known.get("supernet", {}), **ranked},
        "verdicts": [*_verdicts(references, trials, settings), *([] if ranked is None else [ranked["text"]])],
    }


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
    values = _point("baseline", "reference", _whole(study), known, settings)["values"]
    if not values:
        raise ReductionError(f"study {study.study_name}: its baseline has not been trained")
    return {**values, value_of(settings.objectives): 0.0}


def metrics_of(document: dict[str, Any]) -> dict[str, float]:
    """What a study came to, as numbers for where it is tracked."""
    found = {f"trials/{name}": float(count) for name, count in document["counts"].items()}
    volume = document["hypervolume"]
    return {**found, **({} if volume is None else {"hypervolume": volume["value"]})}


def _whole(study: optuna.Study) -> Point:
    for point in study.user_attrs["names"].values():
        if not point["steps"]:
            return Point.from_json(point)
    raise ReductionError(f"study {study.study_name}: it has no baseline among its --references to measure costs by")


def _trial(trial: FrozenTrial, known: Mapping[str, Any], settings: StudySettings) -> dict[str, Any]:
    point = Point.from_json(trial.user_attrs["point"])
    state = "complete" if trial.state is TrialState.COMPLETE else "pruned"
    shown = _point(f"trial {trial.number}", "trial", point, known, settings)
    estimated: dict[str, Any] = {
        name: trial.user_attrs[name] for name in ("drawn", "estimate") if name in trial.user_attrs
    }
    return {**shown, "number": trial.number, "state": state, "params": dict(trial.params), **estimated}


def _reference(name: str, point: Point, known: Mapping[str, Any], settings: StudySettings) -> dict[str, Any]:
    shown = _point(name, "reference", point, known, settings)
    return {**shown, "state": "complete" if shown["runs"] else "failed"}


def _point(name: str, kind: str, point: Point, known: Mapping[str, Any], settings: StudySettings) -> dict[str, Any]:
    every = known.get(f"runs:{point.key}", {})  # also of seeds that were asked for earlier
    order = {seed: number for number, seed in enumerate(settings.seeds)}
    runs = sorted(every.values(), key=lambda run: order.get(run["seed"], len(order)))
    counted = [max(runs, key=lambda run: run["score"])] if "scored" in known and runs else runs  # of the better repair
    values = {
        objective: fmean(run[objective] for run in counted) if objective in runs[0] else getattr(point.cost, objective)
        for objective in (settings.objectives if runs else ())
    }
    document = point.to_json()
    return {
        "name": name,
        "kind": kind,
        "number": None,
        "key": point.key,
        "params": {},
        "steps": document["steps"],
        "settings": document["settings"],
        "cost": document["cost"],
        "pattern": document["pattern"],
        "values": values,
        "feasible": True,
        "front": False,
        "message": "",
        "runs": runs,
    }


def _losses(point: Mapping[str, Any], settings: StudySettings) -> tuple[float, ...]:
    return losses(point["values"], settings.objectives)


def _front_of(trials: Sequence[Mapping[str, Any]], settings: StudySettings) -> list[str]:
    return front({p["name"]: _losses(p, settings) for p in trials if p["state"] == "complete" and p["values"]})


def _hypervolume(trials: Sequence[Mapping[str, Any]], study: optuna.Study, settings: StudySettings) -> dict[str, Any]:
    worst = reference_values(study)
    found = [_losses(p, settings) for p in trials if p["state"] == "complete" and p["values"]]
    return {"value": hypervolume(found, losses(worst, settings.objectives)), "reference": worst}


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


def _verdicts(
    references: Sequence[Mapping[str, Any]], trials: Sequence[Mapping[str, Any]], settings: StudySettings
) -> list[str]:
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
        if not reference["steps"] or not reference["values"]:
            continue
        better = [
            trial
            for trial in trials
            if trial["state"] == "complete"
            and trial["values"]
            and dominates(_losses(trial, settings), _losses(reference, settings))
        ]
        name = reference["name"]
        if not better:
            told.append(f"None of {len(trials)} trials dominates {name} ({', '.join(settings.objectives)}).")
            continue
        best = max(better, key=lambda trial: (len(trial["runs"]), trial["values"][value]))
        costs = ", ".join(f"{o} {best['values'][o]:,.6g} to {reference['values'][o]:,.6g}" for o in others)
        both = [point["values"][value] for point in (best, reference)]
        text = "score {:.4f} to {:.4f}" if value == "score" else "top-1 {:.2f} to {:.2f}"
        sure = "" if value == "score" else f" {_paired(best['runs'], reference['runs'])}"
        told.append(
            f"{len(better)} of {len(trials)} trials dominate {name}; {best['name']}: {text.format(*both)}"
            f"{', ' + costs if costs else ''}.{sure}"
        )
    return told


def _paired(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> str:
    """How sure a difference in top-1 is, over the seeds that both have."""
    from scipy import stats

    by_seed = {run["seed"]: run["top1"] for run in theirs}
    pairs = [(run["top1"], by_seed[run["seed"]]) for run in ours if run["seed"] in by_seed]
    chosen = "The first seed chose the trial, so its own top-1 there is more likely too high than too low."
    if len(pairs) < 2 or len({round(a - b, 9) for a, b in pairs}) < 2:
        return f"n = {len(pairs)}, too small to conclude. {chosen}"
    p = float(stats.ttest_rel(*zip(*pairs, strict=True)).pvalue)
    small = ", n is too small to conclude" if len(pairs) < 3 else ""
    return f"Paired t-test over {len(pairs)} seeds: p = {p:.2f}{small}. {chosen}"
