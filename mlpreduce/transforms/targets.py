"""The hidden widths with which a model meets a target: what `shallow` asks of `mlpreduce.budget`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mlpreduce.budget import (
    LatencyTable,
    Slot,
    budget_of,
    number,
    price_of,
    ranked_widths,
    staged_widths,
    uniform_widths,
)
from mlpreduce.errors import ReductionError
from mlpreduce.graph import MLP
from mlpreduce.transforms.parts import Parts
from mlpreduce.words.values import Config

__all__ = ["SCOPES", "UNITS", "solved_widths"]

SCOPES = {"uniform": uniform_widths, "per_stage": staged_widths, "global": ranked_widths}
_FEW = 16
UNITS = {"target_params": "parameters", "target_macs": "MACs", "target_latency": "ms"}


def solved_widths(
    parts: Parts,
    owners: Sequence[MLP],
    size: str,
    target: Any,
    scope: str,
    criterion: str | Config,
    round_to: int,
    latency_table: str | None,
    latency_weight: float,
    seed: int,
) -> dict[str, int]:
    """Width of each MLP to slice, by name, so that the model costs no more than a target; notes what is reached.

    Raises:
        ReductionError: the target is none or cannot be reached, the criterion gives no scores, or there is no table.
    """
    table = _table(size, latency_table, latency_weight)
    present, prices = _prices(parts, owners, size, table)
    slots = [
        Slot.of(
            mlp,
            round_to,
            prices[mlp.name],
            scores=None if scope == "uniform" else _sorted_scores(parts, mlp, criterion, seed),
            penalty=_penalty(table, mlp, latency_weight),
        )
        for mlp in owners
    ]
    budget = budget_of(slots, present, size, target, UNITS.get(size, "hidden units"))
    widths: dict[str, int] = SCOPES[scope](budget)
    parts.notes.append(
        f"{size}={target!r}: {number(budget.cost(widths))} of at most {number(budget.target)} {budget.unit}, "
        f"{number(present)} before"
    )
    narrow = [slot for slot in slots if widths[slot.owner] * _FEW < slot.hidden]
    if narrow:
        parts.notes.append(
            f"{len(narrow)} of {len(slots)} MLPs keep less than 1/{_FEW} of their units, {narrow[0].owner} "
            f"{widths[narrow[0].owner]} of {narrow[0].hidden}; if the scores of unlike MLPs do not compare, use another "
            f'criterion, or scope="uniform"'
        )
    return widths


def _table(size: str, path: str | None, weight: float) -> LatencyTable | None:
    if path is not None:
        return LatencyTable.load(path)
    if size == "target_latency" or weight:
        wanted = "target_latency" if size == "target_latency" else "latency_weight"
        raise ReductionError(
            f"{wanted} needs latency_table, a path; write one with mlpreduce.budget.LatencyTable.measure(model).save(path)"
        )
    return None


def _prices(
    parts: Parts, owners: Sequence[MLP], size: str, table: LatencyTable | None
) -> tuple[float, dict[str, Callable[[int], float]]]:
    """What the model costs as it is, and the price of each MLP by width."""
    if size == "target_latency" and table is not None:
        present = table.predict({mlp.owner: mlp.hidden_features for mlp in parts.counts.mlps})
        return present, {mlp.name: _latency(table, mlp.name) for mlp in owners}
    if size == "ratio":
        return sum(mlp.hidden_features for mlp in owners), {mlp.name: float for mlp in owners}
    known = parts.counts if size == "target_params" else parts.baseline
    present = known.cost.params if size == "target_params" else known.cost.macs
    return present, {mlp.name: price_of(known, mlp.name, UNITS[size]) for mlp in owners}


def _latency(table: LatencyTable, owner: str) -> Callable[[int], float]:
    return lambda width: table.of(owner, width)


def _penalty(table: LatencyTable | None, mlp: MLP, weight: float) -> Callable[[int], float] | None:
    return None if table is None or not weight else lambda width: weight * table.of(mlp.name, width)


def _sorted_scores(parts: Parts, mlp: MLP, criterion: str | Config, seed: int) -> Any:
    """Scores of the units in the order in which they are kept; of an MLP with groups, in turns of the groups."""
    scores = parts.scores(mlp, criterion, seed)
    if mlp.groups == 1:
        return scores.sort(descending=True, stable=True).values
    return scores.unflatten(0, (mlp.groups, -1)).sort(dim=1, descending=True, stable=True).values.T.flatten()
