"""Histories rewritten: the plans that give a model the same shapes without its ties, or without its layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from mlpreduce.edits import Axis, Edit, Plan, Replace, Share, Slice
from mlpreduce.layers import merges, wraps
from mlpreduce.surgery.ties import gone_by, moved_by

__all__ = ["without_layers", "without_ties"]


def without_ties(plans: Iterable[Plan]) -> list[Plan]:
    """Plans without sharing: a slice of what was tied becomes one of each use, and so does a layer in its place."""
    uses: dict[str, set[str]] = {}  # leaf path -> all paths of its tie
    untied = []
    for made in plans:
        edits: list[Edit] = []
        for edit in made.edits:
            if isinstance(edit, Share):
                together = uses.get(edit.source, {edit.source}) | uses.get(edit.target, {edit.target})
                uses.update(dict.fromkeys(together, together))
            elif isinstance(edit, Slice):
                axes = []
                for axis in edit.axes:
                    leaf, _, name = axis.tensor.rpartition(".")
                    axes += [replace(axis, tensor=f"{path}.{name}") for path in sorted(uses.get(leaf, {leaf}))]
                edits.append(replace(edit, axes=tuple(axes)))
            elif isinstance(edit, Replace) and not wraps(edit.layer):
                edits += [replace(edit, module=path) for path in sorted(uses.get(edit.module, {edit.module}))]
            else:
                edits.append(edit)
        for edit in made.of(Replace):
            uses = {
                path: {other for other in others if not gone_by(edit, other)}
                for path, others in uses.items()
                if not gone_by(edit, path)
            }
            moved = {path: moved_by(edit, path) for path in uses}
            uses = {moved[path]: {moved[other] for other in others} for path, others in uses.items()}
        untied.append(replace(made, edits=tuple(edits)))
    return untied


def without_layers(plans: Iterable[Plan]) -> list[Plan]:
    """Plans with slices alone, of the tensors that a model has whose layers are merged."""
    before: list[Replace] = []
    plain = []
    for made in plans:
        edits: list[Edit] = []
        for edit in made.edits:
            if isinstance(edit, Slice):
                axes = (_merged(axis, before) for axis in edit.axes)
                edits.append(replace(edit, axes=tuple(dict.fromkeys(axis for axis in axes if axis is not None))))
            elif not isinstance(edit, Replace) or not merges(edit.layer):
                edits.append(edit)
        for edit in made.of(Replace):
            if merges(edit.layer):
                before.append(edit)
            else:  # it stays, and has moved the others
                before = [replace(other, module=moved_by(edit, other.module)) for other in before]
        plain.append(replace(made, edits=tuple(edits)))
    return plain


def _merged(axis: Axis, layers: list[Replace]) -> Axis | None:
    """The axis that hidden units lie on once these layers are merged; None if it was of what a layer added."""
    for edit in reversed(layers):
        inside = axis.tensor.startswith(f"{edit.module}.")
        if inside and wraps(edit.layer):
            rest = axis.tensor.removeprefix(f"{edit.module}.base.")
            if rest == axis.tensor:
                return None
            axis = replace(axis, tensor=f"{edit.module}.{rest}")
        elif inside:  # a layer that stands for a Linear has outputs along 0 and inputs along 1, as that has
            name = "bias" if axis.tensor.endswith(".bias") else "weight"
            axis = replace(axis, tensor=f"{edit.module}.{name}", size=axis.size * axis.groups, groups=1)
    return axis
