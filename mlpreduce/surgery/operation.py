"""Carries the edits of a plan out on a model: checks all, then changes all.

The plan is first rehearsed on a copy of the module tree with meta tensors, where every mistake shows at no cost in
memory. What fails in the change itself is undone, and an interrupt waits until it is over.
"""

from __future__ import annotations

import copy
import math
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from types import FrameType
from typing import Any, cast

import torch
from torch import fx, nn

from mlpreduce.edits import Assign, Plan, Replace, Scale, Share, Slice
from mlpreduce.errors import ReductionError, call_text, naming
from mlpreduce.graph import canonicalize, is_one_node, module_at, structural_copy
from mlpreduce.layers import make_layer, wraps
from mlpreduce.surgery.slicing import find_tensor, slice_all

__all__ = ["carry_out", "rehearse", "untie_leaves"]


def rehearse(model: nn.Module, plan: Plan, rehearsal: nn.Module | None = None, *, weights: bool = True) -> nn.Module:
    """The reduced model on the meta device; `model` is not touched.

    Args:
        model: the model.
        plan: what to do.
        rehearsal: a structural copy of the model on the meta device to do it on; one is made if there is none.
        weights: whether it is to have all values that its edits give.

    Raises:
        ReductionError: the plan does not fit the model; the message names the module or tensor.
    """
    call = call_text(plan.transform, plan.config)
    if rehearsal is None:
        rehearsal = structural_copy(model, device="meta")
    _check_hooks(model, plan, call)
    _check_memory(model, plan, call)
    _check_slices(rehearsal, plan.of(Slice), call)
    undo = ExitStack()  # of no use here: the rehearsal is dropped
    slice_all(rehearsal, plan.of(Slice), undo)
    _check_shares(rehearsal, plan.of(Share), call)
    _share_all(rehearsal, plan.of(Share), undo)
    for share in plan.of(Share):
        if module_at(rehearsal, share.target) is not module_at(rehearsal, share.source):
            raise ReductionError(f"{call}: {share.target} would be shared with two different modules")
    given: set[tuple[type, int]] = set()
    weightless = next((p.is_meta for p in model.parameters()), True)
    for edit in plan.of(Assign, Scale):
        if isinstance(edit, Assign) and edit.value is not None and edit.value.is_meta and not weightless:
            raise ReductionError(f"{call}: the new values of {edit.tensor} are on the meta device; give them values")
        tensor = _tensor(rehearsal, edit.tensor, call)
        if (type(edit), id(tensor)) in given:
            raise ReductionError(f"{call}: {edit.tensor} has two {type(edit).__name__} edits; make them one")
        given.add((type(edit), id(tensor)))
        _check_value(tensor, edit, call)
    layers = _make_all(rehearsal, plan.of(Replace), call)
    _put_in(rehearsal, layers, undo)
    for edit, _, layer in layers:
        _check_layer(layer, edit, f"{call}: {edit.module}", weights=weights, weightless=weightless)
    return rehearsal


def carry_out(model: nn.Module, plan: Plan, *, weights: bool = True, rehearsal: nn.Module | None = None) -> None:
    """Carry a plan out in place, all of it or nothing.

    Args:
        model: the module to change; a `GraphModule`'s graph is rewritten with it.
        plan: what to do.
        weights: without, only shapes and ties change and the values of sliced tensors are those of the kept units;
            this is what loading a saved model needs.
        rehearsal: as for `rehearse`.

    Raises:
        ReductionError: the plan does not fit the model, which is then unchanged.
    """
    plan = plan if weights else plan.structure()
    rehearse(model, plan, rehearsal, weights=weights)
    with _uninterrupted(), torch.inference_mode(False), torch.no_grad(), ExitStack() as undo:
        slice_all(model, plan.of(Slice), undo)
        _share_all(model, plan.of(Share), undo)
        layers = _make_all(
            model, plan.of(Replace), plan.transform
        )  # what may want for memory comes before what is not undone
        for edit, _, layer in layers:
            for name, value in (edit.values or {}).items() if weights else ():
                attrgetter(name)(layer).copy_(value)
        for edit in plan.of(Assign):
            _tensor(model, edit.tensor, plan.transform).copy_(edit.value)
        for edit in plan.of(Scale):
            _tensor(model, edit.tensor, plan.transform).mul_(edit.factor)
        _put_in(model, layers, undo)
        if isinstance(model, fx.GraphModule):
            canonicalize(model)
        undo.pop_all()


def untie_leaves(parts: Iterable[tuple[nn.Module, list[Share]]]) -> None:
    """Give the target of each share a module of its own, with equal values. Exact: no output changes.

    Args:
        parts: modules, and the ties by the paths below each.

    Raises:
        ReductionError: a tie is gone; nothing is changed.
    """
    copies = []
    for part, shares in parts:
        for share in shares:
            source = module_at(part, share.source)
            if source is None or module_at(part, share.target) is not source:
                raise ReductionError(
                    f"untie: {share.target} is no longer tied to {share.source}; mlpreduce.verify tells more"
                )
            with torch.inference_mode(False):  # what is made within can never train
                copies.append((part, share.target, copy.deepcopy(source)))
    for part, path, module in copies:
        parent, _, name = path.rpartition(".")
        module_at(part, parent)._modules[name] = module  # type: ignore[union-attr]


