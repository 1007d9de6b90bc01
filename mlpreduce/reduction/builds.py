"""How a model of timm was built: what can be known of it, and building it again."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from mlpreduce.errors import ReductionError, did_you_mean
from mlpreduce.graph import below
from mlpreduce.surgery.operation import carry_out
from mlpreduce.surgery.ties import full_state, plans_of, reduced_parts

__all__ = ["DOUBT", "NOT_RECORDED", "build_doubt", "built", "how_built", "made_by_timm", "settings_of"]

DOUBT = "save cannot tell"  # how the note on such a model begins

# arguments that make timm read other files; never recorded
NOT_RECORDED = ("pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")

# what an architecture raises for arguments that it cannot take
_REFUSALS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


_FILLS = {
    getattr(torch.Tensor, f"{name}_") for name in ("add", "clamp", "erfinv", "fill", "mul", "normal", "uniform", "zero")
}


class _Unfilled(TorchFunctionMode):
    """Fills no tensor on the meta device: there are no values, and going through the motions is most of a build's time."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _FILLS and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def made_by_timm(name: Any, arguments: Mapping[str, Any], call: str = "", hint: str = "") -> nn.Module:
    """Call `timm.create_model`, and say what is wrong where it cannot build.

    Args:
        name: an architecture.
        arguments: of `timm.create_model`.
        call: how a message begins.
        hint: how the message about arguments ends.

    Raises:
        ReductionError: timm has no such architecture, or refuses the arguments.
    """
    import timm

    from mlpreduce.models import is_model

    start = f"{call}: " if call else ""
    if not isinstance(name, str) or not is_model(name):
        raise ReductionError(f"{start}timm has no architecture {name!r}{did_you_mean(str(name), timm.list_models())}")
    on_meta = torch.get_default_device().type == "meta"
    try:
        with _Unfilled() if on_meta else contextlib.nullcontext():
            model: nn.Module = timm.create_model(name, **arguments)
    except ReductionError:  # of a name that is registered with its reduction
        raise
    except _REFUSALS as error:
        plain = isinstance(error, (AssertionError, RuntimeError, TypeError, ValueError)) and str(error)
        fact = error if plain else f"{type(error).__name__}: {error}".removesuffix(": ")
        given = {key: value for key, value in arguments.items() if key != "pretrained" or value}
        raise ReductionError(f"{start}timm cannot build {name} with {given}: {fact}{hint and '; '}{hint}") from error
    return model


def how_built(model: nn.Module, build: dict[str, Any] | Literal[False] | None, call: str) -> dict[str, Any] | None:
    """A checked build of the model, or None if none is to be recorded."""
    if build is False:
        return None
    if build is not None:
        candidates = iter([_checked(build, call)])
    elif "architecture" in (vars(model).get("pretrained_cfg") or {}) or "mlpreduce_build" in vars(model):
        candidates = _guesses(model, call)
    else:
        return None
    for candidate in candidates:
        try:
            json.dumps(candidate)
        except (TypeError, ValueError) as error:  # a tensor, or a dict in itself
            raise ReductionError(
                f"{call}: how it was built is not JSON ({error}); save with build=False and load with model="
            ) from error
        try:
            reason = _difference(model, candidate, call)
        except ReductionError as error:
            if build is not None:
                raise
            reason = str(error).removeprefix(f"{call}: ")
        if reason is None:
            return candidate
    raise ReductionError(
        f"{call}: a build of {candidate['name']} with {candidate['kwargs']} is another model: {reason}; "
        f'give build={{"name": ..., "kwargs": {{...}}}}, or build=False and load with model='
    )


def build_doubt(model: nn.Module) -> str:
    """What `save` will need for a model of timm whose build it cannot tell; nothing if it can, or is not asked to."""
    try:
        how_built(model, None, "save")
    except ReductionError as error:
        return (
            f"{DOUBT} how this {type(model).__name__} was built: call it with build={{'name': ..., 'kwargs': {{...}}}}, as "
            f"timm.create_model was called, or build by mlpreduce.create_model, which records it ({error})"
        )
    return ""


