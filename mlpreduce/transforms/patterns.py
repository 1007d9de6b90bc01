"""Which blocks share one MLP: patterns of `grouped`.

- `sequence`, `cycle` and `cycle_reverse`: Takase and Kiyono, "Lessons on Parameter Sharing across Layers in Transformers",
  arXiv 2104.06022. One group for all blocks is ALBERT's (arXiv 1909.11942), one for each stage MiniViT's (arXiv 2204.07154).
- `sandwich`: Reid et al., "Subformer: Exploring Weight Sharing for Parameter Efficiency in Generative Transformers", arXiv
  2101.00234: the first and the last block keep their own.
- `similarity`: clusters by the linear CKA (arXiv 1905.00414) of what MLPs give, with average linkage.
- `cost`: clusters by how far what the whole model gives moves when two MLPs share, with average linkage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from statistics import fmean

import numpy as np

from mlpreduce.edits import Edit
from mlpreduce.errors import ReductionError, check_one_of, did_you_mean
from mlpreduce.graph import MLP
from mlpreduce.transforms.parts import Parts

__all__ = ["BY_DATA", "groups_of"]

BY_DATA = ("similarity", "cost")
PATTERNS = ("sequence", "cycle", "cycle_reverse", "sandwich", *BY_DATA)
Pairs = dict[tuple[str, str], float]
REMAINDERS = ("error", "own", "merge")


def groups_of(
    parts: Parts,
    group: int | str,
    pattern: str | Sequence[Sequence[int]],
    remainder: str,
    sharing: Callable[[list[MLP]], Sequence[Edit]],
) -> list[list[MLP]]:
    """Groups of MLPs, in order of execution, of which each is to share one; of one member: those that keep their own.

    Args:
        parts: the MLPs in scope.
        group, pattern, remainder: as of `grouped`.
        sharing: the edits that leave one MLP for some.

    Raises:
        ReductionError: the MLPs do not split so, or an argument is out of range.
    """
    if not isinstance(pattern, (str, list, tuple)):
        raise ReductionError(f"pattern is {pattern!r}; it must be a name or lists of row numbers")
    if not isinstance(pattern, str):
        return _listed(parts, pattern)
    if pattern not in PATTERNS:
        raise ReductionError(f"pattern is {pattern!r}{did_you_mean(pattern, PATTERNS)}, or lists of row numbers")
    check_one_of("remainder", remainder, REMAINDERS)
    own = 1 if pattern == "sandwich" else 0  # at either end of a chain
    lengths = sorted({max(len(chain) - 2 * own, 0) for chain in parts.chains})
    fitting = [size for size in range(2, lengths[-1] + 1) if all(length % size == 0 for length in lengths)]
    advice = f"group must be one of {', '.join(map(str, fitting))}" if fitting else "no group divides all stages"
    if group != "all" and (isinstance(group, bool) or not isinstance(group, int) or group < 1):
        raise ReductionError(f"group is {group!r}, the number of blocks that share one MLP, or 'all'; {advice}")
    if pattern == "similarity":
        return _similar(parts, group)
    if pattern == "cost":
        return _cheapest(parts, group, sharing)
    groups = []
    for chain in parts.chains:
        inner = chain[own : len(chain) - own] if len(chain) > 2 * own else []
        size = max(len(inner), 1) if group == "all" else int(group)
        if remainder == "error" and len(inner) % size:
            where = f" ({inner[0].name} to {inner[-1].name})" if len(parts.chains) > 1 or own else ""
            raise ReductionError(
                f'{len(inner)} MLPs{where} do not split into equal groups; {advice}, or remainder="own" or "merge"'
            )
        which = _numbers(len(inner), size, pattern, remainder)
        middle = [[m for m, index in zip(inner, which, strict=True) if index == n] for n in dict.fromkeys(which)]
        ends = [[mlp] for mlp in chain if mlp not in inner]
        groups += sorted([*ends, *middle], key=lambda members: chain.index(members[0]))
    return groups


def _numbers(length: int, group: int, pattern: str, remainder: str) -> list[int]:
    """For each of the MLPs the number of its group."""
    if not length:
        return []
    if pattern in ("sequence", "sandwich"):
        count = max(length // group, 1) if remainder == "merge" else math.ceil(length / group)
        return [min(position // group, count - 1) for position in range(length)]
    count = math.ceil(length / group)
    which = [position % count for position in range(length)]
    if pattern == "cycle_reverse":
        start = (math.ceil(length / count) - 1) * count
        which[start:] = [count - 1 - index for index in which[start:]]
    return which


def _similar(parts: Parts, group: int | str) -> list[list[MLP]]:
    """Clusters of MLPs that give what is alike."""
    alike = parts.similarity()
    known = [value for (one, other), value in alike.items() if one != other and not math.isnan(value)]
    if not known:
        raise ReductionError(
            f"pattern='similarity': no two of {len(parts)} MLPs give anything but a constant on the data, so none are alike; "
            f"use other data, or another pattern"
        )
    # NaN: of one that gives a constant
    far = {pair: 1.0 if math.isnan(cka) else 1.0 - cka for pair, cka in alike.items()}
    groups = _clusters(parts, group, far)
    shared = [value for value in _within(groups, alike) if not math.isnan(value)]
    if shared:
        parts.notes.append(
            f"pattern='similarity': the mean CKA of MLPs that share is {fmean(shared):.3f}, of all {fmean(known):.3f}"
        )
    return groups


def _cheapest(parts: Parts, group: int | str, sharing: Callable[[list[MLP]], Sequence[Edit]]) -> list[list[MLP]]:
    """Clusters of MLPs that can stand for each other."""
    pairs = [pair for chain in parts.chains for pair in combinations(chain, 2)]
    far = parts.distances({(one.name, other.name): sharing([one, other]) for one, other in pairs})
    groups = _clusters(parts, group, far)
    if shared := _within(groups, far):
        parts.notes.append(
            f"pattern='cost': two MLPs that share move what the model gives by {fmean(shared):.3g} on average (1 - cosine), "
            f"any two of a stage by {fmean(far.values()):.3g}"
        )
    return groups


def _clusters(parts: Parts, group: int | str, far: Pairs) -> list[list[MLP]]:
    """As many clusters of each chain as `cycle` would leave MLPs, by distances."""
    from scipy.cluster import hierarchy

    groups = []
    for chain in parts.chains:
        count = 1 if group == "all" else math.ceil(len(chain) / int(group))
        distances = np.array([far[one.name, other.name] for one, other in combinations(chain, 2)])
        numbers = hierarchy.cut_tree(hierarchy.linkage(distances, "average"), n_clusters=count)[:, 0]
        groups += [[m for m, n in zip(chain, numbers, strict=True) if n == number] for number in dict.fromkeys(numbers)]
    return groups


def _within(groups: Sequence[list[MLP]], values: Pairs) -> list[float]:
    """The values of pairs that share."""
    return [values[one.name, other.name] for members in groups for one, other in combinations(members, 2)]


def _listed(parts: Parts, pattern: Sequence[Sequence[int]]) -> list[list[MLP]]:
    """Groups given by row numbers."""
    seen: set[int] = set()
    groups = []
    for rows in pattern:
        if not isinstance(rows, (list, tuple)) or not rows:
            raise ReductionError(f"pattern has {rows!r}; it must be lists of row numbers, such as [[0, 1], [2, 3]]")
        for row in rows:
            if isinstance(row, bool) or not isinstance(row, int) or not 0 <= row < len(parts):
                raise ReductionError(f"pattern has row {row!r}; rows in scope are 0 to {len(parts) - 1}")
            if row in seen:
                raise ReductionError(f"pattern has row {row} twice; a block has one MLP")
            seen.add(row)
        members = [parts[row] for row in sorted(rows)]
        for mlp in members[1:]:
            if mlp.chain != members[0].chain:
                raise ReductionError(
                    f"pattern groups {members[0].name} ({_shape(members[0])}) with {mlp.name} ({_shape(mlp)}), which "
                    f"are unlike or of different stages; print(mlpreduce.plan(...)) and group within a stage"
                )
        groups.append(members)
    return groups


def _shape(mlp: MLP) -> str:
    return f"{mlp.kind} {mlp.in_features}-{mlp.hidden_features}-{mlp.out_features} in {mlp.stage or 'the model'}"
