"""The calls that reduce a built model: plan, apply, history, untie, merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import fx, nn

from mlpreduce.budget import Baseline, Cost, measure, outcome
from mlpreduce.edits import Assign, Edit, Plan, Row, Scale, Share, Slice
from mlpreduce.errors import ReductionError, call_text
from mlpreduce.graph import (
    MLP,
    Inputs,
    chains,
    find_mlps,
    mlps_or_raise,
    module_at,
    refuse_wrapped,
    select,
    structural_copy,
)
from mlpreduce.parts import Parts
from mlpreduce.surgery import carry_out, untie_leaves
from mlpreduce.ties import guard, unguard
from mlpreduce.transforms import Transform, check_config

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["apply", "broken_ties", "history", "merge", "plan", "untie"]

Model = TypeVar("Model", bound=nn.Module)
Globs = str | Sequence[str] | None


def plan(
    model: nn.Module,
    transform: str,
    *,
    include: Globs = None,
    exclude: Globs = None,
    example_inputs: Inputs | None = None,
    **config: Any,
) -> Plan:
    """What a transform would do to a model. Nothing is changed; print the plan to see it.

    Args:
        model: the model, on any device. On `meta`, transforms that look at weights are refused.
        transform: a name of `list_transforms`.
        include: glob or globs over MLP names; others are left out.
        exclude: glob or globs over MLP names to leave out.
        example_inputs: what the model is called with, as for `find_mlps`.
        **config: keyword parameters of the transform.

    Raises:
        ReductionError: unknown names, values out of range, nothing to reduce, or nothing would change.

    Example:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=4)
        >>> [row.owner for row in plan(vit, "grouped", group=2).rows]
        ['blocks.0.mlp', 'blocks.0.mlp', 'blocks.2.mlp', 'blocks.2.mlp']
    """
    made, mlps = _make(model, transform, include, exclude, example_inputs, config)
    return replace(made, costs=_costs(structural_copy(model, device="meta"), mlps, made, example_inputs))


def _make(
    model: nn.Module,
    transform: str,
    include: Globs,
    exclude: Globs,
    example_inputs: Inputs | None,
    config: dict[str, Any],
) -> tuple[Plan, list[MLP]]:
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
    found = mlps_or_raise(model, call, example_inputs)
    mlps = found.mlps
    try:
        scope, left_out = _scope(entry, *select(mlps, include, exclude))
        if not scope:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:3])
            raise ReductionError(f"none of {len(mlps)} MLPs is in scope ({reasons})")
        others = [mlp for mlp in mlps if mlp.name in left_out]
        edits = tuple(entry.function(Parts(model, scope, others), **config) or ())
        strange = [edit for edit in edits if not isinstance(edit, Slice | Share | Assign | Scale)]
        if strange:
            raise ReductionError(f"the transform gave {strange[0]!r}; edits are Slice, Share, Assign and Scale")
    except ReductionError as error:
        raise ReductionError(f"{call}: {error}") from error
    if not edits:
        raise ReductionError(f"{call}: nothing would change on {len(scope)} MLPs")
    draft = Plan(transform, config, edits, left_out=left_out)
    notes = (*_notes(edits), *_look_alikes(found.others))
    return replace(draft, rows=_rows(scope, mlps, draft), notes=notes), mlps


def apply(
    model: Model,
    transform: str | Plan,
    *,
    include: Globs = None,
    exclude: Globs = None,
    example_inputs: Inputs | None = None,
    **config: Any,
) -> Model:
    """Reduce a model in place, and return it.

    The model keeps its class, methods and hooks. It is changed as a whole or, after an error, not at all. Build
    optimizer, EMA and DDP after it. The plan is appended to `history(model)`.

    Args:
        model: the model; of a `torch.fx.GraphModule` the graph is rewritten too.
        transform: a name of `list_transforms`, or a plan made before.
        include: glob or globs over MLP names; others are left out.
        exclude: glob or globs over MLP names to leave out.
        example_inputs: what the model is called with, as for `find_mlps`.
        **config: keyword parameters of the transform.

    Raises:
        ReductionError: as `plan`, or the plan does not fit the model.

    Example:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=4)
        >>> vit = apply(vit, "grouped", group=2)
        >>> vit.blocks[1].mlp.fc1 is vit.blocks[0].mlp.fc1
        True
    """
    if isinstance(transform, Plan):
        if config or include or exclude:
            raise ReductionError("apply(model, plan): a plan is applied as it is; give it no further arguments")
        refuse_wrapped(model, "apply(model, plan)")
        made = transform
        _check_same(model, made, example_inputs)
    else:
        made, _ = _make(model, transform, include, exclude, example_inputs, config)
    carry_out(model, made)
    remember(model, made)
    return model


def _check_same(model: nn.Module, made: Plan, example_inputs: Inputs | None) -> None:
    """Whether a model has the MLPs that a plan was made for: all, and in the same widths and ties.

    Raises:
        ReductionError: it has not. Plans made by hand list no MLPs, and are checked edit by edit only.
    """
    if not made.rows:
        return
    call = f"apply(model, {call_text(made.transform, made.config)})"
    found = {mlp.name: mlp for mlp in find_mlps(model, example_inputs)}
    planned = {row.mlp for row in made.rows} | made.left_out.keys()
    if planned != found.keys():
        names = sorted(planned ^ found.keys())
        raise ReductionError(
            f"{call}: the plan is of another model: {names[0]} is in one of them only, of {len(names)} MLPs"
        )
    for row in made.rows:
        mlp = found[row.mlp]
        if (row.hidden_before, row.owner_before) != (mlp.hidden_features, mlp.owner):
            raise ReductionError(
                f"{call}: {row.mlp} has {mlp.hidden_features} hidden units and is owned by {mlp.owner}; the plan was made "
                f"for {row.hidden_before} and {row.owner_before}: it is of another model, or already carried out"
            )


def remember(model: nn.Module, made: Plan) -> None:
    """Append a plan to the model's history, without the tensors it may hold."""
    edits = tuple(Assign(edit.tensor) if isinstance(edit, Assign) else edit for edit in made.edits)
    plans = [*history(model), replace(made, edits=edits, costs=None)]
    model.mlpreduce_history = plans  # type: ignore[assignment]
    if isinstance(model, fx.GraphModule):
        model.meta["mlpreduce_history"] = plans  # what a GraphModule's deepcopy keeps
    elif made.of(Share):
        guard(model)


