"""Sums of a repair: products in the model's own type about a mean, and streams kept in memory or run for again."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import mlpreduce
from mlpreduce.calibration import Batch
from mlpreduce.calibration.sums import gram
from mlpreduce.edits import Assign
from mlpreduce.repair import whole
from mlpreduce.repair.fit import Fit, _changes, add_rows, empty_fit, solved
from mlpreduce.testing import tiny_vit


@pytest.mark.parametrize("size", [1, 5, 128, 300, 1000])
def test_a_product_by_blocks_is_the_whole_one(size: int) -> None:
    rows = torch.randn(7, size, dtype=torch.float64)
    found = gram(rows)
    torch.testing.assert_close(found, rows.T @ rows)
    assert torch.equal(found, found.T)


@pytest.mark.parametrize("weighed", [False, True])
def test_sums_in_single_precision_bear_a_large_mean(weighed: bool) -> None:
    """What deviates by one in a thousand of its mean would be rounding in products of single precision about 0."""
    generator = torch.Generator().manual_seed(0)
    inputs = 1000 + torch.randn(400, 6, generator=generator)
    missing = torch.randn(400, 3, generator=generator)
    weight = torch.rand(400, generator=generator) if weighed else None
    fit = _fit(nn.Linear(6, 3))
    add_rows(fit, 0, inputs[:100], missing[:100], weight=None if weight is None else weight[:100])
    add_rows(fit, 0, inputs[100:], missing[100:], weight=None if weight is None else weight[100:])
    given = torch.cat([inputs, torch.ones(400, 1)], 1).double()
    counts = torch.ones(400).double() if weight is None else weight.double()
    torch.testing.assert_close(fit.cross[0], (missing.double() * counts[:, None]).T @ given, rtol=1e-4, atol=1e-2)
    centred = given[:, :-1] - (counts[:, None] * given[:, :-1]).sum(0) / counts.sum()
    square = fit.square[0]
    found = square[:-1, :-1] - torch.outer(square[-1, :-1], square[-1, :-1]) / square[-1, -1]
    torch.testing.assert_close(found, centred.T @ (counts[:, None] * centred), rtol=1e-4, atol=1e-2)


def test_where_rounding_leaves_no_root_there_is_a_solution() -> None:
    """An indefinite matrix is solved as where outputs have factors of their own."""
    vectors = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    inner = vectors @ torch.diag(torch.tensor([-1.0, 1, 2, 3, 4, 1000]).double()) @ vectors.T
    square = torch.block_diag(inner, torch.ones(1, 1).double() * 50)
    cross = torch.randn(3, 7, dtype=torch.float64)
    alike = torch.full((3,), 0.5, dtype=torch.float64)
    apart = alike + torch.tensor([0, 1e-13, 0]).double()
    found, expected = (_changes(square, cross, True, factor)(1e-4) for factor in (alike, apart))
    assert found[:, :-1].any()
    torch.testing.assert_close(found, expected)


def _fit(layer: nn.Linear) -> Fit:
    return empty_fit(nn.ModuleDict({"fc2": layer}), "fc2")


@pytest.mark.parametrize("transform", ["shallow", "grouped"])
def test_kept_streams_and_those_run_for_again_give_the_same(monkeypatch: pytest.MonkeyPatch, transform: str) -> None:
    images = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model: Any = tiny_vit().double().eval()
    for name, parameter in model.named_parameters():
        if ".mlp." in name:
            nn.init.normal_(parameter, std=0.3)
    config: dict[str, Any] = {"ratio": 0.5} if transform == "shallow" else {"scale": "none"}
    lengths: list[int] = []
    one = 64 // 2 * model.embed_dim * 17 * 8  # bytes of the stream of one block for one batch
    made = []
    for most in (math.inf, 0.0, 5.5 * one):  # all, none, and what turns out to be too much on the way
        monkeypatch.setattr(whole, "allowed", lambda device, given, most=most: most)
        made.append(_counted(model, transform, config, images, lengths))
    assert made[0].of(Assign)
    for other in made[1:]:
        for edit, again in zip(made[0].of(Assign), other.of(Assign), strict=True):
            assert edit.tensor == again.tensor
            torch.testing.assert_close(edit.value, again.value, rtol=1e-9, atol=1e-12)
    kept, *again = lengths
    assert all(kept < runs for runs in again)  # of the whole model


def _counted(model: nn.Module, transform: str, config: dict[str, Any], images: torch.Tensor, lengths: list[int]) -> Any:
    """A plan, and how often the reduction's calibration ran the first MLP of the model."""
    runs = 0

    def run(batch: Batch, tree: nn.Module) -> Any:
        nonlocal runs
        runs += 1
        return original(batch, tree)

    original = Batch.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batch, "run", run)
        made = mlpreduce.plan(model, transform, data=[images], repair="least_squares", **config)
    lengths.append(runs)
    return made


