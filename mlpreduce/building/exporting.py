"""Reduced models as ONNX files: `to_onnx`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mlpreduce.errors import ReductionError, did_you_mean, require
from mlpreduce.graph import Inputs, tensors_in
from mlpreduce.graph import example_inputs as inputs_of

__all__ = ["to_onnx"]

_GIVEN = ("model", "args", "kwargs", "f")  # arguments of torch's function that ours have other names for
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


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
        ReductionError: onnx or onnxscript is not installed, the model has no weights, `path` is a folder or in none,
            an option is not one of torch's, or torch cannot export the model.
    """
    call = f"to_onnx({type(model).__name__})"
    require(call, "onnx", "onnxscript")
    known = [name for name in inspect.signature(torch.onnx.export).parameters if name not in _GIVEN]
    for name in options:
        if name in _GIVEN:
            raise ReductionError(f"{call}: {name}= is not an option; give model, path and example_inputs")
        if name not in known:
            raise ReductionError(f"{call}: torch.onnx.export has no option {name!r}{did_you_mean(name, known)}")
    if not Path(path).parent.is_dir():
        raise ReductionError(
            f"{call}: there is no folder {str(Path(path).parent)!r} for {Path(path).name}; make it first"
        )
    if Path(path).is_dir():
        raise ReductionError(f"{call}: {str(path)!r} is a folder; name a file in it, such as model.onnx")
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
    except (
        RuntimeError,
        TypeError,
        ValueError,
        OSError,
    ) as error:  # torch's own error of the exporter is a RuntimeError
        raise ReductionError(
            f"{call}: torch cannot export it: {_reason(error)}; try torch.export.export(model, inputs) to see why"
        ) from error
    finally:
        for module, mode in modes:
            module.training = mode
    return Path(path)


def _reason(error: BaseException) -> str:
    """The first line of what an error came from; the outer ones of torch's exporter are advice, in colours."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = _COLOURS.sub("", str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
