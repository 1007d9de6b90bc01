"""Importance criteria: which hidden units of an MLP stay. One criterion a file, all of them an order of the units.

A criterion is a function of one MLP. Its keyword parameters are its options, written `criterion={"name": "taylor",
"site": "fc1"}`. It is given

- `HiddenUnits`, if it needs nothing or the weights, and returns scores of the units (floating point, the larger the more
  important) or their order (integers, the most important first);
- `Seen`, if it needs images or a loss: what the units did for a few examples. It returns a value of each unit for each
  example; the score is the mean over all examples;
- gates of the units, learned on data, if it needs gates.

An order serves every width, so narrower choices are nested. Only scores can be compared between MLPs.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from mlpreduce.errors import ReductionError, call_text, check_name, check_one_of, did_you_mean
from mlpreduce.registry import add_entry_points, remember, taken

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mlpreduce.graph import MLP

__all__ = [
    "SITES",
    "Choice",
    "Criterion",
    "HiddenUnits",
    "Seen",
    "as_order",
    "choose",
    "derived_seed",
    "get_criterion",
    "list_criteria",
    "register_criterion",
    "unit_weights",
]

Needs = Literal["nothing", "weights", "images", "loss", "gates"]
Objective = Callable[["nn.Module", "torch.Tensor"], "torch.Tensor"]

# where a unit is looked at, and the leaves at which that is: what comes out of fc1, or goes into fc2
GATE_OPTIONS = ("coefficient", "lr", "epochs")
SITES = {"fc1": ("fc1",), "act": ("fc2",), "fc2": ("fc2",), "both": ("fc1", "fc2")}


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
    """

    name: str
    function: Callable[..., torch.Tensor]
    needs: Needs
    objective: Objective | None = None
    probes: int = 0
    draws: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Its options with their defaults."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}

    @property
    def of_data(self) -> bool:
        """Whether it looks at calibration data."""
        return self.needs in ("images", "loss", "gates")


@dataclass(frozen=True)
class Choice:
    """A criterion with the options that a user has given."""

    criterion: Criterion
    options: dict[str, Any]

    def __str__(self) -> str:
        return call_text(self.criterion.name, self.options)

    @property
    def sites(self) -> tuple[str, ...]:
        """Leaves at which it looks."""
        site = (self.criterion.options | self.options).get("site", "act")
        check_one_of(f"criterion {self}: site", site, SITES)
        return SITES[site]

    def values(self, given: Any) -> torch.Tensor:
        """What the criterion makes of units, of what they did, or of their gates.

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
        if not isinstance(found, torch.Tensor):
            raise ReductionError(f"criterion {self} gave a {type(found).__name__}; give a tensor")
        return found


@dataclass(frozen=True)
class HiddenUnits:
    """The hidden units of one MLP.

    Attributes:
        mlp: the MLP.
        tensor: gives the values of a parameter or buffer by its path.
        seed: for random choices; another one for each MLP.
        wanted: how many units of the order matter.
    """

    mlp: MLP
    tensor: Callable[[str], torch.Tensor]
    seed: int = 0
    wanted: int | None = None

    def __len__(self) -> int:
        return self.mlp.hidden_features

    def weights(self, *names: str) -> torch.Tensor:
        """What each unit is made of: see `unit_weights`."""
        return unit_weights(self.mlp, self.tensor, names or UNIT_WEIGHTS)


@dataclass(frozen=True)
class Seen:
    """What the hidden units of one MLP did for a few examples; of a tied MLP, in all its uses.

    Attributes:
        hidden: what fc2 was given, (examples, positions, hidden units); None unless images alone are needed.
        change: at each site, (examples, hidden units): the derivative of an example's loss by a factor on all a unit puts
            out there. By Euler's identity it is the sum over positions of z dL/dz at `fc1`, which equals the sum of w dL/dw
            over the unit's fc1 row and bias, and the sum of a dL/da at `fc2`, which equals that over its fc2 column.
        bend: at each site, an estimate of the second derivative by that factor, if the criterion asks for probes.
    """

    hidden: torch.Tensor | None
    change: Mapping[str, torch.Tensor]
    bend: Mapping[str, torch.Tensor]

    def at(self, site: str) -> torch.Tensor:
        """The change at `fc1`, `act` or `fc2`, or the sum over `both`: that over all weights of a unit."""
        return sum(self.change[leaf] for leaf in SITES[site])  # type: ignore[return-value]


UNIT_WEIGHTS = ("fc1.weight", "fc1.bias", "fc2.weight")

_CRITERIA: dict[str, Criterion] = {}


def register_criterion(
    name: str,
    *,
    needs: Needs = "weights",
    objective: Objective | None = None,
    probes: int = 0,
    draws: bool = False,
) -> Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]:
    """Add a criterion under `name`.

    Packages can also name a criterion in the entry-point group `mlpreduce.criteria`; a plain function there needs the weights.

    Args:
        name: what users write in `criterion=`.
        needs: `nothing` (it then works on the meta device), `weights`, `images`, `loss` (images, their labels unless
            there is an `objective`, and a backward pass), or `gates` (the same; its options are `coefficient`, `lr` and
            `epochs`).
        objective: `(model, images) -> scalar`: a loss that needs no labels.
        probes: random sign vectors along which the second derivative is estimated.
        draws: whether it draws random numbers by `HiddenUnits.seed`; in a recipe each run then gives its own seed.

    Raises:
        ReductionError: the name is no identifier or is taken, or an option has no default.
    """
    check_name("register_criterion", name)

    def decorate(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        if name in _CRITERIA:
            raise ReductionError(f"register_criterion({name!r}): {taken('criterion', name)}")
        check_one_of(f"register_criterion({name!r}): needs", needs, get_args(Needs))
        criterion = Criterion(name, function, needs, objective, probes, draws)
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


def choose(criterion: str | Mapping[str, Any]) -> Choice:
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


def derived_seed(seed: int, name: str) -> int:
    """A seed for one of several random choices that are to have nothing in common, whatever the seed they follow from."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ReductionError(f"seed is {seed!r}; it must be a whole number")
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7])


