"""Finds MLPs in a torch.fx graph by dataflow.

From each contracting projection the matcher walks back through elementwise operations, norms and gates to the
expanding projections. It is an MLP when those have one common input, their output goes nowhere else, a nonlinearity
or a gate lies between, and the result is added to something its input was computed from (the residual stream).
What a node may be is a matter of the tables in `rules.py`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import fx, nn

from mlpreduce.edits import Axis
from mlpreduce.graph.rules import (
    ACTIVATIONS,
    ADD,
    MULTIPLY,
    NEUTRAL,
    QUERIES,
    SPLIT,
    describe,
    is_channelwise,
    is_elementwise,
    is_nonlinear,
    is_projection,
    mixes_positions,
    operand,
    passes,
    target_of,
    tensors_of,
)  # fmt: skip
from mlpreduce.graph.trace import module_at

__all__ = ["Match", "match_mlps"]


@dataclass
class Match:
    """An MLP in the graph, by nodes and leaf paths."""

    contract: fx.Node
    source: fx.Node
    hidden: int
    expand: list[fx.Node] = field(default_factory=list)
    inner: list[fx.Node] = field(default_factory=list)
    axes: list[Axis] = field(default_factory=list)
    signature: list[object] = field(default_factory=list)
    gated: bool = False
    class_token: bool = False


class _Walk:
    """The walk back from one contracting projection. `offsets` says where on a node's channels hidden unit 0 lies."""

    def __init__(self, model: nn.Module, contract: fx.Node, hidden: int) -> None:
        self.model, self.contract, self.hidden = model, contract, hidden
        self.channel_dims = (-1, 2) if isinstance(module_at(model, str(contract.target)), nn.Linear) else (1, -3)
        self.offsets: dict[fx.Node, set[int]] = {}
        self.expand: list[fx.Node] = []
        self.inner: list[fx.Node] = []
        self.signature: list[object] = []
        self.nonlinear = self.gated = False

    def visit(self, node: object, offset: int) -> bool:
        if not isinstance(node, fx.Node):
            return False
        first = node not in self.offsets
        self.offsets.setdefault(node, set()).add(offset)
        if node.op == "call_module":
            return self._module(node, offset, first)
        if node.op not in ("call_function", "call_method"):
            return False
        target = target_of(node)
        if target in ACTIVATIONS or target in NEUTRAL or target == "dropout":
            self.nonlinear |= target in ACTIVATIONS
            self.signature.append((str(target), *_constants(node)))
            return self.visit(operand(node), offset)
        if target in MULTIPLY:
            return self._multiply(node, offset)
        if target is operator.getitem:
            return self._half(node, offset)
        return False

    def _module(self, node: fx.Node, offset: int, first: bool) -> bool:
        module = module_at(self.model, str(node.target))
        if module is None or module._modules or len(node.args) + len(node.kwargs) != 1:
            return False
        if is_projection(module):
            if first:
                self.expand.append(node)
            return True
        tensors = tensors_of(module)
        if tensors:
            # a norm or a scale on the hidden axis: every tensor one value a channel
            channel_last = -1 in self.channel_dims
            if not is_channelwise(module, channel_last) or any(
                t.dim() != 1 or t.numel() % self.hidden for _, t in tensors
            ):
                return False
            if first:
                self.inner.append(node)
            self.nonlinear |= type(module).__module__ == nn.ReLU.__module__
        elif not is_elementwise(module):
            return False
        else:
            self.nonlinear |= is_nonlinear(module)
        self.signature.append(describe(module))
        return self.visit(operand(node), offset)

    def _multiply(self, node: fx.Node, offset: int) -> bool:
        operands = [arg for arg in node.args if isinstance(arg, fx.Node)]
        if len(operands) == 2:
            self.nonlinear = self.gated = True
            self.signature.append("gate")
            return all(self.visit(operand, offset) for operand in operands)
        self.signature.append(("mul", *_constants(node)))
        return len(operands) == 1 and self.visit(operands[0], offset)

    def _half(self, node: fx.Node, offset: int) -> bool:
        """`y.chunk(2, dim)[i]`: hidden units lie `i` times their number further on in `y`."""
        parts, index = node.args
        if not isinstance(parts, fx.Node) or target_of(parts) not in SPLIT or not isinstance(index, int):
            return False
        dim = parts.kwargs.get("dim", parts.args[2] if len(parts.args) > 2 else 0)
        sizes = parts.args[1] if len(parts.args) > 1 else next(iter(parts.kwargs.values()))
        chunk = "chunk" in str(getattr(parts.target, "__name__", parts.target))
        equal = sizes == 2 if chunk else sizes in (self.hidden, [self.hidden] * 2, (self.hidden,) * 2)
        if dim not in self.channel_dims or not equal:
            return False
        self.offsets.setdefault(parts, set())
        self.signature.append(("half", index))
        return self.visit(parts.args[0], offset + (index % 2) * self.hidden)

    def closed(self) -> bool:
        """Whether what lies between the projections goes nowhere else."""
        inside = {*self.offsets, self.contract}
        users = {user for node in self.offsets for user in node.users}
        return all(user in inside or target_of(user) in QUERIES for user in users)


def _constants(node: fx.Node) -> tuple[str, ...]:
    """Arguments that are no tensors, for comparison."""
    named = [f"{key}={value!r}" for key, value in node.kwargs.items() if not isinstance(value, fx.Node)]
    return (*(repr(arg) for arg in node.args if not isinstance(arg, fx.Node)), *named)


def _strip(node: object) -> object:
    while isinstance(node, fx.Node) and node.op != "placeholder" and target_of(node) in NEUTRAL:
        node = operand(node)
    return node


