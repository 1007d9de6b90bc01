"""`low_rank`: write each projection of an MLP as a product of two thin ones.

Source: truncated singular value decomposition (Eckart and Young); with data, of the weight times a root of the second moments
of its inputs, so that the error of what the layer gives is least (as in ASVD, arXiv 2312.05821, and SVD-LLM, 2403.07378).
A layer of d inputs and h outputs keeps rank (d + h) weights of d h.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from mlpreduce.criteria import derived_seed
from mlpreduce.edits import Replace
from mlpreduce.errors import ReductionError, check_number, check_one_of, check_whole
from mlpreduce.layers import LowRankLinear, layer_of
from mlpreduce.transforms.layers import LAYERS, linears, replacing
from mlpreduce.transforms.parts import Parts
from mlpreduce.transforms.registry import Config, Follows, register

INITS = ("weights", "data", "new")


def _looks_at_data(config: Config) -> bool:
    return config.get("init") == "data"


def _without_data(config: Config) -> Config:
    return {**config, "init": "weights"} if _looks_at_data(config) else config


def _follows(config: Config) -> Follows | None:
    return None if config.get("energy") is None else Follows("energy", "weights", "ratio or rank")


@register(
    "low_rank",
    looks_at_data=_looks_at_data,
    without_data=_without_data,
    draws=lambda config: config.get("init") == "new",
    follows=_follows,
)
def low_rank(
    parts: Parts,
    *,
    ratio: float | None = None,
    rank: int | None = None,
    energy: float | None = None,
    target_params: float | None = None,
    layers: Sequence[str] = LAYERS,
    init: str = "weights",
    seed: int = 0,
) -> Iterator[Replace]:
    """Write each projection of an MLP as a product of two thin ones.

    A tied layer is replaced once, for all its uses.

    Args:
        parts: the MLPs in scope.
        ratio: the share of each layer's weights to keep, in (0, 1]; the rank is the highest with no more. 0.5 if nothing
            else is given.
        rank: features between, the same for all.
        energy: the share of each layer's energy to keep, in (0, 1]; the rank is the least that does.
        target_params: the most parameters the model may have, at most 1: a fraction of those it has; with the highest ratio
            that all layers can have in common.
        layers: `fc1`, `fc2`, or both.
        init: `weights` (the nearest to each weight), `data` (the nearest to what each layer gives on the data), or `new`, for
            training from scratch.
        seed: of new values.

    Raises:
        ReductionError: more than one size, an option out of range, a target out of reach, or no data for `data`.
    """
    sizes = {"ratio": ratio, "rank": rank, "energy": energy, "target_params": target_params}
    given = [name for name, value in sizes.items() if value is not None]
    if len(given) > 1:
        raise ReductionError(f"{' and '.join(given)} both say the size; give one of {', '.join(sizes)}")
    check_one_of("init", init, INITS)
    if rank is not None:
        check_whole("rank", rank)
    for name in ("ratio", "energy"):
        if sizes[name] is not None:
            check_number(name, sizes[name], most=1, above=True)
    if energy is not None and init == "new":
        raise ReductionError("energy is of given weights, and init='new' has none; give a ratio or a rank")
    found = [(leaf, layer) for _, leaf, layer in linears(parts, "low rank", layers)]
    if target_params is not None:
        ratio = _ratio_for(parts, [layer for _, layer in found], target_params)
    ratio = 0.5 if not given else ratio
    kept, whole, used, before = 0.0, 0.0, 0, 0
    generator = torch.Generator().manual_seed(derived_seed(seed, "low_rank"))
    for leaf, layer in found:
        wanted = rank if ratio is None else _rank(layer, ratio)
        if wanted == 0:
            raise ReductionError(
                f"ratio={ratio} leaves {leaf.path} no rank; a rank of 1 is {_ratio(layer, 1):.3g} of it"
            )
        if wanted is not None and (init == "new" or layer.weight.is_meta):
            made = layer_of(LowRankLinear, layer, {"rank": wanted})
            _draw(made, layer, generator)
        else:
            moments = parts.moments(leaf) if init == "data" else None
            made = LowRankLinear.from_linear(layer, wanted, energy=energy, moments=moments)
            kept, whole = kept + made.kept, whole + 1
        used, before = used + made.down.numel() + made.up.numel(), before + layer.weight.numel()
        yield replacing(leaf.path, "low_rank", {"rank": made.down.shape[0]}, made)
    if whole:
        of = "what they give on the data" if init == "data" else "their weights"
        parts.notes.append(f"{len(found)} layers keep {kept / whole:.1%} of the energy of {of} on average")
    if used > before:
        parts.notes.append(
            f"they have {used:,} weights, more than the {before:,} of before: the ranks are too high to save"
        )


def _rank(layer: nn.Linear, ratio: float) -> int:
    """The highest rank with no more than that share of the weights."""
    outputs, inputs = layer.weight.shape
    return min(int(ratio * outputs * inputs / (outputs + inputs) + 1e-9), outputs, inputs)


def _ratio(layer: nn.Linear, rank: int) -> float:
    outputs, inputs = layer.weight.shape
    return rank * (outputs + inputs) / (outputs * inputs)


def _ratio_for(parts: Parts, layers: Sequence[nn.Linear], target: float) -> float:
    """The highest ratio by which the model has no more than so many parameters."""
    check_number("target_params", target, above=True)
    present = parts.counts.cost.params
    most = int(target * present) if target <= 1 else int(target)
    fixed = present - sum(layer.weight.numel() for layer in layers)

    def params(ratio: float) -> int:
        return fixed + sum(_rank(layer, ratio) * sum(layer.weight.shape) for layer in layers)

    least = max(_ratio(layer, 1) for layer in layers)
    ratios = {1.0} | {_ratio(layer, rank) for layer in layers for rank in range(1, _rank(layer, 1.0) + 1)}
    for ratio in sorted((ratio for ratio in ratios if least <= ratio <= 1), reverse=True):
        if params(ratio) <= most:
            return ratio
    raise ReductionError(
        f"target_params={target}: the model has {present:,} parameters, and {params(least):,} to {params(1.0):,} with "
        f"projections of low rank"
    )


def _draw(made: LowRankLinear, layer: nn.Linear, generator: torch.Generator) -> None:
    """New values of a layer, of its own generator; the bias is that of the layer before."""
    if made.down.is_meta:
        return
    std = (1 / (3 * made.in_features * len(made.down))) ** 0.25
    with torch.no_grad():
        for factor in (made.down, made.up):
            factor.copy_(std * torch.randn(factor.shape, generator=generator, device="cpu"))
        if made.bias is not None:
            made.bias.copy_(layer.bias)
