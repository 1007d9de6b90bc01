"""What Optuna's storage tells of the trials of a study."""

from __future__ import annotations

import optuna
from optuna.trial import FrozenTrial, TrialState

from mlpreduce.search.points import Point

__all__ = ["counts", "finished", "key_of", "point_of"]


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that were trained, to their end or until they were ended early; none that is a reference."""
    states = (TrialState.COMPLETE, TrialState.PRUNED)
    trials = study.get_trials(deepcopy=False, states=states)
    return [trial for trial in trials if not {"reference", "screened"} & trial.user_attrs.keys()]


def counts(study: optuna.Study) -> dict[str, int]:
    """How many trials ended how."""
    trained = finished(study)
    trials = study.get_trials(deepcopy=False)
    failed = [trial.user_attrs.get("why") for trial in trials if trial.state is TrialState.FAIL]
    complete = sum(trial.state is TrialState.COMPLETE for trial in trained)
    return {
        "trained": len(trained),
        "complete": complete,
        "pruned": len(trained) - complete,
        "screened": sum("screened" in trial.user_attrs for trial in trials),
        **{why: failed.count(why) for why in ("infeasible", "duplicate", "failed", "lost")},
    }


def key_of(trial: FrozenTrial) -> str:
    """The key of a trial's point; empty where it has none yet."""
    return str(trial.user_attrs.get("key", ""))


def point_of(trial: FrozenTrial) -> Point:
    """The point of a trial."""
    return Point.from_json(trial.user_attrs["point"])
