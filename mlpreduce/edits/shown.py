"""How a plan is shown: as a table that fits the console, in one line, and in a notebook."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mlpreduce.errors import ReductionError
from mlpreduce.words.console import Column, Grid, first_that_fits, wrapped
from mlpreduce.words.markup import html_list, html_table

if TYPE_CHECKING:
    from mlpreduce.edits.plan import Plan, Row

__all__ = ["arrow", "as_html", "as_text", "costs_text", "histories_html", "summary"]

_HEADERS = ("#", "MLP", "kind", "hidden", "parameters", "owner")


def as_text(plan: Plan, columns: int | None) -> str:
    """Write a plan as text in so many columns: one line per MLP in scope, totals, what is left out and why."""
    rows = [first_that_fits(_grids(plan.rows), columns).text(columns)] if plan.rows else []
    lines = [*_totals(plan), *_remarks(plan)]
    return "\n".join([wrapped(plan.call, columns), *rows, *(wrapped(line, columns) for line in lines)])


def as_html(plan: Plan) -> str:
    """Write a plan as an HTML table, with the totals and notes that its text has."""
    rows = [[str(number), *_cells(row)] for number, row in enumerate(plan.rows)]
    return html_table(_HEADERS, rows, caption=plan.call) + html_list([*_totals(plan), *_remarks(plan)])


def histories_html(plans: Sequence[Plan]) -> str:
    """Write plans as an HTML table, one row for each: the call, its MLPs and their parameters before and after."""
    rows = [
        [str(number), made.call, str(len(made.rows)), _unique(made), _params(made)] for number, made in enumerate(plans)
    ]
    headers = ("#", "plan", "MLPs in scope", "unique MLPs", "parameters of MLPs")
    return html_table(headers, rows, caption="Reductions of this model" if plans else "This model is not reduced")


def summary(plan: Plan) -> str:
    """Say in a few words what a plan does, from its rows: nothing is computed."""
    if not plan.rows:
        return f"{len(plan.edits)} edit{'' if len(plan.edits) == 1 else 's'}, made by hand"
    aside = f", {len(plan.left_out)} left out" if plan.left_out else ""
    return f"{len(plan.rows)} MLPs, unique {_unique(plan)}, MLP parameters {_params(plan)}{aside}"


def costs_text(was: Any, now: Any) -> list[str]:
    """Write what a model cost, and costs now, in two lines."""
    change = (now.params - was.params) / was.params
    return [f"model: {was.params:,} -> {now.params:,} parameters ({change:+.2%})", f"       {was.macs_text(now)}"]


def arrow(before: int, after: int) -> str:
    """Write a count before and after, or once if it stays.

    Example:
        >>> arrow(3072, 1536), arrow(12, 12)
        ('3,072 -> 1,536', '12')
    """
    return f"{before:,}" if before == after else f"{before:,} -> {after:,}"


def _unique(plan: Plan) -> str:
    return arrow(len({row.owner_before for row in plan.rows}), len({row.owner for row in plan.rows}))


def _params(plan: Plan) -> str:
    return arrow(sum(row.params_before for row in plan.rows), sum(row.params for row in plan.rows))


def _cells(row: Row) -> list[str]:
    """A row as text: MLP, kind, hidden features, parameters, and the owner if that is another MLP."""
    hidden, params = arrow(row.hidden_before, row.hidden), arrow(row.params_before, row.params)
    return [row.mlp, row.kind, hidden, params, "" if row.owner == row.mlp else row.owner]


def _grids(rows: Sequence[Row]) -> Iterator[Grid]:
    """The rows as tables, each narrower than the one before."""
    places = {row.mlp: str(number) for number, row in enumerate(rows)}
    names, kinds, hidden, params, owners = zip(*map(_cells, rows), strict=True) if rows else ((),) * 5
    number = Column("#", list(places.values()))
    name, kind = Column("MLP", names, left=True), Column("kind", kinds, left=True)
    units, both = Column("hidden", hidden), Column("parameters", params)
    left = Column("parameters", [f"{row.params:,}" for row in rows])
    owner = [Column("owner", owners, left=True)] if any(owners) else []
    short = (
        [Column("owner", [f"#{places[own]}" if own in places else own for own in owners], left=True)] if owner else []
    )
    yield Grid("", [number, name, kind, units, both, *owner], ruled=False)
    yield Grid("", [number, name, kind, units, both, *short], ruled=False)
    yield Grid("", [number, name, units, both, *short], ruled=False)
    yield Grid("", [number, name, units, left, *short], ruled=False)
    yield Grid("", [name, number, units, left, *short], ruled=False)


def _totals(plan: Plan) -> list[str]:
    """Parameters and MACs before and after; those of the whole model are computed where the plan was made."""
    lines = []
    before, after = sum(r.params_before for r in plan.rows), sum(r.params for r in plan.rows)
    if plan.rows and before:
        lines.append(f"MLPs in scope: {before:,} -> {after:,} parameters ({(after - before) / before:+.2%})")
    if plan.costs is not None:
        try:
            lines += costs_text(*plan.costs())
        except ReductionError as error:  # the input size is not known
            lines.append(f"MACs are not counted: {error}")
    return lines


def _remarks(plan: Plan) -> list[str]:
    """What is left out and why, and the notes."""
    left_out = [f"left out: {name}: {reason}" for name, reason in plan.left_out.items()]
    return left_out + [f"note: {note}" for note in plan.notes]
