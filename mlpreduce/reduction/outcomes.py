"""What a plan makes of a model, before it is carried out: exact costs, widths and owners."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from mlpreduce.budget import Baseline, Cost, measure, outcome
from mlpreduce.edits import Plan, Replace, Slice
from mlpreduce.graph import MLP, Inputs, find_mlps, is_one_node, module_at
from mlpreduce.layers import macs_of, wraps
from mlpreduce.surgery.operation import rehearse

__all__ = ["planned"]


def planned(
    model: nn.Module, measured: Baseline, made: Plan, inputs: Inputs | None = None
) -> tuple[Cost, dict[str, tuple[int, str]]]:
    """The exact cost of a model after a plan, and the hidden width and owner of each MLP that is left, by name.

    Args:
        model: the model, or a copy on the meta device; it is not changed.
        measured: what it costs as it is.
        made: the plan.
        inputs: what the model is called with, as for `find_mlps`.
    """
    if not made.of(Replace):
        return measured.after(made), outcome(measured.mlps, made)
    tree = rehearse(model, made, weights=False)
    found: list[MLP] = list(made.replaced.values()) if made.replaced is not None else find_mlps(tree, inputs)
    widths = {mlp.name: (mlp.hidden_features, mlp.owner) for mlp in found}
    more = None if made.of(Slice) else _more_macs(model, tree, measured, made)
    if more is None:  # more has changed than projections
        return measure(tree, inputs, found).cost, widths
    before = measured.cost
    cost = replace(
        before,
        params=sum(parameter.numel() for parameter in tree.parameters()),
        mlp_params=sum(mlp.params(owned=mlp.owner == mlp.name) for mlp in found),
        unique_mlps=len({mlp.owner for mlp in found}),
        macs_linear=before.macs_linear + more,
        macs=before.macs + more,
        macs_with_attention=before.macs_with_attention + more,
    )
    return cost, widths


def _more_macs(model: nn.Module, tree: nn.Module, measured: Baseline, made: Plan) -> int | None:
    """By how much multiply-accumulates for one image grow with new layers; None where projections alone do not tell."""
    more = 0
    for edit in made.of(Replace):
        old, new = module_at(model, edit.module), module_at(tree, edit.module)
        if old is None or new is None or not is_one_node(old):  # a whole MLP goes, or something happens before it
            return None
        (each, once), (each_before, once_before) = macs_of(new), macs_of(old)
        positions = [count for path, count in _calls(measured) if _is_of(model, path, edit, old)]
        if not positions and (each, once) != (each_before, once_before):
            return None
        more += (each - each_before) * sum(positions) + (once - once_before) * len(positions)
    return more


def _calls(measured: Baseline) -> Iterator[tuple[str, int]]:
    """Paths of the projections of MLPs and of the layers around them, and the positions of each call."""
    for mlp, positions in zip(measured.mlps, measured.positions, strict=True):
        for leaf in mlp.leaves:
            if leaf.role in ("fc1", "fc2"):
                path = leaf.call
                yield path, positions
                while path != leaf.path:
                    path = f"{path}.base"
                    yield path, positions


def _is_of(model: nn.Module, path: str, edit: Replace, old: nn.Module) -> bool:
    """Whether a call at a path has the new layer: one around a module is at its place alone."""
    return path == edit.module if wraps(edit.layer) else module_at(model, path) is old
