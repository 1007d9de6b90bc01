"""The guard: the few units that carry an MLP's output stay, whatever the criterion says.

Trained transformers have units with massive activations: one may carry nearly all of what its MLP gives. Criteria drop it, as
its gradient is small, or its row is like others; and a refit that imitates it with many units breaks on other inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlpreduce.errors import ReductionError

__all__ = ["Guarded", "check_guard", "guard_notes", "guarded"]

_PART = 0.03  # of the output energy of an MLP, above which a unit stays
_UNITS = 20  # times what a unit has on average, above which it stays
_ONE_IN = 32  # of the units that are kept


@dataclass(frozen=True)
class Guarded:
    """What the guard makes of an order.

    Attributes:
        order: the units, those that it keeps first.
        stay: units that stay because of it, the strongest first.
        go: units as strong that go all the same.
    """

    order: list[int]
    stay: list[int]
    go: list[int]


def check_guard(guard: Any) -> None:
    """Check that a guard is "auto", False, or a part of the output energy.

    Raises:
        ReductionError: it is not.
    """
    number = isinstance(guard, int | float) and not isinstance(guard, bool)
    if guard != "auto" and guard is not False and not (number and 0 < guard < 1):
        raise ReductionError(
            f'guard is {guard!r}; give "auto", False, or the part of an MLP\'s output energy above which a unit stays, between '
            f"0 and 1"
        )


def guarded(order: Sequence[int], shares: Sequence[float], width: int, groups: int, guard: str | float) -> Guarded:
    """Put the strongest units first.

    Args:
        order: all units of an MLP, the most important first.
        shares: the part of each in the output energy.
        width: units that are kept; as many of each group.
        groups: equal parts that the units come in, one after the other.
        guard: "auto": units above 3 %, and above 20 times the average, at most one in 32 of those kept; a number: above it;
            False: none, so that all that are strong and go are told.
    """
    size, each = len(order), width // groups
    least = guard if isinstance(guard, float) else max(_PART, _UNITS / size)
    strong = [unit for unit in sorted(range(size), key=lambda unit: (-shares[unit], unit)) if shares[unit] > least]
    allowed = 0 if guard is False else width // _ONE_IN
    first: list[int] = []
    of_group = [0] * groups
    for unit in strong:
        group = unit * groups // size
        if len(first) < allowed and of_group[group] < each:
            first.append(unit)
            of_group[group] += 1

    def kept(units: Sequence[int]) -> set[int]:
        taken = [[unit for unit in units if unit * groups // size == group][:each] for group in range(groups)]
        return {unit for some in taken for unit in some}

    held = set(first)
    new = [*first, *(unit for unit in order if unit not in held)]
    before, after = kept(order), kept(new)
    return Guarded(new, [unit for unit in first if unit not in before], [unit for unit in strong if unit not in after])


def guard_notes(criterion: str, stay: Sequence[str], go: Sequence[str]) -> list[str]:
    """Sentences on units that stay by the guard, and on those as strong that go, each with its part of the output energy."""

    def some(units: Sequence[str]) -> str:
        return ", ".join(units[:4]) + (", ..." if len(units) > 4 else "")

    notes = []
    if stay:
        units = "1 unit stays" if len(stay) == 1 else f"{len(stay)} units stay"
        notes.append(f"guard: {units} that {criterion} would drop: {some(stay)} of the output energy")
    if go:
        notes.append(
            f"{criterion} drops {len(go)} of the units that carry much of what the MLP gives: {some(go)} of "
            f"its output energy; keep "
            f'wider MLPs with guard="auto", or choose criterion="reconstruction"'
        )
    return notes
