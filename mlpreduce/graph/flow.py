"""The flow of data through a graph: what a value is computed from, and where an MLP's output goes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx, nn

from mlpreduce.graph.rules import (
    ADD,
    MIXING,
    MULTIPLY,
    NEUTRAL,
    PASSING,
    QUERIES,
    is_activation,
    is_depthwise,
    operand,
    operation,
    projection,
    tensors_of,
)
from mlpreduce.graph.tracing import NORMS, module_at

__all__ = ["Flow"]


class Flow:
    """A graph with the module tree that its nodes name.

    Attributes:
        order: position of each node in the order of execution.
        fed: the nodes that depend on the model's input; the others are constants and parameters.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.model, self.graph = model, graph
        self.order = {node: position for position, node in enumerate(graph.nodes)}
        self.fed: set[fx.Node] = set()
        for node in graph.nodes:
            if node.op == "placeholder" or any(parent in self.fed for parent in node.all_input_nodes):
                self.fed.add(node)

    def module(self, node: fx.Node) -> nn.Module | None:
        """The leaf that a node calls."""
        return module_at(self.model, str(node.target)) if node.op == "call_module" else None

    def tensor(self, node: fx.Node) -> torch.Tensor | None:
        """The parameter or buffer that a node reads."""
        path, _, name = str(node.target).rpartition(".")
        value = getattr(module_at(self.model, path), name, None) if node.op == "get_attr" else None
        return value if isinstance(value, torch.Tensor) else None

    def parameter(self, node: fx.Node) -> fx.Node | None:
        """The parameter that a value is a view of, if it is one."""
        while node not in self.fed and node.op != "get_attr" and node.all_input_nodes:
            node = node.all_input_nodes[0]
        return node if self.tensor(node) is not None else None

    def shape(self, node: object) -> tuple[int, ...] | None:
        """The shape of a node's value, if the graph knows it."""
        if not isinstance(node, fx.Node):
            return None
        if "shape" not in node.meta and "tensor_meta" in node.meta:  # what torch.fx's own ShapeProp leaves
            return tuple(getattr(node.meta["tensor_meta"], "shape", ())) or None
        return node.meta.get("shape")

    def strip(self, node: object) -> object:
        """What a value is before copies, casts and clamps."""
        while isinstance(node, fx.Node) and operation(node) in NEUTRAL:
            node = operand(node)
        return node

    def passes(self, node: fx.Node) -> bool:
        """Whether a node hands the output of an MLP on to the residual addition: a norm, a scale, a drop, a shape."""
        if node.op == "call_module":
            module = self.module(node)
            if module is None or projection(module) is not None or is_activation(module):
                return False
            return is_depthwise(module) or all(t.squeeze().dim() <= 1 for _, t in tensors_of(module))
        name = operation(node)
        if name in MULTIPLY or name == "truediv":  # a layer scale, not a gate
            return sum(parent in self.fed for parent in node.all_input_nodes) == 1
        return name in PASSING

    def _is_scaled(self, user: fx.Node, node: fx.Node) -> bool:
        """Whether a value keeps its shape when multiplied by a smaller one: an adaptive scale, such as adaLN's gate."""
        shape, shapes = self.shape(node), [self.shape(other) for other in user.all_input_nodes if other is not node]
        return operation(user) in MULTIPLY and shape is not None and shape == self.shape(user) not in shapes

    def _mixes_positions(self, node: fx.Node) -> bool:
        """Whether a node computes one position from several: pooling, attention, a mean."""
        module = self.module(node)
        if module is not None:
            return "Pool" in type(module).__name__ or isinstance(module, (nn.MultiheadAttention, nn.Softmax))
        return operation(node) in MIXING

    def _terms(self, node: fx.Node) -> Iterable[fx.Node]:
        """The node, and what it is the sum of, through scales and norms."""
        stack, seen = [node], set()
        while stack:
            term = stack.pop()
            if term in seen:
                continue
            seen.add(term)
            yield term
            if operation(term) in ADD or self.passes(term):
                stack.extend(term.all_input_nodes)

    def _comes_from(self, node: fx.Node, candidate: fx.Node) -> bool:
        """Whether each position of `node` is computed from that of `candidate`; no mean or attention lies between."""
        stack, seen = [node], {node}
        while stack:
            current = stack.pop()
            if current is candidate:
                return True
            if self._mixes_positions(current) or operation(current) in QUERIES:
                continue
            for parent in current.all_input_nodes:
                if parent not in seen and self.order[parent] >= self.order[candidate]:
                    seen.add(parent)
                    stack.append(parent)
        return False

    def _belongs_to(self, term: fx.Node, source: fx.Node) -> bool:
        """Whether `term` is the residual stream of an MLP with this input: the input comes from it, or, where the
        width changes, it is a projection of the input."""
        if self.order[term] <= self.order[source]:
            return self._comes_from(source, term)
        return projection(self.module(term)) is not None and self.strip(operand(term)) is source

    def is_residual(self, contract: fx.Node, source: fx.Node) -> bool:
        """Whether the output of a projection is added to what `source` was computed from."""
        stack, seen = [contract], {contract}
        while stack:
            node = stack.pop()
            for user in node.users:
                if user in seen:
                    continue
                seen.add(user)
                if operation(user) in ADD:
                    others = [other for other in user.all_input_nodes if other is not node and other in self.fed]
                    if any(self._belongs_to(term, source) for other in others for term in self._terms(other)):
                        return True
                elif not self.passes(user) and not self._is_scaled(user, node):
                    continue
                stack.append(user)
        return False

    def meets_norm(self, contract: fx.Node) -> bool:
        """Whether a norm lies on the way from a projection to the residual addition."""
        stack, seen = [contract], {contract}
        while stack:
            for user in stack.pop().users:
                if user in seen or operation(user) in ADD or not self.passes(user):
                    continue
                module = self.module(user)
                if isinstance(module, NORMS) or (operation(user) or "").endswith("_norm"):
                    return True
                seen.add(user)
                stack.append(user)
        return False

    def acts_on_one_token(self, sources: list[fx.Node]) -> list[bool]:
        """Which of the values are one token, such as that of class attention or pooling, where others are many."""
        shapes = [self.shape(source) for source in sources]
        one = [
            len(shape) == 3 and shape[1] == 1 if shape else self._is_class_token(s)
            for s, shape in zip(sources, shapes, strict=True)
        ]
        return one if not all(one) else [False] * len(one)

    def _is_class_token(self, source: fx.Node) -> bool:
        """The same without shapes: whether a value is sliced from the tokens, or grown from a parameter of one token.

        Follows it back through norms and residual additions, always to the older operand that depends on the model's
        input, to the root of its residual stream.
        """
        node = source
        while True:
            if node.op == "get_attr":
                token = self.tensor(node)
                return token is not None and token.dim() >= 2 and token.shape[-2] == 1
            name = operation(node)
            if name == "getitem":
                index = node.args[1]
                at = index[1] if isinstance(index, tuple) and len(index) > 1 else None
                return isinstance(at, int) or (isinstance(at, slice) and at.stop == 1 and not at.start)
            operands = [arg for arg in node.args if isinstance(arg, fx.Node)]
            if name in ADD and len(operands) > 1:  # a position embedding is no stream
                operands = [arg for arg in operands if arg in self.fed] or operands
            elif not (node.op == "call_module" and self.passes(node)) and name not in NEUTRAL | {
                "layer_norm",
                "expand",
            }:
                return False
            if not operands:
                return False
            node = min(operands, key=self.order.__getitem__)
