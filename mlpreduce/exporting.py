"""Reduced models as ONNX files: `to_onnx`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mlpreduce.errors import ReductionError
from mlpreduce.extras import require
from mlpreduce.graph import Inputs, tensors_in
from mlpreduce.graph import example_inputs as inputs_of

__all__ = ["to_onnx"]


def to_onnx(model: nn.Module, path: str | Path, example_inputs: Inputs | None = None, **options: Any) -> Path:
    """Write a model to an ONNX file that holds each tied weight once.

    `torch.onnx.export` does the work. The model is exported in evaluation mode, and afterwards every module is in the mode
    that it was in.

    Args:
        model: reduced or not; its parameters must not be on the meta device.
        path: of the file.
        example_inputs: what the model takes, one tensor or several; by default one image of the size that it is built for.
        **options: arguments of `torch.onnx.export`, such as `dynamic_shapes` or `external_data`.

    Returns:
        The path.

    Raises:
        ReductionError: onnx or onnxscript is not installed, the model has no weights, or torch cannot export it.
    """
    call = f"to_onnx({type(model).__name__})"
    require(call, "onnx", "onnxscript")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ReductionError(f"{call}: the model is on the meta device; load its weights first")
    inputs = inputs_of(model) if example_inputs is None else example_inputs
    if not tensors_in(inputs):
        raise ReductionError(f"{call}: example_inputs holds no tensor")
    arguments: dict[str, Any] = {"args": inputs if isinstance(inputs, tuple) else (inputs,)}
    if isinstance(inputs, Mapping):
        arguments = {"args": (), "kwargs": dict(inputs)}
    modes = [(module, module.training) for module in model.modules()]
    try:
        torch.onnx.export(model.eval(), f=path, **({"dynamo": True, "verbose": False} | arguments | options))
    except RuntimeError as error:  # torch's own error of the exporter is one
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ReductionError(
            f"{call}: torch cannot export it: {lines[0]}; try torch.export.export(model, inputs) to see why"
        ) from error
    finally:
        for module, mode in modes:
            module.training = mode
    return Path(path)
