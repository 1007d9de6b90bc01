"""Widths at a budget by what was measured of each MLP at a few of them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mlpreduce.budget import measure
from mlpreduce.graph import find_mlps
from mlpreduce.search.spaces.allotting import PARTS, Allotment
from mlpreduce.search.spaces.goals import Budget
from mlpreduce.testing import tiny_vit


@pytest.mark.parametrize("part", [0.3, 0.5, 0.6])
def test_widths_have_the_least_sum_of_losses_between_those_that_were_measured(part: float) -> None:
    """Of losses whose logarithm bends, units are given one after the other to the MLP that gains most."""
    model = tiny_vit()
    mlps = find_mlps(model)
    measured, hidden = measure(model, None, mlps), mlps[0].hidden_features

    def loss(row: int, width: int) -> float:
        return math.exp(0.3 * row - 3 * width / hidden - 3 * (width / hidden) ** 2)

    widths = [int(part * hidden) for part in PARTS]
    losses = {mlp.name: {width: loss(row, width) for width in widths} for row, mlp in enumerate(mlps)}
    budget = Budget("mlp_params", "mlp_params", part * measured.cost.mlp_params)
    found = Allotment(mlps, measured, lambda: losses).widths([budget], "worth", {}, hidden)
    counts = np.array([found.get(mlp.name, hidden) for mlp in mlps])
    best = np.zeros_like(counts)
    for _ in range(counts.sum()):
        best[np.argmax([loss(row, width) - loss(row, width + 1) for row, width in enumerate(best)])] += 1
    assert np.abs(counts - best).max() <= 1
    assert counts.sum() == pytest.approx(part * hidden * len(mlps), rel=0.02)  # it is what the budget leaves
