"""Layers that were a plain projection and are not one now: pruned, reparametrized, adapted, quantised.

They hide the MLP that they are part of. Each kind has a call that makes them plain again, or has to come after the reduction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mlpreduce.graph.rules import PARAMETRIZED, is_stock, projection
from mlpreduce.graph.tracing import structural_copy
from mlpreduce.layers import StandIn, Wrapper

__all__ = ["as_plain", "remedy"]


def as_plain(model: nn.Module) -> tuple[nn.Module, dict[str, str]]:
    """A copy of a model on the meta device in which every altered layer is a plain one of its widths.

    Returns:
        The copy, or the model if it has none, and by path what each altered layer is, with the call that makes it plain.
    """
    found: dict[str, str] = {}
    if not any(remedy(module) for module in model.modules()):  # as nearly always; a copy takes longer
        return model, found
    tree = structural_copy(model, device="meta")
    twins: dict[int, nn.Module | None] = {}
    for path, module in list(tree.named_modules(remove_duplicate=False)):
        if any(path.startswith(f"{outer}.") for outer in found):
            continue
        reason = remedy(module)
        if id(module) not in twins:
            twins[id(module)] = _twin(module) if reason else None
        twin = twins[id(module)]
        if path and twin is not None:
            parent, _, name = path.rpartition(".")
            tree.get_submodule(parent)._modules[name] = twin
            found[path] = f"{path} {reason}"
    return tree, found


def remedy(module: nn.Module) -> str:
    """What has been done to a layer, and the call that undoes it; nothing for a plain one and for what is no projection."""
    if _widths(module) is None or isinstance(module, (StandIn, Wrapper)):
        return ""
    parametrized = list(getattr(module, "parametrizations", {}))
    names = {*module._parameters, *module._buffers}
    pruned = sorted(name.removesuffix("_mask") for name in module._buffers if name.endswith("_mask"))
    if parametrized:
        if any(type(each).__module__.startswith("mlpreduce.") for each in module.parametrizations.modules()):  # type: ignore[union-attr]
            return PARAMETRIZED
        calls = " and ".join(f'parametrize.remove_parametrizations(layer, "{name}")' for name in parametrized)
        return f"is parametrized: call torch.nn.utils.{calls}"
    if pruned and {f"{name}_orig" for name in pruned} <= names:
        calls = " and ".join(f'prune.remove(layer, "{name}")' for name in pruned)
        return f"is pruned by a mask at each call: make it final with torch.nn.utils.{calls}"
    if {"weight_g", "weight_v"} <= names:
        return "has a weight norm: call torch.nn.utils.remove_weight_norm(layer)"
    if {"weight_orig", "weight_u"} <= names:
        return "has a spectral norm: call torch.nn.utils.remove_spectral_norm(layer)"
    return _foreign(module)


def _foreign(module: nn.Module) -> str:
    """What a layer of another library is, or one with a custom forward."""
    cls = type(module)
    where = f"{cls.__name__} of {cls.__module__.partition('.')[0]}"
    if isinstance(module._modules.get("base_layer"), nn.Module) or hasattr(module, "lora_A"):
        how = "model = model.merge_and_unload()" if cls.__module__.startswith("peft.") else "merge it into the layer"
        return f"is an adapter around a layer ({where}): fold it in first, {how}"
    if "quantized" in cls.__module__ or cls.__module__.startswith(("bitsandbytes", "hqq", "torchao")):
        return f"is quantised or computes in another type ({where}): reduce the model first, then convert it"
    if "forward" in vars(module):
        return (
            "has a custom forward on the instance, as accelerate's hooks put there: call "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True), or delete it"
        )
    if isinstance(module, nn.Linear) and not is_stock(module):
        return (
            f"computes in a way of its own ({where}): put an nn.Linear in its place, and convert it after the reduction"
        )
    return ""


def _widths(module: Any) -> tuple[int, int] | None:
    """The widths of a projection, whatever has been done to it."""
    base = getattr(module, "base_layer", module)
    widths = getattr(base, "in_features", None), getattr(base, "out_features", None)
    if not all(isinstance(width, int) for width in widths):
        widths = getattr(base, "in_channels", None), getattr(base, "out_channels", None)
    return widths if all(isinstance(width, int) for width in widths) else None  # type: ignore[return-value]


def _twin(module: Any) -> nn.Module | None:
    """A plain layer of the same widths on the meta device; None where there is none."""
    widths = _widths(module)
    base = getattr(module, "base_layer", module)
    with torch.device("meta"):
        if isinstance(base, (nn.Conv1d, nn.Conv2d)) and widths is not None:
            cls: Any = nn.Conv1d if isinstance(base, nn.Conv1d) else nn.Conv2d
            plain: nn.Module = cls(*widths, base.kernel_size, base.stride, base.padding, groups=base.groups)
            return plain if projection(plain) is not None else None
        return nn.Linear(*widths) if widths is not None and hasattr(base, "in_features") else None
