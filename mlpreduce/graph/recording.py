"""A torch.fx graph recorded from one run, for what symbolic tracing cannot see.

Some models branch on values that a proxy does not have, and some modules are leaves of a symbolic trace though they
hold MLPs. Here a structural copy with meta tensors runs once on an example input; every call of a leaf module and
every torch function outside of one becomes a node, which also knows the shape of its result.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from mlpreduce.errors import ReductionError
from mlpreduce.graph.inputs import INPUTS, Inputs, call_with, example_inputs, map_tensors
from mlpreduce.graph.rules import IDLE, is_of_library
from mlpreduce.graph.tracing import NORMS, below, is_one_node, path_below, structural_copy, trace

__all__ = ["read", "record"]


class _Recorder(TorchFunctionMode):
    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.root = root
        self.graph = fx.Graph()
        self.scope = [""]  # paths of the modules whose forward runs
        self.inside_leaf = False
        self.nodes: dict[int, fx.Node] = {}
        self.alive: list[torch.Tensor] = []  # ids are unique among tensors that live
        self.names: dict[int, str] = {}
        for path, module in root.named_modules(remove_duplicate=False):
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                self.names.setdefault(id(tensor), below(path, name))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.inside_leaf:
            return func(*args, **(kwargs or {}))
        result = _result(func, args)
        if result is None:
            result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "__setitem__":
            self.add("call_function", func, args, kwargs or {}, args[0])
        elif isinstance(result, (torch.Tensor, tuple, list)):
            self.add("call_function", func, args, kwargs or {}, result)
        return result

    def add(self, op: str, target: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        """A node for a call, and one for each tensor of a tuple it returns."""
        tensors = [r for r in result if isinstance(r, torch.Tensor)] if isinstance(result, (tuple, list)) else []
        if not isinstance(result, torch.Tensor) and not tensors:
            return
        node = self.graph.create_node(op, target, self.argument(tuple(args)), self.argument(kwargs))
        if isinstance(result, torch.Tensor):
            self.name(result, node)
            return
        for index, part in enumerate(result):
            if isinstance(part, torch.Tensor):
                self.name(part, self.graph.call_function(operator.getitem, (node, index)))

    def name(self, tensor: torch.Tensor, node: fx.Node) -> None:
        node.meta["shape"] = tuple(tensor.shape)
        self.nodes[id(tensor)] = node
        self.alive.append(tensor)

    def argument(self, value: Any) -> Any:
        """A value as an argument of a node."""
        if isinstance(value, torch.Tensor):
            if id(value) not in self.nodes:
                self.name(value, self.graph.create_node("get_attr", self.names.get(id(value), "_constant")))
            return self.nodes[id(value)]
        if isinstance(value, (tuple, list)):
            return type(value)(map(self.argument, value)) if type(value) in (tuple, list) else repr(value)
        if isinstance(value, dict):
            return {str(key): self.argument(entry) for key, entry in value.items()}
        plain = (bool, int, float, str, type(None), torch.dtype, torch.device, type(Ellipsis), slice)
        return value if isinstance(value, plain) else type(value).__name__

    @contextmanager
    def calls(self) -> Iterator[None]:
        """Make nodes of the calls of modules, by a forward of its own on each module of the private tree."""
        theirs = [(module, vars(module).get("forward")) for module in self.root.modules() if module is not self.root]
        for module, _ in theirs:
            module.forward = partial(self.call, module, module.forward)
        try:
            yield
        finally:
            for module, own in theirs:
                del module.__dict__["forward"]
                if own is not None:
                    module.__dict__["forward"] = own

    def call(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one module, and make a node of it if it is a leaf that does something."""
        if self.inside_leaf:
            return forward(*args, **kwargs)
        own = forward != MethodType(type(module).forward, module)
        if type(module).forward in IDLE and not own and len(args) == 1 and not kwargs:
            return args[0]
        path = path_below(self.root, self.scope[-1], module)
        if not is_one_node(module):
            self.scope.append(path)
            try:
                return forward(*args, **kwargs)
            finally:
                self.scope.pop()
        with torch._C.DisableTorchFunction():  # what is done here is no node
            result = None if own else _without_running(module, args, kwargs)
        if result is None:
            self.inside_leaf = True
            try:
                result = forward(*args, **kwargs)
            finally:
                self.inside_leaf = False
        with torch._C.DisableTorchFunction():
            self.add("call_module", path, args, kwargs, result)
        return result


