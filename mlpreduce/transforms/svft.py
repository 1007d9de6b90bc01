"""`svft`: let MLP projections train at a few entries between their singular vectors.

Source: SVFT (arXiv 2405.19597): W = U (diag(s) + sigmoid(gate) M) V^T. A layer with n singular values trains n entries
(`plain`) or n (2 band + 1) - band (band + 1), and a gate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mlpreduce.criteria import derived_seed
from mlpreduce.edits import Replace
from mlpreduce.errors import check_one_of
from mlpreduce.layers import SvftLinear, layer_of
from mlpreduce.transforms.layers import LAYERS, check_seed, linears, replacing
from mlpreduce.transforms.parts import Parts
from mlpreduce.transforms.registry import register


@register(
    "svft",
    preserves="at_init",
    draws=lambda config: config.get("init") == "normal" or config.get("pattern") == "random",
)
def svft(
    parts: Parts,
    *,
    pattern: str = "plain",
    band: int = 1,
    rank: int | None = None,
    init: str = "zeros",
    layers: Sequence[str] = LAYERS,
    seed: int = 0,
) -> Iterator[Replace]:
    """Let MLP projections train at a few entries between their singular vectors, which stay.

    It adds no capacity to what runs: `merge` makes plain layers of them. Until then each call makes the weight anew. Other
    weights train as they did; freeze them as you like (`mlpreduce.layers.adapters`).

    Args:
        parts: the MLPs in scope.
        pattern: which entries train: `plain`, `banded`, `random`, `top_k`; see `mlpreduce.layers.SvftLinear`.
        band: entries on each side of the diagonal.
        rank: singular values that are kept; with fewer than all the function changes.
        init: of the entries: `zeros`, or `normal` as released, which changes the function a little.
        layers: `fc1`, `fc2`, or both.
        seed: of random entries and values.

    Raises:
        ReductionError: an option is out of range, or the weights have no values.
    """
    check_one_of("init", init, ("zeros", "normal"))
    check_seed(seed)
    for _, leaf, layer in linears(parts, "svft", layers):
        if layer.weight.is_meta:
            _, size, entries = SvftLinear.sizes(layer, pattern, band, rank)
            made = layer_of(SvftLinear, layer, {"entries": entries, "rank": size})
        else:
            of_its_own = derived_seed(seed, leaf.path)
            made = SvftLinear.from_linear(layer, pattern, band=band, rank=rank, init=init, seed=of_its_own)
        yield replacing(leaf.path, "svft", {"entries": len(made.entries), "rank": len(made.values)}, made)
