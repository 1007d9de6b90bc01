"""Search for a reduction: an Optuna study over a search space. The only package that imports optuna.

    spaces      search spaces: Python files with a function `suggest`
    subjects    what is reduced: the model of a recipe, built when a point is priced
    hand        the same: a model in hand, of which all that points ask for is measured once
    allotting   widths at a budget, by what narrowing each MLP alone loses
    points      what a suggestion comes to: exact cost, pattern, and a key that equal reductions share
    choices     walks through a space without training: checks it, finds its cheapest point
    goals       objectives and budgets
    settings    what a study is
    storage     where it is kept, that one process at a time owns it, and what it tells of trials
    front       points compared, and which are trained with further seeds
    study       Optuna's study: asks for points worth training, and is told what became of them
    results     what else a study knows: what it is, and what each job came to
    valuing     how points are valued, as the owner sees it
    training    by training them: runs of a recipe
    scoring     by a score of the reduced model
    owner       decides what is valued next; a Ray actor where points are trained by Ray
    jobs        a point and a seed, as what a worker needs to train it
    stopping    which trials are ended early
    supernet    candidates for a supernet, and how well it ranks
    ranking     the supernet in a study
    trial       what a worker does
    driver      keeps the workers busy
    examples    those that a tune calibrates with, and those by which it scores
    tuning      `mlpreduce.tune`
    bare        the same points in plain Optuna, for the bench
    answer      what a study came to
    export      its points as recipes

The names are loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlpreduce.errors import require

if TYPE_CHECKING:
    from mlpreduce.search.cli import main
    from mlpreduce.search.driver import run
    from mlpreduce.search.settings import StudySettings
    from mlpreduce.search.spaces import list_spaces
    from mlpreduce.search.tuning import Tuning, tune

__all__ = ["StudySettings", "Tuning", "list_spaces", "main", "run", "tune"]

_HOME = {
    "StudySettings": "settings",
    "Tuning": "tuning",
    "list_spaces": "spaces",
    "main": "cli",
    "run": "driver",
    "tune": "tuning",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "run":
        from mlpreduce.search.cli import NEEDED

        require("mlpreduce.search.run", *NEEDED)
    if name == "tune":
        require("mlpreduce.tune", "optuna", "scipy")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