def _guesses(model: nn.Module, call: str) -> Iterator[dict[str, Any]]:
    """Builds of a timm model: the recorded one or its architecture, then with what can be read off the model."""
    start: Any = vars(model).get("mlpreduce_build")
    start = start or {"name": model.pretrained_cfg["architecture"], "kwargs": {}}  # type: ignore[index]
    yield start
    try:
        usual = settings_of(built(start, call, device="meta"))
    except ReductionError:
        return
    found = {name: value for name, value in settings_of(model).items() if value != usual.get(name)}
    plainest = {name: value for name, value in found.items() if name in _EVERY}
    for settings in (plainest, found) if plainest != found else (found,):
        if settings:
            yield {"name": start["name"], "kwargs": start["kwargs"] | settings}


def _difference(model: nn.Module, build: dict[str, Any], call: str) -> str | None:
    """What tells a build, after the plans, from the model; None if nothing does.

    Raises:
        ReductionError: timm cannot build it.
    """
    there = built(build, call, device="meta")
    try:
        for path, part in reduced_parts(model).items():
            for made in plans_of(part):
                carry_out(there.get_submodule(path), made, weights=False)
    except (ReductionError, TypeError, RuntimeError, ValueError, AssertionError, AttributeError) as error:
        return str(error)
    theirs = {name: tuple(t.shape) for name, t in there.state_dict().items()}
    ours = {name: tuple(t.shape) for name, t in full_state(model).items()}
    if theirs != ours:
        name = next(iter(sorted(theirs.items() ^ ours.items())))[0]
        return _told(name, theirs.get(name, "missing"), ours.get(name, "missing"))
    others = dict(model.named_modules(remove_duplicate=False))
    for path, module in there.named_modules(remove_duplicate=False):
        other = others.get(path)
        if other is None or type(other) is not type(module):
            yours = "missing" if other is None else f"a {type(other).__name__}"
            return _told(path or "the model", f"a {type(module).__name__}", yours)
        if "forward" in vars(other) and "forward" not in vars(module):
            return f"the forward of {path or 'the model'} was replaced on the instance, which no build repeats"
        mine, its = _settings(other), _settings(module)
        for name in sorted(mine.keys() & its.keys()):
            if mine[name] != its[name]:
                return _told(below(path, name), repr(its[name]), repr(mine[name]))
    return None


def _told(name: str, theirs: Any, yours: Any) -> str:
    return f"{name} is {theirs} in that build and {yours} in yours"


_MODES = {"training", "grad_checkpointing"}  # how a model is run, not what it computes


