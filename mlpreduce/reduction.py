"""The calls that reduce a model: plan, apply, history, untie, create_model, verify."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from mlpreduce.budget import Baseline, Cost, measure, outcome
from mlpreduce.edits import Assign, Plan, Row, Share, Slice
from mlpreduce.errors import ReductionError, call_text
from mlpreduce.graph import MLP, chains, mlps_or_raise, refuse_wrapped, select, structural_copy
from mlpreduce.parts import Parts
from mlpreduce.surgery import carry_out, untie_leaves
from mlpreduce.transforms import Transform, check_config, get_transform

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["apply", "create_model", "history", "plan", "untie"]

Model = TypeVar("Model", bound=nn.Module)
Globs = str | Sequence[str] | None


def plan(model: nn.Module, transform: str, *, include: Globs = None, exclude: Globs = None, **config: Any) -> Plan:
    """What a transform would do to a model. Nothing is changed; print the plan to see it.

    Args:
        model: the model, on any device. On `meta`, transforms that look at weights are refused.
        transform: a name of `list_transforms`.
        include: glob or globs over MLP names; others are left out.
        exclude: glob or globs over MLP names to leave out.
        **config: keyword parameters of the transform.

    Raises:
        ReductionError: unknown names, values out of range, nothing to reduce, or nothing would change.

    Example:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=4)
        >>> [row.owner for row in plan(vit, "grouped", group=2).rows]
        ['blocks.0.mlp', 'blocks.0.mlp', 'blocks.2.mlp', 'blocks.2.mlp']
    """
    made, mlps = _make(model, transform, include, exclude, config)
    return replace(made, costs=_costs(structural_copy(model, device="meta"), mlps, made))


def _make(
    model: nn.Module, transform: str, include: Globs, exclude: Globs, config: dict[str, Any]
) -> tuple[Plan, list[MLP]]:
    call = call_text(transform, config)
    refuse_wrapped(model, call)
    entry = check_config(transform, config)
    if entry.construction:
        arguments = ", ".join(f"{key}={value!r}" for key, value in config.items()) or "..."
        raise ReductionError(
            f"{call}: {transform} acts when a model is built, and this one is; build it with "
            f'mlpreduce.create_model(name, "{transform}", {arguments}), or slice it: mlpreduce.apply(model, "shallow")'
        )
    mlps = mlps_or_raise(model, call)
    try:
        scope, left_out = _scope(entry, *select(mlps, include, exclude))
        if not scope:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:3])
            raise ReductionError(f"none of {len(mlps)} MLPs is in scope ({reasons})")
        others = [mlp for mlp in mlps if mlp.name in left_out]
        edits = tuple(entry.function(Parts(model, scope, others), **config))
    except ReductionError as error:
        raise ReductionError(f"{call}: {error}") from error
    if not edits:
        raise ReductionError(f"{call}: nothing would change on {len(scope)} MLPs")
    draft = Plan(transform, _plain(config), edits, left_out=left_out)
    return replace(draft, rows=_rows(scope, mlps, draft), notes=_notes(edits)), mlps


def apply(model: Model, transform: str | Plan, *, include: Globs = None, exclude: Globs = None, **config: Any) -> Model:
    """Reduce a model in place, and return it.

    The model keeps its class, methods and hooks. It is changed as a whole or, after an error, not at all. Build
    optimizer, EMA and DDP after it. The plan is appended to `history(model)`.

    Args:
        model: the model; of a `torch.fx.GraphModule` the graph is rewritten too.
        transform: a name of `list_transforms`, or a plan made before.
        include: glob or globs over MLP names; others are left out.
        exclude: glob or globs over MLP names to leave out.
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
    else:
        made, _ = _make(model, transform, include, exclude, config)
    carry_out(model, made)
    remember(model, made)
    return model


def remember(model: nn.Module, made: Plan) -> None:
    """Append a plan to the model's history, without the tensors it may hold."""
    edits = tuple(Assign(edit.tensor) if isinstance(edit, Assign) else edit for edit in made.edits)
    model.mlpreduce_history = [*history(model), replace(made, edits=edits, costs=None)]  # type: ignore[assignment]


