"""Where MLPs lie in the module tree: name, block and stage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from mlpreduce.graph.trace import module_at

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
    common = [_common(leaves) for leaves in paths]
    different = [name for name, _ in {(name, tuple(leaves)) for name, leaves in zip(common, paths, strict=True)}]
    names = [n if n and different.count(n) == 1 else leaves[0] for n, leaves in zip(common, paths, strict=True)]
    kinds = dict(zip(names, signatures, strict=True))
    places: list[Place] = []
    for name in names:
        steps = name.split(".")
        lists = []  # (stage, block) from the outside in
        for depth in range(len(steps)):
            stage, block = ".".join(steps[:depth]), ".".join(steps[: depth + 1])
            parent = module_at(model, stage)
            if isinstance(parent, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) or steps[depth].isdigit():
                lists.append((stage, block))
        contents = {stage: _contents(stage, kinds) for stage, _ in lists}
        repeated = [pair for pair in lists if len(contents[pair[0]]) > 1 and _all_equal(contents[pair[0]].values())]
        held = {path for leaves in paths for path in leaves}
        blocks = [pair for pair in repeated if _are_blocks(model, pair[0], list(contents[pair[0]]), held)]
        several = [pair for pair in lists if len(contents[pair[0]]) > 1 or len(_children(model, pair[0])) == 1]
        stage, block = (blocks[-1:] or repeated[:1] or several[-1:] or lists[-1:] or [("", name.rpartition(".")[0])])[0]
        again = sum(place.name.split("@")[0] == name for place in places)
        unique = f"{name}@{again}" if again else name  # a flat graph calls a tied MLP by one path
        places.append(Place(unique, block, stage))
    return places


def _common(paths: Sequence[str]) -> str:
    parts = [path.split(".")[:-1] for path in paths]
    prefix = []
    for step in zip(*parts, strict=False):
        if len(set(step)) > 1:
            break
        prefix.append(step[0])
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


def _all_equal(values: Iterable[object]) -> bool:
    first, *others = values
    return all(value == first for value in others)
