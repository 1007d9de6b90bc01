"""The calls that change a built model: apply, untie, merge; and its history."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import fx, nn

from mlpreduce.calibration import Loss
from mlpreduce.edits import Assign, History, Plan, Replace, Share
from mlpreduce.errors import ReductionError, call_text
from mlpreduce.graph import Inputs, find_mlps, refuse_wrapped
from mlpreduce.layers import LAYERS, merged
from mlpreduce.reduction.builds import DOUBT
from mlpreduce.reduction.planning import Globs, make_plan
from mlpreduce.surgery.operation import carry_out, untie_leaves
from mlpreduce.surgery.rewriting import without_layers, without_ties
from mlpreduce.surgery.ties import (
    check_parts,
    distinct_parts,
    guard,
    holds,
    plans_of,
    reduced_parts,
    shares_of,
    unguard,
)

__all__ = ["apply", "broken_ties", "history", "merge", "remember", "untie"]

Model = TypeVar("Model", bound=nn.Module)


def apply(
    model: Model,
    transform: str | Plan,
    *,
    include: Globs = None,
    exclude: Globs = None,
    data: Any = None,
    loss: Loss | None = None,
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
        data: calibration data, as of `plan`.
        loss: of what the model gives and labels, as of `plan`.
        example_inputs: what the model is called with, as for `find_mlps`.
        **config: keyword parameters of the transform.

    Raises:
        ReductionError: as `plan`, or the plan does not fit the model.

    Warns:
        UserWarning: units were chosen by data, and `save` will not be able to tell how timm built the model.

    Example:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=4)
        >>> vit = apply(vit, "grouped", group=2)
        >>> vit.blocks[1].mlp.fc1 is vit.blocks[0].mlp.fc1
        True
    """
    if isinstance(transform, Plan):
        if config or include or exclude or data is not None or loss is not None:
            raise ReductionError("apply(model, plan): a plan is applied as it is; give it no further arguments")
        refuse_wrapped(model, "apply(model, plan)")
        made, tree = transform, None
        _check_same(model, made, example_inputs)
    else:
        scope: dict[str, Any] = {"include": include, "exclude": exclude, "data": data, "loss": loss}
        made, found = make_plan(model, transform, config, **scope, example_inputs=example_inputs)
        tree = found.tree
    check_parts(model, made, f"apply(model, {call_text(made.transform, made.config)})")
    carry_out(model, made, rehearsal=tree)
    remember(model, made)
    for note in made.notes:
        if note.startswith(DOUBT):
            warnings.warn(note, stacklevel=2)
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
        params = mlp.params(owned=mlp.owner == mlp.name)
        if (row.hidden_before, row.owner_before, row.params_before) != (mlp.hidden_features, mlp.owner, params):
            raise ReductionError(
                f"{call}: {row.mlp} has {mlp.hidden_features} hidden units, {params:,} parameters of its own and "
                f"the owner {mlp.owner}; the plan was made for {row.hidden_before}, {row.params_before:,} and "
                f"{row.owner_before}: it is of another model, or already carried out"
            )


def remember(model: nn.Module, made: Plan) -> None:
    """Append a plan to the model's history, without the tensors it may hold."""
    edits = tuple(
        Assign(edit.tensor)
        if isinstance(edit, Assign)
        else replace(edit, values=None)
        if isinstance(edit, Replace)
        else edit
        for edit in made.edits
    )
    plans = [*plans_of(model), replace(made, edits=edits, costs=None, replaced=None)]
    model.mlpreduce_history = plans  # type: ignore[assignment]
    if isinstance(model, fx.GraphModule):
        model.meta["mlpreduce_history"] = plans  # what a GraphModule's deepcopy keeps
    if made.of(Share):
        guard(model)


def history(model: nn.Module) -> list[Plan]:
    """The plans that were applied to a model, first to last: a list, which a notebook shows as a table.

    The model keeps them in its attribute `mlpreduce_history`.
    """
    plans = plans_of(model) or getattr(model, "mlpreduce_history", [])  # of a wrapper that passes attributes on
    return History(plans)


def untie(model: Model) -> Model:
    """Give every block its own copy of the MLP it shares, in place, also in parts that were reduced on their own.
    Exact: no output changes.

    What is left in the history are the plans without their ties, so that the model is saved as what it now is.

    Raises:
        ReductionError: nothing is tied, or a tie that the history tells of is gone.
    """
    refuse_wrapped(model, "untie")
    having = [(part, shares) for part in distinct_parts(model).values() if (shares := shares_of(plans_of(part)))]
    if not having:
        raise ReductionError("untie: this model has no tie made by mlpreduce")
    untie_leaves(having)
    for part, _ in having:
        _rewrite(part, without_ties(plans_of(part)))
        unguard(part)
    return model


def merge(model: Model) -> Model:
    """Turn a reduced model into a plain one, in place. Exact: no output in evaluation changes beyond rounding.

    What reductions added is folded into the weights, layers that stand for others become dense, and what was tied is untied,
    so that classes and state dict are those of the architecture again; sliced MLPs stay as narrow as they are. A model with
    nothing to merge is returned as it is.

    Raises:
        ReductionError: the model is wrapped, or a tie that the history tells of is gone.
    """
    refuse_wrapped(model, "merge")
    parts = reduced_parts(model).values()
    if any(shares_of(plans_of(part)) for part in parts):
        untie(model)
    plains: dict[int, nn.Module] = {}  # of a module in several places one
    for layer in [module for module in model.modules() if isinstance(module, tuple(LAYERS.values()))]:
        if hasattr(layer, "merged"):
            with torch.inference_mode(False), torch.no_grad():
                plains[id(layer)] = merged(layer)
    while any(id(plain) in plains for plain in plains.values()):  # a layer was around a layer
        plains = {key: plains.get(id(plain), plain) for key, plain in plains.items()}
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if id(child) in plains:
                module._modules[name] = plains[id(child)].train(child.training)  # type: ignore[union-attr]
    if plains:
        for part in parts:
            _rewrite(part, without_layers(without_ties(plans_of(part))))
    return model


def _rewrite(model: nn.Module, plans: list[Plan]) -> None:
    """Give a model another history."""
    kept = [made for made in plans if made.edits]
    model.mlpreduce_history = kept  # type: ignore[assignment]
    if isinstance(model, fx.GraphModule):
        model.meta["mlpreduce_history"] = kept


def broken_ties(model: nn.Module, tree: nn.Module | None = None) -> list[Share]:
    """Ties of the model's history that no longer hold in it, or in `tree`, such as its EMA."""
    tree = model if tree is None else tree
    return [share for share in shares_of(plans_of(model)) if not holds(share, tree)]
