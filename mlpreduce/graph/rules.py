"""What a node of the graph may be: tables of operations, and questions about leaf modules.

To teach the matcher an operation, add it to a table.
"""

from __future__ import annotations

import copy
import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from mlpreduce.graph.trace import module_at

__all__ = [
    "ACTIVATIONS",
    "ADD",
    "MULTIPLY",
    "NEUTRAL",
    "QUERIES",
    "SPLIT",
    "describe",
    "is_channelwise",
    "is_elementwise",
    "is_nonlinear",
    "is_projection",
    "mixes_positions",
    "operand",
    "passes",
    "target_of",
    "tensors_of",
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
# between the residual stream and an MLP's input: what mixes positions, so that the input is no longer the stream's
MIXING = {
    torch.mean, torch.sum, torch.amax, torch.max, torch.matmul, torch.bmm, torch.einsum, torch.softmax, operator.matmul,
    F.softmax, F.scaled_dot_product_attention, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.avg_pool2d, F.max_pool2d,
    "mean", "sum", "amax", "max", "matmul", "bmm", "softmax",
}  # fmt: skip
QUERIES = {getattr, "size", "dim", "numel", "new_empty"}  # they read a tensor's shape, not its values
_NUMBERS = torch.linspace(-3.0, 3.0, 24, device="cpu")
_PROBED: dict[tuple[type[nn.Module], str], bool] = {}
NOT_ELEMENTWISE = (nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, nn.Softmin, nn.LogSoftmax, nn.GLU)


def target_of(node: fx.Node) -> object:
    """What a call does: the function, or the name of the method; fx-wrapped functions count by name too."""
    if node.op == "call_function" and node.target not in PASSING | MULTIPLY | ADD | ACTIVATIONS:
        name = getattr(node.target, "__name__", "")
        return name if name in ("stochastic_depth", "drop_path", "dropout") else node.target
    return node.target


def is_projection(module: nn.Module | None) -> bool:
    if not isinstance(module, (nn.Linear, nn.Conv2d)) or not _is_ordinary(module):
        return False
    if isinstance(module, nn.Linear):
        return True
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


def _is_ordinary(module: nn.Linear | nn.Conv2d) -> bool:
    """Whether a projection has just a weight and a bias, and a forward that is known: not parametrised, lazy or quantised."""
    known = type(module).forward in (nn.Linear.forward, nn.Conv2d.forward) or type(module).__module__.startswith(
        "timm."
    )
    lazy = any(isinstance(p, nn.parameter.UninitializedParameter) for p in module._parameters.values())
    return known and not lazy and set(module._parameters) == {"weight", "bias"} and not module._buffers


def is_channelwise(module: nn.Module, channel_last: bool) -> bool:
    """Whether a leaf with one value a channel can be sliced along its channels: a known norm or scale."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return not channel_last  # BatchNorm1d counts the tokens of (batch, tokens, features) as channels
    known = isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.PReLU)) or type(module).__module__.startswith("timm.")
    return known and not isinstance(module, nn.GroupNorm)


def operand(node: fx.Node) -> object:
    """The tensor that a unary operation is applied to."""
    return node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("x"))


def is_elementwise(module: nn.Module) -> bool:
    """Whether a leaf without tensors treats each element alone. An unknown class is asked, on a few numbers."""
    known = _elementwise_class(module)
    if known is not None:
        return known
    key = (type(module), module.extra_repr())
    if key not in _PROBED:
        _PROBED[key] = _probe(module)
    return _PROBED[key]


def _probe(module: nn.Module) -> bool:
    try:  # on a copy, in case it counts its calls, and on the CPU, where its scalars have values
        probe = copy.deepcopy(module).to_empty(device="cpu")
        for scalar in [*probe.parameters(), *probe.buffers()]:
            nn.init.constant_(scalar, 0.5)
        with torch.no_grad():
            return all(_keeps_elements_apart(probe, x) for x in (_NUMBERS.reshape(1, 24), _NUMBERS.reshape(1, 4, 6)))
    except Exception:  # whatever a foreign module raises on such a tensor
        return False


def _keeps_elements_apart(module: nn.Module, x: torch.Tensor) -> bool:
    y, part = module(x), module(x[..., 2:5])
    return isinstance(y, torch.Tensor) and y.shape == x.shape and torch.allclose(y[..., 2:5], part)


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


def mixes_positions(model: nn.Module, node: fx.Node) -> bool:
    """Whether a node computes one position from several: pooling, attention, a mean."""
    if node.op == "call_module":
        module = module_at(model, str(node.target))
        return "Pool" in type(module).__name__ or isinstance(module, (nn.MultiheadAttention, nn.Softmax))
    return target_of(node) in MIXING