def list_criteria() -> list[str]:
    """Names of all criteria.

    Example:
        >>> "l2" in list_criteria()
        True
    """
    _load_entry_points()
    return sorted(_CRITERIA)


def as_order(answer: torch.Tensor) -> list[int]:
    """Units by importance from what a criterion returns; where scores are equal, the lower index first."""
    import torch

    if answer.is_floating_point():
        answer = torch.sort(answer, descending=True, stable=True).indices
    order: list[int] = answer.tolist()
    return order


def unit_weights(mlp: MLP, tensor: Callable[[str], torch.Tensor], names: Sequence[str] = UNIT_WEIGHTS) -> torch.Tensor:
    """What each hidden unit is made of: fc1 rows (both halves of a gate), biases, fc2 columns, in float32 or wider.

    What lies between fc1 and fc2, norms and convolutions, is of another scale and counts only if it is named.

    Args:
        mlp: the MLP.
        tensor: gives the values of a tensor by its path.
        names: such as "fc1.weight" or "norm.weight". Those that the MLP lacks are left out.

    Returns:
        A matrix (hidden units, values).

    Raises:
        ReductionError: the MLP has none of them.
    """
    import torch

    roles = {leaf.path: leaf.role for leaf in mlp.leaves}
    calls = {leaf.path: leaf.call for leaf in mlp.leaves}  # the layer around it, if there is one
    parts = []
    known = []
    for axis in mlp.axes:
        path, _, name = axis.tensor.rpartition(".")
        if roles.get(path) in ("fc1", "fc2") and name not in ("weight", "bias"):
            name = "weight"  # of a layer that is a product of factors
        known.append(f"{roles.get(path)}.{name}")
        if known[-1] not in names:
            continue
        values = tensor(f"{calls.get(path, path)}.{name}").detach()
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        if axis.groups > 1 and values.shape[axis.dim] == axis.size:  # inputs of a grouped convolution, not yet dense
            values = values.unflatten(0, (axis.groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)
        else:
            values = values.movedim(axis.dim, 0).reshape(values.shape[axis.dim], -1)
        parts += [values[offset : offset + mlp.hidden_features] for offset in axis.offsets]
    if not parts:
        near = did_you_mean(str(names[0]) if names else "", known)
        raise ReductionError(
            f"{mlp.name} has none of {', '.join(map(str, names)) or 'no names'} on its hidden axis{near}"
        )
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


from mlpreduce.criteria import (  # noqa: E402, F401  (they register themselves)
    activation,
    entropy_taylor,
    first,
    fisher,
    gate,
    gram_schmidt,
    hessian_diag,
    l1,
    l2,
    last,
    nvit,
    random,
    taylor,
)
