"""What a report says of the probes at the end of training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import fmean
from typing import Any

from mlpreduce.records import Record

__all__ = ["HEADERS", "NOTE", "TITLE", "any_in", "cells"]

TITLE = "Probes at the last epoch"
HEADERS = (
    *("variant", "source", "lambda_max", "SAM gap"),
    *("smallest gradient norm of an MLP", "largest gradient norm of an MLP", "mean CKA of neighbouring MLPs"),
    "activations above 0.01",
)
NOTE = (
    "Probes, of the trained weights on images of the validation set, means over seeds. lambda_max: largest eigenvalue of the "
    "Hessian of the cross entropy. SAM gap: its growth over a step of length 0.05 along the gradient, in nats. Gradient norms: "
    "of the parameters of each unique MLP. CKA: linear, of the outputs of MLPs that follow each other. Activations: "
    "of hidden units, in magnitude, as a share, mean over "
    "MLPs. docs/probes.md has more."
)


def any_in(records: Iterable[Record]) -> bool:
    """Whether a run was probed in any epoch."""
    return any(entry.probes for record in records for entry in record.epochs)


def cells(records: Iterable[Record]) -> list[str]:
    """The row of a variant, from the records of its seeds."""
    found = [record.epochs[-1].probes for record in records]
    columns: list[Callable[[dict[str, Any]], float | None]] = [
        lambda probes: probes["sharpness"]["lambda_max"],
        lambda probes: probes["sharpness"]["sam_gap"],
        lambda probes: _of(min, probes["gradients"].values()),
        lambda probes: _of(max, probes["gradients"].values()),
        lambda probes: _of(fmean, [rows[number + 1] for number, rows in enumerate(probes["similarity"][:-1])]),
        lambda probes: fmean(shares[-1] for shares in probes["density"].values()),
    ]
    needed = ("sharpness", "sharpness", "gradients", "gradients", "similarity", "density")
    return [
        _cell([column(probes) for probes in found if name in probes])
        for name, column in zip(needed, columns, strict=True)
    ]


def _of(function: Callable[[list[float]], float], values: Iterable[float | None]) -> float | None:
    """Of what is finite; None where nothing is."""
    known = [value for value in values if value is not None]
    return function(known) if known else None


def _cell(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "not finite" if values else "not measured"
    return f"{fmean(known):.4g}"