def _share_all(model: nn.Module, shares: list[Share], undo: ExitStack) -> None:
    places = _places(model) if shares else {}
    for share in shares:
        source, target = module_at(model, share.source), module_at(model, share.target)
        for parent, name in places[id(target)]:
            undo.callback(parent._modules.__setitem__, name, target)
            parent._modules[name] = source


_Made = tuple[Replace, nn.Module, nn.Module]  # an edit, what it replaces, and the layer


def _make_all(model: nn.Module, edits: list[Replace], call: str) -> list[_Made]:
    """The layers that edits ask for; they are not in the model yet."""
    made: list[_Made] = []
    places: dict[tuple[int, str], str] = {}
    for edit in edits:
        module = module_at(model, edit.module)
        if module is None or not edit.module:
            raise ReductionError(f"{call}: {type(model).__name__} has no module {edit.module!r} to replace")
        if isinstance(model, fx.GraphModule) and not is_one_node(module):
            raise ReductionError(
                f"{call}: {edit.module} is no call of a torch.fx graph, but what it was made of; give the model"
            )
        place = _place(model, edit.module)
        other = places.setdefault((id(place[0]), place[1]), edit.module)
        if len(places) == len(made):
            raise ReductionError(
                f"{call}: {edit.module} and {other} are one place, which would be replaced twice, as the module around it is "
                f"shared; give each block one of its own (of a torch.fx graph give the model), or include one of them"
            )
        with naming(f"{call}: {edit.module}"):
            made.append((edit, module, make_layer(edit.layer, module, edit.config, edit.source)))
    return made


def _put_in(model: nn.Module, made: list[_Made], undo: ExitStack) -> None:
    """Put layers in their places."""
    for edit, module, layer in made:
        for owner, key in [_place(model, edit.module)] if wraps(edit.layer) else _places(model)[id(module)]:
            undo.callback(owner._modules.__setitem__, key, module)
            owner._modules[key] = layer


def _place(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return cast(nn.Module, module_at(model, parent)), name


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every (parent, name) under which each module is registered, aliases too."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, child in module._modules.items():
            if child is not None:
                places.setdefault(id(child), []).append((module, name))
    return places


def _tensor(model: nn.Module, path: str, call: str) -> torch.Tensor:
    return find_tensor(model, path, call)[2]


def _check_hooks(model: nn.Module, plan: Plan, call: str) -> None:
    """Whether nothing hangs on the leaves that go, and nothing changes what sliced ones compute."""
    for path in {axis.tensor.rpartition(".")[0] for edit in plan.of(Slice) for axis in edit.axes}:
        state = getattr(module_at(model, path), "__dict__", {})
        if any(state.get(name) for name in ("_forward_hooks", "_forward_pre_hooks")) and not state["_modules"]:
            raise ReductionError(
                f"{call}: {path} has forward hooks, which may know its old width; remove them, or exclude the MLP"
            )
    going = [share.target for share in plan.of(Share)]
    going += [edit.module for edit in plan.of(Replace) if not wraps(edit.layer)]
    for path in going:
        state = getattr(module_at(model, path), "__dict__", {})
        if any("_hooks" in name and value for name, value in state.items()):
            raise ReductionError(f"{call}: {path} has hooks, which would go with it; remove them or exclude the MLP")


def _check_memory(model: nn.Module, plan: Plan, call: str) -> None:
    """Whether the tensors that the plan names can change: each held by one module, in memory of its own."""
    holders: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            holders.setdefault(id(parameter), set()).add(id(module))
    in_place = [edit.tensor for edit in plan.of(Assign, Scale)]
    paths = in_place + [axis.tensor for edit in plan.of(Slice) for axis in edit.axes]
    leaves = {path for share in plan.of(Share) for path in (share.source, share.target)}
    for path in leaves | {edit.module for edit in plan.of(Replace)}:
        leaf = module_at(model, path)
        paths += [f"{path}.{name}" for name in (leaf._parameters if leaf is not None else ())]
    for path in paths:
        parent, _, name = path.rpartition(".")
        tensor = getattr(module_at(model, parent), name, None)
        if not isinstance(tensor, torch.Tensor):  # a layer without bias; a wrong path is found by the rehearsal
            continue
        if len(holders.get(id(tensor), ())) > 1:
            raise ReductionError(
                f"{call}: {path} is one Parameter in {len(holders[id(tensor)])} modules, and slicing or tying would untie "
                f"it; share the module instead of the Parameter, or give each module its own"
            )
        expanded = any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))
        if path in in_place and (expanded or tensor.is_inference()):
            raise ReductionError(
                f"{call}: {path} cannot be changed in place: it was made in torch.inference_mode, or its elements share "
                f"memory; build the model outside, with tensors of its own"
            )