def _match(model: nn.Module, contract: fx.Node, order: dict[fx.Node, int]) -> Match | None:
    module = module_at(model, str(contract.target))
    if module is None or not is_projection(module) or len(contract.args) + len(contract.kwargs) != 1:
        return None
    hidden = int(module.get_parameter("weight").shape[1])
    walk = _Walk(model, contract, hidden)
    if not walk.visit(operand(contract), 0) or not walk.nonlinear or not walk.expand or not walk.closed():
        return None
    sources = {_strip(operand(node)) for node in walk.expand}
    source = sources.pop()
    if sources or not isinstance(source, fx.Node) or not _is_residual(model, contract, source, order):
        return None
    expand = sorted(walk.expand, key=order.__getitem__)
    match = Match(contract, source, hidden, expand, walk.inner, gated=walk.gated)
    for node in [*expand, *walk.inner]:
        leaf = module_at(model, str(node.target))
        offsets = tuple(sorted(walk.offsets[node]))
        for name, tensor in tensors_of(leaf):  # type: ignore[arg-type]
            if tensor.shape[0] != hidden * len(offsets) or offsets != tuple(range(0, tensor.shape[0], hidden)):
                return None
            match.axes.append(Axis(f"{node.target}.{name}", 0, int(tensor.shape[0]), offsets))
    match.axes.append(Axis(f"{contract.target}.weight", 1, hidden))
    leaves = [module_at(model, str(node.target)) for node in [*expand, contract]]
    match.signature = [*(describe(leaf) for leaf in leaves if leaf is not None), *walk.signature]
    return match


def _terms(model: nn.Module, node: fx.Node) -> Iterable[fx.Node]:
    """The node, and what it is the sum of, through scales and norms."""
    stack = [node]
    seen = set()
    while stack:
        term = stack.pop()
        if term in seen:
            continue
        seen.add(term)
        yield term
        if target_of(term) in ADD or passes(model, term):
            stack.extend(arg for arg in term.args if isinstance(arg, fx.Node))


def _comes_from(model: nn.Module, node: fx.Node, candidate: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether each position of `node` is computed from that of `candidate`; a mean or attention between them is none."""
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        if current is candidate:
            return True
        if mixes_positions(model, current) or target_of(current) in QUERIES:
            continue
        for parent in current.all_input_nodes:
            if parent not in seen and order[parent] >= order[candidate]:
                seen.add(parent)
                stack.append(parent)
    return False


def _is_residual(model: nn.Module, contract: fx.Node, source: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether the output is added to what the input was computed from."""
    stack, seen = [contract], {contract}
    while stack:
        node = stack.pop()
        for user in node.users:
            if user in seen:
                continue
            seen.add(user)
            if target_of(user) in ADD:
                others = [arg for arg in user.args if isinstance(arg, fx.Node) and arg is not node]
                terms = [term for other in others for term in _terms(model, other) if order[term] <= order[source]]
                if any(_comes_from(model, source, term, order) for term in terms):
                    return True
            elif not passes(model, user):
                continue
            stack.append(user)
    return False


def _acts_on_class_token(model: nn.Module, match: Match, order: dict[fx.Node, int], fed: set[fx.Node]) -> bool:
    """Whether the input is the class token alone: sliced from the tokens, or grown from a parameter of one token.

    Follows the input back through norms and residual additions, always to the older operand that depends on the
    model's input (`fed`), to the root of its residual stream.
    """
    node = match.source
    while True:
        if node.op == "get_attr":
            path, _, name = str(node.target).rpartition(".")
            token = getattr(module_at(model, path), name, None)
            return isinstance(token, torch.Tensor) and token.dim() >= 2 and token.shape[-2] == 1
        target = target_of(node)
        if target is operator.getitem:
            index = node.args[1]
            token = index[1] if isinstance(index, tuple) and len(index) > 1 else None
            return isinstance(token, int) or (isinstance(token, slice) and token.stop == 1 and not token.start)
        operands = [arg for arg in node.args if isinstance(arg, fx.Node)]
        if target in ADD and len(operands) > 1:  # a position embedding is no stream
            operands = [arg for arg in operands if arg in fed] or operands
        elif not (node.op == "call_module" and passes(model, node)) and target not in NEUTRAL | {
            F.layer_norm,
            "expand",
        }:
            return False
        if not operands:
            return False
        node = min(operands, key=order.__getitem__)


def _used_elsewhere(model: nn.Module, graph: fx.Graph, matches: list[Match]) -> set[int]:
    """Leaf modules of matches that the graph also calls, or reads a tensor of, outside of them."""
    inside = {node for match in matches for node in (*match.expand, *match.inner, match.contract)}
    elsewhere = set()
    for node in graph.nodes:
        path = str(node.target) if node.op == "call_module" else str(node.target).rpartition(".")[0]
        if node.op in ("call_module", "get_attr") and node not in inside:
            elsewhere.add(id(module_at(model, path)))
    return elsewhere


def match_mlps(model: nn.Module, graph: fx.Graph) -> list[Match]:
    """All MLPs of a graph, in order of execution, tied ones once for each call."""
    order = {node: position for position, node in enumerate(graph.nodes)}
    fed: set[fx.Node] = set()  # what depends on the model's input
    for node in graph.nodes:
        if node.op == "placeholder" or any(parent in fed for parent in node.all_input_nodes):
            fed.add(node)
    found = (_match(model, node, order) for node in graph.nodes if node.op == "call_module")
    matches = [match for match in found if match is not None]
    elsewhere = _used_elsewhere(model, graph, matches)
    for match in matches:
        match.class_token = _acts_on_class_token(model, match, order, fed)
    return [
        match
        for match in matches
        if not any(
            id(module_at(model, str(n.target))) in elsewhere for n in (*match.expand, *match.inner, match.contract)
        )
    ]
