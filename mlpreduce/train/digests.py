"""Short fingerprints of what a run starts from and is fed with, so that variants of one seed can be seen to be alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
import torch.distributed as dist

from mlpreduce.train.runtime import Runtime
from mlpreduce.train.state import rng_state

__all__ = ["of_randomness", "of_tensors", "together"]

LENGTH = 16  # hexadecimal digits that are kept


def of_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """The fingerprint of named tensors, by names, shapes and bits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(values.shape)} {values.dtype} ".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:LENGTH]


def of_randomness(runtime: Runtime) -> str:
    """The fingerprint of the random states of all workers: equal where as many numbers were drawn from equal seeds."""
    state = rng_state(runtime.device)
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    others = json.dumps({name: value for name, value in state.items() if name not in tensors}, sort_keys=True)
    return together(of_tensors(tensors) + hashlib.sha256(others.encode()).hexdigest(), runtime)


def together(digest: str, runtime: Runtime) -> str:
    """One fingerprint of those of all workers."""
    every = [digest]
    if runtime.world > 1:
        every = [""] * runtime.world
        dist.all_gather_object(every, digest)
    return hashlib.sha256("".join(every).encode()).hexdigest()[:LENGTH]
