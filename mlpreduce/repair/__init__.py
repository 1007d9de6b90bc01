"""Repair: fc2 and its bias refitted in closed form, so that a reduced model gives what it gave, on calibration data.

fit         least squares from sums
streams     where what an MLP gives enters the residual stream; runs that begin at a block
uses        the calls of the layers that are refitted
whole       the stream of the whole model behind each
importance  how much the outputs hang on what is given at each position
sequential  MLP after MLP, each on what the model gives as repaired so far, judged by what the whole model gives
parallel    every MLP by itself
moments     the same from moments that were measured once
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import fx, nn

from mlpreduce.calibration import Batch, Measured, Samples, in_all, quiet_copy, running
from mlpreduce.criteria import Moments
from mlpreduce.edits import Assign, Edit, Plan, Replace, Scale, Share, Slice
from mlpreduce.errors import ReductionError, check_one_of
from mlpreduce.graph import MLP, Leaf
from mlpreduce.layers import wraps
from mlpreduce.repair.judging import gathered, nearness
from mlpreduce.repair.moments import Refits
from mlpreduce.repair.outputs import output_of
from mlpreduce.repair.parallel import Alone, repair_alone
from mlpreduce.repair.sequential import repair_in_turn
from mlpreduce.repair.whole import Whole
from mlpreduce.surgery.operation import carry_out, rehearse
from mlpreduce.words.waiting import steps

__all__ = ["REPAIRS", "Refits", "distances", "refitted", "repaired", "repaired_from", "watcher"]

REPAIRS = ("none", "bias", "parallel", "least_squares")
_COMPARED = 128  # examples of each process, by which sets of edits are compared
_FAR = 0.9  # cosine of what the models give, below which the plan warns
Value = TypeVar("Value")
Key = TypeVar("Key")


def watcher(kind: str, mlps: Sequence[MLP], scope: Sequence[MLP]) -> Whole:
    """What a repair needs of the whole model, noted while that runs over the data for a criterion.

    Args:
        kind: of the repair.
        mlps: all MLPs of the model.
        scope: those that may change, and what is tied to them too.
    """
    owners = {mlp.owner for mlp in scope} if kind == "least_squares" else set()
    return Whole([mlp for mlp in mlps if mlp.owner in owners])


def repaired(
    model: nn.Module,
    mlps: Sequence[MLP],
    made: Plan,
    data: Any,
    whole: Whole | None = None,
    moments: Callable[[MLP], Moments] | None = None,
) -> Plan:
    """The plan with new values of fc2 of every MLP that it changes.

    Args:
        model: the unreduced model; it is not changed.
        mlps: its MLPs.
        made: a plan for it.
        data: an iterable of batches of images.
        whole: what was noted of the whole model; it is run if that was of other data.
        moments: of an MLP, with pairs, if they are known.

    Raises:
        ReductionError: unknown repair, the data is missing, empty or not finite, or an MLP cannot be refitted.
    """
    kind = made.config["repair"]
    check_one_of("repair", kind, REPAIRS)
    samples = Samples(data, model, labels=False)
    uses = _uses(mlps, made)
    _check_own(kind, uses)
    before, after = ([pair[number] for pair in uses] for number in range(2))
    if kind != "parallel":
        slices = kind == "least_squares" and all(isinstance(edit, Slice) for edit in made.edits)
        alone = _alone(model, mlps, made, Refits(moments)) if slices and moments is not None else {}
        return _in_turn(model, mlps, made, (before, after), samples, whole or watcher(kind, mlps, before), alone)
    with running(samples.device, gradients=False):
        found = repair_alone((quiet_copy(model), before), (_reduced(model, made), after), samples)
    facts = {"samples": samples.count, "fingerprint": samples.fingerprint}
    note = f"repair={kind!r}, {samples.count:,} examples: {found}"
    return replace(_with(made, found.values), notes=(*made.notes, note), data=facts)


def repaired_from(model: nn.Module, mlps: Sequence[MLP], made: Plan, refits: Refits) -> Plan:
    """The plan as `repair="parallel"` makes it, from moments that were measured once and without running the model.

    Args:
        model: the unreduced model; it is not changed.
        mlps: its MLPs.
        made: a plan for it, which slices alone.
        refits: of its MLPs; those of this plan are put there.

    Raises:
        ReductionError: the plan does more than slice, or an MLP cannot be refitted.
    """
    others = sorted({type(edit).__name__ for edit in made.edits if not isinstance(edit, Slice)})
    if others:
        raise ReductionError(f"repair from moments: the plan has edits {', '.join(others)}, of which they tell nothing")
    _check_own("parallel", _uses(mlps, made))
    return _with(made, _alone(model, mlps, made, refits))


def refitted(model: nn.Module, mlps: Sequence[MLP], edits: Sequence[Edit], data: Any) -> tuple[Alone, Measured]:
    """Fit fc2 of each MLP that these edits change, by itself.

    Args:
        model: the unreduced model; it is not changed.
        mlps: its MLPs.
        edits: of a plan for it.
        data: calibration data.

    Raises:
        ReductionError: as `repaired`.
    """
    made = Plan("trial", {}, tuple(edits))
    samples, uses = Samples(data, model, labels=False), _uses(mlps, made)
    before, after = ([pair[number] for pair in uses] for number in range(2))
    with running(samples.device, gradients=False):
        found = repair_alone((quiet_copy(model), before), (_reduced(model, made), after), samples)
    found = replace(found, values=_within(made, found.values), differences=_within(made, found.differences))
    return found, Measured({}, samples.count, samples.fingerprint)


def distances(model: nn.Module, trials: Mapping[Key, Sequence[Edit]], data: Any) -> tuple[dict[Key, float], Measured]:
    """How far what the model gives moves with each of some sets of edits: 1 minus the mean cosine, over all processes.

    The first 128 examples of each process count; the others are only read.

    Args:
        model: the unreduced model; it is not changed.
        trials: edits of a plan for it, by any key.
        data: calibration data.

    Raises:
        ReductionError: as `repaired`, or the model gives nothing for each example.
    """
    samples = Samples(data, model, labels=False)
    some: list[Batch] = []
    with running(samples.device, gradients=False):
        with in_all():
            for batch, _ in samples.chunks():
                if sum(map(len, some)) < _COMPARED:
                    some.append(batch)
        samples.finish({}, None)

        def given(tree: nn.Module, what: str) -> torch.Tensor:
            with in_all():
                outputs = [output_of(batch.run(tree), batch) for batch in some]
            found = gathered(outputs)
            if not found.isfinite().all():
                raise ReductionError(f"{what} gives what is not finite on the data")
            return found

        whole, found = given(quiet_copy(model), "the model"), {}
        with steps("sharing", len(trials)) as advance:
            for key, edits in trials.items():
                with in_all():
                    tree = _reduced(model, Plan("trial", {}, tuple(edits)))
                found[key] = 1 - nearness(whole, given(tree, "a reduction that was tried"))[0]
                advance(1)
    return found, Measured({}, samples.count, samples.fingerprint)


def _check_own(kind: str, uses: Sequence[tuple[MLP, MLP]]) -> None:
    """Check that each fc2 is of its MLP alone.

    Raises:
        ReductionError: one is not.
    """
    for mlp, _ in uses:
        if "fused" in mlp.kind:
            raise ReductionError(
                f"repair={kind!r}: {mlp.name} shares a layer with attention, which would change too; exclude it"
            )


def _alone(model: nn.Module, mlps: Sequence[MLP], made: Plan, refits: Refits) -> dict[str, torch.Tensor]:
    """Values of fc2 by tensor path, fitted for each MLP by itself, of a plan that slices alone."""
    by_name = {mlp.name: mlp for mlp in mlps}
    tree = functools.cache(lambda: _reduced(model, made))
    found = [refits.of(by_name[edit.mlp], edit.units, tree) for edit in made.of(Slice)]
    return {path: value for values in found for path, value in values.items()}


def _uses(mlps: Sequence[MLP], made: Plan) -> list[tuple[MLP, MLP]]:
    """The MLPs that a plan changes, all uses, each as it is and as it is found in the reduced model.

    A graph knows a tied leaf by one path only. Where a layer is put around a leaf, each use has its own around the same one.
    """
    changed = {edit.mlp for edit in made.of(Slice)}
    tied = {path for share in made.of(Share) for path in (share.source, share.target)}
    places = {share.target: share.source for share in made.of(Share)}
    around = {edit.module for edit in made.of(Replace) if wraps(edit.layer)}

    def moved(leaf: Leaf) -> Leaf:
        if leaf.path in around:
            return replace(leaf, path=f"{leaf.path}.base", around=leaf.path)
        return replace(leaf, path=places.get(leaf.path, leaf.path))

    uses = [mlp for mlp in mlps if mlp.owner in changed or mlp.leaf("fc2").path in tied]
    return [(mlp, replace(mlp, leaves=tuple(map(moved, mlp.leaves)))) for mlp in uses]


def _within(made: Plan, values: Mapping[str, Value]) -> dict[str, Value]:
    """Values by the paths of the unreduced model: layers come around others after tensors have their values."""
    around = {f"{edit.module}.base": edit.module for edit in made.of(Replace)}
    found = {}
    for path, value in values.items():
        inner = next((key for key in around if path == key or path.startswith(f"{key}.")), None)
        found[path if inner is None else around[inner] + path.removeprefix(inner)] = value
    return found


def _with(made: Plan, values: Mapping[str, torch.Tensor]) -> Plan:
    """The plan with new values of tensors."""
    values = _within(made, values)
    edits = [edit for edit in made.edits if not (isinstance(edit, Assign | Scale) and edit.tensor in values)]
    new = [Assign(path, value) for path, value in values.items()]
    return replace(made, edits=tuple(sorted([*edits, *new], key=lambda edit: isinstance(edit, Replace))))


def _in_turn(
    model: nn.Module,
    mlps: Sequence[MLP],
    made: Plan,
    uses: tuple[Sequence[MLP], Sequence[MLP]],
    samples: Samples,
    whole: Whole,
    alone: Mapping[str, torch.Tensor],
) -> Plan:
    """The plan with values of a repair in order of execution, and what it came to."""
    kind = made.config["repair"]
    with running(samples.device, gradients=False):
        before, after = quiet_copy(model), _reduced(model, made)
        found = repair_in_turn((before, uses[0]), (after, uses[1]), mlps, samples, kind, whole, alone)
    note = (
        f"repair={kind!r}, {samples.count:,} examples: what the model gives for {found.held:,} that no fit in turn saw is "
        f"as near to the whole model's as cosine {found.after[0]:.3f} and alignment {found.after[1]:.3f} say, without repair "
        f"{found.before[0]:.3f} and {found.before[1]:.3f}"
    )
    if found.left:
        note += f"; {len(found.left)} of {found.fitted} MLPs stay unrepaired, as the whole would be further off"
    if found.unfollowed:
        note += f"; of {len(found.unfollowed)} MLPs no stream can be followed, and their own outputs are fitted"
    if not found.weighed:
        note += "; the model gives no gradient, so all positions count alike"
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
    rehearse(tree, made)  # edits may be of others, and name what is not there
    for edit in made.of(Assign, Scale):
        path, _, name = edit.tensor.rpartition(".")
        module = tree.get_submodule(path)
        value = getattr(module, name).detach().clone()
        setattr(module, name, nn.Parameter(value, requires_grad=False) if name in module._parameters else value)
    carry_out(tree, made)
    return tree
