"""Criteria by name, and a criterion with the options that a user gives."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from mlpreduce.criteria.given import SITES, Ranking
from mlpreduce.errors import ReductionError, call_text, check_name, check_number, check_one_of, did_you_mean
from mlpreduce.registry import add_entry_points, remember, taken
from mlpreduce.words.values import Config

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["GATE_OPTIONS", "Choice", "Criterion", "choose", "get_criterion", "list_criteria", "register_criterion"]

Needs = Literal["nothing", "weights", "images", "loss", "gates", "moments", "pairs"]
Function = Callable[..., "torch.Tensor | Ranking"]
Objective = Callable[["nn.Module", "torch.Tensor"], "torch.Tensor"]

GATE_OPTIONS = ("coefficient", "lr", "epochs")


@dataclass(frozen=True)
class Criterion:
    """A registered criterion.

    Attributes:
        name: what users write.
        function: `(units, *, ...)` or `(seen, *, ...)`.
        needs: what it looks at.
        objective: `(model, images) -> scalar`, the mean over the images, where its loss needs no labels; else None.
        probes: random sign vectors along which it looks at the second derivative of the loss; 0 for none.
        draws: whether it draws random numbers by `HiddenUnits.seed`, so that the runs of a recipe each draw their own.
        with_loss: `(options) -> bool`: whether one that needs pairs also looks at the loss.
        doubt: why others are better, which a plan with it says; empty if nothing is known.
    """

    name: str
    function: Function
    needs: Needs
    objective: Objective | None
    probes: int
    draws: bool
    with_loss: Callable[[Config], bool] | None
    doubt: str

    @property
    def options(self) -> dict[str, Any]:
        """Its options with their defaults."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}

    @property
    def of_data(self) -> bool:
        """Whether it looks at calibration data."""
        return self.needs in ("images", "loss", "gates", "moments", "pairs")


@dataclass(frozen=True)
class Choice:
    """A criterion with the options that a user has given."""

    criterion: Criterion
    options: Config

    def __str__(self) -> str:
        return call_text(self.criterion.name, self.options)

    @property
    def settings(self) -> Config:
        """All its options: what was given, and the defaults of the others."""
        return {**self.criterion.options, **self.options}

    @property
    def needs_loss(self) -> bool:
        """Whether it looks at a loss."""
        asked = self.criterion.with_loss
        return self.criterion.needs == "loss" or (asked is not None and asked(self.settings))

    @property
    def sites(self) -> tuple[str, ...]:
        """Leaves at which it looks."""
        site = self.settings.get("site", "act")
        check_one_of(f"criterion {self}: site", site, SITES)
        return SITES[site]

    @property
    def memory(self) -> float | None:
        """MiB that sums for it may take; None where it does not say."""
        limit: float | None = self.settings.get("memory")
        if limit is not None:
            check_number(f"criterion {self.criterion.name}: memory", limit)
        return limit

    def values(self, given: Any) -> torch.Tensor | Ranking:
        """What the criterion makes of units, of what they did, of their moments, or of their gates.

        Raises:
            ReductionError: it raises whatever it may, or gives no tensor.
        """
        import torch

        try:
            found: Any = self.criterion.function(given, **self.options)
        except ReductionError:
            raise
        except Exception as error:  # whatever a user's criterion raises
            raise ReductionError(f"criterion {self} raised {type(error).__name__}: {error}") from error
        parts = [found.order, found.scores] if isinstance(found, Ranking) else []
        if parts and not (all(isinstance(p, torch.Tensor) for p in parts) and not parts[0].is_floating_point()):
            raise ReductionError(
                f"criterion {self} gave a Ranking of {' and '.join(type(p).__name__ for p in parts)}; give the order as a "
                f"tensor of whole numbers, and the scores as one"
            )
        if not isinstance(found, torch.Tensor | Ranking):
            raise ReductionError(f"criterion {self} gave a {type(found).__name__}; give a tensor")
        return found


_CRITERIA: dict[str, Criterion] = {}


def register_criterion(
    name: str,
    *,
    needs: Needs = "weights",
    objective: Objective | None = None,
    probes: int = 0,
    draws: bool = False,
    with_loss: Callable[[Config], bool] | None = None,
    doubt: str = "",
) -> Callable[[Function], Function]:
    """Add a criterion under `name`.

    Packages can also name a criterion in the entry-point group `mlpreduce.criteria`; a plain function there needs the weights.

    Args:
        name: what users write in `criterion=`.
        needs: `nothing` (it then works on the meta device), `weights`, `images`, `loss` (images, their labels unless
            there is an `objective`, and a backward pass), `gates` (the same; its options are `coefficient`, `lr` and
            `epochs`), `moments` (means and variances of the units on images), or `pairs` (also of all pairs).
        objective: `(model, images) -> scalar`: a loss that needs no labels.
        probes: random sign vectors along which the second derivative is estimated.
        draws: whether it draws random numbers by `HiddenUnits.seed`; in a recipe each run then gives its own seed.
        with_loss: `(options) -> bool`: whether one that needs pairs also looks at the loss.
        doubt: why others are better; a plan with it says so.

    Raises:
        ReductionError: the name is no identifier or is taken, or an option has no default.
    """
    check_name("register_criterion", name)

    def decorate(function: Function) -> Function:
        if name in _CRITERIA:
            raise ReductionError(f"register_criterion({name!r}): {taken('criterion', name)}")
        check_one_of(f"register_criterion({name!r}): needs", needs, get_args(Needs))
        criterion = Criterion(name, function, needs, objective, probes, draws, with_loss, doubt)
        missing = [] if needs != "gates" else [key for key in GATE_OPTIONS if key not in criterion.options]
        if missing:
            raise ReductionError(
                f"register_criterion({name!r}): gates are learned with {', '.join(GATE_OPTIONS)}; add the option {missing[0]!r}"
            )
        for key, default in criterion.options.items():
            if default is inspect.Parameter.empty or key == "name":
                raise ReductionError(f"register_criterion({name!r}): option {key!r} needs a default and another name")
        _CRITERIA[name] = criterion
        remember("criterion", name, function)
        return function

    return decorate


def _load_entry_points() -> None:
    add_entry_points(
        "criterion", lambda: {name: found.function for name, found in _CRITERIA.items()}, register_criterion
    )


def get_criterion(name: str) -> Criterion:
    """The criterion of this name.

    Raises:
        ReductionError: there is none.
    """
    _load_entry_points()
    if name not in _CRITERIA:
        raise ReductionError(f"unknown criterion {name!r}{did_you_mean(str(name), _CRITERIA)}")
    return _CRITERIA[name]


def choose(criterion: str | Config) -> Choice:
    """A criterion by its name, or by `{"name": ..., option: value}`.

    Raises:
        ReductionError: there is no such criterion or option.
    """
    given = {"name": criterion} if isinstance(criterion, str) else criterion
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise ReductionError(
            f"criterion is {criterion!r}; it must be a name, or a name with options: "
            f'{{"name": "taylor", "site": "fc1"}}'
        )
    found = get_criterion(given["name"])
    options = {key: value for key, value in given.items() if key != "name"}
    for key in options:
        if key not in found.options:
            raise ReductionError(f"criterion {found.name} has no option {key!r}{did_you_mean(key, found.options)}")
    choice = Choice(found, options)
    if found.of_data:
        _ = choice.sites
    return choice


def list_criteria() -> list[str]:
    """Names of all criteria.

    Example:
        >>> "l2" in list_criteria()
        True
    """
    _load_entry_points()
    return sorted(_CRITERIA)
