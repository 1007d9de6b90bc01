"""Where MLPs lie in the module tree: name, block and stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from mlpreduce.graph.tracing import module_at
from mlpreduce.layers import Wrapper

__all__ = ["Place", "locate"]


@dataclass(frozen=True)
class Place:
    """Where an MLP lies in the module tree."""

    name: str
    block: str
    stage: str


def locate(model: nn.Module, paths: Sequence[Sequence[str]], signatures: Sequence[object]) -> list[Place]:
    """Name, block and stage of MLPs, given the paths of the leaves of each, and what tells them apart.

    A stage is a sequence of modules (Sequential, ModuleList, or children named by numbers) around the MLP: the
    innermost one whose children are blocks (of one class, with weights beside their MLPs, and like MLPs), else the
    outermost one whose children hold like MLPs, else the innermost one that has several children with MLPs, or one
    child. So parallel MLPs in a block are no stage, nor is a list such as [attention, MLP], nor a list of stages.
    """
    common = [_common(model, leaves) for leaves in paths]
    different = [name for name, _ in {(name, tuple(leaves)) for name, leaves in zip(common, paths, strict=True)}]
    names = [n if n and different.count(n) == 1 else leaves[0] for n, leaves in zip(common, paths, strict=True)]
    kinds = dict(zip(names, signatures, strict=True))
    held = {path for leaves in paths for path in leaves}
    stages: dict[str, _Stage] = {}
    places: list[Place] = []
    for name in names:
        lists = _lists(model, name)
        for stage, _ in lists:
            if stage not in stages:
                stages[stage] = _stage(model, stage, _contents(stage, kinds), held)
        blocks = [pair for pair in lists if stages[pair[0]].blocks]
        repeated = [pair for pair in lists if stages[pair[0]].alike]
        several = [pair for pair in lists if stages[pair[0]].several]
        stage, block = (blocks[-1:] or repeated[:1] or several[-1:] or lists[-1:] or [("", name.rpartition(".")[0])])[0]
        again = sum(place.name.split("@")[0] == name for place in places)
        unique = f"{name}@{again}" if again else name  # a flat graph calls a tied MLP by one path
        places.append(Place(unique, block, stage))
    return places


@dataclass(frozen=True)
class _Stage:
    """What a sequence of modules is.

    Attributes:
        several: whether more than one child holds MLPs, or there is but one child.
        alike: whether more than one does, and all of these hold the like.
        blocks: whether these are blocks besides: of one class, with weights that are none of an MLP.
    """

    several: bool
    alike: bool
    blocks: bool


def _stage(model: nn.Module, path: str, contents: Mapping[str, object], held: set[str]) -> _Stage:
    first, *others = contents.values()
    alike = bool(others) and all(other == first for other in others)
    several = bool(others) or len(_children(model, path)) == 1
    return _Stage(several, alike, alike and _are_blocks(model, path, list(contents), held))


def _lists(model: nn.Module, name: str) -> list[tuple[str, str]]:
    """The sequences of modules around a module, and their child that it lies in, from the outside in."""
    steps, lists = name.split("."), []
    for depth, step in enumerate(steps):
        stage = ".".join(steps[:depth])
        if step.isdigit() or isinstance(module_at(model, stage), (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            lists.append((stage, ".".join(steps[: depth + 1])))
    return lists


def _common(model: nn.Module, paths: Sequence[str]) -> str:
    """The innermost module that has all of these in it; what is wrapped goes by the place of the layer around it."""
    parts = [path.split(".")[:-1] for path in paths]
    prefix = []
    for step in zip(*parts, strict=False):
        if len(set(step)) > 1:
            break
        prefix.append(step[0])
    while len(prefix) > 1 and isinstance(module_at(model, ".".join(prefix[:-1])), Wrapper):
        prefix.pop()
    return ".".join(prefix)


def _children(model: nn.Module, stage: str) -> list[str]:
    module = module_at(model, stage)
    return list(module._modules) if module is not None else []


def _contents(stage: str, kinds: Mapping[str, object]) -> dict[str, list[tuple[str, object]]]:
    """For each child of a stage that holds MLPs: where in it, and which."""
    start = f"{stage}." if stage else ""
    contents: dict[str, list[tuple[str, object]]] = {}
    for name, kind in kinds.items():
        if name.startswith(start):
            child, _, rest = name[len(start) :].partition(".")
            contents.setdefault(child, []).append((rest, kind))
    return contents


def _are_blocks(model: nn.Module, stage: str, names: Sequence[str], held: set[str]) -> bool:
    """Whether the children of a stage are of one class, and have weights that are none of an MLP, such as attention's."""
    paths = [f"{stage}.{name}" if stage else name for name in names]
    children = [(path, module_at(model, path)) for path in paths]
    if len({type(child) for _, child in children}) > 1:
        return False
    return all(
        any(p.dim() > 1 and f"{path}.{name}".rpartition(".")[0] not in held for name, p in child.named_parameters())
        for path, child in children
        if child is not None
    )
