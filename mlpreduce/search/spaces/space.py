"""Search spaces: Python files with a function `suggest`, found by name or path.

    def suggest(trial, model):         # `model` may be left out
        ratio = trial.suggest_float("ratio", 0.25, 1.0, step=0.25)
        return [("shallow", {"ratio": ratio})] if ratio < 1 else []

`trial` is Optuna's; what is returned are transforms and their arguments, in order. A file may also have `settings(trial)`,
which gives keys of the recipe and their values, and `POINTS`, choices that are tried first, or `points(model)` for them.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, Protocol

from mlpreduce.errors import ReductionError, call_text, did_you_mean, naming
from mlpreduce.files import shipped
from mlpreduce.graph import MLP
from mlpreduce.train.settings import Step
from mlpreduce.transforms import check_config

__all__ = ["InHand", "ModelView", "Space", "Suggestion", "list_spaces", "load_space"]


class InHand(Protocol):
    """What only a model in hand can tell of itself."""

    def widths(self, begin: str, more: Mapping[str, float], steps: int) -> dict[str, int]:
        """Widths of MLPs at the budgets, by name."""

    def limit(self, cost: str) -> float | None:
        """The most that the budgets leave of a cost, if one of them is of it."""


@dataclass(frozen=True)
class ModelView:
    """What a space may know of the model.

    Attributes:
        mlps: all MLPs, in order of execution.
        chains: for MLPs that may share with each other, their row numbers, as patterns of `grouped` count.
        trained: whether points start from trained weights.
        hand: the model, where it is in hand.
    """

    mlps: tuple[MLP, ...]
    chains: tuple[tuple[int, ...], ...]
    trained: bool = False
    hand: InHand | None = None

    @property
    def units(self) -> dict[str, dict[str, Any]]:
        """Ways to choose the units that stay, by name: arguments of `shallow`; of trained weights by data too."""
        found = {name: {"criterion": name} for name in ("first", "l2")}
        if self.trained:
            found["reconstruction"] = {"criterion": "reconstruction", "repair": "least_squares"}
        return found

    def widths(self, begin: str, more: Mapping[str, float], *, steps: int) -> dict[str, int]:
        """Widths of MLPs at the budgets, by name; those that stay as they are are left out.

        Args:
            begin: `worth`: those that move what the model gives least, by what narrowing each MLP alone does; `uniform`: equal
                parts.
            more: by what worth, or part, of each MLP is multiplied, by name.
            steps: widths of an MLP to choose from.

        Raises:
            ReductionError: the model is not in hand, so nothing is known of its weights.
        """
        if self.hand is None:
            raise ReductionError("the worth of units is known of a model in hand only; use mlpreduce.tune")
        return self.hand.widths(begin, more, steps)

    def limit(self, cost: str) -> float | None:
        """The most that the budgets leave of a cost, such as `params`; None where no budget is of it, or no model in hand."""
        return None if self.hand is None else self.hand.limit(cost)

    @property
    def owners(self) -> list[MLP]:
        """The MLPs with weights of their own."""
        return [mlp for mlp in self.mlps if mlp.owner == mlp.name]

    @property
    def longest(self) -> int:
        """Blocks of the longest chain: the largest group.

        Raises:
            ReductionError: no two MLPs may share.
        """
        if not self.chains:
            raise ReductionError("the model has no two MLPs that may share; search a space of widths")
        return max(map(len, self.chains))


@dataclass(frozen=True)
class Suggestion:
    """What a space suggests: the steps of a reduction, and keys of the recipe with their values."""

    steps: tuple[Step, ...]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Space:
    """A search space.

    Attributes:
        name: the file's, or the function's.
        source: its text; a study goes on only with the same.
        function: `suggest`.
        settings: gives keys of the recipe and their values, if there are any.
        points: choices that are tried first, by parameter, or a function of the model that gives them.
    """

    name: str
    source: str
    function: Callable[..., Any]
    settings: Callable[[Any], dict[str, Any]] | None = None
    points: tuple[dict[str, Any], ...] | Callable[[ModelView], Sequence[dict[str, Any]]] = ()

    def starts(self, model: ModelView) -> tuple[dict[str, Any], ...]:
        """Choices that are tried first, by parameter."""
        return tuple(map(dict, self.points(model))) if callable(self.points) else self.points

    @property
    def digest(self) -> str:
        """A fingerprint of the source."""
        return hashlib.sha256(self.source.encode()).hexdigest()[:16]

    @cached_property
    def _takes(self) -> int:
        return len(inspect.signature(self.function).parameters)

    def suggest(self, trial: Any, model: ModelView) -> Suggestion:
        """Ask the space for a point.

        Raises:
            ReductionError: what it gives are no transforms with arguments, or one of a name that does not exist.
        """
        given = self.function(trial) if self._takes == 1 else self.function(trial, model)
        call = f"search space {self.name}"
        if not isinstance(given, (list, tuple)) or not all(_is_step(step) for step in given):
            raise ReductionError(
                f'{call}: suggest gave {given!r}; it must give a list such as [("grouped", {{"group": 2}})]'
            )
        for name, config in given:
            with naming(f"{call}: {call_text(name, config)}"):
                check_config(name, config)
        settings = self.settings(trial) if self.settings is not None else {}
        if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
            raise ReductionError(
                f"{call}: settings gave {settings!r}; it must give keys of a recipe, such as {{'train.lr': 1e-3}}"
            )
        return Suggestion(tuple({"transform": name, **config} for name, config in given), settings)


def list_spaces() -> dict[str, Path]:
    """The search spaces that ship with the library, or lie in `search_spaces/` beside it in a checkout."""
    return {path.stem: path for path in sorted(shipped("search_spaces").glob("*.py"))}


def load_space(given: str | Path | Callable[..., Any]) -> Space:
    """A search space: a name of `list_spaces`, a path to a .py, or a function `suggest`.

    Raises:
        ReductionError: there is none of this name, or the file cannot be run or has no `suggest`.
    """
    if callable(given):
        try:
            source = inspect.getsource(given)
        except (OSError, TypeError):
            source = getattr(given, "__qualname__", repr(given))
        return Space(getattr(given, "__name__", "space"), source, given)
    path = Path(given)
    if path.suffix != ".py":
        known = list_spaces()
        if str(given) not in known:
            raise ReductionError(
                f"unknown search space {str(given)!r}{did_you_mean(str(given), known)}, or a path to a .py"
            )
        path = known[str(given)]
    if not path.is_file():
        raise ReductionError(f"search space {str(given)!r}: no such file; names: {', '.join(list_spaces())}")
    return _read(path.resolve())


def _read(path: Path) -> Space:
    spec = spec_from_file_location(f"mlpreduce_space_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ReductionError(f"search space {path}: Python cannot import it")
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        raise ReductionError(f"search space {path}: {type(error).__name__}: {error}") from error
    function = getattr(module, "suggest", None)
    if not callable(function):
        raise ReductionError(f"search space {path}: it has no function suggest(trial) or suggest(trial, model)")
    given: Sequence[dict[str, Any]] = getattr(module, "POINTS", ())
    settings, points = getattr(module, "settings", None), getattr(module, "points", None)
    first = points if callable(points) else tuple(map(dict, given))
    return Space(path.stem, path.read_text(encoding="utf-8"), function, settings, first)


def _is_step(step: object) -> bool:
    return isinstance(step, (list, tuple)) and len(step) == 2 and isinstance(step[0], str) and isinstance(step[1], dict)