def _settings(module: nn.Module) -> dict[str, Any]:
    """The plain attributes of a module: what its forward may depend on beside its tensors."""
    values = {name: value for name, value in vars(module).items() if not name.startswith(("_", "mlpreduce"))}
    return {name: value for name, value in values.items() if name not in _MODES and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(entry) for entry in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _checked(build: Any, call: str) -> dict[str, Any]:
    if (
        not isinstance(build, dict)
        or not isinstance(build.get("name"), str)
        or not isinstance(build.get("kwargs"), dict)
    ):
        raise ReductionError(f'{call}: build is {build!r}; it must be {{"name": architecture, "kwargs": {{...}}}}')
    return build


def built(build: Any, call: str, device: str = "cpu", plugin: object = None) -> nn.Module:
    """Build a model of timm as a saved description says; `plugin` names the file that its architecture came from, if any.

    Raises:
        ReductionError: nothing is recorded, it is no build, names what would read other files, or timm cannot build it.
    """
    if build is None:
        raise ReductionError(f"{call}: how the model was built is not recorded; build it and give it as model=")
    build = _checked(build, call)
    from mlpreduce.models import is_model

    if plugin and not is_model(build["name"]):
        raise ReductionError(
            f"{call}: timm has no architecture {build['name']!r}: it is of the plug-in {plugin}; run that first by "
            f"mlpreduce.plugins.load_plugins"
        )
    forbidden = [key for key in build["kwargs"] if key in ("pretrained", *NOT_RECORDED)]
    if forbidden:
        raise ReductionError(
            f"{call}: the build has {', '.join(forbidden)}, which would read other files; it is refused"
        )
    with torch.random.fork_rng(devices=[]), torch.device(device):
        return made_by_timm(build["name"], {**build["kwargs"], "pretrained": False}, call)


def _first_block(model: Any) -> Any:
    return model.blocks[0]


def _square(size: Any) -> Any:
    return size[0] if len(set(size)) == 1 else list(size)


def _mlp_ratio(model: Any) -> float:
    """Of the MLPs as they were built: the first plan has the width from before."""
    rows = {row.mlp: row.hidden_before for plan in reversed(plans_of(model)) for row in plan.rows}
    return float(rows.get("blocks.0.mlp", _first_block(model).mlp.fc1.out_features) / model.embed_dim)


def _drop_path(model: Any) -> float:
    rates = [module.drop_prob for module in model.modules() if type(module).__name__ == "DropPath"]
    rate = max(rates, default=0.0)
    single = np.float32(rate)  # as which torch.linspace made it
    return float(str(single)) if float(single) == rate else rate  # the shortest number is what a person typed


# what a model of timm keeps of the arguments that it was built with, by their names
_EVERY: dict[str, Callable[[Any], Any]] = {
    "num_classes": lambda model: int(model.num_classes),
    "in_chans": lambda model: next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels,
    "global_pool": lambda model: str(model.global_pool),
    "img_size": lambda model: list(model.patch_embed.img_size),
}
_READ: dict[str, Callable[[Any], Any]] = _EVERY | {
    "patch_size": lambda model: _square(model.patch_embed.patch_size),
    "embed_dim": lambda model: int(model.embed_dim),
    "depth": lambda model: len(model.blocks),
    "num_heads": lambda model: _first_block(model).attn.num_heads,
    "mlp_ratio": _mlp_ratio,
    "qkv_bias": lambda model: _first_block(model).attn.qkv.bias is not None,
    "qk_norm": lambda model: not isinstance(_first_block(model).attn.q_norm, nn.Identity),
    "init_values": lambda model: _first_block(model).ls1.init_values,
    "class_token": lambda model: model.cls_token is not None,
    "reg_tokens": lambda model: model.num_reg_tokens,
    "no_embed_class": lambda model: model.no_embed_class,
    "dynamic_img_size": lambda model: model.dynamic_img_size,
    "drop_rate": lambda model: model.head_drop.p,
    "pos_drop_rate": lambda model: model.pos_drop.p,
    "patch_drop_rate": lambda model: model.patch_drop.prob,
    "proj_drop_rate": lambda model: _first_block(model).attn.proj_drop.p,
    "attn_drop_rate": lambda model: _first_block(model).attn.attn_drop.p,
    "drop_path_rate": _drop_path,
    "weight_init": lambda model: model.weight_init_mode,
}


def settings_of(model: nn.Module) -> dict[str, Any]:
    """The arguments of `timm.create_model` that can be read off a model. A guess: compare what it builds."""
    made_by = [vars(cls)["__init__"] for cls in type(model).__mro__ if "__init__" in vars(cls)]
    takes = {name for function in made_by for name in inspect.signature(function).parameters} | {*_EVERY}
    found = {}
    for name, read in _READ.items():
        try:
            value = read(model) if name in takes else None
        except (AttributeError, TypeError, IndexError, StopIteration, ZeroDivisionError):  # another architecture
            continue
        if value is not None and _is_plain(value):
            found[name] = value
    own = {name: value for name, value in _settings(model).items() if name in takes and name not in _READ}
    return found | own
