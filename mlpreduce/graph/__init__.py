"""From a model to its MLPs: the torch.fx graph tells where they are, what is coupled to each hidden unit, and which
are alike. Nothing here changes a model.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace

import torch
from torch import fx, nn

from mlpreduce.errors import ReductionError
from mlpreduce.graph.altered import as_plain
from mlpreduce.graph.blocks import block_leaves, leaf_parameters
from mlpreduce.graph.describe import describe_mlp
from mlpreduce.graph.flow import Flow
from mlpreduce.graph.inputs import INPUTS, Inputs, call_with, example_inputs, map_tensors, tensor_of, tensors_in
from mlpreduce.graph.match import match_mlps
from mlpreduce.graph.mlp import MLP, Leaf, chains, first_units, select, slice_edit
from mlpreduce.graph.places import Place, locate
from mlpreduce.graph.recording import read, record
from mlpreduce.graph.rules import projection, projection_of, says_mlp
from mlpreduce.graph.tracing import (
    PLAIN,
    below,
    forget,
    is_leaf,
    is_meta_twin,
    is_one_node,
    module_at,
    module_through,
    refuse_wrapped,
    structural_copy,
    trace,
    unwrapped,
)
from mlpreduce.graph.whole import token_grid, whole_module

__all__ = [
    "MLP",
    "PLAIN",
    "Inputs",
    "Leaf",
    "Survey",
    "below",
    "block_leaves",
    "call_with",
    "chains",
    "example_inputs",
    "find_mlps",
    "first_units",
    "is_leaf",
    "is_one_node",
    "leaf_parameters",
    "map_tensors",
    "mlps_or_raise",
    "module_at",
    "module_through",
    "projection",
    "projection_of",
    "record",
    "refuse_wrapped",
    "select",
    "slice_edit",
    "structural_copy",
    "survey",
    "tensor_of",
    "tensors_in",
    "to_graph",
    "token_grid",
    "unwrapped",
    "whole_module",
]


@dataclass(frozen=True)
class Survey:
    """What a model has.

    Attributes:
        mlps: its MLPs, in order of execution.
        others: what looks like an MLP and is none, by name, with the reason.
        advice: what to try if an MLP is missing.
        tree: a structural copy of the model on the meta device, to be used up; None if none was made.
        hidden: MLPs that an altered layer hides, by name, with the layer and the call that makes it plain.
    """

    mlps: list[MLP]
    others: dict[str, str]
    advice: str
    tree: nn.Module | None = None
    hidden: dict[str, str] = field(default_factory=dict)


def find_mlps(model: nn.Module, example_inputs: Inputs | None = None) -> list[MLP]:
    """The MLPs of a model, found in its torch.fx graph by dataflow, in order of execution.

    A tied MLP appears once for each call; `MLP.owner` names the first. The model is not changed in any way.

    Args:
        model: any module, on any device, `meta` included.
        example_inputs: what the model is called with: a tensor, a tuple of arguments or a dict of keyword arguments.
            Only shapes and dtypes matter. Models of timm, torchvision and transformers say themselves what they take;
            of others the graph is traced symbolically, which is less exact.

    Returns:
        The MLPs; an empty list if there is none.

    Raises:
        ReductionError: the model is wrapped, compiled, or its graph cannot be read.

    Example:
        >>> import timm
        >>> [(mlp.name, mlp.hidden_features) for mlp in find_mlps(timm.create_model("vit_tiny_patch16_224", depth=2))]
        [('blocks.0.mlp', 768), ('blocks.1.mlp', 768)]
    """
    refuse_wrapped(model, "find_mlps")
    return survey(model, example_inputs).mlps


def survey(model: nn.Module, example_inputs: Inputs | None = None) -> Survey:
    """The MLPs of a model, and what is none of them.

    Raises:
        ReductionError: its graph cannot be read.
    """
    tree, graph, advice = read(model, example_inputs)
    flow = Flow(tree, graph)
    matches, stops = match_mlps(flow)
    paths = [[str(node.target) for node in match.leaves] for match in matches]
    places = locate(tree, paths, [tuple(match.signature) for match in matches])
    owners: dict[tuple[int, ...], str] = {}
    mlps: list[MLP] = []
    others: dict[str, str] = {}
    single = flow.acts_on_one_token([match.source for match in matches])
    for match, place, one in zip(matches, places, single, strict=True):
        if match.convolves and not says_mlp(_names(tree, place)):
            others[place.name] = "expands, convolves and projects; no name says MLP: an inverted residual or SepConv"
            continue
        mlp = describe_mlp(tree, match, place, "one token" if one else "tokens")
        shape = flow.shape(match.expand[0].args[0]) if match.expand[0].args else None
        mlp = replace(mlp, input_shape=shape or (), norm_follows=flow.meets_norm(match.contract))
        shared = [leaf for leaf in mlp.leaves if leaf.shareable] or mlp.leaves
        leaves = tuple(id(module_at(tree, leaf.path)) for leaf in shared)
        mlps.append(replace(mlp, owner=owners.setdefault(leaves, mlp.name)))
    spare = tree if tree is not model and is_meta_twin(tree, model) else None
    if spare is None:
        forget(tree)
    return Survey(mlps, others, "".join(f"; {stop}" for stop in stops[:1]) + advice, spare)


def _names(model: nn.Module, place: Place) -> list[str]:
    """Names and classes of the modules from an MLP up to its block."""
    steps, names = place.name.split("@")[0].split("."), []
    block = len(place.block.split("."))
    for depth in range(min(block + 1, len(steps)), len(steps) + 1):
        names += [steps[depth - 1], type(module_at(model, ".".join(steps[:depth]))).__name__]
    return names


def to_graph(model: nn.Module) -> fx.GraphModule:
    """The model as a `torch.fx.GraphModule` in eval mode, for export and inspection.

    Each tied MLP is one submodule, called several times, and there are no dead parameters. Optional arguments of
    `forward` are fixed at their defaults. The graph shares its tensors with the model; do not train it: drop rates
    and other things that depend on the mode are baked in.

    Raises:
        ReductionError: torch.fx cannot trace the model.
    """
    refuse_wrapped(model, "to_graph")
    tree, graph = trace(structural_copy(model) if isinstance(model, fx.GraphModule) else model)
    graph_module = fx.GraphModule(tree, graph, class_name=type(model).__name__)
    canonicalize(graph_module)
    with contextlib.suppress(ReductionError):  # then its shapes stay unknown
        graph_module.meta[INPUTS] = map_tensors(example_inputs(model, 2), lambda tensor: tensor.to("meta"))
    return graph_module


def canonicalize(graph_module: fx.GraphModule) -> None:
    """Let every call of a tied module name it by one path, and delete what is no longer called."""
    first: dict[int, str] = {}
    for path, module in graph_module.named_modules(remove_duplicate=False):
        first.setdefault(id(module), path)
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            node.target = first[id(module_at(graph_module, str(node.target)))]
        elif node.op == "get_attr":
            path, _, name = str(node.target).rpartition(".")
            owner = module_at(graph_module, path)
            if owner is not None and isinstance(getattr(owner, name, None), torch.Tensor) and id(owner) in first:
                node.target = f"{first[id(owner)]}.{name}".lstrip(".")
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()


def mlps_or_raise(model: nn.Module, call: str, example_inputs: Inputs | None = None) -> Survey:
    """`survey`, which must find some.

    Raises:
        ReductionError: no MLP was found.
    """
    found = survey(model, example_inputs)
    hidden = _hidden(model, found.mlps, example_inputs)
    if not found.mlps:
        looks = "".join(
            f"; {len(found.others)} blocks look like one ({n}: {r})" for n, r in [*found.others.items()][:1]
        )
        way = "".join(f"; {len(hidden)} are hidden: {reason}" for reason in [*hidden.values()][:1]) or found.advice
        raise ReductionError(
            f"{call}: found no MLP in {type(model).__name__}: two projections with an activation between them, added "
            f"to a residual stream{looks}{way}"
        )
    return replace(found, hidden=hidden)


def _hidden(model: nn.Module, known: list[MLP], example_inputs: Inputs | None) -> dict[str, str]:
    """MLPs that would be found if the layers of a model were plain: by name, the first layer in the way."""
    tree, altered = as_plain(model)
    if not altered:
        return {}
    try:
        plain = survey(tree, example_inputs).mlps
    except ReductionError:  # then nothing is known of them
        return {}
    names = {mlp.name for mlp in known}
    ways = ((mlp.name, [altered[leaf.path] for leaf in mlp.leaves if leaf.path in altered]) for mlp in plain)
    return {name: way[0] for name, way in ways if way and name not in names}
