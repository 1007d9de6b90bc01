"""What an MLP of a model is: where it lies, what its hidden axis runs through, and which others may share with it."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from mlpreduce.edits import Axis, Setting, Slice, as_units
from mlpreduce.errors import ReductionError, did_you_mean
from mlpreduce.words.markup import shortened

__all__ = ["MLP", "Leaf", "chains", "first_units", "select", "slice_edit"]


@dataclass(frozen=True)
class Leaf:
    """A leaf module with tensors on the hidden axis.

    Attributes:
        path: dotted path, at the place it is called from.
        role: `fc1` (expanding; a gated MLP may have two), `fc2` (contracting), `norm`, `conv` or `mix` (what lies in
            between: norms, convolutions of channels, a Linear over positions), `param` (a parameter of the module
            around them).
        shareable: whether it is tied when the MLP is. Statistics of a BatchNorm belong to one depth, so it is not.
        parameters: number of parameters, each counted once; of a layer that also computes something else, those of
            the hidden units.
        per_unit: how many of them belong to one hidden unit.
        per_pair: how many of them belong to pairs of hidden units, in a grouped convolution.
        around: dotted path of the layer around it, if there is one.
    """

    path: str
    role: str
    shareable: bool
    parameters: int
    per_unit: int
    per_pair: int = 0
    around: str = ""

    @property
    def call(self) -> str:
        """Dotted path of the module that is called: the outermost layer around this one, or itself."""
        return self.around or self.path


@dataclass(frozen=True)
class MLP:
    """One call of an MLP, found in the graph.

    Attributes:
        name: dotted path of the module that holds its leaves.
        kind: `plain`, `gated` (two expanding layers), `packed` (one, whose output is halved); with `+norm`, `+conv`
            or `+mix` when a normalisation, a convolution of channels or a Linear over positions lies on the hidden
            axis, and `+fused` when the expanding layer is attention's too.
        block: dotted path of the block it belongs to.
        stage: dotted path of the sequence of blocks.
        acts_on: `tokens`, or `one token` when its input is one of them, as in class attention and pooling.
        in_features, hidden_features, out_features: widths.
        leaves: its leaf modules with parameters, in order of execution.
        axes: every tensor axis the hidden units lie on.
        owner: name of the first MLP in order of execution with the same leaves; its own name unless it is tied.
        signature: equal for MLPs that may share.
        macs_per_unit: multiply-accumulates of one hidden unit at one position, Linear and Conv only.
        norms_per_unit: LayerNorm elements of one hidden unit at one position.
        groups: equal parts that its hidden units come in; as many are kept of each.
        settings: plain attributes that hold the hidden width.
        alone: why it cannot share, if so.
        reshapes: whether shapes change between its layers, so that a plan is tried before it is given.
        fixed: why its hidden units cannot be sliced, if so.
        input_shape: of what it is given, with the batch that was used to find it; empty if that is not known.
        norm_follows: whether a norm lies between it and the residual stream.
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
    groups: int = 1
    settings: tuple[Setting, ...] = ()
    alone: str = ""
    reshapes: bool = False
    fixed: str = ""
    input_shape: tuple[int, ...] = field(default=(), compare=False)
    norm_follows: bool = False

    def __repr__(self) -> str:
        widths = f"{self.in_features:,} -> {self.hidden_features:,} -> {self.out_features:,}"
        tie = "" if self.owner == self.name else f", tied to {shortened(self.owner, 50)}"
        return f"<MLP {shortened(self.name, 50)}: {self.kind}, {widths}{tie}>"

    def params(self, hidden: int | None = None, *, owned: bool = True) -> int:
        """Parameters of its leaves, each counted once.

        Args:
            hidden: number of hidden units; its own by default.
            owned: whether it owns what can be shared; without, only what stays its own is counted.
        """
        hidden = self.hidden_features if hidden is None else hidden
        gone = self.hidden_features - hidden
        counted = [leaf for leaf in self.leaves if owned or not leaf.shareable]
        return sum(leaf.parameters - gone * leaf.per_unit - self._pairs(leaf.per_pair, hidden) for leaf in counted)

    def macs_gone(self, hidden: int) -> int:
        """Multiply-accumulates of Linear and Conv that go at each position when this many hidden units are left."""
        pairs = sum(self._pairs(leaf.per_pair, hidden) for leaf in self.leaves)
        return (self.hidden_features - hidden) * self.macs_per_unit + pairs

    def _pairs(self, count: int, hidden: int) -> int:
        """How many of `count` things, one for each pair of units, go."""
        return count - count * hidden**2 // self.hidden_features**2

    @cached_property
    def chain(self) -> tuple[object, ...]:
        """Equal for MLPs of one chain: same stage, same place in the block, same signature, same tokens."""
        return self.stage, self.name.removeprefix(self.block), self.acts_on, self.signature

    def leaf(self, role: str) -> Leaf:
        """Its first leaf of this role."""
        return next(leaf for leaf in self.leaves if leaf.role == role)


def first_units(mlp: MLP, order: Sequence[int], width: int) -> list[int]:
    """The first units of an order; of an MLP with groups, as many of each group."""
    if mlp.groups == 1:
        return list(order[:width])
    size = mlp.hidden_features // mlp.groups
    groups = [[unit for unit in order if unit // size == group] for group in range(mlp.groups)]
    return [unit for units in groups for unit in units[: width // mlp.groups]]


def slice_edit(mlp: MLP, uses: Sequence[MLP], units: Sequence[int]) -> Slice:
    """The edit that keeps `units` of an MLP, in all tensors that its `uses` run through.

    Raises:
        ReductionError: the MLP cannot be sliced.
    """
    if mlp.fixed:
        raise ReductionError(f"{mlp.name}: {mlp.fixed}, or exclude it")
    axes = list(mlp.axes)
    for other in uses:
        if other.name != mlp.name:  # what is tied is sliced once; norms of each depth are its own
            own = {leaf.path for leaf in other.leaves if not leaf.shareable}
            axes += [axis for axis in other.axes if axis.tensor.rpartition(".")[0] in own]
    return Slice(mlp.name, mlp.hidden_features, as_units(units), tuple(dict.fromkeys(axes)), mlp.settings)


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