def _check_slices(model: nn.Module, slices: list[Slice], call: str) -> None:
    """Whether every slice names what the model has, in the size the plan was made for."""
    sliced: set[tuple[int, int]] = set()
    for edit in slices:
        if not edit.units or min(edit.units) < 0 or max(edit.units) >= edit.hidden:
            raise ReductionError(f"{call}: {edit.mlp} would keep units {edit.units!r} of {edit.hidden}")
        if len(set(edit.units)) < len(edit.units):
            raise ReductionError(f"{call}: {edit.mlp} would keep a unit twice; units are {edit.units!r}")
        for axis in edit.axes:
            tensor = _tensor(model, axis.tensor, call)
            if tensor.dim() <= axis.dim or tensor.shape[axis.dim] != axis.size:
                raise ReductionError(
                    f"{call}: {axis.tensor} has shape {tuple(tensor.shape)}, but the plan was made for {axis.size} at "
                    f"dimension {axis.dim}; it is of another model, or already carried out"
                )
            if axis.groups > 1 and not _is_balanced(edit, axis.groups):
                raise ReductionError(
                    f"{call}: {axis.tensor} is a convolution in {axis.groups} groups, of which as many units must be kept each"
                )
            if (id(tensor), axis.dim) in sliced:
                raise ReductionError(f"{call}: {axis.tensor} would be sliced twice")
            sliced.add((id(tensor), axis.dim))


def _is_balanced(edit: Slice, groups: int) -> bool:
    size = edit.hidden // groups
    return len({sum(unit // size == group for unit in edit.units) for group in range(groups)}) == 1


def _check_shares(model: nn.Module, shares: list[Share], call: str) -> None:
    """Whether every share ties two leaf modules of one form, after slicing."""
    for share in shares:
        source, target = module_at(model, share.source), module_at(model, share.target)
        for path, module in ((share.source, source), (share.target, target)):
            if module is None or module._modules:
                fact = f"{type(model).__name__} has no module {path!r}" if module is None else f"{path} has children"
                raise ReductionError(f"{call}: {fact}; the plan is of another model: only its leaf modules are tied")
        if source is target:
            raise ReductionError(f"{call}: {share.target} already is {share.source}; nothing is tied or scaled twice")
        if _form(source) != _form(target):
            raise ReductionError(
                f"{call}: {share.source} and {share.target} differ: {_form(source)} and {_form(target)}"
            )


def _check_value(tensor: torch.Tensor, edit: Assign | Scale, call: str) -> None:
    """Whether new values fit a tensor. They are written in place, which takes no memory and is not undone."""
    where = f"{call}: {edit.tensor}"
    if not tensor.is_floating_point():
        raise ReductionError(f"{where} is {tensor.dtype}; only floating-point weights are changed")
    if isinstance(edit, Scale):
        if isinstance(edit.factor, bool) or not isinstance(edit.factor, (int, float)) or not math.isfinite(edit.factor):
            raise ReductionError(f"{where} would be multiplied by {edit.factor!r}; it must be a finite number")
        return
    if edit.value is None or edit.value.shape != tensor.shape:
        fact = "are not in the plan" if edit.value is None else f"have {tuple(edit.value.shape)}"
        raise ReductionError(f"{where} has shape {tuple(tensor.shape)}, its new values {fact}")
    if edit.value.layout != torch.strided:
        raise ReductionError(f"{where}: its new values are {edit.value.layout}; give a dense tensor")


def _check_layer(layer: nn.Module, edit: Replace, where: str, *, weights: bool, weightless: bool) -> None:
    """Whether the values of a new layer are its own and fit."""
    if weights and edit.values is None:
        raise ReductionError(f"{where}: the values of the new layer are not in the plan; they lie beside it")
    own = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    for name, value in (edit.values or {}).items():
        tensor = None if name.startswith("base.") else own.get(name)
        if tensor is None or tensor.shape != value.shape or tensor.is_floating_point() != value.is_floating_point():
            fact = "no such tensor" if tensor is None else f"{tuple(tensor.shape)} of {tensor.dtype}"
            raise ReductionError(
                f"{where}: {edit.layer} has {fact} where {name!r} is {tuple(value.shape)} of {value.dtype}"
            )
        if value.is_meta and not weightless:
            raise ReductionError(f"{where}: the new values of {name} are on the meta device; give them values")
        if value.layout != torch.strided:
            raise ReductionError(f"{where}: the new values of {name} are {value.layout}; give a dense tensor")


def _form(leaf: nn.Module | None) -> tuple[Any, ...]:
    tensors = [*leaf.named_parameters(), *leaf.named_buffers()] if leaf is not None else []
    return repr(leaf), [(name, tuple(t.shape), str(t.dtype), "trains" * t.requires_grad) for name, t in tensors]


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold SIGINT back until the block is done, so that Ctrl-C never leaves a model half changed."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or handler is None:
        yield
        return
    pending: list[FrameType | None] = []
    signal.signal(signal.SIGINT, lambda number, frame: pending.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if pending and callable(handler):
            handler(signal.SIGINT, pending[0])
