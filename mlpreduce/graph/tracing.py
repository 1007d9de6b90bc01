"""From a model to a torch.fx graph, leaving no trace in the model.

The graph is only read. What is traced is a structural copy that aliases the model's tensors: some models keep what
they compute in caches, and would keep the tracer's proxies too.
"""

from __future__ import annotations

import inspect
import sys
from collections import OrderedDict, deque
from copy import copy as shallow_copy
from copy import deepcopy
from itertools import zip_longest
from types import MethodType
from typing import Any, TypeVar, cast

import torch
from torch import fx, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mlpreduce.errors import ReductionError
from mlpreduce.layers import Wrapper

__all__ = [
    "NORMS",
    "PLAIN",
    "below",
    "forget",
    "is_leaf",
    "is_meta_twin",
    "is_one_node",
    "module_at",
    "module_through",
    "path_below",
    "refuse_wrapped",
    "structural_copy",
    "trace",
    "unwrapped",
]

Model = TypeVar("Model", bound=nn.Module)

# they may hold an activation, as timm's BatchNormAct2d does
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_PLAIN = (int, float, str, type(None), torch.dtype, torch.device)
PLAIN = (
    "is a plain tensor in the place of a Parameter, as torch.func.functional_call leaves it in shared modules: no optimizer "
    "updates it, and its values are of that call; load the weights into a newly built model, and call functional_call with "
    "tie_weights=False and the names of named_parameters()"
)
_WRAPPERS = {
    "DistributedDataParallel": "model.module",
    "DataParallel": "model.module",
    "FullyShardedDataParallel": "the model before wrapping",
    "OptimizedModule": "the model before torch.compile",
}


# where known wrappers keep what they wrap
_INSIDE = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "OptimizedModule": "_orig_mod",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside of wrappers of PyTorch; of another module, the module itself."""
    names = [_INSIDE[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in _INSIDE]
    inside = module._modules.get(names[0]) if names else None
    return module if inside is None else unwrapped(inside)


def module_through(model: nn.Module, path: str) -> nn.Module | None:
    """As `module_at`, but wrappers of PyTorch around the model and its modules do not count."""
    module = unwrapped(model)
    for name in path.split(".") if path else ():
        child = module._modules.get(name)
        if child is None:
            return None
        module = unwrapped(child)
    return module


def module_at(model: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path, or None. Unlike `get_submodule` it does not raise."""
    module: nn.Module | None = model
    for name in path.split(".") if path else ():
        module = module._modules.get(name) if module is not None else None
    return module


