"""What a node of the graph may be: tables of operations, and questions about leaf modules.

Operations go by name, so that functions, methods and operators are one thing. To teach the matcher an operation, add
its name to a table.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from mlpreduce.graph.tracing import NORMS
from mlpreduce.layers import StandIn, Wrapper

__all__ = [
    "ACTIVATIONS",
    "ADD",
    "IDLE",
    "MIXING",
    "MULTIPLY",
    "NEUTRAL",
    "PARAMETRIZED",
    "PASSING",
    "PRODUCTS",
    "QUERIES",
    "SHAPING",
    "SPLIT",
    "Projection",
    "describe",
    "is_depthwise",
    "is_elementwise",
    "is_nonlinear",
    "is_norm",
    "is_of_library",
    "is_stock",
    "keeps_units_apart",
    "no_slices",
    "norm_dim",
    "operand",
    "operation",
    "projection",
    "projection_of",
    "says_mlp",
    "tensors_of",
]

PARAMETRIZED = "is parametrized: fold that into its weight first, gates by GateL1.fold() or finalize()"

ACTIVATIONS = {
    "gelu", "relu", "relu6", "silu", "mish", "elu", "selu", "celu", "leaky_relu", "softplus", "sigmoid", "tanh",
    "hardswish", "hardsigmoid", "hardtanh", "logsigmoid", "square", "pow", "erf",
}  # fmt: skip
NEUTRAL = {"dropout", "contiguous", "clone", "detach", "to", "type_as", "float", "half", "bfloat16", "clamp", "clip"}
MULTIPLY = {"mul"}
ADD = {"add", "sub"}
SPLIT = {"chunk", "split", "tensor_split", "split_with_sizes", "unsafe_chunk", "unsafe_split"}
SHAPING = {
    "flatten", "unflatten", "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "reshape", "view",
    "reshape_as", "view_as", "squeeze", "unsqueeze", "t", "T", "mT",
}  # fmt: skip
# on the way from the contracting projection to the residual addition
PASSING = NEUTRAL | SHAPING | {
    "layer_norm", "batch_norm", "group_norm", "rms_norm", "cat", "stack", "sum", "truediv", "getitem",
    "stochastic_depth", "drop_path",
}  # fmt: skip
# between the residual stream and an MLP's input: what mixes positions, so that the input is no longer the stream's
MIXING = {
    "mean", "sum", "amax", "max", "matmul", "bmm", "einsum", "softmax", "scaled_dot_product_attention",
    "multi_head_attention_forward", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "avg_pool2d", "max_pool2d",
}  # fmt: skip
PRODUCTS = {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "conv1d", "conv2d"}
QUERIES = {"getattr", "size", "dim", "numel", "new_empty"}  # they read a tensor's shape, not its values
_SYNONYMS = {
    "iadd": "add", "radd": "add", "isub": "sub", "rsub": "sub", "imul": "mul", "rmul": "mul", "multiply": "mul",
    "subtract": "sub", "div": "truediv", "divide": "truediv", "itruediv": "truediv",
}  # fmt: skip
_LIBRARIES = {"torch", "torchvision", "timm", "transformers"}
_MLP_WORDS = re.compile(r"mlp|ffn|feed_?forward|^(le|mix)?ff\d*$", re.IGNORECASE)
_NUMBERS = torch.linspace(-3.0, 3.0, 120, device="cpu")
_PROBED: dict[tuple[type[nn.Module], str], bool] = {}
# forwards of modules that give back what they are given, in eval mode
IDLE = {cls.forward for cls in (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)}
NOT_ELEMENTWISE = (nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, nn.Softmin, nn.LogSoftmax, nn.GLU)


def operation(node: fx.Node) -> str | None:
    """What a call does, by name; None if it is no call of a known function."""
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        if name == "__get__":  # a property, such as Tensor.T
            name = getattr(getattr(node.target, "__self__", None), "__name__", "")
        if getattr(node.target, "__module__", None) and not is_of_library(node.target, "_operator", "builtins"):
            return None  # methods of tensors do not say where they are from
    else:
        return None
    name = name.strip("_")
    return _SYNONYMS.get(name, name)


def operand(node: fx.Node) -> object:
    """The tensor that a unary operation is applied to."""
    return node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("x"))


@dataclass(frozen=True)
class Projection:
    """How a layer maps features, each position alone.

    Attributes:
        outputs: names of its tensors that have an axis of outputs, and that axis. Empty: none can be sliced.
        inputs: the same of inputs, with the blocks they come in on that axis.
        features: the feature dimension of what it is given.
        in_features, out_features: widths.
        groups: blocks of inputs, each of which only a block of outputs sees.
        dense: whether it is a weight and a bias, of which each output sees each input.
    """

    outputs: tuple[tuple[str, int], ...]
    inputs: tuple[tuple[str, int, int], ...]
    features: int
    in_features: int
    out_features: int
    groups: int = 1
    dense: bool = True


def is_of_library(thing: object, *others: str) -> bool:
    """Whether a function or class is of a library whose names and classes are known, or of one of `others`."""
    module = getattr(thing, "__module__", None) or ""
    return module.partition(".")[0] in {*_LIBRARIES, *others}


def is_stock(module: nn.Module) -> bool:
    """Whether what a module computes is known: its forward is a library's, not a user's class's or an instance's own."""
    return "forward" not in vars(module) and is_of_library(type(module).forward)


def projection_of(module: nn.Module) -> Projection:
    """`projection` of a layer of an MLP, which is one.

    Raises:
        TypeError: it is none.
    """
    found = projection(module)
    if found is None:
        raise TypeError(f"a {type(module).__name__} is no projection")
    return found


def projection(module: nn.Module | None) -> Projection | None:
    """What a layer is as a projection of each position alone, if it has just a weight and a bias and a known forward, or is a
    layer of this library.

    Parametrised, lazy and quantised layers are none.
    """
    if isinstance(module, Wrapper):
        return _around(module) if module.is_one_layer else None
    if isinstance(module, StandIn) and "forward" not in vars(module):
        made: Any = module
        widths = made.in_features, made.out_features
        groups = getattr(module, "groups", 1)
        outputs, inputs = _present(module, made.outputs), _present(module, made.inputs)
        blocks = tuple((name, dim, groups) for name, dim in inputs)
        return Projection(outputs, blocks, -1, *widths, groups=groups, dense=False)
    if module is None or set(module._parameters) != {"weight", "bias"} or module._buffers or module._modules:
        return None
    if not is_stock(module) or module._parameters["weight"] is None:
        return None
    if isinstance(module, nn.Linear):
        return _dense(module, 0, -1)
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        pointwise = {*module.kernel_size, *module.stride, module.groups} == {1}
        unpadded = module.padding in ((0,), (0, 0), "valid", "same")
        return _dense(module, 0, 1) if pointwise and unpadded else None
    if type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers."):  # GPT-2's
        return _dense(module, 1, -1)
    return None


def _dense(module: nn.Module, outputs: int, features: int) -> Projection:
    """A projection by a weight whose axis of outputs is the first or the second."""
    weight: Any = module._parameters["weight"]  # a plain tensor, where functional_call has left one
    shape, bias = weight.shape, (("bias", 0),) if module._parameters["bias"] is not None else ()
    return Projection(
        (("weight", outputs), *bias), (("weight", 1 - outputs, 1),), features, shape[1 - outputs], shape[outputs]
    )


def _around(module: Wrapper) -> Projection | None:
    """A projection with what a layer around it adds."""
    inner, own = projection(module.base), module
    if inner is None:
        return None
    outputs = ((f"base.{name}", dim) for name, dim in inner.outputs)
    inputs = ((f"base.{name}", dim, groups) for name, dim, groups in inner.inputs)
    seen = ((name, dim, 1) for name, dim in _present(module, own.inputs))  # each of its rows sees all inputs
    return replace(
        inner,
        outputs=(*outputs, *_present(module, own.outputs)) if inner.outputs else (),
        inputs=(*inputs, *seen) if inner.inputs else (),
        dense=False,
    )


def _present(module: nn.Module, axes: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...]:
    return tuple((name, dim) for name, dim in axes if getattr(module, name) is not None)


def no_slices(node: fx.Node, module: nn.Module) -> str:
    """Why a projection has no axes to slice."""
    return (
        f"{node.target} is a {type(module).__name__}, of which no hidden units can be taken out; merge the model first"
    )


def tensors_of(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers of a leaf with an axis to slice (a counter or a scalar has none)."""
    if module._modules:
        named = [*module.named_parameters(), *module.named_buffers()]
    else:  # the same, of what most leaves are, and much faster
        named = [(n, t) for n, t in (*module._parameters.items(), *module._buffers.items()) if t is not None]
    return [(name, tensor) for name, tensor in named if tensor.numel() > 1]


