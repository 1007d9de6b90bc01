"""Layers that stand in for a `Linear`: fewer weights, or few that train. Each turns back into a `Linear` by `merged()`.

They are plain modules and can be used alone. All take and give tensors `(..., features)`. Some wrap a module, their `base`:
what they add is their own where the base is tied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mlpreduce.errors import ReductionError, did_you_mean
from mlpreduce.layers.block_diagonal import BlockDiagonalLinear
from mlpreduce.layers.block_gate import BlockGate, NoMlp
from mlpreduce.layers.channel_covariance import ChannelCovariance
from mlpreduce.layers.energy import BlockOrders, block_orders
from mlpreduce.layers.lora import LoraLinear
from mlpreduce.layers.low_rank import LowRankLinear
from mlpreduce.layers.scale_shift import ScaleShift, is_scalable
from mlpreduce.layers.svft import SvftLinear
from mlpreduce.layers.token_convolution import TokenConvolution
from mlpreduce.layers.wrapper import StandIn, Wrapper, macs_of, merged

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
    "is_scalable",
    "macs_of",
    "make_layer",
    "merged",
    "merges",
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
ADAPTERS = (LoraLinear, ScaleShift, SvftLinear)  # few parameters that train beside weights that may be frozen


def merges(name: str) -> bool:
    """Whether the layer of this name has a plain one that computes the same."""
    return hasattr(LAYERS[name], "merged") if name in LAYERS else False


def wraps(name: str) -> bool:
    """Whether the layer of this name is one around what it replaces."""
    return issubclass(LAYERS[name], Wrapper) if name in LAYERS else False


def adapters(model: nn.Module) -> list[str]:
    """Names of the parameters that adapters have added to a model and that train: those of LoRA, of scales and shifts, and of
    SVFT. To train them and the head alone, freeze the others:

        names = adapters(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names or name.startswith("head."))
    """
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, ADAPTERS)
        for name, parameter in module._parameters.items()
        if parameter is not None and not (isinstance(module, SvftLinear) and name == "bias")
    ]


def make_layer(name: str, module: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    """A layer to put in the place of a module: of its widths, type, device and mode. It draws no random numbers of others.

    Args:
        name: one of `LAYERS`.
        module: what is replaced, or wrapped.
        config: keyword arguments of its `in_place_of`.

    Raises:
        ReductionError: there is no such layer, it cannot replace that module, or an argument is wrong.
    """
    if name not in LAYERS:
        raise ReductionError(f"unknown layer {name!r}{did_you_mean(str(name), LAYERS)}")
    devices = {tensor.device for tensor in module.parameters() if tensor.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            layer: nn.Module = LAYERS[name].in_place_of(module, **config)
        except TypeError as error:
            raise ReductionError(f"the layer {name} cannot be made with {dict(config)}: {error}") from error
    layer.training = module.training  # and not that of a base, which keeps its own
    if not isinstance(layer, ADAPTERS) and not any(parameter.requires_grad for parameter in module.parameters()):
        layer.requires_grad_(False)
    return layer