def below(path: str, name: str) -> str:
    """The path of what has a name inside the module at a path; the model itself is at "".

    Example:
        >>> below("blocks.0", "mlp"), below("", "head")
        ('blocks.0.mlp', 'head')
    """
    return f"{path}.{name}" if path else name


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is what edits tie and slice: it has no children, or is a norm whose children have no tensors."""
    if not module._modules:
        return True
    return isinstance(module, NORMS) and not any(True for c in module.children() for _ in c.state_dict(keep_vars=True))


def is_one_node(module: nn.Module) -> bool:
    """Whether a graph has one node for a call of a module: a leaf is one, and a leaf with a layer around it."""
    return is_leaf(module) or (isinstance(module, Wrapper) and module.is_one_layer)


def path_below(root: nn.Module, caller: str, module: nn.Module) -> str:
    """The path of a module as its caller knows it; a tied module has several.

    Raises:
        ReductionError: it is not in the tree.
    """
    above: nn.Module | None = module_at(root, caller)
    for name, child in above._modules.items() if above is not None else ():
        if child is module:
            return below(caller, name)
    for start, tree in ((caller, above), ("", root)):
        for name, child in tree.named_modules(remove_duplicate=False) if tree is not None else ():
            if child is module and name:
                return below(start, name)
    raise ReductionError(f"{type(module).__name__}, called by {caller or 'the model'}, is not registered in the model")


def refuse_wrapped(model: Any, call: str) -> None:
    """Raise if `model` is no plain module whose leaves can be edited.

    Raises:
        ReductionError: not a module, wrapped for data parallelism, sharded, compiled or scripted.
    """
    if not isinstance(model, nn.Module):
        raise ReductionError(f"{call}: needs a torch.nn.Module, got {type(model).__name__}")
    for cls in type(model).__mro__:
        if cls.__name__ in _WRAPPERS:
            raise ReductionError(
                f"{call}: the model is wrapped in {cls.__name__}, whose buffers and buckets were made for the old "
                f"parameters; reduce {_WRAPPERS[cls.__name__]}, then wrap it"
            )
    modules = list(model.named_modules())
    for name, module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            raise ReductionError(
                f"{call}: {name or 'the model'} is scripted and cannot change; reduce it, then script it"
            )
        if module._compiled_call_impl is not None or any(c.__name__ == "OptimizedModule" for c in type(module).__mro__):
            raise ReductionError(f"{call}: {name or 'the model'} is compiled; reduce the model, then compile it")
    for path, module in modules:
        for name, parameter in module._parameters.items():
            where = f"{call}: {below(path, name)}"
            if parameter is not None and not isinstance(parameter, nn.Parameter):
                raise ReductionError(f"{where} {PLAIN}")
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ReductionError(f"{where} has no shape yet; run the model once, then reduce it")
            if any(cls.__name__ == "DTensor" for cls in type(parameter).__mro__):
                raise ReductionError(f"{where} is sharded (DTensor); reduce the model, then call fully_shard")
            if is_traceable_wrapper_subclass(parameter):
                raise ReductionError(
                    f"{where} is a {type(parameter).__name__}; reduce the model, then quantise or convert it"
                )


def structural_copy(model: Model, device: str | None = None) -> Model:
    """A copy of the module tree, without hooks, whose tensors are the model's own.

    Tied modules stay tied. With `device="meta"` the copy has meta tensors of the same shapes instead, so that a plan
    can be rehearsed on it without memory.
    """
    modules: dict[int, nn.Module] = {}
    tensors: dict[int, torch.Tensor] = {}

    def tensor(value: torch.Tensor | None) -> torch.Tensor | None:
        if value is None or device is None:
            return value
        if id(value) not in tensors:
            empty = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=device)
            is_parameter = isinstance(value, nn.Parameter)
            tensors[id(value)] = nn.Parameter(empty, requires_grad=value.requires_grad) if is_parameter else empty
        return tensors[id(value)]

    def attribute(value: Any) -> Any:
        if isinstance(value, nn.Module):
            return module(value)
        if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
            return MethodType(value.__func__, module(value.__self__))
        if type(value) in (dict, OrderedDict):
            return type(value)((key, attribute(entry)) for key, entry in value.items())
        if type(value) in (list, tuple, set):
            return type(value)(attribute(entry) for entry in value)
        return shallow_copy(value) if isinstance(value, (dict, list, set, deque)) else value

    def module(original: nn.Module) -> nn.Module:
        if id(original) in modules:
            return modules[id(original)]
        copy = modules[id(original)] = object.__new__(type(original))
        state = copy.__dict__
        for name, value in original.__dict__.items():
            if isinstance(value, _PLAIN):  # most are
                state[name] = value
            elif name in ("_parameters", "_buffers"):
                state[name] = {key: tensor(entry) for key, entry in value.items()}
            elif name == "_modules":
                state[name] = {key: None if entry is None else module(entry) for key, entry in value.items()}
            elif name.endswith("_hooks"):
                state[name] = OrderedDict()
            elif name == "_compiled_call_impl":
                state[name] = None
            elif isinstance(value, fx.Graph):  # a GraphModule's
                state[name] = deepcopy(value)
            else:
                state[name] = attribute(value)
        return copy

    return cast(Model, module(model))


def is_meta_twin(copy: nn.Module, model: nn.Module) -> bool:
    """Whether a structural copy that has run still has the modules of the model and meta tensors of the same shapes."""

    def shapes(module: nn.Module) -> list[object]:
        tensors = (*module._parameters.items(), *module._buffers.items())
        return [(name, t.shape, t.dtype) for name, t in tensors if t is not None]

    both = zip_longest(copy.named_modules(remove_duplicate=False), model.named_modules(remove_duplicate=False))
    return all(parameter.is_meta for parameter in copy.parameters()) and all(
        one is not None
        and other is not None
        and one[0] == other[0]
        and type(one[1]) is type(other[1])
        and shapes(one[1]) == shapes(other[1])
        for one, other in both
    )


class _Tracer(fx.Tracer):
    """Calls of leaf modules become nodes, named by the place they are called from.

    A module without children is a leaf, whatever its class: it is what edits tie and slice. A tied leaf is called
    from several places; fx would name every call by the first of them.
    """

    def __init__(self) -> None:
        fx_layers = sys.modules.get("timm.layers._fx")  # a timm model cannot exist unless timm is imported
        self._opaque = tuple(fx_layers.get_notrace_modules()) if fx_layers else ()
        functions = tuple(fx_layers.get_notrace_functions()) if fx_layers else ()
        super().__init__(autowrap_functions=functions)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_one_node(m) or isinstance(m, self._opaque) or super().is_leaf_module(m, module_qualified_name)

    def path_of_module(self, mod: nn.Module) -> str:
        return path_below(self.root, self.scope.module_path, mod)


def trace(model: nn.Module) -> tuple[nn.Module, fx.Graph]:
    """The torch.fx graph of a model in eval mode, and the module tree that its nodes name.

    Optional arguments of `forward` are fixed at their defaults. A `GraphModule` is not traced: its graph is read.

    Raises:
        ReductionError: torch.fx cannot trace the model; the message has its reason.
    """
    if isinstance(model, fx.GraphModule):
        return model, model.graph
    copy = structural_copy(model).eval()
    signature = inspect.signature(type(model).forward)
    empty = inspect.Parameter.empty
    defaults = {name: p.default for name, p in signature.parameters.items() if p.default is not empty}
    try:
        with torch.no_grad():
            return copy, _Tracer().trace(copy, concrete_args=defaults or None)
    except Exception as error:  # whatever a foreign forward does with a proxy
        raise ReductionError(
            f"torch.fx cannot trace the forward of {type(model).__name__}: {type(error).__name__}: {error}"
        ) from error


def forget(tree: nn.Module) -> None:
    """Let go of the tensors of a traced copy now: it is part of reference cycles, and would hold them for a while."""
    if not isinstance(tree, fx.GraphModule):
        for module in list(tree.modules()):
            module._parameters.clear()
            module._buffers.clear()
