"""Importance criteria: which hidden units of an MLP stay. One criterion a file, all of them an order of the units.

A criterion is a function `(weights, seed) -> order`: `weights` is a matrix (hidden units, weights of the unit), the
result the unit indices, the most important first. An order serves every width, so narrower choices are nested.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mlpreduce.errors import ReductionError, did_you_mean

if TYPE_CHECKING:
    import torch

    from mlpreduce.graph import MLP

__all__ = ["get_criterion", "list_criteria", "needs_weights", "register_criterion", "unit_weights"]

_CRITERIA: dict[str, Callable[..., torch.Tensor]] = {}
_NEED_WEIGHTS: set[str] = set()


def register_criterion(
    name: str, *, weights: bool = True
) -> Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]:
    """Add a criterion under `name`.

    Args:
        name: what users write in `criterion=`.
        weights: whether the order depends on the weights; if not, it works on the meta device.

    Raises:
        ReductionError: the name is taken.
    """

    def decorate(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        if name in _CRITERIA:
            raise ReductionError(f"register_criterion({name!r}): there is a criterion of this name already")
        _CRITERIA[name] = function
        if weights:
            _NEED_WEIGHTS.add(name)
        return function

    return decorate


def get_criterion(name: str) -> Callable[..., torch.Tensor]:
    """The criterion of this name.

    Raises:
        ReductionError: there is none.
    """
    if name not in _CRITERIA:
        raise ReductionError(f"unknown criterion {name!r}{did_you_mean(str(name), _CRITERIA)}")
    return _CRITERIA[name]


def list_criteria() -> list[str]:
    """Names of all criteria.

    Example:
        >>> list_criteria()
        ['first', 'l2', 'last', 'random']
    """
    return sorted(_CRITERIA)


def needs_weights(name: str) -> bool:
    """Whether the criterion looks at the weights."""
    get_criterion(name)
    return name in _NEED_WEIGHTS


def unit_weights(mlp: MLP, tensor: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """What each hidden unit is made of: fc1 rows (both halves of a gate), biases, fc2 columns, in float32 or wider.

    Returns:
        A matrix (hidden units, values).
    """
    import torch

    parts = []
    for axis in mlp.axes:
        values = tensor(axis.tensor).detach()
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        if axis.groups > 1:  # the input axis of a grouped convolution, once for each group
            values = values.unflatten(0, (axis.groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)
        else:
            values = values.movedim(axis.dim, 0).reshape(values.shape[axis.dim], -1)
        parts += [values[offset : offset + mlp.hidden_features] for offset in axis.offsets]
    return torch.cat(parts, dim=1)


from mlpreduce.criteria import first, l2, last, random  # noqa: E402, F401  (they register themselves)
