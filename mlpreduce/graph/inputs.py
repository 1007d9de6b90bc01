"""Inputs of the size a model says it takes, and how a model is called with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from mlpreduce.errors import ReductionError

__all__ = ["INPUTS", "Inputs", "call_with", "example_inputs", "map_tensors", "tensor_of", "tensors_in"]

INPUTS = "mlpreduce_inputs"  # where a GraphModule keeps what it is called with

Inputs: TypeAlias = "torch.Tensor | tuple[Any, ...] | Mapping[str, Any]"


def call_with(model: nn.Module, inputs: Inputs) -> Any:
    """Call a model with one tensor, a tuple of positional arguments, or a mapping of keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def map_tensors(inputs: Inputs, function: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
    """The same inputs with every tensor replaced, those in lists and dicts too."""
    plain = dict(inputs) if isinstance(inputs, Mapping) else inputs
    changed: Inputs = tree_map(lambda value: function(value) if isinstance(value, torch.Tensor) else value, plain)
    return changed


def tensors_in(inputs: Inputs) -> list[torch.Tensor]:
    """The tensors of inputs, in order."""
    plain = dict(inputs) if isinstance(inputs, Mapping) else inputs
    return [value for value in tree_leaves(plain) if isinstance(value, torch.Tensor)]


def tensor_of(output: Any, names: Sequence[str]) -> torch.Tensor:
    """The tensor in what a model gives: itself, the first of the names that it has, or the first of several.

    Args:
        output: what the model gave.
        names: attributes or keys, the best first, as of what models of transformers give.

    Raises:
        ReductionError: there is none.
    """
    found = output
    for name in names:
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if value is not None:
            found = value
            break
    if isinstance(found, (list, tuple)) and found:
        found = found[0]
    if not isinstance(found, torch.Tensor):
        raise ReductionError(
            f"the model gives a {type(output).__name__} without {' or '.join(names)}; wrap it so that it gives a tensor, or, "
            f"where a loss is asked for, give loss=, a function of it"
        )
    return found


def example_inputs(model: nn.Module, batch: int = 1) -> Inputs:
    """A batch of the size the model says it takes, on its device, zeros.

    The size is that of its patch embedding, its pretrained config (timm), its image size (torchvision), or its config
    (transformers: images or token ids, by the name of its main input).

    Raises:
        ReductionError: it does not say.
    """
    parameter = next(model.parameters(), torch.empty(0))
    if isinstance(model, fx.GraphModule) and INPUTS in model.meta:
        kept: Inputs = model.meta[INPUTS]
        return map_tensors(kept, lambda t: torch.zeros(batch, *t.shape[1:], dtype=t.dtype, device=parameter.device))
    config = getattr(model, "config", None)
    if hasattr(model, "main_input_name") and config is not None:
        named = _of_config(config, str(model.main_input_name), batch, parameter)
        if named is not None:
            return named
    embed = getattr(model, "patch_embed", None)
    size, channels = getattr(embed, "img_size", None), None
    convolutions = (m for m in (embed if isinstance(embed, nn.Module) else model).modules() if isinstance(m, nn.Conv2d))
    channels = next((convolution.in_channels for convolution in convolutions), None)
    if channels is not None and channels > 16:  # no stem, but some other convolution that was registered first
        channels = None
    if not (isinstance(size, tuple) and all(isinstance(side, int) for side in size)):
        size = getattr(model, "image_size", None)  # torchvision
        size = (size, size) if isinstance(size, int) else None
    pretrained = getattr(model, "pretrained_cfg", None) or {}
    if size is None and "input_size" in pretrained:
        channels, *size = pretrained["input_size"] if channels is None else (channels, *pretrained["input_size"][1:])
    if size is None and type(model).__module__.startswith("torchvision."):
        size = (224, 224)
    if size is None or channels is None:
        raise ReductionError(
            f"{type(model).__name__} does not say what image size it takes; give example inputs, such as "
            f"torch.zeros(1, 3, height, width)"
        )
    return torch.zeros(batch, channels, *size, device=parameter.device, dtype=parameter.dtype)


def _of_config(config: Any, name: str, batch: int, parameter: torch.Tensor) -> Mapping[str, Any] | None:
    """Inputs of a model of transformers."""
    size = getattr(config, "image_size", None)
    if name == "pixel_values" and size is not None:
        sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
        channels = getattr(config, "num_channels", 3)
        return {name: torch.zeros(batch, channels, *sides, device=parameter.device, dtype=parameter.dtype)}
    if name == "input_ids":
        length = min(16, getattr(config, "max_position_embeddings", 16))
        return {name: torch.zeros(batch, length, device=parameter.device, dtype=torch.long)}
    return None
