"""What a reduction does to a model, as data: edits of leaf modules and tensors, and the plan that lists them.

Edits name leaf modules (modules without children) and their tensors by dotted path, say what becomes of them, and do
nothing themselves. A plan is carried out in a fixed order, whatever the order of its edits: `Slice`, `Share`, then the
weights: `Assign`, `Scale`. The first two are the structure of the model (shapes and ties), the last two its weights,
so a saved model is rebuilt from structure alone and nothing is scaled twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from safetensors import SafetensorError

from mlpreduce.errors import ReductionError, call_text, did_you_mean

if TYPE_CHECKING:
    import torch

__all__ = ["Assign", "Axis", "Edit", "Plan", "Row", "Scale", "Setting", "Share", "Slice", "Units", "as_units"]

PLAN_VERSION = 1

Units: TypeAlias = "range | tuple[int, ...]"


def as_units(indices: Sequence[int]) -> Units:
    """Hidden units in their compact form: a range when they are contiguous, else a sorted tuple.

    Example:
        >>> as_units([2, 0, 1]), as_units([3, 0])
        (range(0, 3), (0, 3))
    """
    units = sorted(map(int, indices))
    if units and units == list(range(units[0], units[-1] + 1)):
        return range(units[0], units[-1] + 1)
    return tuple(units)


@dataclass(frozen=True)
class Axis:
    """One tensor axis along which the hidden units of an MLP lie.

    Attributes:
        tensor: dotted path of the parameter or buffer.
        dim: the axis.
        size: length of the axis before slicing.
        offsets: unit `j` lies at `offset + j` for each offset; a packed gate has two. Other positions of the axis
            belong to something else and stay.
        groups: of the input axis of a grouped convolution: the axis has the units of one group, and which of them
            they are depends on the group of the output. As many units of each group are kept.
    """

    tensor: str
    dim: int
    size: int
    offsets: tuple[int, ...] = (0,)
    groups: int = 1

    def positions(self, hidden: int, units: Units) -> Units:
        """Positions of the axis that stay when `units` of `hidden` hidden units are kept."""
        if self.offsets == (0,) and self.size == hidden:
            return units
        taken = {offset + unit for offset in self.offsets for unit in range(hidden)}
        kept = {offset + unit for offset in self.offsets for unit in units}
        return as_units([p for p in range(self.size) if p in kept or p not in taken])


@dataclass(frozen=True)
class Setting:
    """A plain attribute that holds the hidden width, and is read when the model runs.

    Attributes:
        module: dotted path of the module that has it.
        name: its name there; the value is a list.
        index: which entry is the width.
    """

    module: str
    name: str
    index: int


@dataclass(frozen=True)
class Slice:
    """Keep only `units` of the `hidden` hidden units of the MLP `mlp`, on every axis they run through."""

    mlp: str
    hidden: int
    units: Units
    axes: tuple[Axis, ...]
    settings: tuple[Setting, ...] = ()


@dataclass(frozen=True)
class Share:
    """Let the leaf module at `target` become the one at `source`: one module, called twice."""

    source: str
    target: str


@dataclass(frozen=True)
class Scale:
    """Multiply a tensor by a factor, in place."""

    tensor: str
    factor: float


@dataclass(frozen=True)
class Assign:
    """Give a tensor new values of the same shape. In a history, and read from JSON alone, it has no values."""

    tensor: str
    value: torch.Tensor | None = field(default=None, compare=False, repr=False)


Edit: TypeAlias = Slice | Share | Assign | Scale


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

    def of(self, *kinds: type[Any]) -> list[Any]:
        """The edits of these kinds, in the order given by the transform."""
        return [edit for edit in self.edits if isinstance(edit, kinds)]

    def structure(self) -> Plan:
        """The same plan without its weights step."""
        return replace(self, edits=tuple(e for e in self.edits if isinstance(e, (Slice, Share))))

    def without(self, *kinds: type[Any]) -> Plan:
        """The same plan without the edits of these kinds."""
        return replace(self, edits=tuple(e for e in self.edits if not isinstance(e, kinds)))

    def __str__(self) -> str:
        return _table(self)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"costs": None}  # a closure over a model

    def to_json(self) -> str:
        """The plan as JSON. Tensors of `Assign` are named, not stored: `save` writes them beside it."""
        rows = [list(vars(row).values()) for row in self.rows]
        document = {
            "version": PLAN_VERSION,
            "transform": self.transform,
            "config": self.config,
            "edits": [_edit_to_json(edit) for edit in self.edits],
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
            tensors: the values of its `Assign` edits by tensor path; without them only its structure can be applied.

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
                edits=tuple(_edit_from_json(entry, tensors) for entry in document["edits"]),
                rows=tuple(Row(*row) for row in document["rows"]),
                left_out=document["left_out"],
                notes=tuple(document["notes"]),
                data=document["data"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ReductionError(f"Plan.from_json: damaged plan: {type(error).__name__}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the plan to `path` (.json), and the tensors of its `Assign` edits beside it (.plan.safetensors)."""
        path = Path(path)
        values = {edit.tensor: edit.value.detach().contiguous() for edit in self.of(Assign) if edit.value is not None}
        if len(values) < len(self.of(Assign)):
            raise ReductionError(
                f"Plan.save({str(path)!r}): the plan has lost the values it assigns; save it before apply"
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


def _edit_to_json(edit: Edit) -> dict[str, Any]:
    if isinstance(edit, Slice):
        axes = [[axis.tensor, axis.dim, axis.size, list(axis.offsets), axis.groups] for axis in edit.axes]
        settings = [[setting.module, setting.name, setting.index] for setting in edit.settings]
        units: Any = list(edit.units)
        if isinstance(edit.units, range):
            units = {"start": edit.units.start, "stop": edit.units.stop}
        sliced = {"edit": "slice", "mlp": edit.mlp, "hidden": edit.hidden, "units": units, "axes": axes}
        return sliced | ({"settings": settings} if settings else {})
    if isinstance(edit, Share):
        return {"edit": "share", "source": edit.source, "target": edit.target}
    if isinstance(edit, Scale):
        return {"edit": "scale", "tensor": edit.tensor, "factor": edit.factor}
    return {"edit": "assign", "tensor": edit.tensor}


def _edit_from_json(entry: dict[str, Any], tensors: dict[str, torch.Tensor] | None) -> Edit:
    kind = entry["edit"]
    if kind == "slice":
        axes = tuple(Axis(t, dim, size, tuple(offsets), groups) for t, dim, size, offsets, groups in entry["axes"])
        settings = tuple(Setting(module, name, index) for module, name, index in entry.get("settings", ()))
        units = entry["units"]
        kept = range(units["start"], units["stop"]) if isinstance(units, dict) else tuple(units)
        return Slice(entry["mlp"], entry["hidden"], kept, axes, settings)
    if kind == "share":
        return Share(entry["source"], entry["target"])
    if kind == "scale":
        return Scale(entry["tensor"], float(entry["factor"]))
    if kind == "assign":
        if tensors is None:
            return Assign(entry["tensor"])
        if entry["tensor"] not in tensors:
            raise ReductionError(
                f"Plan.from_json: the values of {entry['tensor']!r} are missing; they lie beside the plan"
            )
        return Assign(entry["tensor"], tensors[entry["tensor"]])
    raise ReductionError(
        f"Plan.from_json: unknown edit {kind!r}{did_you_mean(kind, ['slice', 'share', 'scale', 'assign'])}"
    )


def _table(plan: Plan) -> str:
    """The plan as text: one line per MLP in scope, totals, what is left out and why."""
    width = max([len(row.mlp) for row in plan.rows] + [5])
    kinds = max([len(row.kind) for row in plan.rows] + [5])
    lines = [
        call_text(plan.transform, plan.config),
        f"{'#':>4}  {'MLP':<{width}}  {'kind':<{kinds}} {'hidden':>15}  {'parameters':>26}  owner",
    ]
    for number, row in enumerate(plan.rows):
        hidden = f"{row.hidden_before:,}" + (f" -> {row.hidden:,}" if row.hidden != row.hidden_before else "")
        params = f"{row.params_before:,}" + (f" -> {row.params:,}" if row.params != row.params_before else "")
        owner = "" if row.owner == row.mlp else row.owner
        lines.append(
            f"{number:>4}  {row.mlp:<{width}}  {row.kind:<{kinds}} {hidden:>15}  {params:>26}  {owner}".rstrip()
        )
    before, after = sum(r.params_before for r in plan.rows), sum(r.params for r in plan.rows)
    if plan.rows and before:
        lines.append(f"MLPs in scope: {before:,} -> {after:,} parameters ({(after - before) / before:+.2%})")
    if plan.costs is not None:
        try:
            was, now = plan.costs()
            change = (now.params - was.params) / was.params
            lines.append(f"model: {was.params:,} -> {now.params:,} parameters ({change:+.2%})")
            lines.append(
                f"       {was.macs_text()}" + (f" -> {now.macs_text()}" if now.macs != was.macs else ", unchanged")
            )
        except ReductionError as error:  # the input size is not known
            lines.append(f"MACs are not counted: {error}")
    lines += [f"left out: {name}: {reason}" for name, reason in plan.left_out.items()]
    lines += [f"note: {note}" for note in plan.notes]
    return "\n".join(lines)