@pytest.mark.parametrize("turned", [False, True])
def test_a_fit_from_other_values_is_least_squares_about_these(turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is solved anew on rows to which the ridge's are added; about the layer's own values it is the plain fit."""
    monkeypatch.setattr("mlpreduce.repair.fit.RIDGES", (0.5,))
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 4, generator=generator, dtype=torch.float64)
    layer: nn.Module = Conv1D(3, 4).double() if turned else nn.Linear(4, 3).double()
    factor = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    truth = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    missing = inputs @ truth + 0.1 * torch.randn(200, 3, generator=generator, dtype=torch.float64)
    fit = replace(empty_fit(nn.ModuleDict({"fc2": layer}), "fc2"), factor=factor)
    for half in range(2):
        add_rows(fit, half, inputs[half::2], missing[half::2], wanted=missing[half::2])
    layer.requires_grad_(False)
    weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
    begun = {"fc2.weight": weight + torch.randn(weight.shape, generator=generator), "fc2.bias": bias + 1}
    for start in ({"fc2.weight": weight, "fc2.bias": bias}, begun):
        found = solved(fit, start=start)[0]
        about = (start["fc2.weight"] - weight) if turned else (start["fc2.weight"] - weight).T
        ridge = 0.5 * float(factor.square().mean()) * float(((inputs - inputs.mean(0)) ** 2).sum(0).mean())
        for output in range(3):
            rows = factor[output] * torch.cat([inputs, torch.ones(200, 1)], 1)
            more = math.sqrt(ridge) * torch.eye(5, dtype=torch.float64)[:4]
            wanted = torch.cat([missing[:, output], math.sqrt(ridge) * about[:, output]])
            change = torch.linalg.lstsq(torch.cat([rows, more]), wanted[:, None]).solution[:, 0]
            new = (found["fc2.weight"] - weight) if turned else (found["fc2.weight"] - weight).T
            torch.testing.assert_close(new[:, output], change[:4], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(found["fc2.bias"][output] - bias[output], change[4], rtol=1e-6, atol=1e-6)


def test_the_fit_counts_with_which_the_model_gives_more_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of `reconstruction` the moments of every MLP are known, so the repair in turn has two fits to choose from."""
    torch.manual_seed(1)
    model: Any = tiny_vit().eval()
    for name, parameter in model.named_parameters():
        if ".mlp." in name or "patch_embed" in name:
            nn.init.normal_(parameter, std=0.3)
    images = torch.randn(160, 3, 16, 16)

    def nearness() -> float:
        made = mlpreduce.plan(
            model, "shallow", ratio=0.75, criterion="reconstruction", repair="least_squares", data=images[:128]
        )
        with torch.no_grad():
            return float(
                torch.cosine_similarity(
                    mlpreduce.apply(copy.deepcopy(model), made)(images[128:]), model(images[128:])
                ).mean()
            )

    both = nearness()
    monkeypatch.setattr("mlpreduce.transforms.parts.Parts.pairs", None)
    assert both > nearness()


@pytest.mark.parametrize("memory", [0.5, 1.2])
def test_where_moments_do_not_fit_the_second_fit_is_the_same(memory: float) -> None:
    """Moments that were given up after the choice of units are measured again for the repair."""
    torch.manual_seed(1)
    model: Any = tiny_vit().eval()
    for name, parameter in model.named_parameters():
        if ".mlp." in name:
            nn.init.normal_(parameter, std=0.3)
    images = torch.randn(128, 3, 16, 16)
    made = []
    for more in ({}, {"memory": memory}):
        criterion = {"name": "reconstruction", **more}
        made.append(
            mlpreduce.plan(model, "shallow", ratio=0.6, criterion=criterion, repair="least_squares", data=[images])
        )
    values = [{edit.tensor: edit.value for edit in one.of(Assign)} for one in made]
    assert made[0].structure().edits == made[1].structure().edits
    assert values[0].keys() == values[1].keys()
    assert all(torch.equal(values[1][path], value) for path, value in values[0].items())
