"""Search for a reduction: an Optuna study over a search space. The only package that imports optuna.

    spaces      search spaces: Python files with a function `suggest`
    points      what a suggestion comes to: exact cost, pattern, and a key that equal reductions share
    choices     walks through a space without training: checks it, finds its cheapest point
    goals       objectives and budgets
    settings    what a study is
    storage     where it is kept, and that one process at a time owns it
    study       Optuna's study: asks for points worth training, and is told what became of them
    told        what the storage tells of trials
    results     what else a study knows: what it is, and what each run came to
    jobs        a point and a seed, as what a worker needs
    owner       decides what is trained next; a Ray actor
    stopping    which trials are ended early
    racing      which points are trained with further seeds
    supernet    candidates for a supernet, and how well it ranks
    ranking     the supernet in a study
    trial       what a worker does
    driver      keeps the workers busy
    bare        the same points in plain Optuna, for the bench
    answer      what a study came to
    export      its points as recipes

The names are loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlpreduce.extras import require

if TYPE_CHECKING:
    from mlpreduce.search.cli import main
    from mlpreduce.search.driver import run
    from mlpreduce.search.settings import StudySettings
    from mlpreduce.search.spaces import list_spaces

__all__ = ["StudySettings", "list_spaces", "main", "run"]

NEEDED = ("optuna", "mlflow", "matplotlib")  # to search; ray too, unless with workers=0
_HOME = {"StudySettings": "settings", "list_spaces": "spaces", "main": "cli", "run": "driver"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "run":
        require("mlpreduce.search.run", *NEEDED)
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
