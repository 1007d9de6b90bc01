"""Hidden units of a model that trains: which MLPs are its own, where a unit lies in fc1 and fc2, checks of arguments."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mlpreduce.edits import Axis, Plan, Slice, as_units
from mlpreduce.errors import ReductionError, check_number, check_whole
from mlpreduce.graph import MLP, module_at, refuse_wrapped
from mlpreduce.words.values import Config

__all__ = [
    "average_of",
    "entry",
    "fraction",
    "indices",
    "owners",
    "parameter",
    "part_of",
    "projections",
    "same_settings",
    "unit_norms",
    "whole",
    "with_units",
]


def owners(mlps: Sequence[MLP]) -> list[MLP]:
    """Each MLP once, in order of execution: of tied ones the first."""
    return [mlp for mlp in mlps if mlp.owner == mlp.name]


def projections(mlp: MLP) -> tuple[list[Axis], Axis]:
    """The axes of the hidden units in the weights of fc1 (a gated MLP may have two) and of fc2.

    Raises:
        ReductionError: one of the layers is none that has a weight for each pair of features, or has another around it.
    """
    for leaf in mlp.leaves:
        if leaf.around:
            raise ReductionError(
                f"{leaf.around} is a layer around {leaf.path}; merge the model first, or exclude {mlp.name}"
            )
    roles = {leaf.path: leaf.role for leaf in mlp.leaves}
    named = [(roles.get(axis.tensor.removesuffix(".weight")), axis) for axis in mlp.axes]
    fc1, fc2 = ([axis for role, axis in named if role == wanted and axis.groups == 1] for wanted in ("fc1", "fc2"))
    if not fc1 or not fc2:
        raise ReductionError(
            f"{mlp.name} has layers without a weight of all units; merge the model first, or exclude it"
        )
    return fc1, fc2[0]


def parameter(model: nn.Module, path: str, call: str) -> nn.Parameter:
    """The parameter at a path.

    Raises:
        ReductionError: there is none, so the model is another than it was.
    """
    leaf, _, name = path.rpartition(".")
    found = getattr(module_at(model, leaf), name, None)
    if not isinstance(found, nn.Parameter):
        raise ReductionError(
            f"{call}: {type(model).__name__} has no parameter {path!r}; give the model it was made for"
        )
    return found


def indices(axis: Axis, units: torch.Tensor) -> torch.Tensor:
    """Where units lie on an axis: a packed gate has each twice."""
    return torch.cat([units + offset for offset in axis.offsets])


def unit_norms(tensor: torch.Tensor, axis: Axis, hidden: int) -> torch.Tensor:
    """L1 norm of what each hidden unit has in a tensor, (hidden,), in float32 or wider, on the CPU."""
    values = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)).abs()
    sums = values.movedim(axis.dim, 0).flatten(1).sum(dim=1)
    return sum(sums[offset : offset + hidden] for offset in axis.offsets).cpu()  # type: ignore[union-attr]


def with_units(made: Plan, name: str, config: Config, units: Mapping[str, Sequence[int]]) -> Plan:
    """A plan of `shallow` as one of another name, which keeps other units in the same number."""
    edits = tuple(replace(e, units=as_units(units[e.mlp])) if isinstance(e, Slice) else e for e in made.edits)
    return replace(made, transform=name, config=config, edits=edits, costs=None, data=None, notes=())


def average_of(model: nn.Module, ema: Any, call: str) -> nn.Module | None:
    """The model of a moving average: of timm's and torch's classes the one they hold, else the module itself.

    Raises:
        ReductionError: it is none, is wrapped, is the model itself, or has other tensors.
    """
    if ema is None:
        return None
    held = getattr(ema, "module", None)
    other = held if isinstance(held, nn.Module) else ema
    if not isinstance(other, nn.Module):
        raise ReductionError(
            f"{call}: ema is a {type(ema).__name__}; give the averaged model, or what holds it as .module"
        )
    refuse_wrapped(other, call)
    ours, theirs = ({n: tuple(t.shape) for n, t in each.named_parameters()} for each in (model, other))
    if other is model:
        raise ReductionError(f"{call}: ema is the model itself; give its moving average, or leave it out")
    if ours != theirs:
        name = next(n for n in {**ours, **theirs} if ours.get(n) != theirs.get(n))
        raise ReductionError(
            f"{call}: ema is no average of this model: {name} has shape {theirs.get(name)} in it and {ours.get(name)} in the "
            f"model; give the average, or leave it out"
        )
    return other


def part_of(count: int, share: float) -> int:
    """How many of `count` a fraction of them is, rounded down but for rounding errors: 0.29 of 100 is 29."""
    return math.floor(count * share + 1e-9)


def same_settings(ours: Mapping[str, Any], state: Any, call: str) -> None:
    """Whether a state was written with the settings of the one that goes on.

    Raises:
        ReductionError: it was not.
    """
    theirs = entry(state, "settings", call)
    for key, value in ours.items():
        given = theirs.get(key) if isinstance(theirs, Mapping) else None
        if given != value:
            raise ReductionError(f"{call}: the state was written with {key}={given!r}, and this has {key}={value!r}")


def entry(state: Any, key: str, call: str) -> Any:
    """What a state dict has under a key.

    Raises:
        ReductionError: it has none.
    """
    if not isinstance(state, Mapping) or key not in state:
        raise ReductionError(f"{call}: the state has no {key!r}; give what state_dict() of this class returned")
    return state[key]


def fraction(name: str, value: Any, call: str, *, least: float = 0.0, most: float = 1.0) -> float:
    """A number from `least` to `most`.

    Raises:
        ReductionError: it is none.
    """
    check_number(f"{call}: {name}", value, least=least, most=most)
    return float(value)


def whole(name: str, value: Any, call: str, *, least: int = 1) -> int:
    """A whole number from `least`.

    Raises:
        ReductionError: it is none.
    """
    check_whole(f"{call}: {name}", value, least=least)
    return int(value)
