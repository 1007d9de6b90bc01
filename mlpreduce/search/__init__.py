"""Search for a reduction: an Optuna study over a search space. The only package that imports optuna.

    spaces      what may be chosen, and what it comes to
    study       Optuna's study, where it is kept, and what it is told
    supernet    one that says which points a study trains
    owner       decides what is valued next; a Ray actor where points are trained by Ray
    training    points valued by training them: runs of a recipe
    stopping    which trials are ended early
    trial       what a worker does
    driver      keeps the workers busy
    scoring     points valued by a score of the reduced model
    examples    those that a tune calibrates with, and those by which it scores
    tuning      `mlpreduce.tune`
    answer      what a study came to
    comparison  studies at equal cost
    export      points of a study as recipes
    verbs       what is done with a study that exists
    bare        the same points in plain Optuna, for the bench

The names are loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlpreduce.errors import require

if TYPE_CHECKING:
    from mlpreduce.search.cli import main
    from mlpreduce.search.driver import run
    from mlpreduce.search.spaces.space import list_spaces
    from mlpreduce.search.study.settings import StudySettings
    from mlpreduce.search.tuning import Tuning, tune

__all__ = ["StudySettings", "Tuning", "list_spaces", "main", "run", "tune"]

_HOME = {
    "StudySettings": "study.settings",
    "Tuning": "tuning",
    "list_spaces": "spaces.space",
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
