"""The plan: edits with what they do to each MLP, ready to be printed, stored and carried out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from mlpreduce.console import Column, Grid, first_that_fits, width, wrapped
from mlpreduce.edits.kinds import Edit, Replace, Share, Slice
from mlpreduce.edits.written import edit_from_json, edit_to_json, tensors_of
from mlpreduce.errors import ReductionError, call_text

if TYPE_CHECKING:
    import torch

__all__ = ["Plan", "Row", "costs_text"]

PLAN_VERSION = 1


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
    config: dict[str, Any]
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

    def __str__(self) -> str:
        return _table(self, width())

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


def _table(plan: Plan, columns: int | None) -> str:
    """The plan as text: one line per MLP in scope, totals, what is left out and why."""
    head = wrapped(call_text(plan.transform, plan.config), columns)
    rows = first_that_fits(_grids(plan.rows), columns).text(columns)
    return "\n".join([head, rows, *(wrapped(line, columns) for line in [*_totals(plan), *_remarks(plan)])])


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


def costs_text(was: Any, now: Any) -> list[str]:
    """What a model cost before, and costs now, in two lines."""
    change = (now.params - was.params) / was.params
    return [f"model: {was.params:,} -> {now.params:,} parameters ({change:+.2%})", f"       {was.macs_text(now)}"]


def _remarks(plan: Plan) -> list[str]:
    """What is left out and why, and the notes."""
    left_out = [f"left out: {name}: {reason}" for name, reason in plan.left_out.items()]
    return left_out + [f"note: {note}" for note in plan.notes]


def _grids(rows: Sequence[Row]) -> Iterator[Grid]:
    """The rows as tables, each narrower than the one before."""
    places = {row.mlp: str(number) for number, row in enumerate(rows)}
    number = Column("#", list(places.values()))
    names = Column("MLP", [row.mlp for row in rows], left=True)
    kinds = Column("kind", [row.kind for row in rows], left=True)
    hidden = Column("hidden", [_arrow(row.hidden_before, row.hidden) for row in rows])
    params = Column("parameters", [_arrow(row.params_before, row.params) for row in rows])
    owners = Column("owner", ["" if row.owner == row.mlp else row.owner for row in rows], left=True)
    numbers = Column("owner", [f"#{places[owner]}" if owner in places else owner for owner in owners.cells], left=True)
    left = Column("parameters", [f"{row.params:,}" for row in rows])
    shared = [owners] if any(owners.cells) else []
    yield Grid("", [number, names, kinds, hidden, params, *shared], ruled=False)
    shared = [numbers] if shared else []
    yield Grid("", [number, names, kinds, hidden, params, *shared], ruled=False)
    yield Grid("", [number, names, hidden, params, *shared], ruled=False)
    yield Grid("", [number, names, hidden, left, *shared], ruled=False)
    yield Grid("", [names, number, hidden, left, *shared], ruled=False)


def _arrow(before: int, after: int) -> str:
    return f"{before:,}" + (f" -> {after:,}" if after != before else "")
