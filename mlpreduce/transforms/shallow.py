"""`shallow`: slice hidden units out of every MLP.

Source: ShallowMLP, Krishna Kumar, "Parameter Reduction Improves Vision Transformers", arXiv 2512.01059, equation 2:
W_fc1 <- W_fc1[:k, :], W_fc2 <- W_fc2[:, :k] with k = h / 2. The name is the paper's: MLPs become narrower, not fewer.
Here any width, any choice of units, and every tensor the hidden axis runs through.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from mlpreduce.budget import Slot
from mlpreduce.criteria import check_guard
from mlpreduce.edits import Slice
from mlpreduce.errors import ReductionError, check_number, check_one_of, check_whole, did_you_mean
from mlpreduce.graph import MLP
from mlpreduce.transforms.parts import Parts
from mlpreduce.transforms.registry import Config, Follows, register
from mlpreduce.transforms.targets import SCOPES, UNITS, solved_widths


def _without_data(config: Config) -> Config:
    """Widths that would follow from scores become equal parts: a target is met all the same, up to rounding."""
    return {key: "uniform" if key == "scope" else value for key, value in config.items() if key != "latency_weight"}


def _follows(config: Config) -> Follows | None:
    if config.get("min_score") is not None:
        return Follows("min_score", "scores", "ratio, widths or a target")
    if config.get("scope", "uniform") != "uniform":
        return Follows("scope", "scores", 'scope="uniform", or widths (width_per_block)', roughly=True)
    return None


@register("shallow", without_data=_without_data, follows=_follows)
def shallow(
    parts: Parts,
    *,
    ratio: float | None = None,
    width: int | None = None,
    widths: Sequence[int] | Mapping[str, int] | None = None,
    min_score: float | None = None,
    target_params: float | None = None,
    target_macs: float | None = None,
    target_latency: float | None = None,
    criterion: str | Config = "first",
    scope: str = "uniform",
    round_to: int = 1,
    latency_table: str | None = None,
    latency_weight: float = 0.0,
    repair: str = "none",
    guard: str | float = "auto",
    seed: int = 0,
) -> Iterator[Slice]:
    """Keep part of the hidden units of every MLP.

    A tied MLP is sliced once, for all its uses. Kept units stay in their order.

    Args:
        parts: the MLPs in scope.
        ratio: fraction of the hidden units to keep, in (0, 1]; the realised width is int(hidden * ratio). 0.5 if no
            size is given. With a scope beyond one MLP, the fraction of all their hidden units.
        width: the width to keep, the same for all, which must be alike.
        widths: the width of each MLP that is not tied to an earlier one, in order of execution, or by name.
        min_score: units whose score is above it stay, at least one multiple; 0 with `activation` takes away what is never
            active on the data, which changes nothing there.
        target_params: the most parameters the model may have; at most 1: a fraction of those it has.
        target_macs: the most multiply-accumulates, in the convention of `Cost.macs`; at most 1: a fraction.
        target_latency: the most milliseconds by `latency_table`; at most 1: a fraction.
        criterion: which units to keep, see `list_criteria`; or a dictionary with its name and options.
        scope: `uniform` (all MLPs keep the same fraction), or the scores of the criterion tell how many units each MLP
            keeps, `per_stage` (each stage keeps the same fraction) or `global`.
        round_to: widths become multiples of this, and of the groups of a grouped convolution, rounded down, at least
            one multiple.
        latency_table: path of a table that `budget.LatencyTable` has saved.
        latency_weight: of the milliseconds that a unit costs, which are taken from its score (the eta of NViT, 5e-4 there).
        repair: `least_squares` refits fc2 and its bias on the data, MLP by MLP in order of execution, so that the stream
            after it is what it was; `parallel` each MLP by itself; `bias` the bias alone; or `none`.
        guard: "auto": units that have more than 3 % of the output energy of their MLP, and more than 20 times the average, stay
            whatever the criterion says, at most one in 32 of those kept, where there is data to tell; a number: units above it;
            False: only the criterion counts, as in the papers. Not for `reconstruction`, which counts what they give.
        seed: of criteria that draw random numbers, `random` and `hessian_diag`.

    Raises:
        ReductionError: more than one size, a size out of range or that cannot be reached, an unknown criterion, or one that
            needs data and there is none.
    """
    given = {"ratio": ratio, "width": width, "widths": widths, "min_score": min_score}
    targets = {"target_params": target_params, "target_macs": target_macs, "target_latency": target_latency}
    sizes = [name for name, value in {**given, **targets}.items() if value is not None]
    if len(sizes) > 1:
        raise ReductionError(
            f"{len(sizes)} sizes are given ({', '.join(sizes)}); give one of {', '.join([*given, *targets])}"
        )
    for mlp in parts:
        if mlp.fixed:
            raise ReductionError(f"{mlp.name}: {mlp.fixed}, or exclude it")
    check_whole("round_to", round_to)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ReductionError(f"seed is {seed!r}; it must be a whole number")
    if not isinstance(criterion, (str, Mapping)):
        raise ReductionError(
            f"criterion is {criterion!r}; it must be a name, or a dictionary with its name and options"
        )
    check_one_of("scope", scope, SCOPES)
    check_guard(guard)
    check_number("latency_weight", latency_weight)
    if latency_weight and scope == "uniform":
        raise ReductionError(
            "latency_weight changes how MLPs compare, and scope='uniform' keeps the same part of each; give scope='global' or "
            "'per_stage'"
        )
    owners = _owners(parts)
    size = sizes[0] if sizes else "ratio"
    if size in UNITS or (size == "ratio" and scope != "uniform"):
        target = targets[size] if size in UNITS else _fraction(owners, ratio)
        kept = solved_widths(
            parts, owners, size, target, scope, criterion, round_to, latency_table, latency_weight, seed
        )
    elif scope != "uniform":
        raise ReductionError(
            f"{size} tells the width of each MLP, and scope={scope!r} would, too; give ratio or a target"
        )
    elif latency_table is not None:
        raise ReductionError(
            "latency_table counts where widths are solved for: give target_latency, or scope='per_stage' or scope='global' "
            "with latency_weight"
        )
    elif min_score is not None:
        check_number("min_score", min_score, least=-math.inf)
        kept = {mlp.name: _above(parts, mlp, min_score, criterion, round_to, seed) for mlp in owners}
    else:
        asked = _widths(parts, owners, ratio, width, widths)
        kept = {mlp.name: _rounded(mlp, count, round_to) for mlp, count in zip(owners, asked, strict=True)}
    for mlp in owners:
        if kept[mlp.name] < mlp.hidden_features:
            yield parts.keep(mlp, kept[mlp.name], criterion, seed, guard)
    parts.notes += parts.criterion_notes(criterion)


def _rounded(mlp: MLP, target: int, round_to: int) -> int:
    """The width that is realised."""
    if not 1 <= target <= mlp.hidden_features:
        raise ReductionError(
            f"{mlp.name} would keep {target} of {mlp.hidden_features} hidden units; it must be 1 to {mlp.hidden_features}"
        )
    return target if target == mlp.hidden_features else Slot.of(mlp, round_to, float).rounded(target)


def _above(parts: Parts, mlp: MLP, least: float, criterion: str | Config, round_to: int, seed: int) -> int:
    """The narrowest width that keeps every unit whose score is above the least."""
    above = parts.scores(mlp, criterion, seed) > least
    fullest = int(above.unflatten(0, (mlp.groups, -1)).sum(1).max()) * mlp.groups  # as many of each group are kept
    slot = Slot.of(mlp, round_to, float)
    return slot.above(max(fullest, 1) - 1)


def _owners(parts: Parts) -> list[MLP]:
    """The MLPs to slice: of tied ones the first. All uses must be in scope, as slicing one slices all."""
    names = {mlp.name for mlp in parts}
    owners: dict[str, MLP] = {}
    for mlp in parts:
        outside = [use.name for use in parts.uses(mlp) if use.name not in names]
        if outside:
            raise ReductionError(
                f"{mlp.name} is tied to {', '.join(outside)}, which is not in scope; include all or none"
            )
        owners.setdefault(mlp.owner, mlp)
    return list(owners.values())


def _fraction(owners: Sequence[MLP], ratio: float | None) -> float:
    """The ratio, checked."""
    ratio = 0.5 if ratio is None else ratio
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 1 or math.isnan(ratio):
        raise ReductionError(f"ratio is {ratio!r}; it is the fraction of hidden units to keep, above 0 and at most 1")
    for mlp in owners:
        if int(mlp.hidden_features * ratio) < 1:
            raise ReductionError(
                f"ratio {ratio} keeps none of the {mlp.hidden_features} hidden units of {mlp.name}; "
                f"the smallest ratio here is {1 / mlp.hidden_features:.3g}"
            )
    return ratio


def _widths(
    parts: Parts,
    owners: list[MLP],
    ratio: float | None,
    width: int | None,
    widths: Sequence[int] | Mapping[str, int] | None,
) -> list[int]:
    if widths is not None:
        return _given_widths(parts, owners, widths)
    if width is not None:
        hidden = sorted({mlp.hidden_features for mlp in owners})
        if len(hidden) > 1:
            raise ReductionError(
                f"width={width!r} for MLPs of {', '.join(map(str, hidden))} hidden units, which are unlike; give ratio, or "
                f"widths by name"
            )
        return [_whole("width", width)] * len(owners)
    ratio = _fraction(owners, ratio)
    return [int(mlp.hidden_features * ratio) for mlp in owners]


def _given_widths(parts: Parts, owners: list[MLP], widths: Sequence[int] | Mapping[str, int]) -> list[int]:
    if isinstance(widths, Mapping):
        names = [mlp.name for mlp in owners]
        for name in widths:
            tied = [mlp.name for mlp in owners for use in parts.uses(mlp) if use.name == name != mlp.name]
            if tied:
                raise ReductionError(f"widths has {name!r}, which is tied to {tied[0]}; give the width of that one")
            if name not in names:
                raise ReductionError(f"widths has {name!r}, which is no MLP to slice{did_you_mean(str(name), names)}")
        return [_whole(mlp.name, widths.get(mlp.name, mlp.hidden_features)) for mlp in owners]
    if not isinstance(widths, (list, tuple)) or len(widths) != len(owners):
        raise ReductionError(
            f"widths is {widths!r}; it must have one width for each of {len(owners)} MLPs, or be by name"
        )
    return [_whole(mlp.name, value) for mlp, value in zip(owners, widths, strict=True)]


def _whole(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ReductionError(f"{name}: width {value!r} is not a whole number")
    return value
