"""Edits as JSON values, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlpreduce.edits.kinds import Assign, Axis, Edit, Replace, Scale, Setting, Share, Slice
from mlpreduce.errors import ReductionError, did_you_mean
from mlpreduce.registry import Origin, origin

if TYPE_CHECKING:
    import torch

__all__ = ["edit_from_json", "edit_to_json", "tensors_of"]


def tensors_of(edit: Edit) -> dict[str, torch.Tensor | None]:
    """The tensors that an edit gives, by the path each will have; None where it has lost them."""
    if isinstance(edit, Replace):
        if edit.values is None:
            return {edit.module: None}
        return {f"{edit.module}.{name}": value for name, value in edit.values.items()}
    return {edit.tensor: edit.value} if isinstance(edit, Assign) else {}


def edit_to_json(edit: Edit) -> dict[str, Any]:
    """An edit as JSON values, without the tensors it may give."""
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
    if isinstance(edit, Replace):
        values = {} if edit.values is None else {"values": sorted(edit.values)}
        source = origin("layer", edit.layer) or edit.source  # a built-in layer has none
        known = {} if source is None else {"source": _source_to_json(source)}
        written = {"edit": "replace", "module": edit.module, "layer": edit.layer, "config": dict(edit.config)}
        return written | values | known
    if isinstance(edit, Scale):
        return {"edit": "scale", "tensor": edit.tensor, "factor": edit.factor}
    return {"edit": "assign", "tensor": edit.tensor}


def edit_from_json(entry: dict[str, Any], tensors: dict[str, torch.Tensor] | None) -> Edit:
    """An edit of what `edit_to_json` wrote.

    Args:
        entry: its JSON values.
        tensors: what edits give, by path; without, they have lost it.

    Raises:
        ReductionError: it is of no known kind, or a tensor is missing.
    """

    def given(path: str) -> torch.Tensor:
        if tensors is None or path not in tensors:
            raise ReductionError(f"Plan.from_json: the values of {path!r} are missing; they lie beside the plan")
        return tensors[path]

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
    if kind == "replace":
        if not isinstance(entry["layer"], str) or not isinstance(entry["config"], dict):
            raise ValueError(f"a layer {entry['layer']!r} with {entry['config']!r}")
        names, values = entry.get("values"), None
        if tensors is not None and names is not None:
            values = {name: given(f"{entry['module']}.{name}") for name in names}
        return Replace(entry["module"], entry["layer"], entry["config"], values, _source_from_json(entry.get("source")))
    if kind == "assign":
        return Assign(entry["tensor"], None if tensors is None else given(entry["tensor"]))
    known = ["slice", "share", "replace", "scale", "assign"]
    raise ReductionError(f"Plan.from_json: unknown edit {kind!r}{did_you_mean(kind, known)}")


def _source_to_json(source: Origin) -> dict[str, str]:
    """Where a layer comes from. A file is written without its folder: it may lie elsewhere when the plan is compared."""
    return {"kind": source.kind, "name": source.name.rpartition("/")[2], "digest": source.digest}


def _source_from_json(entry: Any) -> Origin | None:
    if entry is None:
        return None
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise ValueError(f"a layer from {entry!r}")
    return Origin(**entry)
