"""The walk back from one contracting projection, through what may lie inside an MLP, to the expanding ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import fx, nn

from mlpreduce.graph.flow import Flow
from mlpreduce.graph.rules import (
    ACTIVATIONS,
    ADD,
    IDLE,
    MULTIPLY,
    NEUTRAL,
    QUERIES,
    SHAPING,
    SPLIT,
    Projection,
    describe,
    is_depthwise,
    is_elementwise,
    is_nonlinear,
    is_norm,
    is_stock,
    keeps_units_apart,
    no_slices,
    norm_dim,
    operand,
    operation,
    projection,
    tensors_of,
)

__all__ = ["Walk"]

INSIDE = 128  # values between the projections of an MLP


@dataclass
class Walk:
    """The walk back from one contracting projection to the expanding ones.

    A node is visited with the dimension of its value that the hidden units lie on, and where the first of them lies.
    Dimensions are exact where the graph knows shapes; elsewhere they are -1 or 1, and changes of shape are barriers.
    """

    flow: Flow
    hidden: int
    barren: set[tuple[object, ...]] = field(default_factory=set)  # where walks for other projections have failed
    expand: list[fx.Node] = field(default_factory=list)
    inner: list[fx.Node] = field(default_factory=list)
    parameters: list[fx.Node] = field(default_factory=list)  # of the modules around the leaves
    visited: dict[fx.Node, None] = field(default_factory=dict)
    axes: dict[tuple[str, int, int], set[int]] = field(default_factory=dict)  # tensor, dim, groups -> offsets
    answers: dict[tuple[object, int, int], bool] = field(default_factory=dict)
    splits: list[fx.Node] = field(default_factory=list)
    signature: list[object] = field(default_factory=list)
    groups: int = 1
    nonlinear: bool = False
    gated: bool = False
    convolves: bool = False
    reshapes: bool = False  # a width may be written in figures
    fixed: str = ""  # a layer whose units cannot be taken out
    stop: str = ""  # the layer with weights that the walk does not know

    def visit(self, node: object, dim: int, offset: int) -> bool:
        """Whether what lies behind a value is the inside of an MLP, down to expanding projections."""
        key = (node, dim, offset)
        if not isinstance(node, fx.Node) or self.lost or (self.hidden, *key) in self.barren:
            return False
        if key not in self.answers:  # values are used several times, and paths to them multiply
            self.answers[key] = self._visit(node, dim, offset)
            if not self.answers[key] and not self.lost and self.groups == 1:  # it fails whatever the walk came from
                self.barren.add((self.hidden, *key))
        return self.answers[key]

    @property
    def lost(self) -> bool:
        """Whether it sees more than an MLP has, as the residual stream does."""
        return len(self.visited) > INSIDE

    def _visit(self, node: fx.Node, dim: int, offset: int) -> bool:
        self.visited[node] = None
        if node.op == "call_module":
            return self._module(node, dim, offset)
        name = operation(node)
        others = [parent for parent in node.all_input_nodes if parent is not operand(node)]
        alone = name in ("to", "type_as") or all(self._is_scalar(parent) for parent in others)
        if (name in ACTIVATIONS or name in NEUTRAL) and alone:
            self.nonlinear |= name in ACTIVATIONS
            if name != "dropout":  # as in the module, its rate is each block's own
                self.signature.append((name, *_constants(node)))
            return self.visit(operand(node), dim, offset)
        if name in SHAPING:
            return self._shaped(node, dim, offset)
        if name in MULTIPLY or name in ADD or name == "truediv":
            return self._combine(node, str(name), dim, offset)
        if name == "getitem":
            return self._part(node, dim, offset)
        if name == "glu":
            return self._halves(node, dim, offset)
        return False

    def _module(self, node: fx.Node, dim: int, offset: int) -> bool:
        module = self.flow.module(node)
        if module is None or len(node.args) + len(node.kwargs) != 1:
            return False
        layer = projection(module)
        if layer is not None:
            return self._projection(node, module, layer, dim, offset)
        if type(module).forward in IDLE and is_stock(module):
            return self.visit(operand(node), dim, offset)
        self.signature.append(describe(module))
        if isinstance(module, nn.GLU):
            return self._halves(node, dim, offset)
        tensors = tensors_of(module)
        if not tensors:
            self.nonlinear |= is_nonlinear(module)
            alone = is_elementwise(module) or keeps_units_apart(module, self.flow.shape(operand(node)), dim)
            return not module._modules and alone and self.visit(operand(node), dim, offset)
        if is_depthwise(module):
            if not self._same(node, dim, 1) or not self._convolution(node, module):
                return False
        elif not self._is_norm_on(module, node, dim):
            if not type(module).__module__.startswith("torch.nn."):
                self.stop = f"{node.target} ({type(module).__name__}) is not known to treat hidden units alone"
            return False
        self.nonlinear |= (is_nonlinear(module) and bool(module._modules)) or isinstance(module, nn.PReLU)
        self._leaf(node, self.inner)
        for name, _ in tensors:
            self._axis(f"{node.target}.{name}", 0, offset)
        return self.visit(operand(node), dim, offset)

    def _convolution(self, node: fx.Node, module: Any) -> bool:
        self.convolves = True
        if module.groups == module.in_channels:
            return bool(module.in_channels % self.hidden == 0)
        if module.in_channels != self.hidden or not self._in_groups(int(module.groups)):
            return False
        self._axis(f"{node.target}.weight", 1, 0, self.groups)
        return True

    def _in_groups(self, groups: int) -> bool:
        """Whether the units can be in these groups; those of one group see each other."""
        if self.groups not in (1, groups):
            return False
        self.groups = groups
        return True

    def _is_norm_on(self, module: nn.Module, node: fx.Node, dim: int) -> bool:
        along = norm_dim(module)
        if not is_norm(module) or any(t.dim() != 1 or t.numel() % self.hidden for _, t in tensors_of(module)):
            return False
        return all(is_elementwise(child) for child in module.children()) and (
            along is None or self._same(node, dim, along)
        )

    def _projection(self, node: fx.Node, module: nn.Module, layer: Projection, dim: int, offset: int) -> bool:
        if self._same(node, dim, layer.features):
            self._leaf(node, self.expand)
            if not layer.outputs:
                self.fixed = no_slices(node, module)
            for name, along in layer.outputs:
                self._axis(f"{node.target}.{name}", along, offset)
            return layer.groups == 1 or self._in_groups(layer.groups)
        if layer.features != -1 or self.flow.shape(node) is None or not layer.dense:
            return False
        self._leaf(node, self.inner)  # a gate over positions, as in gMLP: the same for every hidden unit
        self.signature.append(describe(module))
        return self.visit(operand(node), dim, offset)

    def _combine(self, node: fx.Node, name: str, dim: int, offset: int) -> bool:
        """A product or a sum with a constant, with a parameter that has a value for each unit, or a gate."""
        operands = [arg for arg in node.args if isinstance(arg, fx.Node)]
        fed = [arg for arg in operands if arg in self.flow.fed]
        self.signature.append((name, len(fed), *_constants(node)))
        if len(fed) == 2 and name != "truediv":  # a gate, or a sum of two branches
            self.nonlinear |= name in MULTIPLY
            self.gated |= name in MULTIPLY
            alike = name in MULTIPLY or self.flow.shape(fed[0]) == self.flow.shape(fed[1]) is not None
            return alike and all(self.visit(arg, dim, offset) for arg in fed)
        if name == "truediv" and tuple(fed[:1]) != tuple(node.args[:1]):
            return False
        for arg in operands:
            if arg not in self.flow.fed and not self._parameter(node, arg, dim, offset):
                return False
        return len(fed) == 1 and self.visit(fed[0], dim, offset)

    def _parameter(self, node: fx.Node, arg: fx.Node, dim: int, offset: int) -> bool:
        """A parameter that is multiplied with, or added to, hidden units."""
        tensor, shape = self.flow.tensor(arg), self.flow.shape(node)
        if tensor is None:
            return False
        ndim = len(shape) if shape else None
        along = dim - ndim if ndim is not None and dim >= 0 else dim  # from the right, as tensors are broadcast
        if tensor.numel() == 1 or (along < 0 and (-along > tensor.dim() or tensor.shape[along] == 1)):
            return True
        if along >= 0 or tensor.shape[along] != self.hidden:
            return False
        self.parameters.append(arg)
        self._axis(str(arg.target), tensor.dim() + along, offset)
        return True

    def _part(self, node: fx.Node, dim: int, offset: int) -> bool:
        """One part of a split value: hidden units lie further on in it by the parts before."""
        parts, index = node.args
        if not isinstance(parts, fx.Node) or operation(parts) not in SPLIT or not isinstance(index, int):
            return False
        before = self._size_before(parts, index, dim)
        if before is None:
            return False
        self.reshapes |= "chunk" not in str(operation(parts))
        self.visited[parts] = None
        self.splits.append(parts)
        self.signature.append(("part", index))
        whole = operand(parts)
        return self.visit(whole, dim, offset + before)

    def _size_before(self, parts: fx.Node, index: int, dim: int) -> int | None:
        whole = self.flow.shape(operand(parts))
        if whole is not None:
            shapes = {user.args[1]: self.flow.shape(user) for user in parts.users if operation(user) == "getitem"}
            sizes = [(shapes.get(position) or (0,) * len(whole))[dim] for position in range(len(shapes))]
            return sum(sizes[:index]) if sum(sizes) == whole[dim] else None
        along = parts.kwargs.get("dim", parts.args[2] if len(parts.args) > 2 else 0)
        given: Any = parts.args[1] if len(parts.args) > 1 else next(iter(parts.kwargs.values()))
        halves = given == 2 and "chunk" in str(operation(parts))  # sizes in figures would be wrong after slicing
        return (index % 2) * self.hidden if halves and along in (dim, {-1: 2, 1: -3}[dim]) else None

    def _halves(self, node: fx.Node, dim: int, offset: int) -> bool:
        """`glu` splits in halves and multiplies."""
        self.nonlinear = self.gated = True
        whole = operand(node)
        return self.visit(whole, dim, offset) and self.visit(whole, dim, offset + self.hidden)

    def _shaped(self, node: fx.Node, dim: int, offset: int) -> bool:
        """A change of shape that leaves the hidden dimension whole."""
        before, after = self.flow.shape(operand(node)), self.flow.shape(node)
        if before is None or after is None:
            return False
        name = str(operation(node))
        self.reshapes = True
        self.signature.append(name)
        if name in ("transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "t", "T", "mT"):
            origin = _permuted(node, len(after), dim)
        else:
            same = [d for d in range(len(before)) if before[d] == after[dim] and prod(before[:d]) == prod(after[:dim])]
            origin = same[0] if len(same) == 1 else None
        return origin is not None and self.visit(operand(node), origin, offset)

    def _same(self, node: fx.Node, dim: int, other: int) -> bool:
        shape = self.flow.shape(node)
        return dim % len(shape) == other % len(shape) if shape else dim == other

    def _is_scalar(self, node: fx.Node) -> bool:
        tensor = self.flow.tensor(node)
        return tensor is not None and tensor.numel() == 1

    def _leaf(self, node: fx.Node, leaves: list[fx.Node]) -> None:
        if node not in leaves:
            leaves.append(node)

    def _axis(self, tensor: str, dim: int, offset: int, groups: int = 1) -> None:
        self.axes.setdefault((tensor, dim, groups), set()).add(offset)

    def leaks(self, contract: fx.Node) -> bool:
        """Whether what lies between the projections also goes elsewhere; other parts of a split may."""
        for node in (*self.visited, *self.parameters):
            for user in node.users:
                other = node in self.splits and operation(user) == "getitem"
                if user not in self.visited and user is not contract and operation(user) not in QUERIES and not other:
                    return True
        return False


def _permuted(node: fx.Node, ndim: int, dim: int) -> int | None:
    """Where dimension `dim` of a permuted value comes from, by permuting the numbers of its dimensions."""
    numbers = torch.empty(tuple(range(1, ndim + 1)), device="meta")  # a size for each dimension
    name = str(operation(node))
    arguments = [arg for arg in node.args[1:]]
    kwargs = {key: value for key, value in node.kwargs.items() if key != "input"}
    try:
        moved = getattr(numbers, name) if name in ("T", "mT") else getattr(numbers, name)(*arguments, **kwargs)
    except (RuntimeError, TypeError, IndexError):
        return None
    return int(moved.shape[dim]) - 1


def _constants(node: fx.Node) -> tuple[str, ...]:
    """Arguments that are no tensors, for comparison."""
    named = [f"{key}={value!r}" for key, value in node.kwargs.items() if not isinstance(value, fx.Node)]
    return (*(repr(arg) for arg in node.args if not isinstance(arg, fx.Node)), *named)