def history(model: nn.Module) -> list[Plan]:
    """The plans that were applied to a model, first to last. Kept in the attribute `mlpreduce_history`."""
    return list(getattr(model, "mlpreduce_history", []))


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
    plans = [made.without(Share) for made in history(model)]
    model.mlpreduce_history = [made for made in plans if made.edits]  # type: ignore[assignment]
    return model


def create_model(name: str, transform: str | None = None, *, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """`timm.create_model` and a transform, in one call; the model remembers how it was built.

    Args:
        name: a timm architecture.
        transform: a name of `list_transforms`, those that act at construction (`thin`) too; None for none.
        pretrained: whether timm loads its weights, before anything is reduced.
        **kwargs: keyword parameters of the transform, and of `timm.create_model`.

    Raises:
        ReductionError: as `apply`; the architecture has no such construction argument; pretrained weights for a
            model that is built with other shapes.

    Example:
        >>> vit = create_model("vit_tiny_patch16_224", "thin", mlp_ratio=2.0, depth=2)
        >>> vit.blocks[0].mlp.fc1.out_features
        384
    """
    import timm

    entry = get_transform(transform) if transform is not None else None
    config = {key: kwargs.pop(key) for key in list(kwargs) if entry is not None and key in entry.parameters}
    given = dict(kwargs)
    if entry is not None and entry.construction:
        given |= _construction(entry, name, pretrained, kwargs, config)
    model: nn.Module = timm.create_model(name, pretrained=pretrained, **given)
    model.mlpreduce_build = {"name": name, "kwargs": _plain(given)}  # type: ignore[assignment]
    if entry is not None and entry.construction:
        remember(model, Plan(entry.name, _plain(config), ()))
    elif entry is not None:
        apply(model, entry.name, **config)
    return model


def _construction(
    entry: Transform, name: str, pretrained: bool, kwargs: dict[str, Any], config: dict[str, Any]
) -> dict[str, Any]:
    """Construction arguments, after a look at what they do to the architecture on the meta device."""
    import timm

    call = f"create_model({name!r}, {call_text(entry.name, config)})"
    try:
        arguments: dict[str, Any] = entry.function(**config)
    except ReductionError as error:
        raise ReductionError(f"{call}: {error}") from error
    if pretrained:
        raise ReductionError(
            f"{call}: pretrained weights do not fit a model built with {call_text('', arguments).strip('()')}; slice "
            f'trained weights with mlpreduce.create_model({name!r}, "shallow", pretrained=True)'
        )

    def widths(**more: Any) -> list[int]:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = timm.create_model(name, **kwargs, **more)
        return [mlp.hidden_features for mlp in mlps_or_raise(model, call)]

    usual = widths()
    try:
        built = widths(**arguments)
    except TypeError as error:
        raise ReductionError(f"{call}: {name} cannot be built so: {error}; slice it with shallow instead") from error
    if built == usual and config:
        raise ReductionError(f"{call}: {name} takes the argument, but its MLPs keep their width; slice it with shallow")
    return arguments


def _scope(entry: Transform, mlps: list[MLP], left_out: dict[str, str]) -> tuple[list[MLP], dict[str, str]]:
    """MLPs a transform acts on, and the others with the reason."""
    if entry.scope == "all":
        return mlps, left_out
    alone = {chain[0].name for chain in chains(mlps) if len(chain) == 1}
    for mlp in mlps:
        if mlp.acts_on != "tokens":
            left_out[mlp.name] = f"acts on the {mlp.acts_on} only"
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
        rows.append(Row(mlp.name, mlp.kind, mlp.hidden_features, hidden, owner, before, now))
    return tuple(rows)


def _costs(model: nn.Module, mlps: list[MLP], made: Plan) -> Callable[[], tuple[Cost, Cost]]:
    """Costs before and after, measured when the plan is printed, on a meta copy: the model may have changed by then."""
    measured: list[Baseline] = []

    def costs() -> tuple[Cost, Cost]:
        if not measured:
            measured.append(measure(model, mlps=mlps))
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


def _plain(value: Any) -> Any:
    """Config as JSON values."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value
