"""Repair: fc2 and its bias refitted in closed form, so that a reduced model gives what it gave, on calibration data.

fit         least squares from sums
streams     where what an MLP gives enters the residual stream; runs that begin at a block
sequential  MLP after MLP, each on what the model gives as repaired so far, judged by what the whole model gives
parallel    every MLP by itself
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from mlpreduce.calibration import Samples, quiet_copy, running
from mlpreduce.edits import Assign, Plan, Scale, Share, Slice
from mlpreduce.errors import ReductionError, check_one_of
from mlpreduce.graph import MLP, module_at
from mlpreduce.repair.parallel import repair_alone
from mlpreduce.repair.sequential import repair_in_turn
from mlpreduce.surgery import carry_out

__all__ = ["REPAIRS", "repaired"]

REPAIRS = ("none", "bias", "parallel", "least_squares")
_FAR = 0.9  # cosine of what the models give, below which the plan warns
Model = tuple[nn.Module, Sequence[MLP]]  # with its MLPs that are repaired, all uses


def repaired(model: nn.Module, mlps: Sequence[MLP], made: Plan, data: Any) -> Plan:
    """The plan with new values of fc2 of every MLP that it changes.

    Args:
        model: the unreduced model; it is not changed.
        mlps: its MLPs.
        made: a plan for it.
        data: an iterable of batches of images.

    Raises:
        ReductionError: unknown repair, the data is missing, empty or not finite, or an MLP cannot be refitted.
    """
    kind = made.config["repair"]
    check_one_of("repair", kind, REPAIRS)
    samples = Samples(data, model, labels=False)
    changed = {edit.mlp for edit in made.of(Slice)}
    tied = {path for share in made.of(Share) for path in (share.source, share.target)}
    uses = [mlp for mlp in mlps if mlp.owner in changed or mlp.leaf("fc2").path in tied]
    fused = [mlp.name for mlp in uses if "fused" in mlp.kind]
    if fused:
        raise ReductionError(
            f"repair={kind!r}: {fused[0]} shares a layer with attention, which would change too; exclude it"
        )
    places = {share.target: share.source for share in made.of(Share)}  # a graph knows a tied leaf by one path only
    moved = [
        replace(m, leaves=tuple(replace(one, path=places.get(one.path, one.path)) for one in m.leaves)) for m in uses
    ]
    if kind != "parallel":
        return _in_turn(model, mlps, made, (uses, moved), samples, kind)
    with running(samples.device, gradients=False):
        before, after = quiet_copy(model), _reduced(model, made)
        values, note = repair_alone((before, uses), (after, moved), samples)
    facts = {"samples": samples.count, "fingerprint": samples.fingerprint}
    note = f"repair={kind!r}, {samples.count:,} examples: {note}"
    return replace(_with(made, values), notes=(*made.notes, note), data=facts)


def _with(made: Plan, values: Mapping[str, torch.Tensor]) -> Plan:
    """The plan with new values of tensors."""
    edits = [edit for edit in made.edits if not (isinstance(edit, Assign | Scale) and edit.tensor in values)]
    return replace(made, edits=(*edits, *(Assign(path, value) for path, value in values.items())))


def _in_turn(
    model: nn.Module,
    mlps: Sequence[MLP],
    made: Plan,
    uses: tuple[Sequence[MLP], Sequence[MLP]],
    samples: Samples,
    kind: str,
) -> Plan:
    """The plan with values of a repair in order of execution, and what it came to."""
    with running(samples.device, gradients=False):
        before, after = quiet_copy(model), _reduced(model, made)
        found = repair_in_turn((before, uses[0]), (after, uses[1]), mlps, samples, kind)
    note = (
        f"repair={kind!r}, {samples.count:,} examples: what the model gives for {found.held:,} of them that no fit saw is as "
        f"near to the whole model's as cosine {found.after[0]:.3f} and alignment {found.after[1]:.3f} say, without repair "
        f"{found.before[0]:.3f} and {found.before[1]:.3f}"
    )
    if found.left:
        note += f"; {len(found.left)} of {found.fitted} MLPs stay unrepaired, as the whole would be further off"
    if found.unfollowed:
        note += f"; of {len(found.unfollowed)} MLPs no stream can be followed, and their own outputs are fitted"
    if not found.cut:
        note += "; the model cannot be cut at its blocks, so each fit ran all of it"
    notes = [*made.notes, note]
    if found.after[0] < _FAR:
        notes.append(
            f"the reduced model is far from the whole one (cosine {found.after[0]:.3f}); keep more units, give more data, or "
            f"train it"
        )
    facts = {
        "samples": samples.count,
        "fingerprint": samples.fingerprint,
        "held": found.held,
        "cosine": list(found.after),
        "cosine_before": list(found.before),
    }
    return replace(_with(made, found.values), notes=tuple(notes), data=facts)


def _reduced(model: nn.Module, made: Plan) -> nn.Module:
    """A copy of the model after the plan; tensors that the plan writes into are its own."""
    tree = quiet_copy(model)
    if isinstance(tree, fx.GraphModule):  # its code lies in its class, and would change for the model too
        tree = fx.GraphModule(tree, tree.graph, class_name=type(model).__name__)
    for edit in made.of(Assign, Scale):
        path, _, name = edit.tensor.rpartition(".")
        module = module_at(tree, path)
        assert module is not None
        value = getattr(module, name).detach().clone()
        setattr(module, name, nn.Parameter(value, requires_grad=False) if name in module._parameters else value)
    carry_out(tree, made)
    return tree