_KNOWN = {torch.Tensor.add, torch.Tensor.mul, F.scaled_dot_product_attention}
_KEEPS_SHAPE = {nn.GELU.forward, nn.ReLU.forward, nn.SiLU.forward}


def _result(func: Callable[..., Any], args: tuple[Any, ...]) -> torch.Tensor | None:
    """The result of a well-known function, of which only the shape matters; the meta device takes longer."""
    if func not in _KNOWN or len(args) < 2 or not all(isinstance(x, torch.Tensor) and x.is_meta for x in args[:3]):
        return None
    shape = args[0].shape
    if func is F.scaled_dot_product_attention:
        return (
            torch.empty((*shape[:-1], args[-1].shape[-1]), dtype=args[0].dtype, device="meta")
            if args[3:] == ()
            else None
        )
    return torch.empty(shape, dtype=torch.result_type(*args[:2]), device="meta") if args[1].shape == shape else None


def _without_running(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The result of a well-known leaf, of which only the shape matters; running it on the meta device takes longer."""
    if len(args) != 1 or kwargs or not isinstance(args[0], torch.Tensor):
        return None
    x, forward = args[0], type(module).forward
    weight = module._parameters.get("weight")
    is_norm = isinstance(module, NORMS) and is_of_library(forward)
    if is_norm and weight is not None and weight.shape not in ((x.shape[-1],), x.shape[1:2]):
        return None  # let it raise
    if is_norm or forward in _KEEPS_SHAPE:
        return torch.empty(x.shape, dtype=x.dtype, device="meta")
    if forward is nn.Linear.forward:
        held: Any = module.weight  # under weight_norm a tensor, and no parameter
        outputs, inputs = held.shape
        if x.shape[-1] == inputs:
            return torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device="meta")
    return None


def read(model: nn.Module, inputs: Inputs | None = None) -> tuple[nn.Module, fx.Graph, str]:
    """The graph of a model, the module tree that its nodes name, and advice if it may not show everything.

    It is recorded if the inputs are known, else traced symbolically. A `GraphModule` has a graph.

    Raises:
        ReductionError: neither works; the message has the reasons.
    """
    if isinstance(model, fx.GraphModule):
        inputs = model.meta.get(INPUTS) if inputs is None else inputs
        return (*_with_shapes(model, inputs), "")
    call, advice, given = f"find_mlps({type(model).__name__})", "", inputs is not None
    if inputs is None:
        try:
            inputs = example_inputs(model, batch=2)
        except ReductionError:
            advice = "; its input size is not known, and example_inputs= may show more"
    if inputs is not None:
        try:
            return (*record(model, inputs), "")
        except Exception as error:  # whatever a foreign forward raises on meta tensors
            advice = f"; a run on example inputs raised {type(error).__name__}: {error}"
            if given:
                raise ReductionError(
                    f"{call}{advice.replace(';', ':', 1)}; give a batch that the model takes, or "
                    f"none if it does not run on the meta device"
                ) from error
    try:
        return (*trace(model), advice)
    except ReductionError as error:
        reason = advice if inputs is not None else ""
        raise ReductionError(f"{call}: {error}{reason}; give example_inputs=, a batch that it takes") from error


def _with_shapes(model: fx.GraphModule, inputs: Inputs | None) -> tuple[nn.Module, fx.Graph]:
    """A graph module, with the shapes of its values if its inputs are known."""
    if not isinstance(inputs, torch.Tensor):
        return model, model.graph
    copy = structural_copy(model, device="meta")
    try:
        with torch.no_grad():
            ShapeProp(copy).propagate(torch.empty_like(inputs, device="meta"))
    except Exception:  # the inputs were those of another model, or it does not run on the meta device
        return model, model.graph
    return copy, copy.graph


def record(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, fx.Graph]:
    """The graph of one run in eval mode, on the meta device, and the module tree that its nodes name.

    Args:
        model: any module; it is not touched.
        inputs: what it is called with; only shapes and dtypes matter.

    Raises:
        Exception: whatever the model's forward raises on meta tensors.
    """
    copy = structural_copy(model, device="meta").eval()
    recorder = _Recorder(copy)

    def example(tensor: torch.Tensor) -> torch.Tensor:
        meta = torch.empty_like(tensor, device="meta")
        recorder.name(meta, recorder.graph.placeholder(f"input_{len(recorder.nodes)}"))
        return meta

    given = map_tensors(inputs, example)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), recorder.calls(), recorder:
        result = call_with(copy, given)
    recorder.graph.output(recorder.argument([x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]))
    return copy, recorder.graph
