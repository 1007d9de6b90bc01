"""How the hidden units of one MLP go with those of another on calibration data, position by position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mlpreduce.calibration.measure import Measured, telling
from mlpreduce.calibration.quiet import quiet_copy, running
from mlpreduce.calibration.samples import Samples
from mlpreduce.calibration.sums import live_rows
from mlpreduce.calibration.taps import Taps
from mlpreduce.errors import ReductionError
from mlpreduce.graph import MLP

__all__ = ["measure_correlations"]

Pair = tuple[str, str]


def measure_correlations(
    model: nn.Module, mlps: Sequence[MLP], pairs: Sequence[tuple[MLP, MLP]], data: Any
) -> tuple[dict[Pair, torch.Tensor], Measured]:
    """Correlations of what fc2 is given in two MLPs at the same positions, over all positions of all examples.

    Args:
        model: the model; it is not changed.
        mlps: its MLPs, all uses of each.
        pairs: of MLPs that run at as many positions and are not tied.
        data: calibration data.

    Returns:
        (hidden units of the one, of the other) in float64 by names, 0 for a unit that never changes; and which data was read,
        without scores.

    Raises:
        ReductionError: as `measure_scores`; what a unit does is not finite, or two MLPs run at other positions.
    """
    samples = Samples(data, model, labels=False)
    problem: Exception | None = None
    cross: dict[Any, torch.Tensor] = {}
    alone: dict[Any, torch.Tensor] = {}  # rows, sums and sums of squares
    with running(samples.device, gradients=False), samples.shown("units that go together"):
        tree = quiet_copy(model)
        taps = Taps(tree, mlps, ("fc2",))
        names = {mlp.name for pair in pairs for mlp in pair}
        for one, other in pairs:
            shape = one.hidden_features, other.hidden_features
            cross[one.name, other.name] = torch.zeros(shape, dtype=torch.float64, device=samples.device)
        for mlp in (mlp for mlp in mlps if mlp.name in names):
            alone[mlp.name] = torch.zeros(3, mlp.hidden_features, dtype=torch.float64, device=samples.device)
        try:
            for batch, _ in samples.chunks():
                with telling(batch), taps.recording(len(batch)) as kept:
                    batch.run(tree)
                for name in names:
                    if not kept[name]:
                        raise ReductionError(
                            f"what the units of {name} do cannot be seen; use another keep, or exclude it"
                        )
                rows = {name: live_rows(kept[name][0], batch.mask) for name in names}
                for name, values in rows.items():
                    ones = torch.full_like(values[0], len(values))
                    alone[name] += torch.stack([ones, values.sum(0), values.double().square().sum(0)])
                for one, other in pairs:
                    if len(rows[one.name]) != len(rows[other.name]):
                        raise ReductionError(f"{one.name} and {other.name} do not run at the same positions")
                    cross[one.name, other.name] += rows[one.name].T @ rows[other.name]
        except Exception as error:  # whatever the data raises, or the model: the other processes are told
            problem = error
        every = samples.finish({**cross, **alone}, problem)
    found = {}
    for one, other in pairs:
        (count, sums, squares), (_, its_sums, its_squares) = every[one.name], every[other.name]
        covariance = every[one.name, other.name] - sums.outer(its_sums) / count[:, None]
        scale = [_spread(t, s, count[0]) for t, s in ((sums, squares), (its_sums, its_squares))]
        apart = torch.outer(*scale)
        found[one.name, other.name] = torch.where(apart > 0, covariance / apart.clamp(min=1e-300), 0.0)
        if not found[one.name, other.name].isfinite().all():
            raise ReductionError(
                f"what {one.name} or {other.name} does is not finite; look at the weights and the data"
            )
    return found, Measured({}, samples.count, samples.fingerprint)


def _spread(sums: torch.Tensor, squares: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Roots of the sums of squares about the mean; 0 where that is no more than rounding leaves of a constant."""
    about = (squares - sums.square() / count).clamp(min=0)
    return torch.where(about > 1e-10 * squares, about, 0.0).sqrt()
