"""Finds MLPs in a graph by dataflow.

From each contracting projection the matcher walks back through elementwise operations, norms, gates, convolutions of
single channels and changes of shape to the expanding projections. It is an MLP when those have one common input, their
output goes nowhere else, a nonlinearity or a gate lies between, and the result is added to something its input was
computed from (the residual stream). What a node may be is a matter of the tables in `rules.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

from torch import fx, nn

from mlpreduce.edits import Axis, Setting
from mlpreduce.graph.flow import Flow
from mlpreduce.graph.rules import (
    PARAMETRIZED,
    PRODUCTS,
    Projection,
    describe,
    no_slices,
    operand,
    operation,
    projection,
)
from mlpreduce.graph.tracing import module_at
from mlpreduce.graph.walk import Walk

__all__ = ["Match", "match_mlps"]


@dataclass
class Match:
    """An MLP in the graph, by nodes and leaf paths.

    Attributes:
        contract: the contracting projection.
        source: what goes in.
        hidden: its width.
        groups: equal parts that its units come in, of each of which as many are kept.
        expand: the expanding projections.
        inner: other leaves with tensors, between.
        parameters: where parameters of the modules around them are read.
        axes: every tensor axis the hidden units lie on.
        settings: plain attributes that hold the width.
        signature: what tells it from others, beside its values.
        gated: whether two halves or layers are multiplied.
        fused: whether its expanding or contracting layer also computes something else.
        convolves: whether a convolution lies between, as it does in an inverted residual, which is no MLP.
        reshapes: whether shapes change between, where the model's code may have the width in figures.
        fixed: why its hidden units cannot be sliced, if so.
    """

    contract: fx.Node
    source: fx.Node
    hidden: int
    groups: int
    expand: list[fx.Node]
    inner: list[fx.Node]
    parameters: list[fx.Node]
    axes: list[Axis]
    settings: list[Setting]
    signature: list[object]
    gated: bool
    fused: bool
    convolves: bool
    reshapes: bool
    fixed: str

    @property
    def leaves(self) -> list[fx.Node]:
        """Calls of its leaf modules, in order of execution."""
        return [*self.expand, *self.inner, self.contract]


@dataclass(frozen=True)
class _Entry:
    """What goes into a contracting projection: a value, the dimension and number of its hidden units, and the column of
    the weight that the first of them meets."""

    value: object
    dim: int
    hidden: int
    start: int = 0


def _entries(flow: Flow, contract: fx.Node, layer: Projection, columns: int) -> list[_Entry]:
    """What goes into a projection; one that projects several things at once takes them concatenated."""
    value = operand(contract)
    shape = flow.shape(value)
    dim = layer.features % len(shape) if shape else layer.features
    if shape is None or not isinstance(value, fx.Node) or operation(value) != "cat" or not value.args:
        return [_Entry(value, dim, columns)]
    parts = value.args[0] if isinstance(value.args[0], (list, tuple)) else ()
    widths = [(flow.shape(part) or (0,) * (dim + 1))[dim] for part in parts]
    if sum(widths) != columns:  # it is along another dimension
        return []
    return [_Entry(part, dim, widths[i], sum(widths[:i])) for i, part in enumerate(parts)]


def _match(flow: Flow, contract: fx.Node, barren: set[tuple[object, ...]], stops: list[str]) -> Match | None:
    module = flow.module(contract)
    layer = projection(module)
    if module is None or layer is None or len(contract.args) + len(contract.kwargs) != 1:
        return None
    whole, columns = operand(contract), layer.in_features
    for entry in _entries(flow, contract, layer, columns):
        walk = Walk(flow, entry.hidden, barren, groups=layer.groups)
        if not walk.visit(entry.value, entry.dim, 0) or not walk.nonlinear or not walk.expand:
            stops += [walk.stop] if walk.stop else []
            continue
        into = contract if entry.value is whole else whole
        if not isinstance(into, fx.Node) or walk.leaks(into):
            continue
        sources = {flow.strip(operand(node)) for node in walk.expand}
        source = sources.pop()
        if sources or not isinstance(source, fx.Node) or not flow.is_residual(contract, source):
            continue
        if not layer.inputs:
            walk.fixed = no_slices(contract, module)
        ends = [
            Axis(f"{contract.target}.{name}", dim, attrgetter(name)(module).shape[dim], (entry.start,), groups)
            for name, dim, groups in layer.inputs
        ]
        return _built(flow, contract, source, walk, ends, entry.hidden != columns)
    return None


def _built(flow: Flow, contract: fx.Node, source: fx.Node, walk: Walk, ends: list[Axis], fused: bool) -> Match | None:
    """The match of a walk that found an MLP; `ends` are the axes of its contracting projection, `fused` whether it is one of
    other things too."""
    hidden, axes = walk.hidden, []
    for (path, dim, groups), offsets in walk.axes.items():
        parent, _, name = path.rpartition(".")
        size = int(getattr(module_at(flow.model, parent), name).shape[dim])
        starts = tuple(sorted(offsets))
        if groups > 1:
            starts = (0,)
        elif size != hidden * len(starts) or starts != tuple(range(0, size, hidden)):
            if len(starts) > 1:
                return None
            fused = True  # other rows of it compute something else
        axes.append(Axis(path, dim, size, starts, groups))
    settings = _settings(flow.model, walk.splits) if fused else []
    if fused and not settings:
        return None
    described = [flow.module(node) for node in (*walk.expand, contract)]
    return Match(
        contract=contract,
        source=source,
        hidden=hidden,
        groups=walk.groups,
        expand=sorted(walk.expand, key=flow.order.__getitem__),
        inner=walk.inner,
        parameters=walk.parameters,
        axes=[*axes, *ends],
        settings=settings,
        signature=[*(describe(leaf) for leaf in described if leaf is not None), *walk.signature],
        gated=walk.gated,
        fused=fused,
        convolves=walk.convolves,
        reshapes=walk.reshapes,
        fixed=walk.fixed,
    )


def _settings(model: nn.Module, splits: list[fx.Node]) -> list[Setting]:
    """The attribute that holds the sizes of an unequal split: a list that one module above the split layer has."""
    for parts in splits:
        whole, sizes = operand(parts), parts.args[1] if len(parts.args) > 1 else None
        part = min((user.args[1] for user in parts.users if isinstance(user.args[1], int)), default=0)
        if isinstance(whole, fx.Node) and whole.op == "call_module" and isinstance(sizes, (list, tuple)):
            path = str(whole.target).rpartition(".")[0]
            owner = module_at(model, path)
            names = [name for name, value in vars(owner).items() if isinstance(value, list) and value == list(sizes)]
            if len(names) == 1:
                return [Setting(path, names[0], part)]
    return []


def _used_elsewhere(flow: Flow, matches: list[Match]) -> set[int]:
    """Leaf modules of matches that the graph also calls, or reads a tensor of, outside of them."""
    inside = {node for match in matches for node in (*match.leaves, *match.parameters)}
    elsewhere = set()
    for node in flow.graph.nodes:
        path = str(node.target) if node.op == "call_module" else str(node.target).rpartition(".")[0]
        if node.op in ("call_module", "get_attr") and node not in inside:
            elsewhere.add(id(module_at(flow.model, path)))
    return elsewhere


def _bare(product: str | None, tensor: str) -> str:
    """Why a product with a tensor is no layer."""
    layer, parametrized, _ = tensor.partition(".parametrizations.")
    if parametrized:
        return f"{layer} {PARAMETRIZED}"
    return f"{product} multiplies by {tensor} itself, and only layers are tied and sliced"


def match_mlps(flow: Flow) -> tuple[list[Match], list[str]]:
    """All MLPs of a graph, in order of execution, tied ones once for each call; and what may have hidden others."""
    stops: list[str] = []
    barren: set[tuple[object, ...]] = set()
    found = (_match(flow, node, barren, stops) for node in flow.graph.nodes if node.op == "call_module")
    matches = [match for match in found if match is not None]
    elsewhere = _used_elsewhere(flow, matches)
    products = (node for node in flow.graph.nodes if operation(node) in PRODUCTS)
    bare = [(node, arg) for node in products for arg in map(flow.parameter, node.all_input_nodes) if arg is not None]
    stops += [_bare(operation(node), str(arg.target)) for node, arg in bare]
    return [m for m in matches if not any(id(flow.module(node)) in elsewhere for node in m.leaves)], stops
