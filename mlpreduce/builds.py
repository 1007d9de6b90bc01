"""How a model of timm was built: what can be known of it, and building it again."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import nn

from mlpreduce.errors import ReductionError
from mlpreduce.surgery import carry_out
from mlpreduce.ties import full_state, plans_of, reduced_parts

__all__ = ["DOUBT", "NOT_RECORDED", "build_doubt", "built", "how_built", "settings_of"]

DOUBT = "save cannot tell"  # how the note on such a model begins

NOT_RECORDED = (
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
)  # of a build; they load weights


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
        except TypeError as error:
            raise ReductionError(
                f"{call}: how it was built is not JSON ({error}); save with build=False and load with model="
            ) from error
        reason = _difference(model, candidate, call)
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
    """What tells a build, after the plans, from the model; None if nothing does."""
    try:
        there = built(build, call, device="meta")
        for path, part in reduced_parts(model).items():
            for made in plans_of(part):
                carry_out(there.get_submodule(path), made, weights=False)
    except (ReductionError, TypeError, RuntimeError, ValueError, AssertionError, AttributeError) as error:
        return str(error)
    theirs = {name: tuple(t.shape) for name, t in there.state_dict().items()}
    ours = {name: tuple(t.shape) for name, t in full_state(model).items()}
    if theirs != ours:
        name = next(iter(sorted(theirs.items() ^ ours.items())))[0]
        return f"{name} is {theirs.get(name, 'missing')} there and {ours.get(name, 'missing')} here"
    others = dict(model.named_modules(remove_duplicate=False))
    for path, module in there.named_modules(remove_duplicate=False):
        other = others.get(path)
        if other is None or type(other) is not type(module):
            return f"{path} is a {type(module).__name__} there and a {type(other).__name__} here"
        mine, its = _settings(other), _settings(module)
        for name in sorted(mine.keys() & its.keys()):
            if mine[name] != its[name]:
                return f"{path}.{name} is {its[name]!r} there and {mine[name]!r} here".lstrip(".")
    return None


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
    import timm

    from mlpreduce.models import is_model

    if not is_model(build["name"]):
        own = f": it is of the plug-in {plugin}; run that first by mlpreduce.plugins.load_plugins" if plugin else ""
        raise ReductionError(f"{call}: timm {timm.__version__} has no architecture {build['name']!r}{own}")
    forbidden = [key for key in build["kwargs"] if key in ("pretrained", *NOT_RECORDED)]
    if forbidden:
        raise ReductionError(
            f"{call}: the build has {', '.join(forbidden)}, which would read other files; it is refused"
        )
    with torch.random.fork_rng(devices=[]), torch.device(device):
        try:
            model: nn.Module = timm.create_model(build["name"], pretrained=False, **build["kwargs"])
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise ReductionError(f"{call}: timm cannot build {build}: {error}") from error
    return model


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
    return round(max(rates, default=0.0), 6)  # the rates of blocks are rounded to float32


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
