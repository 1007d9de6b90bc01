"""`reduce_in_training`: reduces a model between two updates, and carries the optimizer's state over."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from mlpreduce.calibration import Loss
from mlpreduce.during.units import average_of
from mlpreduce.edits import Plan, Replace, Share, Slice
from mlpreduce.errors import ReductionError, call_text
from mlpreduce.graph import Inputs, module_at, refuse_wrapped, structural_copy
from mlpreduce.reduction.applying import apply
from mlpreduce.reduction.planning import Globs, make_plan
from mlpreduce.surgery.operation import rehearse
from mlpreduce.surgery.slicing import slice_all

__all__ = ["reduce_in_training"]

Model = TypeVar("Model", bound=nn.Module)
_GRAD = object()  # the key under which gradients are cut, as if they were a state of the optimizer


def reduce_in_training(
    model: Model,
    transform: str | Plan,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    ema: Any = None,
    *,
    include: Globs = None,
    exclude: Globs = None,
    data: Any = None,
    loss: Loss | None = None,
    example_inputs: Inputs | None = None,
    **config: Any,
) -> Model:
    """Reduce a model in the middle of its training, in place, so that the same optimizer and schedule go on with it.

    What the optimizer knows of a sliced tensor (moments, momentum, anything of its shape) is sliced to the kept units, and
    so is its gradient. Where tensors become tied, what is known of the one that stays is kept, in the place of the first of
    them, and the others leave their group; the groups themselves, and so a schedule, stay. Wrap the model in DDP and
    compile it anew after it.

    Everything is checked before anything changes.

    Args:
        model: the model itself, not its wrapper.
        transform: a name of `list_transforms`, or a plan made before.
        optimizer: of the model's parameters, or some of them; or several.
        ema: a moving average of the model, or what holds it as `.module`; the same plan is applied to it. Values that the plan
            assigns, such as means of tied weights, are those of the model there too.
        include: glob or globs over MLP names, as of `mlpreduce.apply`.
        exclude: glob or globs over MLP names to leave out.
        data: calibration data, as of `mlpreduce.plan`.
        loss: as of `mlpreduce.plan`.
        example_inputs: what the model is called with, as of `mlpreduce.find_mlps`.
        **config: keyword parameters of the transform.

    Returns:
        The model.

    Raises:
        ReductionError: as `mlpreduce.apply`; the plan puts new layers into the model; the optimizer has a parameter that is
            none of the model's, or holds of a sliced one what is not of its shape, as factored moments are; the average is
            another model. Nothing has changed then.

    Example:
        >>> from mlpreduce.testing import tiny_vit
        >>> model = tiny_vit()
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> model(torch.randn(2, 3, 16, 16)).square().mean().backward()
        >>> optimizer.step()
        >>> model = reduce_in_training(model, "shallow", optimizer, ratio=0.5, criterion="l2")
        >>> weight = model.blocks[0].mlp.fc1.weight
        >>> weight.shape, optimizer.state[weight]["exp_avg"].shape
        (torch.Size([64, 32]), torch.Size([64, 32]))
    """
    if isinstance(transform, Plan) and (config or include or exclude or data is not None or loss is not None):
        raise ReductionError(
            "reduce_in_training(model, plan): a plan is carried out as it is; give it no further arguments"
        )
    if isinstance(transform, Plan):
        made = transform
    else:
        scope: dict[str, Any] = {"include": include, "exclude": exclude, "data": data, "loss": loss}
        made, _ = make_plan(model, transform, config, **scope, example_inputs=example_inputs)
    call = f"reduce_in_training(model, {call_text(made.transform, made.config)})"
    refuse_wrapped(model, call)
    for edit in made.of(Replace):
        raise ReductionError(
            f"{call}: it puts a new layer at {edit.module}, of which the optimizer knows nothing; do that before training, or "
            f"apply it and build a new optimizer"
        )
    other = average_of(model, ema, call)
    given = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
    optimizers = [_inner(each, call) for each in given]
    if other is not None:
        rehearse(other, made)
    rehearse(model, made)
    carried = [_carried(model, made, each, call) for each in optimizers]
    apply(model, made, example_inputs=example_inputs)
    for each, what in zip(optimizers, carried, strict=True):
        _put(model, each, what)
    if other is not None:
        apply(other, made, example_inputs=example_inputs)
    return model


@dataclass(frozen=True)
class _Carried:
    """What becomes of an optimizer's parameters.

    Attributes:
        paths: every path of each parameter of the model, by its id.
        slots: id of each parameter of the optimizer that becomes tied -> id of the one in whose place the shared one goes, the
            first of them in the model's order, as in an optimizer that is made anew.
        heirs: id of that one -> the parameter that stays, if it is another.
        cut: path of each sliced parameter of the optimizer, and what it holds of it afterwards.
    """

    paths: dict[int, list[str]]
    slots: dict[int, int]
    heirs: dict[int, nn.Parameter]
    cut: dict[int, dict[Any, Any]]


def _carried(model: nn.Module, made: Plan, optimizer: torch.optim.Optimizer, call: str) -> _Carried:
    """Work out everything on copies.

    Raises:
        ReductionError: it cannot be carried over.
    """
    paths: dict[int, list[str]] = defaultdict(list)
    for path, parameter in model.named_parameters(remove_duplicate=False):
        paths[id(parameter)].append(path)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    strangers = [parameter for parameter in held if id(parameter) not in paths]
    if strangers:
        raise ReductionError(
            f"{call}: {len(strangers)} of {len(held)} parameters of {type(optimizer).__name__} are none of the model's, the "
            f"first of shape {tuple(strangers[0].shape)}; give the optimizer that trains this model, and no other"
        )
    slots, heirs = _tied(model, made, held, paths)
    gone = slots.keys() - {id(heirs.get(slot)) for slot in slots.values()}
    sliced = {axis.tensor for edit in made.of(Slice) for axis in edit.axes}
    touched = [p for p in held if id(p) in slots or sliced & set(paths[id(p)])]
    _check_references(optimizer, touched, call)
    touched = [p for p in touched if sliced & set(paths[id(p)]) and id(p) not in gone]
    entries = {id(p): dict(optimizer.state.get(p, {})) for p in touched}
    for parameter in touched:
        for key, value in entries[id(parameter)].items():
            _check_state(parameter, key, value, paths[id(parameter)][0], optimizer, call)
        if parameter.grad is not None:
            entries[id(parameter)][_GRAD] = parameter.grad
    shapes = {id(p): p.shape for p in touched}
    return _Carried(dict(paths), slots, heirs, _cut(model, made, paths, entries, shapes))


def _tied(
    model: nn.Module, made: Plan, held: list[nn.Parameter], paths: Mapping[int, list[str]]
) -> tuple[dict[int, int], dict[int, nn.Parameter]]:
    """The slots and heirs of the parameters of an optimizer that a plan ties: see `_Carried`."""
    stays: dict[int, nn.Parameter] = {}
    for share in made.of(Share):
        source, target = (module_at(model, path) for path in (share.source, share.target))
        if source is None or target is None:  # the rehearsal tells
            continue
        for name, parameter in target.named_parameters():
            kept = source.get_parameter(name)
            stays |= {id(parameter): kept, id(kept): kept}
    order = {owner: number for number, owner in enumerate(paths)}
    mine = sorted((p for p in held if id(p) in stays), key=lambda p: order[id(p)])
    first: dict[int, int] = {}
    for parameter in mine:
        first.setdefault(id(stays[id(parameter)]), id(parameter))
    slots = {id(p): first[id(stays[id(p)])] for p in mine}
    return slots, {slot: stays[slot] for slot in slots.values()}


def _cut(
    model: nn.Module,
    made: Plan,
    paths: Mapping[int, list[str]],
    entries: Mapping[int, dict[Any, Any]],
    shapes: Mapping[int, torch.Size],
) -> dict[int, dict[Any, Any]]:
    """Slice what is held of each parameter, as the parameter itself is: one entry after the other in its place."""
    result = {owner: dict(entry) for owner, entry in entries.items()}
    keys = {key for entry in entries.values() for key in entry}
    for key in keys:
        tree = structural_copy(model, device="meta")
        places = {}
        for owner, entry in entries.items():
            value = entry.get(key)
            if isinstance(value, torch.Tensor) and value.shape == shapes[owner]:
                leaf, _, name = paths[owner][0].rpartition(".")
                places[owner] = (leaf, name)
                module_at(tree, leaf)._parameters[name] = nn.Parameter(value, requires_grad=False)  # type: ignore[union-attr]
        slice_all(tree, made.of(Slice), ExitStack())
        for owner, (leaf, name) in places.items():
            result[owner][key] = module_at(tree, leaf)._parameters[name].detach()  # type: ignore[union-attr]
    return result


def _check_state(
    parameter: nn.Parameter, key: Any, value: Any, path: str, optimizer: torch.optim.Optimizer, call: str
) -> None:
    """Whether something that an optimizer holds of a sliced parameter can be sliced as it is.

    Raises:
        ReductionError: it cannot.
    """
    if isinstance(value, torch.Tensor) and (value.numel() == 1 or value.shape == parameter.shape):
        return
    if not isinstance(value, torch.Tensor) and (value is None or isinstance(value, (bool, int, float, str))):
        return
    what = f"of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
    raise ReductionError(
        f"{call}: {type(optimizer).__name__} holds {key!r} of {path}, {what}, which cannot be sliced as the parameter of shape "
        f"{tuple(parameter.shape)} is; use one whose state has the shape of the parameters, such as AdamW or SGD, or reduce "
        f"with mlpreduce.apply and make a new optimizer"
    )


def _check_references(optimizer: torch.optim.Optimizer, touched: list[nn.Parameter], call: str) -> None:
    """Whether the optimizer knows its parameters by its groups and state alone.

    Raises:
        ReductionError: it has them somewhere else, too, where they would stay the old ones.
    """
    known = {id(parameter) for parameter in touched}
    for name, value in vars(optimizer).items():
        if isinstance(value, (list, tuple)) and any(id(entry) in known for entry in value):
            raise ReductionError(
                f"{call}: {type(optimizer).__name__} keeps its parameters in {name!r}, too, and cannot go on with others; "
                f"reduce with mlpreduce.apply and make a new optimizer"
            )


def _put(model: nn.Module, optimizer: torch.optim.Optimizer, carried: _Carried) -> None:
    """Give an optimizer the new parameters of a model in the place of the old."""
    now = dict(model.named_parameters(remove_duplicate=False))
    state: dict[Any, Any] = {}
    for group in optimizer.param_groups:
        stay = [index for index, p in enumerate(group["params"]) if carried.slots.get(id(p), id(p)) == id(p)]
        for key in ("params", "param_names"):  # torch keeps the names beside, where it was given them
            if key in group:
                group[key][:] = [group[key][index] for index in stay]
        for index, held in enumerate(group["params"]):
            old = carried.heirs.get(id(held), held)
            new = next(now[path] for path in carried.paths[id(old)] if path in now)
            entry = carried.cut.get(id(old))
            group["params"][index] = new
            if entry is not None:
                new.grad = entry.pop(_GRAD, None)
            if old in optimizer.state:
                state[new] = optimizer.state[old] if entry is None else entry
    for parameter in [key for key in optimizer.state if isinstance(key, torch.Tensor)]:
        del optimizer.state[parameter]
    optimizer.state.update(state)


def _inner(optimizer: Any, call: str) -> torch.optim.Optimizer:
    """The optimizer that has the state: of timm's Lookahead the one that it holds, which has its groups too.

    Raises:
        ReductionError: it is no optimizer, or holds one with other groups.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ReductionError(f"{call}: optimizer is a {type(optimizer).__name__}; give an optimizer, or a list of them")
    for name, held in vars(optimizer).items():
        if isinstance(held, torch.optim.Optimizer):
            if held.param_groups is optimizer.param_groups and not optimizer.state:
                return _inner(held, call)
            raise ReductionError(
                f"{call}: {type(optimizer).__name__} holds another optimizer in {name!r}, and which state is whose is not "
                f"known; reduce with mlpreduce.apply and make a new optimizer"
            )
    return optimizer
