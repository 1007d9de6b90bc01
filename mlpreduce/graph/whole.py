"""Modules that are an MLP and nothing else, and the grid of tokens that an MLP is given."""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.func import functional_call

from mlpreduce.errors import ReductionError
from mlpreduce.graph.mlp import MLP
from mlpreduce.graph.rules import projection
from mlpreduce.graph.tracing import module_at, structural_copy
from mlpreduce.layers import Wrapper

__all__ = ["token_grid", "whole_module"]


def whole_module(model: nn.Module, mlp: MLP) -> nn.Module:
    """The module that is the MLP, and nothing else.

    Raises:
        ReductionError: there is none, or the model is a graph.
    """
    if isinstance(model, fx.GraphModule):
        raise ReductionError(f"{mlp.name} is part of a torch.fx graph and no module by itself; give the model")
    module = module_at(model, mlp.name)
    leaves = {leaf.path for leaf in mlp.leaves}
    held = [] if module is None else [path for path, m in module.named_modules(remove_duplicate=False) if _holds(m)]
    if module is None or not {f"{mlp.name}.{path}".rstrip(".") for path in held} <= leaves:
        raise ReductionError(f"{mlp.name} is no module of the MLP alone, as this needs")
    if _gives_without_weights(module, mlp):
        raise ReductionError(f"{mlp.name} adds its input to what it computes, so it is more than an MLP; exclude it")
    return module


def token_grid(model: nn.Module, mlp: MLP) -> list[int] | None:
    """Number of tokens before the others, height and width of those; None where an MLP is given a grid.

    Raises:
        ReductionError: the model does not say, drops some of its patches, or the MLP is given something else.
    """
    shape, layer = mlp.input_shape, projection(module_at(model, mlp.leaf("fc1").call))
    channels_last = layer is not None and layer.features == -1
    if len(shape) == 4 and channels_last:
        return None
    sides = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    before = getattr(model, "num_prefix_tokens", 0)
    drop = getattr(getattr(model, "patch_drop", None), "prob", 0.0)
    whole = isinstance(sides, (tuple, list)) and len(sides) == 2 and not drop and channels_last
    if not whole or shape[1:] != (before + sides[0] * sides[1], mlp.in_features):  # type: ignore[index]
        raise ReductionError(
            f"{mlp.name} is given {shape or 'what is not known'}, and the model does not say which of that is a grid of "
            f"tokens, or drops some of them"
        )
    return [before, *sides]  # type: ignore[misc]


def _holds(module: nn.Module) -> bool:
    """Whether a module has tensors itself, other than those that a layer around another adds."""
    return bool(module._parameters or module._buffers) and not isinstance(module, Wrapper)


def _gives_without_weights(module: nn.Module, mlp: MLP) -> bool:
    """Whether a module gives something though all its tensors are zero: its input, for one."""
    zeros = {
        name: torch.zeros((), dtype=tensor.dtype, device="cpu").expand(tensor.shape)
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }
    shape = mlp.input_shape or (1, mlp.in_features)
    dtype = next((zero.dtype for zero in zeros.values() if zero.is_floating_point()), None)
    sizes = (1 if shape[-1] == mlp.in_features else size for size in shape[1:-1])
    ones = torch.ones(1, *sizes, shape[-1], dtype=dtype, device="cpu")
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            given = functional_call(structural_copy(module).eval(), zeros, (ones,))
    except Exception:  # whatever a foreign forward raises: it takes other arguments, so this cannot be asked
        return False
    return isinstance(given, torch.Tensor) and bool(given.any())
