"""From a transform to a plan: which MLPs are in scope, what the transform says of them, and what becomes of each."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from mlpreduce.budget import Cost, measure, outcome
from mlpreduce.calibration import Answers, Loss, rereadable
from mlpreduce.edits import Assign, Plan, Replace, Row, Scale, Share, Slice
from mlpreduce.errors import ReductionError, call_text, naming
from mlpreduce.graph import (
    MLP,
    Inputs,
    Survey,
    chains,
    example_inputs,
    find_mlps,
    mlps_or_raise,
    module_at,
    record,
    refuse_wrapped,
    select,
    structural_copy,
)
from mlpreduce.reduction.builds import build_doubt
from mlpreduce.reduction.outcomes import planned
from mlpreduce.repair import repaired, watcher
from mlpreduce.surgery.operation import rehearse
from mlpreduce.surgery.ties import check_parts
from mlpreduce.transforms import Transform, check_config
from mlpreduce.transforms.parts import Parts
from mlpreduce.transforms.registry import blaming
from mlpreduce.words.values import Config

__all__ = ["Globs", "make_plan", "plain", "plan"]

Globs = str | Sequence[str] | None


def plan(
    model: nn.Module,
    transform: str,
    *,
    include: Globs = None,
    exclude: Globs = None,
    data: Any = None,
    loss: Loss | None = None,
    example_inputs: Inputs | None = None,
    **config: Any,
) -> Plan:
    """What a transform would do to a model. Nothing is changed; print the plan to see it.

    Args:
        model: the model, on any device. On `meta`, transforms that look at weights are refused.
        transform: a name of `list_transforms`.
        include: glob or globs over MLP names; others are left out.
        exclude: glob or globs over MLP names to leave out.
        data: calibration data, for criteria and repairs that look at it: any iterable of batches, of images or (images,
            labels); read a few examples at a time, in evaluation mode. In a torch.distributed group every process gives its
            share, and all make the same plan.
        loss: `(what the model gives, labels) -> scalar`, the mean over the examples, for criteria that need one; by
            default the cross entropy of logits.
        example_inputs: what the model is called with, as for `find_mlps`.
        **config: keyword parameters of the transform.

    Raises:
        ReductionError: unknown names, values out of range, nothing to reduce, nothing would change, or data that is missing,
            empty or not finite.

    Example:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=4)
        >>> [row.owner for row in plan(vit, "grouped", group=2).rows]
        ['blocks.0.mlp', 'blocks.0.mlp', 'blocks.2.mlp', 'blocks.2.mlp']
    """
    scope: dict[str, Any] = {"include": include, "exclude": exclude, "data": data, "loss": loss}
    made, found = make_plan(model, transform, config, **scope, example_inputs=example_inputs)
    return replace(made, costs=_costs(structural_copy(model, device="meta"), found.mlps, made, example_inputs))


def make_plan(
    model: nn.Module,
    transform: str,
    config: Config,
    *,
    include: Globs = None,
    exclude: Globs = None,
    data: Any = None,
    loss: Loss | None = None,
    example_inputs: Inputs | None = None,
    found: Survey | None = None,
    answers: Answers | None = None,
) -> tuple[Plan, Survey]:
    """The plan without its costs, and what the model has; `found` and `answers` are that, and of the data, if it is known.

    Raises:
        ReductionError: as `plan`.
    """
    if not isinstance(transform, str):
        raise ReductionError(f"the transform is {transform!r}; it must be a name, or for apply a plan")
    call = call_text(transform, config)
    refuse_wrapped(model, call)
    entry = check_config(transform, config)
    config = {key: plain(value, call) for key, value in config.items()}
    if entry.construction:
        arguments = ", ".join(f"{key}={value!r}" for key, value in config.items()) or "..."
        raise ReductionError(
            f"{call}: {transform} acts when a model is built, and this one is; build it with "
            f'mlpreduce.create_model(name, "{transform}", {arguments}), or slice it: mlpreduce.apply(model, "shallow")'
        )
    found = mlps_or_raise(model, call, example_inputs) if found is None else found
    mlps, data = found.mlps, rereadable(data, model)
    with naming(call):
        scope, left_out = _scope(entry, *select(mlps, include, exclude))
        if not scope:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:3])
            raise ReductionError(f"none of {len(mlps)} MLPs is in scope ({reasons})")
        repair = config.get("repair", "none")
        whole = watcher(repair, mlps, scope)
        given: dict[str, Any] = {"data": data, "loss": loss, "example_inputs": example_inputs}
        parts = Parts(model, scope, mlps, **given, refitted=repair != "none", watcher=whole, answers=answers)
        with blaming(transform):
            edits = tuple(entry.function(parts, **config) or ())
        strange = [edit for edit in edits if not isinstance(edit, Slice | Share | Replace | Assign | Scale)]
        if strange:
            raise ReductionError(
                f"the transform gave {strange[0]!r}; edits are Slice, Share, Replace, Assign and Scale"
            )
    if not edits:
        raise ReductionError(f"{call}: nothing would change on {len(scope)} MLPs")
    try:
        json.dumps(config, allow_nan=False)
    except ValueError as error:
        raise ReductionError(f"{call}: a plan has finite numbers only, so that it can be stored") from error
    draft = Plan(transform, config, edits, left_out=left_out)
    check_parts(model, draft, call)
    _check_whole(model, mlps, edits, call)
    if any(mlp.reshapes for mlp in mlps if mlp.name in {edit.mlp for edit in draft.of(Slice)}):
        _check_runs(model, draft, example_inputs, call)
    draft = replace(draft, data=parts.data)
    unused = parts.unused
    if repair != "none":
        unused = [name for name in unused if name != "data"]
        layers = {leaf.path for mlp in mlps for leaf in mlp.leaves}
        around = [edit for edit in edits if isinstance(edit, Replace) and edit.module not in layers]  # around MLPs
        with naming(call):
            draft = replace(draft, edits=tuple(edit for edit in draft.edits if edit not in around))
            draft = repaired(model, mlps, draft, data, whole, parts.pairs)
            draft = replace(draft, edits=(*draft.edits, *around))
    if unused:
        parts.notes.append(f"{' and '.join(unused)} made no difference: nothing here looks at it")
    if parts.data is not None and (doubt := build_doubt(model)):  # rather now than after training
        parts.notes.append(doubt)
    notes = (
        *parts.notes,
        *draft.notes,
        *_notes(edits, chosen="criterion" in config or config.get("scale") == "none"),
        *_look_alikes(found.others),
        *_unseen(found.hidden),
    )
    after = _replaced(model, mlps, draft, example_inputs, call) if draft.of(Replace) else None
    return replace(draft, rows=_rows(scope, mlps, draft, after), notes=notes, replaced=after), found


def _replaced(model: nn.Module, mlps: list[MLP], draft: Plan, inputs: Inputs | None, call: str) -> dict[str, MLP]:
    """The MLPs of the model with new layers, by name, which shows that it runs.

    Raises:
        ReductionError: it does not, or one of them is an MLP no longer.
    """
    for edit in draft.of(Replace):
        parent = module_at(model, edit.module.rpartition(".")[0])
        if isinstance(parent, nn.TransformerEncoderLayer):
            raise ReductionError(
                f"{call}: {edit.module} is part of a TransformerEncoderLayer, which reads the weights of its Linear layers "
                f"itself in evaluation; exclude it, or share or slice it"
            )
    tree = rehearse(model, draft, weights=False)
    layers = ", ".join(sorted({edit.layer for edit in draft.of(Replace)}))
    if inputs is None:
        with suppress(ReductionError):  # then it is traced, which shows less
            inputs = example_inputs(model, 2)
    try:
        found = {mlp.name: mlp for mlp in find_mlps(tree, inputs)}
    except ReductionError as error:
        raise ReductionError(
            f"{call}: with {layers} the model does not run: its forward reads what only the layers that were there have, or "
            f"calls them otherwise ({error})"
        ) from error
    dropped = {edit.module for edit in draft.of(Replace)}
    lost = [mlp.name for mlp in mlps if mlp.name not in found and mlp.name not in dropped]
    if lost:
        raise ReductionError(f"{call}: with {layers}, {lost[0]} is no MLP that can be found; exclude it")
    return found


def _check_whole(model: nn.Module, mlps: list[MLP], edits: Sequence[object], call: str) -> None:
    """Whether what is sliced belongs to one MLP and those that share all of it.

    Raises:
        ReductionError: a layer or parameter is also part of another MLP, which would be left with half of it.
    """
    owners: dict[tuple[int, str, int], MLP] = {}
    sliced = {edit.mlp for edit in edits if isinstance(edit, Slice)}
    for mlp in mlps:
        for axis in mlp.axes:
            module = module_at(model, axis.tensor.rpartition(".")[0])
            other = owners.setdefault((id(module), axis.tensor.rpartition(".")[2], axis.dim), mlp)
            if other.owner != mlp.owner and {other.name, mlp.name} & sliced:
                raise ReductionError(
                    f"{call}: {axis.tensor} is part of {other.name} and {mlp.name}, which are not tied otherwise; exclude "
                    f"both, or give each its own"
                )


def _check_runs(model: nn.Module, draft: Plan, inputs: Inputs | None, call: str) -> None:
    """Run the sliced model once on the meta device: its code may have the old width in figures.

    Raises:
        ReductionError: it does not run.
    """
    sliced = rehearse(model, draft)
    try:
        batch = example_inputs(model, 2) if inputs is None else inputs
    except ReductionError:  # then nothing was reshaped that is known
        return
    try:
        record(sliced, batch)
    except Exception as error:  # whatever the model's forward raises
        raise ReductionError(
            f"{call}: sliced, the model does not run ({type(error).__name__}: {error}): its forward has a hidden width in "
            f"figures; let it read the width from the tensor, or exclude the MLP"
        ) from error


def _scope(entry: Transform, mlps: list[MLP], left_out: dict[str, str]) -> tuple[list[MLP], dict[str, str]]:
    """MLPs a transform acts on, and the others with the reason."""
    if entry.scope == "all":
        return mlps, left_out
    first: dict[tuple[str, str], str] = {}  # calls of one MLP in one block
    for mlp in mlps:
        other = first.setdefault((mlp.block, mlp.owner), mlp.name)
        if other != mlp.name:
            left_out[mlp.name] = "is the same module as an earlier MLP of its block, and changes with it"
    alone = {chain[0].name for chain in chains([m for m in mlps if m.name not in left_out]) if len(chain) == 1}
    for mlp in mlps:
        if mlp.name in left_out:
            continue
        if mlp.alone:
            left_out[mlp.name] = mlp.alone
        elif mlp.acts_on != "tokens":
            left_out[mlp.name] = "acts on one token only, as class attention and pooling do"
        elif mlp.name in alone:
            left_out[mlp.name] = "no other MLP of its stage is like it"
    return [mlp for mlp in mlps if mlp.name not in left_out], left_out


def _rows(scope: list[MLP], mlps: list[MLP], made: Plan, replaced: dict[str, MLP] | None) -> tuple[Row, ...]:
    """What becomes of each MLP; `replaced` are those with new layers, if there are some."""
    after = outcome(mlps, made)
    rows = []
    for mlp in scope:
        hidden, owner = after[mlp.name]
        before = mlp.params(owned=mlp.owner == mlp.name)
        if replaced is None:
            now = mlp.params(hidden, owned=owner == mlp.name)
        elif new := replaced.get(mlp.name):
            hidden, owner, now = new.hidden_features, new.owner, new.params(owned=new.owner == new.name)
        else:
            hidden, owner, now = 0, mlp.name, 0
        rows.append(Row(mlp.name, mlp.kind, mlp.hidden_features, hidden, mlp.owner, owner, before, now))
    return tuple(rows)


def _costs(model: nn.Module, mlps: list[MLP], made: Plan, inputs: Inputs | None) -> Callable[[], tuple[Cost, Cost]]:
    """Costs before and after, measured when the plan is printed, on a meta copy: the model may have changed by then."""
    measured: list[tuple[Cost, Cost]] = []

    def costs() -> tuple[Cost, Cost]:
        if not measured:
            before = measure(model, inputs, mlps)
            measured.append((before.cost, planned(model, before, made, inputs)[0]))
        return measured[0]

    return costs


def _notes(edits: Sequence[object], *, chosen: bool) -> tuple[str, ...]:
    notes = []
    if any(isinstance(edit, Share) for edit in edits):
        if not chosen:
            notes.append(
                'scale and keep are for training from scratch; for trained weights use scale="none", and keep="auto" with data'
            )
        notes.append("Sharing saves parameters and memory, not compute.")
    if any(isinstance(edit, Slice) for edit in edits) and not chosen:
        notes.append(
            "units are chosen for training from scratch; for trained weights choose a criterion, then fine-tune."
        )
    return tuple(notes)


def _look_alikes(others: Mapping[str, str]) -> tuple[str, ...]:
    """One note on what is no MLP, though it looks like one."""
    for name, reason in others.items():
        return (f"{len(others)} blocks are no MLPs: {name}{', ...' if len(others) > 1 else ''}: {reason}",)
    return ()


def _unseen(hidden: Mapping[str, str]) -> tuple[str, ...]:
    """One note on MLPs that stay as they are since a layer of theirs is no plain one."""
    more = f", and {len(hidden) - 1} more" if hidden.keys() - [*hidden][:1] else ""
    return tuple(f"{name}{more} cannot be reduced: {reason}" for name, reason in [*hidden.items()][:1])


def plain(value: Any, call: str) -> Any:
    """Config as JSON values, so that a plan can be saved whatever the user wrote.

    Raises:
        ReductionError: it is none.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(entry, call) for key, entry in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [plain(entry, call) for entry in value]
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        return plain(value.tolist(), call)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ReductionError(
        f"{call}: {value!r} is a {type(value).__name__}; arguments are numbers, strings, lists and dicts"
    )
