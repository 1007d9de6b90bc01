"""What a node of the graph may be: tables of operations, and questions about leaf modules.

To teach the matcher an operation, add it to a table.
"""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from mlpreduce.graph.trace import module_at

__all__ = [
    "ACTIVATIONS", "ADD", "MULTIPLY", "NEUTRAL", "QUERIES", "SPLIT", "describe", "is_elementwise", "is_nonlinear",
    "is_projection", "passes", "target_of", "tensors_of",
]  # fmt: skip

ACTIVATIONS = {
    F.gelu, F.relu, F.relu6, F.silu, F.mish, F.elu, F.selu, F.celu, F.leaky_relu, F.softplus, F.sigmoid, F.tanh,
    F.hardswish, F.hardsigmoid, F.hardtanh, F.logsigmoid, torch.relu, torch.sigmoid, torch.tanh, torch.square,
    torch.nn.functional.relu_,
    "relu", "relu_", "sigmoid", "tanh", "square", "gelu", "silu",
}  # fmt: skip
NEUTRAL = {
    F.dropout,
    torch.clamp,
    "contiguous",
    "clone",
    "detach",
    "to",
    "type_as",
    "float",
    "half",
    "bfloat16",
    "clamp",
}
MULTIPLY = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
SPLIT = {torch.chunk, torch.split, torch.tensor_split, "chunk", "split", "tensor_split"}
ADD = {operator.add, operator.iadd, operator.sub, torch.add, torch.sub, "add", "add_", "sub", "sub_"}
# on the way from the contracting projection to the residual addition
PASSING = NEUTRAL | {
    F.layer_norm, F.batch_norm, F.group_norm, F.rms_norm, torch.cat, torch.stack, torch.sum, operator.truediv,
    operator.getitem, torch.flatten, torch.transpose, torch.permute, torch.reshape, "sum", "div", "flatten",
    "transpose", "permute", "reshape", "view", "unsqueeze", "squeeze", "stochastic_depth",
}  # fmt: skip
QUERIES = {getattr, "size", "dim", "numel", "new_empty"}  # they read a tensor's shape, not its values
NOT_ELEMENTWISE = (nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, nn.Softmin, nn.LogSoftmax, nn.GLU)


def target_of(node: fx.Node) -> object:
    """What a call does: the function, or the name of the method; fx-wrapped functions count by name too."""
    if node.op == "call_function" and node.target not in PASSING | MULTIPLY | ADD | ACTIVATIONS:
        name = getattr(node.target, "__name__", "")
        return name if name in ("stochastic_depth", "drop_path", "dropout") else node.target
    return node.target


def is_projection(module: nn.Module | None) -> bool:
    if isinstance(module, nn.Linear):
        return True
    if not isinstance(module, nn.Conv2d):
        return False
    return set(module.kernel_size) == {1} and set(module.stride) == {1} and module.groups == 1


def tensors_of(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers of a leaf with an axis to slice (a counter or a scalar has none)."""
    return [(name, t) for name, t in [*module.named_parameters(), *module.named_buffers()] if t.numel() > 1]


def _elementwise_class(module: nn.Module) -> bool | None:
    if isinstance(module, NOT_ELEMENTWISE):
        return False
    if (
        isinstance(module, (nn.Identity, nn.modules.dropout._DropoutNd))
        or type(module).__module__ == nn.ReLU.__module__
    ):
        return True
    return None


def is_elementwise(module: nn.Module) -> bool:
    """Whether a leaf without tensors treats each element alone. An unknown class is asked, on ten numbers."""
    known = _elementwise_class(module)
    if known is not None:
        return known
    x = torch.linspace(-3.0, 3.0, 10, device="cpu").reshape(1, 10)
    try:
        with torch.no_grad():
            y, part = module(x), module(x[:, 2:5])
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return False
    return isinstance(y, torch.Tensor) and y.shape == x.shape and torch.equal(y[:, 2:5], part)


def is_nonlinear(module: nn.Module) -> bool:
    return not isinstance(module, (nn.Identity, nn.modules.dropout._DropoutNd)) and type(module).__name__ != "DropPath"


def describe(module: nn.Module) -> tuple[object, ...]:
    shapes = tuple((name, tuple(t.shape), str(t.dtype)) for name, t in tensors_of(module))
    return type(module).__qualname__, module.extra_repr(), shapes


def passes(model: nn.Module, node: fx.Node) -> bool:
    """Whether a node hands the output of an MLP on to the residual addition: a norm, a scale, a drop, a shape."""
    if node.op == "call_module":
        module = module_at(model, str(node.target))
        if module is None or is_projection(module):
            return False
        tensors = tensors_of(module)
        return all(t.dim() == 1 for _, t in tensors) and (bool(tensors) or not _is_nonlinear_leaf(module))
    target = target_of(node)
    if target in MULTIPLY:  # a layer scale, not a gate
        others = [arg for arg in node.args if isinstance(arg, fx.Node)]
        return len(others) < 2 or any(arg.op == "get_attr" for arg in others)
    return target in PASSING or target in ("drop_path", "dropout")


def _is_nonlinear_leaf(module: nn.Module) -> bool:
    return _elementwise_class(module) is True and is_nonlinear(module)