def is_depthwise(module: nn.Module | None) -> bool:
    """Whether a layer is a convolution of each channel alone, or of groups of channels, as many out as in."""
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)) or not is_stock(module):
        return False
    if module.groups == 1 or module.in_channels != module.out_channels:
        return False
    return set(module.stride) == {1} and set(module._parameters) == {"weight", "bias"} and not module._buffers


def is_norm(module: nn.Module) -> bool:
    """Whether a leaf with one value a channel is a known norm or scale, and can be sliced along its channels."""
    known = isinstance(module, (*NORMS, nn.PReLU)) or type(module).__module__.startswith("timm.")
    return known and is_stock(module) and not isinstance(module, nn.GroupNorm)


def norm_dim(module: nn.Module) -> int | None:
    """The channel dimension that a norm works on; None if it does not say."""
    if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.PReLU)) or "2d" in type(module).__name__.lower():
        return 1
    return -1 if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) else None


def is_elementwise(module: nn.Module) -> bool:
    """Whether a leaf without tensors treats each element alone. An unknown one is asked, on a few numbers."""
    known = _elementwise_class(module)
    if known is not None:
        return known
    if not is_stock(module):  # what one instance says tells nothing of another
        return _probe(module)
    key = (type(module), module.extra_repr())
    if key not in _PROBED:
        _PROBED[key] = _probe(module)
    return _PROBED[key]


