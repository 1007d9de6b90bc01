"""Ties in a state dict: a tied tensor lies in it once, and a dict that does not fit the ties is refused.

PyTorch writes a shared tensor under each of its names and, of several values for it, silently keeps the last. A model
with ties has two hooks against both. In `state_dict()` the first name, the one of `named_parameters`, has the tensor and
the others an empty one. An empty tensor rather than none: a model without the ties then refuses the dict for its shapes,
also with `strict=False`, which timm uses unasked when the number of classes is another.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from mlpreduce.edits import Assign, Plan, Replace, Scale, Share, Slice
from mlpreduce.errors import ReductionError
from mlpreduce.graph import module_at, module_through
from mlpreduce.layers import wraps

__all__ = [
    "check_parts",
    "distinct_parts",
    "full_state",
    "gone_by",
    "guard",
    "holds",
    "is_guarded",
    "moved_by",
    "plans_of",
    "reduced_parts",
    "shares_of",
    "tangled_parts",
    "tied",
    "unguard",
]


def plans_of(model: nn.Module) -> list[Plan]:
    """The plans that a model remembers, first to last.

    A wrapper that passes attributes on remembers none: the paths in a history are those below the model itself.
    """
    kept = (
        model.meta.get("mlpreduce_history", []) if isinstance(model, fx.GraphModule) else []
    )  # a copy has these alone
    return list(vars(model).get("mlpreduce_history", kept))


def reduced_parts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model that remember plans, by path; the model itself has the path ""."""
    return {path: part for path, part in model.named_modules(remove_duplicate=False) if plans_of(part)}


def distinct_parts(model: nn.Module) -> dict[str, nn.Module]:
    """As `reduced_parts`, each module once, by its first path."""
    parts: dict[int, tuple[str, nn.Module]] = {}
    for path, part in reduced_parts(model).items():
        parts.setdefault(id(part), (path, part))
    return dict(parts.values())


def check_parts(model: nn.Module, made: Plan, call: str) -> None:
    """Check that a plan leaves alone what was reduced on its own, whose history would no longer be true.

    Raises:
        ReductionError: it changes a module below one that has a history of its own.
    """
    for path in reduced_parts(model):
        if path and _touches(made, path):
            raise ReductionError(
                f"{call}: {path} was reduced on its own and has its own history, which this would make wrong; apply to "
                f'model.get_submodule({path!r}) instead, or give exclude="{path}.*"'
            )


def tangled_parts(model: nn.Module) -> list[tuple[str, str]]:
    """Pairs of modules, by path, where a plan of the first has changed a module of the second, which has plans of its own.

    Their order is not known, so neither history can be carried out again.
    """
    parts = reduced_parts(model)
    return [
        (outer, inner)
        for outer, part in parts.items()
        for inner in parts
        if inner != outer
        and inner.startswith(f"{outer}." if outer else "")
        and any(_touches(made, inner[len(outer) :].removeprefix(".")) for made in plans_of(part))
    ]


def _touches(made: Plan, path: str) -> bool:
    """Whether a plan changes the module at a path, or one below it."""
    changed = [place for share in made.of(Share) for place in (share.source, share.target)]
    changed += [axis.tensor for edit in made.of(Slice) for axis in edit.axes]
    changed += [edit.tensor for edit in made.of(Assign, Scale)] + [edit.module for edit in made.of(Replace)]
    return any(f"{place}.".startswith(f"{path}.") for place in changed)


def holds(share: Share, tree: nn.Module) -> bool:
    """Whether a tie of a history is one in a module tree, also where wrappers lie around its modules.

    What went with its block, as `prune_intermediate_layers` takes some away, is not missed.
    """
    source, target = module_through(tree, share.source), module_through(tree, share.target)
    if source is None and target is None:
        return _went_with_its_block(tree, share.source) or _went_with_its_block(tree, share.target)
    return source is target


def _went_with_its_block(tree: nn.Module, path: str) -> bool:
    """Whether the first module that a path misses would be one of a list."""
    steps = path.split(".")
    for depth, step in enumerate(steps):
        if module_through(tree, ".".join(steps[: depth + 1])) is None:
            return step.isdigit()
    return False


