"""From a match in the graph to what an MLP is in the module tree."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from torch import fx, nn

from mlpreduce.edits import Axis
from mlpreduce.graph.match import Match
from mlpreduce.graph.mlp import MLP, Leaf
from mlpreduce.graph.places import Place
from mlpreduce.graph.rules import is_depthwise, projection, projection_of
from mlpreduce.graph.tracing import module_at
from mlpreduce.layers import Wrapper

__all__ = ["describe_mlp"]

FUSED = "its expanding or contracting layer is also attention's"


def describe_mlp(tree: nn.Module, match: Match, place: Place, acts_on: str) -> MLP:
    """The MLP of a match; it owns itself."""
    leaves = [leaf for node in match.leaves for leaf in _leaves(tree, match, node)]
    known = {leaf.path for leaf in leaves}
    for axis in match.axes:
        path = axis.tensor.rpartition(".")[0]
        if path not in known:  # a parameter of the module around the leaves
            known.add(path)
            unit = sum(_unit(tree, other)[0] for other in match.axes if other.tensor.rpartition(".")[0] == path)
            leaves.append(Leaf(path, "param", False, unit * match.hidden, unit))
    mixing = sum(projection_of(tree.get_submodule(leaf.path)).in_features for leaf in leaves if leaf.role == "mix")
    return MLP(
        name=place.name,
        kind=_kind(match, leaves),
        block=place.block,
        stage=place.stage,
        acts_on=acts_on,
        in_features=projection_of(tree.get_submodule(str(match.expand[0].target))).in_features,
        hidden_features=match.hidden,
        out_features=projection_of(tree.get_submodule(str(match.contract.target))).out_features,
        leaves=tuple(leaves),
        axes=tuple(match.axes),
        owner=place.name,
        signature=tuple(match.signature),
        macs_per_unit=sum(_unit(tree, axis)[1] for axis in _single(match)) + mixing,
        norms_per_unit=sum(_unit(tree, axis)[2] for axis in _single(match)),
        groups=match.groups,
        settings=tuple(match.settings),
        alone=FUSED if match.fused else "",
        reshapes=match.reshapes,
        fixed=match.fixed,
    )


def _kind(match: Match, leaves: list[Leaf]) -> str:
    packed = any(len(axis.offsets) > 1 for axis in match.axes)
    roles = [role for role in ("norm", "conv", "mix") if any(leaf.role == role for leaf in leaves)]
    return "+".join(
        [
            "packed" if packed else "gated" if match.gated and len(match.expand) > 1 else "plain",
            *roles,
            *["fused"] * match.fused,
        ]
    )


def _single(match: Match) -> list[Axis]:
    """Axes of tensors that have one hidden axis; a grouped convolution has two."""
    uses = Counter(axis.tensor for axis in match.axes)
    return [axis for axis in match.axes if uses[axis.tensor] == 1]


def _leaves(tree: nn.Module, match: Match, node: fx.Node) -> list[Leaf]:
    """The leaf that a node calls; of one with layers around it also those, each of which is its block's own."""
    call = path = str(node.target)
    around = []
    while isinstance(module := tree.get_submodule(path), Wrapper):
        around.append((path, module))
        path = f"{path}.base"
    leaf = _leaf(tree, match, node, path)
    if not around:
        return [leaf]
    axes = _single(match)
    own = [
        Leaf(
            outer,
            "around",
            False,
            sum(parameter.numel() for parameter in layer._parameters.values() if parameter is not None),
            sum(_unit(tree, axis)[0] for axis in axes if axis.tensor.rpartition(".")[0] == outer),
        )
        for outer, layer in around
    ]
    return [replace(leaf, around=call), *own]


def _leaf(tree: nn.Module, match: Match, node: fx.Node, path: str) -> Leaf:
    module = tree.get_submodule(path)
    role = "fc2" if node is match.contract else "fc1" if node in match.expand else "norm"
    if role == "norm" and not isinstance(module, nn.modules.batchnorm._BatchNorm):
        role = "conv" if is_depthwise(module) else "mix" if projection(module) is not None else role
    mine = [axis for axis in _single(match) if axis.tensor.rpartition(".")[0] == path]
    unit = sum(_unit(tree, axis)[0] for axis in mine)
    singles = {axis.tensor for axis in mine}
    pairs = {a.tensor for a in match.axes if a.tensor.rpartition(".")[0] == path} - singles
    per_pair = sum(module.get_parameter(tensor.rpartition(".")[2]).numel() for tensor in pairs)
    partly = any(axis.size * axis.groups != match.hidden * len(axis.offsets) for axis in mine)
    count = unit * match.hidden if partly else sum(parameter.numel() for parameter in module.parameters())
    shareable = not isinstance(module, nn.modules.batchnorm._BatchNorm) and not partly
    return Leaf(path, role, shareable, count, unit, per_pair)


def _unit(tree: nn.Module, axis: Axis) -> tuple[int, int, int]:
    """Parameters, MACs and LayerNorm elements of one hidden unit on one axis."""
    path, _, name = axis.tensor.rpartition(".")
    module = module_at(tree, path)
    tensor: torch.Tensor = getattr(module, name)
    unit = tensor.numel() // (tensor.shape[axis.dim] * axis.groups) * len(axis.offsets)
    norm = isinstance(module, nn.LayerNorm) and name == "weight"
    multiplies = projection(module) is not None or is_depthwise(module) or isinstance(module, Wrapper)
    return (
        unit if isinstance(tensor, nn.Parameter) else 0,
        unit if tensor.dim() > 1 and multiplies else 0,
        len(axis.offsets) if norm else 0,
    )
