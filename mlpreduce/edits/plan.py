"""The plan: edits with what they do to each MLP, ready to be stored and carried out; and how it is shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from mlpreduce.edits.kinds import Edit, Replace, Share, Slice
from mlpreduce.edits.written import edit_from_json, edit_to_json, tensors_of
from mlpreduce.errors import ReductionError, call_text
from mlpreduce.words.console import Column, Grid, first_that_fits, width, wrapped
from mlpreduce.words.markup import html_list, html_table, shortened
from mlpreduce.words.values import Config

if TYPE_CHECKING:
    import torch

__all__ = ["History", "Plan", "Row", "arrow", "costs_text"]

PLAN_VERSION = 1
_HEADERS = ("#", "MLP", "kind", "hidden", "parameters", "owner")


@dataclass(frozen=True)
class Row:
    """What a plan does to one MLP in scope; parameters of a tied MLP are counted where it is owned."""

    mlp: str
    kind: str
    hidden_before: int
    hidden: int
    owner_before: str
    owner: str
    params_before: int
    params: int


@dataclass(frozen=True)
class Plan:
    """A reduction, ready to be printed, stored and carried out.

    Attributes:
        transform: name of the transform that made it.
        config: its keyword parameters, JSON values only.
        edits: what is to be done.
        rows: before and after of every MLP in scope, in order of execution.
        left_out: MLPs that are not in scope or stay as they are, with the reason.
        notes: advice that belongs to this plan.
        data: number and fingerprint of the samples that chose the units, if any did.
    """

    transform: str
    config: Config
    edits: tuple[Edit, ...]
    rows: tuple[Row, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    data: dict[str, Any] | None = None
    costs: Callable[[], tuple[Any, Any]] | None = field(default=None, compare=False, repr=False)
    replaced: Any = field(
        default=None, compare=False, repr=False
    )  # the MLPs afterwards, by name, of a plan with new layers

    def of(self, *kinds: type[Any]) -> list[Any]:
        """The edits of these kinds, in the order given by the transform."""
        return [edit for edit in self.edits if isinstance(edit, kinds)]

    def structure(self) -> Plan:
        """The same plan without its weights step."""
        return replace(self, edits=tuple(e for e in self.edits if isinstance(e, (Slice, Share, Replace))))

    def without(self, *kinds: type[Any]) -> Plan:
        """The same plan without the edits of these kinds."""
        return replace(self, edits=tuple(e for e in self.edits if not isinstance(e, kinds)))

    @property
    def call(self) -> str:
        """The plan as a call, `grouped(group=2)`."""
        return call_text(self.transform, self.config)

    def __str__(self) -> str:
        return _as_text(self, width())

    def __repr__(self) -> str:
        return f"<Plan {shortened(self.call, 90)}: {_summary(self)}>"

    def _repr_html_(self) -> str:
        """Write the plan as an HTML table for notebooks, with the totals and notes that `print(plan)` has."""
        return _as_html(self)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"costs": None, "replaced": None}  # of use where the plan was made

    def to_json(self) -> str:
        """The plan as JSON. Tensors that edits give are named, not stored: `save` writes them beside it."""
        rows = [list(vars(row).values()) for row in self.rows]
        document = {
            "version": PLAN_VERSION,
            "transform": self.transform,
            "config": self.config,
            "edits": [edit_to_json(edit) for edit in self.edits],
            "rows": rows,
            "left_out": self.left_out,
            "notes": list(self.notes),
            "data": self.data,
        }
        return json.dumps(document, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, tensors: dict[str, torch.Tensor] | None = None) -> Plan:
        """Read a plan written by `to_json`.

        Args:
            text: the JSON document.
            tensors: what its edits give, by tensor path; without them only its structure can be applied.

        Raises:
            ReductionError: the text is no plan, or of a version this library does not know.
        """
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise ReductionError(f"Plan.from_json: not JSON: {error}") from error
        if not isinstance(document, dict) or "version" not in document:
            raise ReductionError("Plan.from_json: a JSON document without 'version'; it is no plan of mlpreduce")
        if document["version"] != PLAN_VERSION:
            raise ReductionError(
                f"Plan.from_json: plan version {document['version']!r}; this mlpreduce reads version {PLAN_VERSION}"
            )
        try:
            return cls(
                transform=document["transform"],
                config=document["config"],
                edits=tuple(edit_from_json(entry, tensors) for entry in document["edits"]),
                rows=tuple(Row(*row) for row in document["rows"]),
                left_out=document["left_out"],
                notes=tuple(document["notes"]),
                data=document["data"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ReductionError(f"Plan.from_json: damaged plan: {type(error).__name__}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the plan to `path` (.json), and the tensors that its edits give beside it (.plan.safetensors)."""
        path = Path(path)
        given = {name: value for edit in self.edits for name, value in tensors_of(edit).items()}
        values = {name: value.detach().contiguous() for name, value in given.items() if value is not None}
        if len(values) < len(given) or any(value.is_meta for value in values.values()):
            raise ReductionError(
                f"Plan.save({str(path)!r}): the plan has lost the values it assigns, or never had any; save it before apply"
            )
        if values:
            from safetensors.torch import save_file

            save_file(values, path.with_suffix(".plan.safetensors"))
        path.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan written by `save`.

        Raises:
            ReductionError: no such file, no plan, or its tensors are missing.
        """
        path = Path(path)
        if not path.is_file():
            raise ReductionError(f"Plan.load({str(path)!r}): no such file")
        tensors: dict[str, torch.Tensor] = {}
        try:
            if path.with_suffix(".plan.safetensors").is_file():
                from safetensors.torch import load_file

                tensors = load_file(path.with_suffix(".plan.safetensors"))
            return cls.from_json(path.read_text(encoding="utf-8"), tensors)
        except (UnicodeDecodeError, SafetensorError) as error:
            raise ReductionError(f"Plan.load({str(path)!r}): the plan or its tensors are damaged: {error}") from error


class History(list[Plan]):
    """The plans that were applied to a model: a list that a notebook shows as a table."""

    def __repr__(self) -> str:
        calls = ", ".join(made.call for made in self) or "no reduction"
        return f"<History of {len(self)} plan{'' if len(self) == 1 else 's'}: {shortened(calls, 150)}>"

    def _repr_html_(self) -> str:
        """Write one row for each plan: the call, its MLPs and their parameters before and after."""
        return _histories_html(self)


def _as_text(plan: Plan, columns: int | None) -> str:
    """Write a plan as text in so many columns: one line per MLP in scope, totals, what is left out and why."""
    rows = [first_that_fits(_grids(plan.rows), columns).text(columns)] if plan.rows else []
    lines = [*_totals(plan), *_remarks(plan)]
    return "\n".join([wrapped(plan.call, columns), *rows, *(wrapped(line, columns) for line in lines)])


def _as_html(plan: Plan) -> str:
    """Write a plan as an HTML table, with the totals and notes that its text has."""
    rows = [[str(number), *_cells(row)] for number, row in enumerate(plan.rows)]
    return html_table(_HEADERS, rows, caption=plan.call) + html_list([*_totals(plan), *_remarks(plan)])


def _histories_html(plans: Sequence[Plan]) -> str:
    """Write plans as an HTML table, one row for each: the call, its MLPs and their parameters before and after."""
    rows = [
        [str(number), made.call, str(len(made.rows)), _unique(made), _params(made)] for number, made in enumerate(plans)
    ]
    headers = ("#", "plan", "MLPs in scope", "unique MLPs", "parameters of MLPs")
    return html_table(headers, rows, caption="Reductions of this model" if plans else "This model is not reduced")


def _summary(plan: Plan) -> str:
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
