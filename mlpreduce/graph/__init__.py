"""From a model to its MLPs: the torch.fx graph tells where they are, what is coupled to each hidden unit, and which
are alike. Nothing here changes a model.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from mlpreduce.edits import Axis
from mlpreduce.errors import ReductionError
from mlpreduce.graph.match import Match, match_mlps
from mlpreduce.graph.mlp import MLP, Leaf, chains, locate, select
from mlpreduce.graph.trace import forget, module_at, refuse_wrapped, structural_copy, trace

__all__ = ["MLP", "Leaf", "chains", "find_mlps", "module_at", "refuse_wrapped", "select", "structural_copy", "to_graph"]


def find_mlps(model: nn.Module) -> list[MLP]:
    """The MLPs of a model, found in its torch.fx graph by dataflow, in order of execution.

    A tied MLP appears once for each call; `MLP.owner` names the first. The model is not changed in any way.

    Args:
        model: any module that torch.fx can trace, on any device, `meta` included.

    Returns:
        The MLPs; an empty list if there is none.

    Raises:
        ReductionError: the model is wrapped, compiled, or cannot be traced.

    Example:
        >>> import timm
        >>> [(mlp.name, mlp.hidden_features) for mlp in find_mlps(timm.create_model("vit_tiny_patch16_224", depth=2))]
        [('blocks.0.mlp', 768), ('blocks.1.mlp', 768)]
    """
    refuse_wrapped(model, "find_mlps")
    tree, graph = trace(model)
    matches = match_mlps(tree, graph)
    paths = [[str(node.target) for node in (*m.expand, *m.inner, m.contract)] for m in matches]
    places = locate(tree, paths, [tuple(match.signature) for match in matches])
    owners: dict[tuple[int, ...], str] = {}
    mlps = []
    for match, place in zip(matches, places, strict=True):
        nodes = [*match.expand, *match.inner, match.contract]
        key = tuple(id(module_at(tree, str(node.target))) for node in nodes if _is_shareable(tree, node))
        owner = owners.setdefault(key, place.name)
        leaves = tuple(_leaf(tree, match, node) for node in nodes)
        kind = "packed" if len(match.axes[0].offsets) > 1 else "gated" if match.gated else "plain"
        mlp = MLP(
            name=place.name,
            kind=kind + ("+norm" if match.inner else ""),
            block=place.block,
            stage=place.stage,
            acts_on="class token" if match.class_token else "tokens",
            in_features=tree.get_parameter(f"{leaves[0].path}.weight").shape[1],
            hidden_features=match.hidden,
            out_features=tree.get_parameter(f"{leaves[-1].path}.weight").shape[0],
            leaves=leaves,
            axes=tuple(match.axes),
            owner=owner,
            signature=tuple(match.signature),
            macs_per_unit=sum(_unit_size(tree, axis)[1] for axis in match.axes),
            norms_per_unit=sum(_unit_size(tree, axis)[2] for axis in match.axes),
        )
        mlps.append(mlp)
    forget(tree)
    return mlps


def _is_shareable(tree: nn.Module, node: fx.Node) -> bool:
    return not isinstance(module_at(tree, str(node.target)), nn.modules.batchnorm._BatchNorm)


def _leaf(tree: nn.Module, match: Match, node: fx.Node) -> Leaf:
    path = str(node.target)
    module = module_at(tree, path)
    role = "fc2" if node is match.contract else "fc1" if node in match.expand else "norm"
    count = sum(parameter.numel() for parameter in module.parameters()) if module is not None else 0
    per_unit = sum(_unit_size(tree, axis)[0] for axis in match.axes if axis.tensor.rpartition(".")[0] == path)
    return Leaf(path, role, _is_shareable(tree, node), count, per_unit)


def _unit_size(tree: nn.Module, axis: Axis) -> tuple[int, int, int]:
    """Parameters, MACs and LayerNorm elements of one hidden unit on one axis."""
    path, _, name = axis.tensor.rpartition(".")
    module = module_at(tree, path)
    tensor = getattr(module, name)
    unit = tensor.numel() // tensor.shape[axis.dim] * len(axis.offsets)
    norm = isinstance(module, nn.LayerNorm) and name == "weight"
    return (
        unit if isinstance(tensor, nn.Parameter) else 0,
        unit if tensor.dim() > 1 else 0,
        len(axis.offsets) if norm else 0,
    )


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


def mlps_or_raise(model: nn.Module, call: str) -> list[MLP]:
    """`find_mlps`, which must find some.

    Raises:
        ReductionError: no MLP was found.
    """
    mlps = find_mlps(model)
    if not mlps:
        raise ReductionError(
            f"{call}: found no MLP in {type(model).__name__}: two projections with an activation between them, added "
            f"to a residual stream; mlpreduce.find_mlps(model) shows what is found"
        )
    return mlps