def history(model: nn.Module) -> list[Plan]:
    """The plans that were applied to a model, first to last. Kept in the attribute `mlpreduce_history`."""
    kept = model.meta.get("mlpreduce_history", []) if isinstance(model, fx.GraphModule) else []
    return list(getattr(model, "mlpreduce_history", kept))


def untie(model: Model) -> Model:
    """Give every block its own copy of the MLP it shares, in place. Exact: no output changes.

    What is left in the history are the plans without their ties, so that the model is saved as what it now is.

    Raises:
        ReductionError: nothing is tied, or a tie that the history tells of is gone.
    """
    refuse_wrapped(model, "untie")
    shares = [share for made in history(model) for share in made.of(Share)]
    if not shares:
        raise ReductionError("untie: this model has no tie made by mlpreduce")
    untie_leaves(model, shares)
    plans = _without_ties(history(model))
    model.mlpreduce_history = [made for made in plans if made.edits]  # type: ignore[assignment]
    unguard(model)
    return model


def merge(model: Model) -> Model:
    """Turn a reduced model into a plain one, in place. Exact: no output changes.

    What reductions added is folded into the weights, and what they tied is untied, so that the state dict is that of the
    architecture again; sliced MLPs stay as narrow as they are. A model with nothing to merge is returned as it is.

    Raises:
        ReductionError: the model is wrapped, or a tie that the history tells of is gone.
    """
    refuse_wrapped(model, "merge")
    return untie(model) if any(made.of(Share) for made in history(model)) else model


def _without_ties(plans: list[Plan]) -> list[Plan]:
    """Plans that give the same shapes without sharing: a slice of what was tied becomes one of each use."""
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
            else:
                edits.append(edit)
        untied.append(replace(made, edits=tuple(edits)))
    return untied


def broken_ties(model: nn.Module, tree: nn.Module | None = None) -> list[Share]:
    """Ties of the model's history that no longer hold in it, or in `tree`, such as its EMA."""
    tree = model if tree is None else tree
    shares = (share for made in history(model) for share in made.of(Share))
    return [share for share in shares if module_at(tree, share.source) is not module_at(tree, share.target)]


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


def _rows(scope: list[MLP], mlps: list[MLP], made: Plan) -> tuple[Row, ...]:
    after = outcome(mlps, made)
    rows = []
    for mlp in scope:
        hidden, owner = after[mlp.name]
        before = mlp.params(owned=mlp.owner == mlp.name)
        now = mlp.params(hidden, owned=owner == mlp.name)
        rows.append(Row(mlp.name, mlp.kind, mlp.hidden_features, hidden, mlp.owner, owner, before, now))
    return tuple(rows)


def _costs(model: nn.Module, mlps: list[MLP], made: Plan, inputs: Inputs | None) -> Callable[[], tuple[Cost, Cost]]:
    """Costs before and after, measured when the plan is printed, on a meta copy: the model may have changed by then."""
    measured: list[Baseline] = []

    def costs() -> tuple[Cost, Cost]:
        if not measured:
            measured.append(measure(model, inputs, mlps))
        return measured[0].cost, measured[0].after(made)

    return costs


def _notes(edits: Sequence[object]) -> tuple[str, ...]:
    notes = []
    if any(isinstance(edit, Share) for edit in edits):
        notes.append(
            'scale and keep are for training from scratch; for trained weights use scale="none" with keep="mean" or '
            '"align_mean". Sharing saves parameters and memory, not compute.'
        )
    if any(isinstance(edit, Slice) for edit in edits):
        notes.append(
            "units are chosen for training from scratch; for trained weights choose a criterion, then fine-tune."
        )
    return tuple(notes)


def _look_alikes(others: Mapping[str, str]) -> tuple[str, ...]:
    """One note on what is no MLP, though it looks like one."""
    for name, reason in others.items():
        return (f"{len(others)} blocks are no MLPs: {name}{', ...' if len(others) > 1 else ''}: {reason}",)
    return ()


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
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ReductionError(
        f"{call}: {value!r} is a {type(value).__name__}; arguments are numbers, strings, lists and dicts"
    )
