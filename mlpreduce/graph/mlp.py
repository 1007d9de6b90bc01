"""What an MLP of a model is: where it lies, what its hidden axis runs through, and which others may share with it."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from mlpreduce.edits import Axis
from mlpreduce.errors import ReductionError, did_you_mean
from mlpreduce.graph.trace import module_at

__all__ = ["MLP", "Leaf", "Place", "chains", "locate", "select"]


@dataclass(frozen=True)
class Leaf:
    """A leaf module with tensors on the hidden axis.

    Attributes:
        path: dotted path, at the place it is called from.
        role: `fc1` (expanding; a gated MLP may have two), `fc2` (contracting), `norm` (anything in between).
        shareable: whether it is tied when the MLP is. Statistics of a BatchNorm belong to one depth, so it is not.
        parameters: number of parameters, each counted once.
        per_unit: how many of them belong to one hidden unit.
    """

    path: str
    role: str
    shareable: bool
    parameters: int
    per_unit: int


@dataclass(frozen=True)
class MLP:
    """One call of an MLP, found in the graph.

    Attributes:
        name: dotted path of the module that holds its leaves.
        kind: `plain`, `gated` (two expanding layers), `packed` (one, whose output is halved), with `+norm` when a
            normalisation lies on the hidden axis.
        block: dotted path of the block it belongs to.
        stage: dotted path of the sequence of blocks.
        acts_on: `tokens`, or `class token` when its input is the class token alone.
        in_features, hidden_features, out_features: widths.
        leaves: its leaf modules with parameters, in order of execution.
        axes: every tensor axis the hidden units lie on.
        owner: name of the first MLP in order of execution with the same leaves; its own name unless it is tied.
        signature: equal for MLPs that may share.
        macs_per_unit: multiply-accumulates of one hidden unit at one position, Linear and Conv only.
        norms_per_unit: LayerNorm elements of one hidden unit at one position.
    """

    name: str
    kind: str
    block: str
    stage: str
    acts_on: str
    in_features: int
    hidden_features: int
    out_features: int
    leaves: tuple[Leaf, ...]
    axes: tuple[Axis, ...]
    owner: str
    signature: tuple[object, ...]
    macs_per_unit: int
    norms_per_unit: int

    def params(self, hidden: int | None = None, *, owned: bool = True) -> int:
        """Parameters of its leaves, each counted once.

        Args:
            hidden: number of hidden units; its own by default.
            owned: whether it owns what can be shared; without, only what stays its own is counted.
        """
        gone = self.hidden_features - (self.hidden_features if hidden is None else hidden)
        return sum(leaf.parameters - gone * leaf.per_unit for leaf in self.leaves if owned or not leaf.shareable)

    @cached_property
    def chain(self) -> tuple[object, ...]:
        """Equal for MLPs of one chain: same stage, same place in the block, same signature, same tokens."""
        return self.stage, self.name.removeprefix(self.block), self.acts_on, self.signature

    def leaf(self, role: str) -> Leaf:
        """Its first leaf of this role."""
        return next(leaf for leaf in self.leaves if leaf.role == role)


@dataclass(frozen=True)
class Place:
    """Where an MLP lies in the module tree."""

    name: str
    block: str
    stage: str


def locate(model: nn.Module, paths: Sequence[Sequence[str]], signatures: Sequence[object]) -> list[Place]:
    """Name, block and stage of MLPs, given the paths of the leaves of each, and what tells them apart.

    A stage is a sequence of modules (Sequential, ModuleList, or children named by numbers) around the MLP: the
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
        several = [pair for pair in lists if len(contents[pair[0]]) > 1 or len(_children(model, pair[0])) == 1]
        stage, block = (repeated[:1] or several[-1:] or lists[-1:] or [("", name.rpartition(".")[0])])[0]
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


def _all_equal(values: Iterable[object]) -> bool:
    first, *others = values
    return all(value == first for value in others)


def chains(mlps: Sequence[MLP]) -> list[list[MLP]]:
    """MLPs of one chain together, each chain in order of execution."""
    groups: dict[tuple[object, ...], list[MLP]] = {}
    for mlp in mlps:
        groups.setdefault(mlp.chain, []).append(mlp)
    return list(groups.values())


def select(
    mlps: Sequence[MLP], include: str | Sequence[str] | None, exclude: str | Sequence[str] | None
) -> tuple[list[MLP], dict[str, str]]:
    """MLPs whose name matches the globs, and the others with the reason.

    Raises:
        ReductionError: a glob matches no MLP.
    """

    def globs(option: str, patterns: str | Sequence[str] | None) -> Iterator[str]:
        if patterns is not None and (
            isinstance(patterns, int) or not patterns or not all(isinstance(pattern, str) for pattern in patterns)
        ):
            raise ReductionError(f"{option}={patterns!r}; it must be a glob over MLP names, or a list of globs")
        for pattern in (patterns,) if isinstance(patterns, str) else patterns or ():
            if not fnmatch.filter(names, pattern):
                raise ReductionError(
                    f"{option}={pattern!r} matches none of {len(names)} MLPs{did_you_mean(pattern, names)}"
                )
            yield pattern

    names = [mlp.name for mlp in mlps]
    included = list(globs("include", include))
    excluded = list(globs("exclude", exclude))
    chosen, left_out = [], {}
    for mlp in mlps:
        if included and not any(fnmatch.fnmatchcase(mlp.name, pattern) for pattern in included):
            left_out[mlp.name] = "not in include"
        elif any(fnmatch.fnmatchcase(mlp.name, pattern) for pattern in excluded):
            left_out[mlp.name] = "in exclude"
        else:
            chosen.append(mlp)
    return chosen, left_out