def shares_of(plans: Iterable[Plan]) -> list[Share]:
    """The ties of a history, by the paths that the leaf modules have after it: a layer around one moves it."""
    groups: list[list[str]] = []  # paths of one leaf each, the one that stayed first
    for made in plans:
        for share in made.of(Share):
            ends = [group for group in groups if share.source in group or share.target in group]
            joined = dict.fromkeys([path for group in ends for path in group] or [share.source])
            groups = [group for group in groups if group not in ends]
            groups.append(list(joined | dict.fromkeys([share.source, share.target])))
        for edit in made.of(Replace):
            groups = [[moved_by(edit, path) for path in group if not gone_by(edit, path)] for group in groups]
    return [Share(group[0], path) for group in groups for path in group[1:]]


def gone_by(edit: Replace, path: str) -> bool:
    """Whether what was at `path` lay inside of a module that another has taken the place of."""
    return not wraps(edit.layer) and path.startswith(f"{edit.module}.")


def moved_by(edit: Replace, path: str) -> str:
    """The path of what was at `path`, after a layer was put in the place of a module."""
    moved = wraps(edit.layer) and f"{path}.".startswith(f"{edit.module}.")
    return f"{edit.module}.base{path.removeprefix(edit.module)}" if moved else path


def tied(model: nn.Module) -> dict[str, list[str]]:
    """The ties of a model's history that hold: first path of each shared leaf module -> its other paths."""
    shares = shares_of(plans_of(model))
    shared = {id(module_at(model, path)) for share in shares for path in (share.source, share.target)}
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if id(module) in shared:
            paths.setdefault(id(module), []).append(path)
    return {first: others for first, *others in paths.values() if others}


def full_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with the tensors themselves, a tied one under each of its names."""
    state: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
    for path, part in reduced_parts(model).items():
        prefix = f"{path}." if path else ""
        for first, others in tied(part).items():
            for key in _below(state, prefix + first):
                for other in others:
                    state[prefix + other + key.removeprefix(prefix + first)] = state[key]
    return state


def guard(model: nn.Module) -> None:
    """Put the hooks on a model, unless it has them."""
    if not is_guarded(model):
        model.register_state_dict_post_hook(_write_once)
        model.register_load_state_dict_pre_hook(_read_everywhere)


def is_guarded(model: nn.Module) -> bool:
    """Whether the model has the hooks."""
    return _write_once in model._state_dict_hooks.values()


def unguard(model: nn.Module) -> None:
    """Take the hooks off a model."""
    for hooks in (model._state_dict_hooks, model._load_state_dict_pre_hooks):
        for number, hook in list(hooks.items()):
            if getattr(hook, "hook", hook) in (_write_once, _read_everywhere):  # torch wraps those for loading
                del hooks[number]


# The hooks are functions of the module, so that they survive deepcopy and pickle, and ask the history each time.


def _write_once(model: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    for others in tied(model).values():
        for key in [key for other in others for key in _below(state, prefix + other)]:
            if isinstance(state[key], torch.Tensor):
                state[key] = torch.empty(0, dtype=state[key].dtype, device=state[key].device)


def _read_everywhere(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give every name of a tied tensor the one value that the dict has for it.

    Raises:
        ReductionError: it has several.
    """
    found: dict[str, Any] = {}
    unlike: list[tuple[str, str]] = []
    for first, others in tied(model).items():
        paths = [prefix + path for path in (first, *others)]
        given: dict[str, str] = {}  # name below the leaf -> the first key with a value
        for path in paths:
            for key in _below(state, path):
                if isinstance(state[key], torch.Tensor) and state[key].numel() == 0:
                    continue
                other = given.setdefault(key.removeprefix(path), key)
                if not _same(state[key], state[other]):
                    unlike.append((other, key))
        found |= {path + name: state[key] for name, key in given.items() for path in paths}
    if unlike:
        raise ReductionError(
            f"load_state_dict({type(model).__name__}): {unlike[0][0]} and {unlike[0][1]} differ, but they are tied in this "
            f"model ({len(unlike)} such names): the weights are of a model without the ties; load them into it, then "
            f"reduce it with mlpreduce.apply"
        )
    state.update(found)


def _below(state: dict[str, Any], path: str) -> list[str]:
    return [key for key in state if key.startswith(f"{path}.")]


def _same(value: Any, other: Any) -> bool:
    """Whether two entries are equal bit for bit; without values, whether they are alike."""
    if value is other or not isinstance(value, torch.Tensor) or not isinstance(other, torch.Tensor):
        return value is other
    value, other = getattr(value, "_local_tensor", value), getattr(other, "_local_tensor", other)  # of a DTensor
    if value.shape != other.shape or value.dtype != other.dtype:
        return False
    if value.is_meta or other.is_meta:
        return True
    bits = [tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in (value, other.to(value.device))]
    return torch.equal(*bits)
