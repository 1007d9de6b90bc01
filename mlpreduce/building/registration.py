"""Names of reduced models for `timm.create_model`, so that timm's own scripts can build them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import timm
from timm.models import generate_default_cfgs, get_arch_pretrained_cfgs, get_pretrained_cfg, load_pretrained
from torch import nn

from mlpreduce.building.construction import create_model
from mlpreduce.errors import ReductionError, call_text, check_name, did_you_mean, naming
from mlpreduce.reduction.applying import apply
from mlpreduce.registry import origin, remember
from mlpreduce.transforms import check_config, is_construction

__all__ = ["register_model"]

default_cfgs: dict[str, Any] = {}  # timm looks here for the weights of a name, when it is registered

Steps = Sequence[tuple[str, dict[str, Any]]]


def register_model(name: str, architecture: str, steps: Steps) -> Callable[..., nn.Module]:
    """Let `timm.create_model(name)` build an architecture and reduce it.

    The architecture's pretrained weights, where asked for, are loaded before the reduction; what was saved of such a model
    (a checkpoint, or a folder of `timm.models.save_for_hf`) after it. Other arguments go to the architecture.

    Args:
        name: the new name. A process that reads a saved model by this name has to register it, too.
        architecture: a name of timm.
        steps: (transform, config) pairs, in order; one that acts at construction (`thin`) comes first.

    Returns:
        The function that builds it, as timm calls it.

    Raises:
        ReductionError: the name is no identifier or is taken, the architecture or a transform is unknown, or the steps
            are no pairs.

    Example:
        >>> build = register_model("vit_tiny_patch16_224_by_3", "vit_tiny_patch16_224", [("grouped", {"group": 3})])
        >>> model = timm.create_model("vit_tiny_patch16_224_by_3", num_classes=10)
        >>> model.blocks[2].mlp.fc1 is model.blocks[0].mlp.fc1
        True
    """
    check_name("register_model", name)
    call = f"register_model({name!r}, {architecture!r})"
    if timm.is_model(name) or name in globals():
        of = "" if (noted := origin("model", name)) is None else f", of {noted}"
        raise ReductionError(f"{call}: there is a model or function of this name{of}; choose another name")
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        near = did_you_mean(str(architecture), timm.list_models())
        raise ReductionError(f"{call}: timm has no architecture {architecture!r}{near}")
    _check_steps(steps, call)
    own = copy.deepcopy(list(steps))

    def build(pretrained: bool = False, pretrained_cfg: Any = None, **kwargs: Any) -> nn.Module:
        saved = _is_saved(pretrained_cfg)
        model = _build(name, architecture, own, pretrained and not saved, kwargs | {"pretrained_cfg": pretrained_cfg})
        model.pretrained_cfg["architecture"] = name
        if pretrained and saved:
            _load_saved(model, kwargs)
        return model  # type: ignore[no-any-return]

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{architecture} after {', '.join(call_text(*step) for step in own)}."
    globals()[name] = build  # timm adds the name to __all__
    default_cfgs.update(_weights(name, architecture, none=is_construction(own[0][0])))
    timm.models.register_model(build)
    remember("model", name, build)
    return build


def forget_model(name: str) -> None:
    """Take a name that `register_model` has added out of this module, where timm looks for its weights."""
    del globals()[name]
    default_cfgs.pop(name, None)
    __all__.remove(name)


def _check_steps(steps: Any, call: str) -> None:
    like = '[("grouped", {"group": 2})]'
    if not isinstance(steps, (list, tuple)) or not steps:
        raise ReductionError(f"{call}: steps is {steps!r}; it must be like {like}")
    for number, step in enumerate(steps):
        pair = isinstance(step, (list, tuple)) and [type(part) for part in step] == [str, dict]
        if not pair:
            raise ReductionError(f"{call}: step {number} is {step!r}; steps must be like {like}")
        with naming(call):
            entry = check_config(*step)
        if entry.construction and number:
            raise ReductionError(f"{call}: {step[0]} acts when the model is built; let it be the first step")


def _weights(name: str, architecture: str, *, none: bool) -> dict[str, Any]:
    """The weights of an architecture as those of the name; with `none` its settings alone: no weights fit."""
    known = {} if none else get_arch_pretrained_cfgs(architecture)
    if not known and (usual := get_pretrained_cfg(architecture)) is not None:
        known = {architecture: replace(usual, url="", hf_hub_id=None, tag=None)}
    return dict(generate_default_cfgs({name + key.removeprefix(architecture): known[key] for key in known}))


def _build(name: str, architecture: str, steps: list[Any], pretrained: bool, kwargs: dict[str, Any]) -> Any:
    call = f"timm.create_model({name!r})"
    if kwargs.get("features_only"):
        raise ReductionError(f"{call}: features_only is not built by this name; use forward_intermediates of the model")
    transform, config = steps[0] if is_construction(steps[0][0]) else (None, {})
    for key, value in config.items():
        if kwargs.get(key, value) != value:
            raise ReductionError(f"{call}: {key}={kwargs[key]!r}, but the name stands for {value!r}; register another")
    model: Any = create_model(architecture, transform, pretrained=pretrained, **kwargs | config)
    model.mlpreduce_build["kwargs"].pop("pretrained_model_args", None)  # of the weights, not of the model
    for step, settings in steps[transform is not None :]:
        apply(model, step, **settings)
    return model


def _is_saved(pretrained_cfg: Any) -> bool:
    """Whether the weights come from a folder or hub page that names the reduced model."""
    source = pretrained_cfg.get("source") if isinstance(pretrained_cfg, dict) else getattr(pretrained_cfg, "source", "")
    return source in ("local-dir", "hf-hub")


def _load_saved(model: Any, kwargs: dict[str, Any]) -> None:
    """Load weights as timm does, which adapts them to other numbers of classes and channels and another image size."""
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    channels = kwargs.get("in_chans", model.pretrained_cfg["input_size"][0])
    load_pretrained(model, None, model.num_classes, channels, filter_fn=adapt, cache_dir=kwargs.get("cache_dir"))