def _elementwise_class(module: nn.Module) -> bool | None:
    if isinstance(module, NOT_ELEMENTWISE):
        return False
    neutral = isinstance(module, (nn.Identity, nn.modules.dropout._DropoutNd))
    if is_stock(module) and (neutral or type(module).__module__ == nn.ReLU.__module__):
        return True
    return None


def _probe(module: nn.Module) -> bool:
    try:  # on a copy, in case it counts its calls, and on the CPU, where its scalars have values
        probe = copy.deepcopy(module).to_empty(device="cpu")
        for scalar in [*probe.parameters(), *probe.buffers()]:
            nn.init.constant_(scalar, 0.5)
        with torch.no_grad():
            return all(_keeps_elements_apart(probe, x) for x in (_NUMBERS.reshape(5, 24), _NUMBERS.reshape(4, 5, 6)))
    except Exception:  # whatever a foreign module raises on such a tensor
        return False


def _keeps_elements_apart(module: nn.Module, x: torch.Tensor) -> bool:
    y = module(x)
    if not isinstance(y, torch.Tensor) or y.shape != x.shape:
        return False
    parts = ((y.narrow(dim, 1, 2), module(x.narrow(dim, 1, 2))) for dim in range(x.dim()))
    return all(torch.allclose(whole, part, rtol=1e-4, atol=1e-5) for whole, part in parts)  # kernels differ in rounding


def keeps_units_apart(module: nn.Module, shape: tuple[int, ...] | None, dim: int) -> bool:
    """Whether a user's leaf without tensors treats the positions of one dimension alone and alike, whatever it does elsewhere.

    Spiking neurons do, whose time steps are one of the others. It is asked, on a copy, with random numbers of that shape.
    """
    if shape is None or not -len(shape) <= dim < len(shape) or is_stock(module):
        return False
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(shape, generator=generator, device="cpu")
    order = torch.randperm(shape[dim], generator=generator, device="cpu")
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            whole = copy.deepcopy(module)(x)
            if not isinstance(whole, torch.Tensor) or whole.shape != x.shape:
                return False
            moved = copy.deepcopy(module)(x.index_select(dim, order))
            few = copy.deepcopy(module)(x.index_select(dim, order[: (len(order) + 1) // 2]))
    except Exception:  # whatever a foreign module raises on such a tensor
        return False
    wanted = whole.index_select(dim, order)
    return torch.allclose(moved, wanted, rtol=1e-4, atol=1e-5) and torch.allclose(
        few, wanted.narrow(dim, 0, few.shape[dim]), rtol=1e-4, atol=1e-5
    )


def is_nonlinear(module: nn.Module) -> bool:
    """Whether a leaf is more than a norm, a scale or a drop; a norm is if it holds an activation."""
    if isinstance(module, NORMS):
        return any(is_nonlinear(child) for child in module.children())
    return not isinstance(module, (nn.Identity, nn.modules.dropout._DropoutNd)) and type(module).__name__ != "DropPath"


def is_activation(module: nn.Module) -> bool:
    """Whether a leaf is known to be an activation, or a norm that holds one."""
    return is_nonlinear(module) and (isinstance(module, NORMS) or _elementwise_class(module) is True)


def says_mlp(names: list[str]) -> bool:
    """Whether a name or class says MLP. It is asked only where an MLP and an inverted residual have one structure."""
    return any(_MLP_WORDS.search(name) for name in names)


def describe(module: nn.Module) -> tuple[object, ...]:
    """What tells leaves apart beside their values."""
    shapes = tuple((name, tuple(t.shape), str(t.dtype)) for name, t in tensors_of(module))
    return type(module).__qualname__, repr(module) if module._modules else module.extra_repr(), shapes
