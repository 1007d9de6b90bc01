"""Probes: zeros that are added to what modules give, whose gradient is that by what they give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from mlpreduce.graph import module_at

__all__ = ["Probe", "probing"]

Probe = tuple[str, int, torch.Tensor]  # path of the module, which of its calls, and the zeros


@contextmanager
def probing(tree: nn.Module, paths: Sequence[str]) -> Iterator[list[Probe]]:
    """Within, each call of the modules at these paths has a probe; they are there in order of the calls."""
    probes: list[Probe] = []
    with ExitStack() as stack:
        for path in dict.fromkeys(paths):
            module = module_at(tree, path)
            if module is None:
                continue

            def after(module: nn.Module, args: Any, given: torch.Tensor, path: str = path) -> torch.Tensor:
                call = sum(other == path for other, *_ in probes)
                probes.append((path, call, torch.zeros_like(given, requires_grad=True)))
                return given + probes[-1][2]

            stack.callback(module.register_forward_hook(after).remove)
        yield probes
