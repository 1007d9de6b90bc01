"""Running a model without a trace: in full precision, with the random states as they were, on a copy of its module tree."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from mlpreduce.graph import structural_copy

__all__ = [
    "CHECKPOINTING",
    "check_twice_differentiable",
    "full_precision",
    "quiet_copy",
    "running",
    "undisturbed_randomness",
]

CHECKPOINTING = ("grad_checkpointing", "gradient_checkpointing")  # flags of timm and transformers


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast and no TF32 within."""
    backends: Any = torch.backends
    gpu = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    places = gpu if device.type == "cuda" else (backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn)
    # older names of these settings raise where somebody has used the newer ones, so they are neither read nor written
    coarse = [(place, place.fp32_precision) for place in places if place.fp32_precision not in ("none", "ieee")]
    with torch.autocast(device.type, enabled=False):
        try:
            for place, _ in coarse:
                place.fp32_precision = "ieee"
            yield
        finally:
            for place, before in coarse:
                place.fp32_precision = "none"
                if place.fp32_precision != before:  # it was not what is set for all of the backend
                    place.fp32_precision = before


@contextmanager
def undisturbed_randomness(device: torch.device) -> Iterator[None]:
    """Random states of torch, numpy and Python are afterwards as they were: a loader draws from them, even in order."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def running(device: torch.device, *, gradients: bool) -> Iterator[None]:
    """Full precision, undisturbed random states, with or without gradients."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        stack.enter_context(full_precision(device))
        stack.enter_context(undisturbed_randomness(device))
        yield


def quiet_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree in evaluation mode, without hooks and checkpointing, of frozen tensors in the same memory."""
    tree = structural_copy(model)
    frozen: dict[int, nn.Parameter] = {}
    for module in tree.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                alike = frozen.setdefault(id(parameter), nn.Parameter(parameter.detach(), requires_grad=False))
                module._parameters[name] = alike
        for name in CHECKPOINTING:
            if module.__dict__.get(name) is True:
                setattr(module, name, False)
    return tree.train().eval()  # anew: what modules keep in it, as timm's attention biases, may be of older weights


def check_twice_differentiable(value: torch.Tensor) -> None:
    """Raise where a function of one derivative was met: torch.autograd.grad passes its node by and leaves out what it gives.

    Raises:
        RuntimeError: there is such a function.
    """
    seen, nodes = set(), [value.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if node.name() == "torch::autograd::Error":
            raise RuntimeError("the derivative of a function marked once_differentiable is not implemented")
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
