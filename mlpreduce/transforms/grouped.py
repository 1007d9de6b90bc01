"""`grouped`: share MLP weights between blocks.

Source: GroupedMLP, Krishna Kumar, "Parameter Reduction Improves Vision Transformers", arXiv 2512.01059, equation 1:
blocks (2i, 2i+1) use the MLP of the even one, whose W_fc1, W_fc2 and b_fc1 are scaled by 1/sqrt(2). The released code
scales by 0.707 (`scale="paper"`). Here any group, pattern (see `mlpreduce.transforms.patterns`) and depth, and 1/sqrt(uses)
exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from mlpreduce.edits import Assign, Edit, Replace, Scale, Share
from mlpreduce.errors import ReductionError, check_one_of, did_you_mean
from mlpreduce.graph import MLP
from mlpreduce.transforms.merging import KEEPS, KEPT_BY_DATA, MEANS, merge_of
from mlpreduce.transforms.parts import Parts
from mlpreduce.transforms.patterns import BY_DATA, groups_of
from mlpreduce.transforms.per_use import check_per_use, multiplies, scaled_tensor, uses_of_their_own, with_rank
from mlpreduce.transforms.registry import Config, register

SCALED = ("fc1.weight", "fc1.bias", "fc2.weight")  # equation 1; fc2.bias stays
SHARES = {"mlp": (), "attention": ("attention",), "block": ("attention", "other")}  # roles of leaves beside the MLP


def _corrects(config: Config) -> bool:
    """Whether corrections of the uses start at what the shared layer lacks."""
    own = config.get("per_use")
    return isinstance(own, Mapping) and own.get("init") == "residual"


def _looks_at_data(config: Config) -> bool:
    return config.get("pattern") in BY_DATA or config.get("keep") in KEPT_BY_DATA or _corrects(config)


def _without_data(config: Config) -> Config:
    """As many MLPs are left."""
    other = dict(config)
    if config.get("keep") in KEPT_BY_DATA:
        other["keep"] = "first"
    if _corrects(config):
        other["per_use"] = {key: value for key, value in config["per_use"].items() if key != "init"}
    if config.get("pattern") in BY_DATA:
        other["pattern"] = "cycle"
    return other


def _without_weights(config: Config) -> Config:
    other = dict(config)
    if config.get("keep") == "align_mean":
        other["keep"] = "mean"
    if config.get("scale") == "match_forward":
        other["scale"] = "none"
    return other


def _seeded(config: Config, seed: int) -> Config:
    own = config.get("per_use", "none")
    if own == "lora" or (isinstance(own, Mapping) and own.get("name") == "lora"):
        return {**config, "per_use": {"name": "lora", "seed": seed} | (dict(own) if isinstance(own, Mapping) else {})}
    return config


@register(
    "grouped",
    scope="chains",
    looks_at_data=_looks_at_data,
    without_data=_without_data,
    without_weights=_without_weights,
    seeded=_seeded,
)
def grouped(
    parts: Parts,
    *,
    group: int | str = 2,
    pattern: str | Sequence[Sequence[int]] = "sequence",
    scale: str | float | Mapping[str, float] = "inv_sqrt",
    keep: str = "first",
    remainder: str = "error",
    share: str = "mlp",
    repair: str = "none",
    per_use: str | Config | None = "none",
) -> Iterator[Edit]:
    """Share MLP weights between blocks of one stage.

    Tied are the leaf modules; norms before the MLP, drop paths, layer scales and BatchNorms stay each block's own.

    Args:
        parts: the MLPs in scope.
        group: blocks that share one MLP; `all`: those of a stage.
        pattern: `sequence` (neighbours), `cycle` (every n-th block, n the number of MLPs left), `cycle_reverse` (the
            same, the last cycle backwards), `sandwich` (neighbours, but the first and the last block of a stage keep
            their own), `similarity` (blocks whose MLPs give what is alike on the data; as many MLPs are left as of
            `cycle`), `cost` (the same by how far what the model gives moves when two of them share, one pair at a time,
            without `scale`, and without what `per_use` and `repair` make up for), or lists of the row numbers that a printed
            plan shows.
        scale: factor of the shared fc1.weight, fc1.bias and fc2.weight: `inv_sqrt` (1/sqrt of the uses), `paper`
            (0.707), `none`, a number, a number for each of these tensors, or `match_forward`: measured, so that the shared
            MLP gives noise as much energy as the MLPs it stands for did on average. For training from scratch; keep
            trained weights with `none`.
        keep: whose weights stay: `first`, `last`, their `mean`, `align_mean`, the mean after the hidden units of each are
            matched with those of the first by their weights, `align_activations`, the same by what they do on the data, or
            `auto`: for each group that of these with which it moves what the whole model gives least, on the data.
        remainder: of `sequence` and `sandwich`, when blocks are left over: `error`, `own` (a smaller group), `merge` (into
            the last).
        share: `mlp`; `attention` in its place, MLPs staying each block's own; or the whole `block`, norms and layer scales too.
        repair: `least_squares` refits the shared fc2 and its bias on the data, so that the stream after its uses is what it
            was; `parallel` for what the MLPs gave that it stands for; `bias` the bias alone; or `none`.
        per_use: what each use of a shared layer has of its own: `none`, `ssf` (a scale and shift of what fc1 and fc2 give),
            `lora` (a correction of low rank), `conv` (a depthwise convolution over the tokens before the MLP, which does not
            merge), or with options, `{"name": "lora", "rank": 8}`; `norm`: the norms and layer scales of blocks and MLPs are
            not shared. For trained weights `{"name": "lora", "init": "residual"}` starts each correction as the nearest to
            what the use had and the shared layer lacks, on the data; `target_params` in place of `rank` takes the highest rank
            with which the model has no more parameters, at most 1: a fraction.

    Raises:
        ReductionError: the blocks do not split so, are tied already, or an option is out of range; or there is no data
            for `similarity` or `cost`.
    """
    check_one_of("keep", keep, KEEPS)
    check_one_of("share", share, SHARES)
    check_per_use(parts, per_use, share, keep)
    if share == "attention" and repair != "none":
        raise ReductionError(f"repair={repair!r} refits MLPs that share, and share='attention' leaves each its own")
    tied = [mlp for mlp in parts if len({use.block for use in parts.uses(mlp)}) > 1]
    if tied and share != "attention":
        names = ", ".join(use.name for use in parts.uses(tied[0]))
        raise ReductionError(
            f"{names} are tied already, and nothing is scaled twice; mlpreduce.untie(model) undoes ties of this library, "
            f"exclude= leaves out those the model was built with"
        )
    norms = per_use != "norm"
    plain = keep if keep not in ("align_activations", "auto") else "first"  # these look at data for each pair

    def sharing(members: list[MLP]) -> list[Edit]:
        beside = _tie_beside(parts, members, plain, SHARES[share], norms=norms) if share != "mlp" else ()
        return [*beside, *(_sharing(parts, members, plain, "none", "none") if share != "attention" else ())]

    groups = groups_of(parts, group, pattern, remainder, sharing)
    shared = [members for members in groups if len(members) > 1] if share != "attention" else []
    if keep in ("align_activations", "auto"):
        parts.relate([(members[0], other) for members in shared for other in members[1:]])
    per_use = with_rank(parts, shared, per_use)
    keeps = [keep] * len(shared)
    if keep == "auto":
        if scale != "none" or share != "mlp":
            raise ReductionError("keep='auto' measures trained MLPs: use it with scale='none' and share='mlp'")
        if shared:
            keeps = _least_moved(parts, shared, per_use, repair)
    together: set[tuple[str, ...]] = set()
    for members in groups:
        blocks = tuple(member.block for member in members)
        if len(members) > 1 and share != "mlp" and blocks not in together:  # a block may have several MLPs
            together.add(blocks)
            yield from _tie_beside(parts, members, keep, SHARES[share], norms=norms)
        if members in shared:
            yield from _sharing(parts, members, keeps[shared.index(members)], scale, per_use)


def _sharing(
    parts: Parts,
    members: list[MLP],
    keep: str,
    scale: str | float | Mapping[str, float],
    per_use: str | Config | None,
) -> Iterator[Edit]:
    """The edits that leave one MLP for all members, each use with what it has of its own."""
    merge, factors = merge_of(parts, members, keep), _factors(scale, len(members))
    if scale == "match_forward":
        factors = dict.fromkeys(SCALED, _matching_factor(parts, members, merge.keeper, merge.values))
    yield from (Assign(path, value) for path, value in merge.values.items())
    yield from _tie(parts, members, merge.keeper, factors, own="norm" if per_use == "norm" else "")
    yield from uses_of_their_own(parts, merge, factors, per_use)


def _least_moved(parts: Parts, shared: Sequence[list[MLP]], per_use: str | Config | None, repair: str) -> list[str]:
    """For each group what is best kept, by how far what the whole model gives moves if that group alone shares.

    What is nearest to what the MLPs themselves gave need not be: errors weigh unlike where the model goes on from them. For the
    same reason a refit may do harm. The repair in turn then leaves it out, so of with and without a refit the nearer counts.
    """
    trials: dict[tuple[str, int, bool], list[Edit]] = {}  # what is kept, of which group, whether refitted
    refused = []
    for keep in KEEPS[:-1]:
        try:
            check_per_use(parts, per_use, "mlp", keep)
            edits = [list(_sharing(parts, members, keep, "none", per_use)) for members in shared]
        except ReductionError as error:  # units in groups, or layers without a mean: what is left can still be kept
            refused.append(str(error))
            continue
        values = (
            parts.refits([edit for some in edits for edit in some]) if repair in ("least_squares", "parallel") else {}
        )
        for number, (members, some) in enumerate(zip(shared, edits, strict=True)):
            paths = {member.leaf("fc2").path for member in members}
            new = {path: value for path, value in values.items() if path.rpartition(".")[0] in paths}
            if not new or repair != "parallel":
                trials[keep, number, False] = some
            if new:
                trials[keep, number, True] = _with_values(some, new)
    if not trials:
        raise ReductionError(refused[0])
    moved = parts.distances(trials)
    keeps = list(dict.fromkeys(keep for keep, *_ in trials))
    rows: list[dict[str, float]] = [{} for _ in shared]
    for (keep, number, _), value in moved.items():
        rows[number][keep] = min(value, rows[number].get(keep, math.inf))
    chosen = [min(row, key=row.__getitem__) for row in rows]
    means = ", ".join(f"{keep} {sum(row[keep] for row in rows) / len(rows):.3g}" for keep in keeps)
    taken = ", ".join(f"{keep} for {chosen.count(keep)}" for keep in dict.fromkeys(chosen))
    after = {"parallel": ", refitted", "least_squares": ", refitted where that is nearer"}.get(repair, "")
    parts.notes.append(
        f"keep='auto': {taken} of {len(shared)} groups; what the model gives moves with one group alone (1 - cosine{after}) on "
        f"average by: {means}"
    )
    parts.notes += [f"keep='auto' leaves out: {text}" for text in refused[:1]]
    return chosen


def _with_values(edits: Sequence[Edit], values: Mapping[str, torch.Tensor]) -> list[Edit]:
    """Edits with other values of some tensors; layers come around others that have theirs by then."""
    layers = [edit for edit in edits if isinstance(edit, Replace)]
    plain = [edit for edit in edits if not (isinstance(edit, Replace) or getattr(edit, "tensor", "") in values)]
    return [*plain, *(Assign(path, value) for path, value in values.items()), *layers]


def _factors(scale: str | float | Mapping[str, float], uses: int) -> dict[str, float]:
    """Factor of each scaled tensor."""
    rules = {"inv_sqrt": 1 / math.sqrt(uses), "paper": 0.707, "none": 1.0, "match_forward": 1.0}  # the last is measured
    if isinstance(scale, str):
        if scale not in rules:
            raise ReductionError(
                f"scale is {scale!r}{did_you_mean(scale, rules)}, a number, or a number for each tensor"
            )
        return dict.fromkeys(SCALED, rules[scale])
    factors = dict(scale) if isinstance(scale, Mapping) else dict.fromkeys(SCALED, scale)
    for name, factor in factors.items():
        if name not in (*SCALED, "fc2.bias"):
            raise ReductionError(f"scale has {name!r}{did_you_mean(str(name), (*SCALED, 'fc2.bias'))}")
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor < math.inf:
            raise ReductionError(f"scale of {name} is {factor!r}; it must be a positive number")
    return factors


def _tie(parts: Parts, members: list[MLP], keeper: MLP, factors: Mapping[str, float], own: str) -> Iterator[Edit]:
    """The edits that leave one MLP for all members, but for leaves of the role `own`."""
    for leaf in keeper.leaves:
        for name in ("weight", "bias"):
            factor = factors.get(f"{leaf.role}.{name}", 1.0)
            if factor != 1 and leaf.role in ("fc1", "fc2") and (path := scaled_tensor(parts, leaf, name)) is not None:
                yield Scale(path, float(factor))
    for member in members:
        if member is not keeper:
            for source, target in zip(keeper.leaves, member.leaves, strict=True):
                if source.shareable and source.role != own:
                    yield Share(source.path, target.path)


def _tie_beside(parts: Parts, members: list[MLP], keep: str, roles: Sequence[str], *, norms: bool) -> Iterator[Edit]:
    """The edits that leave one of what the blocks of all members have beside their MLPs; with norms and scales or without."""
    blocks = []
    for member in members:
        leaves = [leaf for leaf in parts.beside(member) if leaf.role in roles and leaf.shareable]
        leaves = [leaf for leaf in leaves if norms or multiplies(parts, leaf)]
        blocks.append({leaf.path.removeprefix(member.block): leaf for leaf in leaves})
    first, keeper = blocks[0], blocks[-1 if keep == "last" else 0]
    for member, block in zip(members, blocks, strict=True):
        if block.keys() != first.keys() or (not block and "other" not in roles):
            odd = sorted(block.keys() ^ first.keys())
            fact = f"{odd[0].lstrip('.')} is in one of them only" if odd else "there is no attention"
            raise ReductionError(
                f"{member.block} cannot share with {members[0].block}: {fact}; use share='mlp', or exclude it"
            )
    for relative, source in keeper.items():
        if keep in MEANS:
            for path in parts.tensors_of(source):
                name = path.removeprefix(source.path)
                values = [parts.tensor(block[relative].path + name).detach() for block in blocks]
                yield Assign(path, torch.stack(values).mean(0))
        for block in blocks:
            if block is not keeper:
                yield Share(source.path, block[relative].path)


def _matching_factor(parts: Parts, members: list[MLP], keeper: MLP, means: Mapping[str, torch.Tensor]) -> float:
    """The factor with which the shared MLP has the mean output energy of the members on standard normal inputs."""
    from scipy import optimize

    noise = torch.randn(256, keeper.in_features, device="cpu", generator=torch.Generator().manual_seed(0))
    paths = [
        path
        for leaf in keeper.leaves
        for name in ("weight", "bias")
        if f"{leaf.role}.{name}" in SCALED and (path := scaled_tensor(parts, leaf, name)) is not None
    ]
    values = {path: means[path] if path in means else parts.tensor(path) for path in paths}

    def energy(mlp: MLP, values: Mapping[str, torch.Tensor]) -> float:
        return parts.output(mlp, noise, values).double().square().mean().item()

    def excess(exponent: float) -> float:
        shared = energy(keeper, {**means, **{path: value * 2**exponent for path, value in values.items()}})
        return math.log2(shared / wanted) if shared and wanted else shared - wanted

    wanted = sum(energy(member, {}) for member in members) / len(members)
    low, high = -10.0, 10.0
    if not excess(low) < 0 < excess(high):
        raise ReductionError(
            f"scale='match_forward': no factor from {2**low:.2g} to {2**high:.2g} gives {keeper.name} the energy {wanted:.3g} "
            f"that {', '.join(member.name for member in members)} have on average; use another scale"
        )
    return float(2 ** optimize.brentq(excess, low, high, xtol=1e-6))
