"""Layers that stand in for a `Linear`: fewer weights, or few that train. Each turns back into a `Linear` by `merged()`.

They are plain modules and can be used alone. All take and give tensors `(..., features)`. Some wrap a module, their `base`:
what they add is their own where the base is tied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import nn

from mlpreduce.errors import ReductionError, did_you_mean
from mlpreduce.layers.block_diagonal import BlockDiagonalLinear
from mlpreduce.layers.block_gate import BlockGate, NoMlp
from mlpreduce.layers.channel_covariance import ChannelCovariance
from mlpreduce.layers.energy import BlockOrders, block_orders
from mlpreduce.layers.lora import LoraLinear
from mlpreduce.layers.low_rank import LowRankLinear, nearest_factors
from mlpreduce.layers.scale_shift import ScaleShift, is_scalable
from mlpreduce.layers.svft import SvftLinear
from mlpreduce.layers.token_convolution import GridConvolution, TokenConvolution
from mlpreduce.layers.wrapper import StandIn, Wrapper, macs_of, merged
from mlpreduce.registry import Origin, remember, taken
from mlpreduce.words.values import Config

__all__ = [
    "ADAPTERS",
    "LAYERS",
    "BlockDiagonalLinear",
    "BlockGate",
    "BlockOrders",
    "ChannelCovariance",
    "LoraLinear",
    "LowRankLinear",
    "NoMlp",
    "ScaleShift",
    "StandIn",
    "SvftLinear",
    "TokenConvolution",
    "Wrapper",
    "adapters",
    "block_orders",
    "gates",
    "is_scalable",
    "layer_of",
    "macs_of",
    "make_layer",
    "merged",
    "merges",
    "nearest_factors",
    "register_layer",
    "wraps",
]

LAYERS: dict[str, Any] = {
    "block_diagonal": BlockDiagonalLinear,
    "block_gate": BlockGate,
    "channel_covariance": ChannelCovariance,
    "lora": LoraLinear,
    "low_rank": LowRankLinear,
    "no_mlp": NoMlp,
    "scale_shift": ScaleShift,
    "svft": SvftLinear,
    "token_convolution": TokenConvolution,
}
ADAPTERS = (GridConvolution, LoraLinear, ScaleShift, SvftLinear)  # few parameters beside weights that may be frozen


LayerClass = TypeVar("LayerClass", bound=type[nn.Module])
Layer = TypeVar("Layer", bound=nn.Module)


def register_layer(name: str) -> Callable[[LayerClass], LayerClass]:
    """Add a layer class under `name`, for `Replace` edits of your own transforms.

    The class extends `StandIn` or `Wrapper`. Its class method `in_place_of(module, **config)` makes the layer that takes
    the place of a module. A saved model names its layers: to load it, the same name must be registered.

    Raises:
        ReductionError: the name is taken or not a string, or the class is not such a layer.
    """

    def decorate(layer: LayerClass) -> LayerClass:
        if not isinstance(name, str) or name in LAYERS:
            fact = taken("layer", name) if isinstance(name, str) else "the name must be a string"
            raise ReductionError(f"register_layer({name!r}): {fact}")
        known = isinstance(layer, type) and issubclass(layer, StandIn | Wrapper) and hasattr(layer, "in_place_of")
        if not known:
            raise ReductionError(
                f"register_layer({name!r}): {layer!r} must be a class that extends StandIn or Wrapper and has a class method "
                f"in_place_of(module, **config)"
            )
        LAYERS[name] = layer
        remember("layer", name, layer)
        return layer

    return decorate


def merges(name: str) -> bool:
    """Whether the layer of this name has a plain one that computes the same."""
    return hasattr(LAYERS[name], "merged") if name in LAYERS else False


def wraps(name: str) -> bool:
    """Whether the layer of this name is one around what it replaces."""
    return issubclass(LAYERS[name], Wrapper) if name in LAYERS else False


def adapters(model: nn.Module) -> list[str]:
    """Names of the parameters that adapters have added to a model and that train: those of LoRA, of scales and shifts, of SVFT,
    and of the convolutions before uses of a shared MLP. To train them and the head alone, freeze the others:

        names = adapters(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names or name.startswith("head."))
    """
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, ADAPTERS)
        for name, parameter in module._parameters.items()
        if parameter is not None and not (isinstance(module, SvftLinear) and name not in ("entries", "gate"))
    ]


def gates(model: nn.Module) -> dict[str, nn.Parameter]:
    """The gates that `block_gate` has put on MLPs, by name. To make it cheap to shut them:

    loss = loss + 0.01 * sum(gate.clamp(0, 1).sum() for gate in gates(model).values())
    """
    return {f"{path}.gate": module.gate for path, module in model.named_modules() if isinstance(module, BlockGate)}


def make_layer(name: str, module: nn.Module, config: Config, source: Origin | None = None) -> nn.Module:
    """A layer to put in the place of a module: of its widths, type, device and mode. It draws no random numbers of others.

    Args:
        name: one of `LAYERS`.
        module: what is replaced, or wrapped.
        config: keyword arguments of its `in_place_of`.
        source: where the layer came from when it was saved, for the message where it is missing.

    Raises:
        ReductionError: there is no such layer, it cannot replace that module, or an argument is wrong.
    """
    if name not in LAYERS and source is not None:
        remedy = f"import {source.name}" if not source.digest else f"mlpreduce.plugins.load_plugins([{source.name!r}])"
        raise ReductionError(
            f"the layer {name!r} is of the {source.kind} {source}, which has not been run in this process; first: {remedy}"
        )
    if name not in LAYERS:
        raise ReductionError(f"unknown layer {name!r}{did_you_mean(str(name), LAYERS)}")
    devices = {tensor.device for tensor in module.parameters() if tensor.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            layer: nn.Module = LAYERS[name].in_place_of(module, **config)
        except TypeError as error:
            raise ReductionError(f"the layer {name} cannot be made with {dict(config)}: {error}") from error
    layer.training = module.training  # and not that of a base, which keeps its own
    _train_alike(layer, module)
    return layer


def layer_of(kind: type[Layer], module: nn.Module, config: Config) -> Layer:
    """`make_layer` by the class of one of `LAYERS`."""
    name = next(name for name, known in LAYERS.items() if known is kind)
    return cast(Layer, make_layer(name, module, config))


def _train_alike(layer: nn.Module, module: nn.Module) -> None:
    """Let what stands for a weight or a bias train if that did; what a layer adds trains."""
    for name, parameter in layer._parameters.items():
        if parameter is None or isinstance(layer, Wrapper) or (name != "bias" and isinstance(layer, SvftLinear)):
            continue
        before = module._parameters.get("bias" if name == "bias" else "weight")
        parameter.requires_grad_(before is None or before.requires_grad)
