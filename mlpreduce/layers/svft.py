"""A projection whose weight trains at a few entries between its singular vectors, which stay.

Source: SVFT (arXiv 2405.19597): W = U (diag(s) + sigmoid(gate) M) V^T.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import nn

from mlpreduce.errors import ReductionError, check_one_of, check_whole
from mlpreduce.layers.linear import decomposed, linear_of, place_of, weight_of
from mlpreduce.layers.wrapper import StandIn

__all__ = ["SvftLinear"]

PATTERNS = ("plain", "banded", "random", "top_k")
INITS = ("normal", "zeros")


class SvftLinear(StandIn):
    """y = U (diag(s) + sigmoid(gate) M) V^T x + b: only M, on a fixed set of entries, and the gate train.

    Attributes:
        left: (outputs, rank), left singular vectors; frozen.
        values: (rank,), singular values; frozen.
        right: (rank, inputs), right singular vectors; frozen.
        rows, columns: (entries,), where M may differ from 0; buffers.
        entries: (entries,), its values there.
        gate: (1,), before the sigmoid.
        bias: (outputs,), or None.

    Args:
        in_features: inputs.
        out_features: outputs.
        entries: how many entries of M train.
        rank: singular values; by default all.
        bias: whether there is one.
        device: where the tensors lie.
        dtype: their type.

    Raises:
        ReductionError: an option is out of range.
    """

    rows: torch.Tensor
    columns: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        entries: int,
        rank: int | None = None,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("out_features", out_features), ("entries", entries)):
            check_whole(f"SvftLinear: {name}", value)
        size = min(in_features, out_features)
        rank = size if rank is None else rank
        check_whole("SvftLinear: rank", rank)
        if rank > size or entries > rank * rank:
            raise ReductionError(f"SvftLinear: rank is {rank} and entries {entries}; at most {size} and rank squared")
        self.in_features, self.out_features = in_features, out_features
        zeros = partial(torch.zeros, device=device, dtype=dtype)
        self.left = nn.Parameter(zeros(out_features, rank), requires_grad=False)
        self.values = nn.Parameter(zeros(rank), requires_grad=False)
        self.right = nn.Parameter(zeros(rank, in_features), requires_grad=False)
        self.register_buffer("rows", torch.zeros(entries, device=device, dtype=torch.long))
        self.register_buffer("columns", torch.zeros(entries, device=device, dtype=torch.long))
        self.entries = nn.Parameter(zeros(entries))
        self.gate = nn.Parameter(zeros(1))
        self.bias = nn.Parameter(zeros(out_features)) if bias else None
        self._dense_trains = True

    @classmethod
    def in_place_of(cls, module: nn.Module, entries: int, rank: int) -> SvftLinear:
        """A layer of the widths of a `Linear`, its type and place, of zeros."""
        outputs, inputs = weight_of(module, "SvftLinear.in_place_of").shape
        made = cls(inputs, outputs, entries, rank, **place_of(module))
        made._dense_trains = module.get_parameter("weight").requires_grad
        return made

    @classmethod
    def from_linear(
        cls,
        layer: nn.Module,
        pattern: str = "plain",
        *,
        band: int = 1,
        rank: int | None = None,
        init: str = "normal",
        seed: int = 0,
    ) -> SvftLinear:
        """The decomposition of a dense layer, in float64.

        Args:
            layer: the dense layer.
            pattern: `plain` (the diagonal), `banded` (at most `band` beside it), `random` (as many entries as `banded`, each
                once), `top_k` (as many, where left and right singular vectors are most alike; of a layer that is not square
                the largest entries of the square one of both).
            band: entries on each side of the diagonal.
            rank: singular values that are kept; all, if none is given. With fewer the function changes.
            init: of M: `normal` with variance 2 / entries, as released, or `zeros`, which changes nothing.
            seed: of random entries and values.

        Raises:
            ReductionError: an option is out of range, or the layer is no `Linear` with finite values.
        """
        weight = weight_of(layer, "SvftLinear")
        check_one_of("SvftLinear: init", init, INITS)
        band, rank, _ = cls.sizes(layer, pattern, band, rank)
        left, values, right = decomposed(weight, "SvftLinear")
        left, values, right = left[:, :rank], values[:rank], right[:rank]
        generator = torch.Generator().manual_seed(seed)
        rows, columns = _entries(pattern, left, right, band, generator)
        made = cls.in_place_of(layer, len(rows), rank)
        drawn = torch.randn(len(rows), generator=generator) * math.sqrt(2 / len(rows))
        with torch.no_grad():
            for mine, given in (
                (made.left, left),
                (made.values, values),
                (made.right, right),
                (made.rows, rows),
                (made.columns, columns),
                (made.entries, drawn if init == "normal" else torch.zeros_like(drawn)),
            ):
                mine.copy_(given)
            if made.bias is not None:
                made.bias.copy_(layer.get_parameter("bias"))
        return made

    @staticmethod
    def sizes(layer: nn.Module, pattern: str, band: int, rank: int | None) -> tuple[int, int, int]:
        """The band, the rank and the number of entries that a layer has, as of `from_linear`; needs no values.

        Raises:
            ReductionError: an option is out of range, or the layer is no `Linear`.
        """
        size = min(weight_of(layer, "SvftLinear").shape)
        check_one_of("SvftLinear: pattern", pattern, PATTERNS)
        check_whole("SvftLinear: band", band, least=0)
        rank = size if rank is None else rank
        check_whole("SvftLinear: rank", rank)
        band = 0 if pattern == "plain" else band
        if rank > size or band >= rank:
            raise ReductionError(f"SvftLinear: rank is {rank} and band {band}; rank is at most {size}, band below it")
        return band, rank, rank * (2 * band + 1) - band * (band + 1)

    @property
    def weight_trains(self) -> bool:
        """Whether a weight in its place would train: as that did which it was made of."""
        return self._dense_trains

    @property
    def macs(self) -> tuple[int, int]:
        """Multiply-accumulates for each position, and once for each call."""
        return self.in_features * self.out_features, len(self.values) * self.in_features * (
            len(self.values) + self.out_features
        )

    def dense_weight(self) -> torch.Tensor:
        """The weight as it is, (outputs, inputs)."""
        core = torch.diag(self.values).index_put(
            (self.rows, self.columns), self.gate.sigmoid() * self.entries, accumulate=True
        )
        return self.left @ (core @ self.right)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., inputs) to (..., outputs). The weight is made at each call, which many tokens share."""
        return nn.functional.linear(x, self.dense_weight(), self.bias)

    def merged(self) -> nn.Linear:
        """The dense layer that computes the same."""
        return linear_of(self.dense_weight(), self.bias)

    def extra_repr(self) -> str:
        """Widths, rank, entries and whether there is a bias."""
        outputs, rank = self.left.shape
        return (
            f"{self.right.shape[1]}, {outputs}, rank={rank}, entries={len(self.entries)}, bias={self.bias is not None}"
        )


def _entries(
    pattern: str, left: torch.Tensor, right: torch.Tensor, band: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of the entries that train, each once."""
    rank = len(right)
    number = torch.arange(rank)
    near = (number[:, None] - number).abs() <= band
    if pattern == "random":
        flat = torch.randperm(rank * rank, generator=generator)[: int(near.sum())].sort().values
    elif pattern == "top_k":
        same = left.shape[0] == right.shape[1]
        alike = left.T @ right.T if same else left if left.shape[0] == rank else right
        if alike.shape != (rank, rank):
            raise ReductionError(f"SvftLinear: pattern='top_k' with rank {rank} needs the full rank; leave rank out")
        flat = alike.flatten().topk(int(near.sum())).indices.cpu().sort().values
    else:
        flat = near.flatten().nonzero().flatten()
    return flat // rank, flat % rank
