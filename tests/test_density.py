"""How dense activations are: the loss, the probe, and units that are never active."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers.runs import digits_run, same, state
from helpers.two_processes import Together
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mlpreduce
from mlpreduce import ReductionError, criteria
from mlpreduce import recipe as recipes
from mlpreduce.edits import Slice
from mlpreduce.search.spaces.points import Pricer
from mlpreduce.search.spaces.space import Suggestion
from mlpreduce.search.spaces.subjects import RecipeModel
from mlpreduce.testing import tiny_vit
from mlpreduce.train import DensityLoss, fit
from mlpreduce.train.density import layer_density
from mlpreduce.train.settings import DENSITY_THRESHOLDS as THRESHOLDS
from mlpreduce.train.settings import SupernetSettings


def images(count: int = 6) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(4))


def activations(model: nn.Module, batch: torch.Tensor) -> list[torch.Tensor]:
    """What fc2 is given in each block, by hooks on the MLPs, which are each block's own also where their layers are tied."""
    kept = []
    for block in model.blocks:
        block.mlp.register_forward_hook(
            lambda module, args, output: kept.append(module.act(module.fc1(args[0])).detach())
        )
    copied = model(batch)
    assert copied.isfinite().all()
    for block in model.blocks:
        block.mlp._forward_hooks.clear()
    return kept


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_is_that_of_the_formula(tied: bool) -> None:
    model = tiny_vit().double().eval()
    if tied:
        mlpreduce.apply(model, "grouped", group=2)
    batch = images().double()
    for eps in (1e-7, 1e-2):
        density = DensityLoss(model, eps=eps)
        with density.watching() as found:
            model(batch)
        hidden = activations(model, batch)
        assert len(hidden) == 4
        expected = torch.stack([(a**2 / (a**2 + eps)).mean() for a in hidden]).mean()
        torch.testing.assert_close(found(), expected, rtol=1e-10, atol=0)
    assert not any(leaf._forward_pre_hooks for leaf in model.modules())


def test_what_the_loss_says_of_single_numbers() -> None:
    """0 is 0, more is more, and it stays below 1."""
    values = [
        DensityLoss(tiny_vit())._mean([torch.full((1, 1, 1), a, dtype=torch.float64)]) for a in (0, 1e-4, -1e-3, 5)
    ]
    assert values[0] == 0
    assert sorted(values) == values
    assert values[-1] < 1
    half = DensityLoss(tiny_vit(), eps=1e-4)._mean([torch.full((1, 1, 1), 1e-2, dtype=torch.bfloat16)])
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(0.5, rel=1e-2)


def test_gradients_are_the_same_with_checkpointing() -> None:
    found = []
    for checkpointing in (False, True):
        model = tiny_vit().train()
        model.set_grad_checkpointing(checkpointing)
        with DensityLoss(model).watching() as density:
            logits = model(images())
        (logits.square().mean() + density()).backward()
        found.append([p.grad for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
def test_a_run_with_a_weight_is_sparser(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"probes": ["density"], "probe_images": 32, "epochs": 4, "accum_steps": 2}
    plain = fit(digits_run(tmp_path / "plain", **settings))[-1]["probes"]["density"]
    sparse_run = digits_run(tmp_path / "sparse", **settings, density_weight=2.0, density_eps=1e-3, amp="bfloat16")
    sparse = fit(sparse_run)[-1]["probes"]["density"]
    assert list(plain) == list(sparse)
    assert all(len(shares) == len(THRESHOLDS) for shares in plain.values())
    assert sum(shares[-1] for shares in sparse.values()) < 0.9 * sum(shares[-1] for shares in plain.values())
    assert sparse_run.config_hash != digits_run(tmp_path / "sparse", **settings, amp="bfloat16").config_hash


def test_without_a_weight_a_run_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    fit(digits_run(tmp_path / "plain", epochs=1, warmup_epochs=0))
    fit(digits_run(tmp_path / "zero", epochs=1, warmup_epochs=0, density_weight=0.0, density_eps=1e-3))
    plain, zero = state(tmp_path / "plain"), state(tmp_path / "zero")
    same(plain["state.pt"]["model"], zero["state.pt"]["model"])


def test_wrong_calls_are_told() -> None:
    with pytest.raises(
        ReductionError, match=r"DensityLoss\(VisionTransformer, eps=0\): eps is 0; it must be a number above 0"
    ):
        DensityLoss(tiny_vit(), eps=0)
    with pytest.raises(ReductionError, match="found no MLP"):
        DensityLoss(nn.Sequential(nn.Linear(2, 2)), example_inputs=torch.zeros(1, 2))
    with (
        DensityLoss(tiny_vit()).watching() as density,
        pytest.raises(ReductionError, match="no MLP of the model was run"),
    ):
        density()
    with pytest.raises(ReductionError, match=r"layer_density: images \(0, 3, 16, 16\); give at least one"):
        layer_density(tiny_vit(), images(0))
    with pytest.raises(ReductionError, match=r"watched by hooks, which train\.compile=true leaves out"):
        recipes.load("digits_tiny", ["train.density_weight=1.0", "train.compile=true"])
    with pytest.raises(ReductionError, match=r"what min_score=0\.0 leaves is known only when scores are"):
        recipes.load("digits_tiny", ['variants={a=[{transform="shallow",criterion="activation",min_score=0.0}]}'])


def _gradients(rank: int, folder: str) -> None:
    model = tiny_vit().double()
    density, replica = DensityLoss(model), DistributedDataParallel(model)
    with density.watching() as found:
        logits = replica(images(8).double()[rank::2])
    (logits.square().mean() + found()).backward()
    torch.save([parameter.grad for parameter in model.parameters()], f"{folder}/grads{rank}.pt")


@pytest.mark.processes
def test_two_processes_have_the_gradient_of_one(together: Together, tmp_path: Path) -> None:
    together(_gradients, str(tmp_path))
    model = tiny_vit().double()
    with DensityLoss(model).watching() as found:
        logits = model(images(8).double())
    (logits.square().mean() + found()).backward()
    for rank in range(2):
        for theirs, parameter in zip(torch.load(tmp_path / f"grads{rank}.pt"), model.parameters(), strict=True):
            torch.testing.assert_close(theirs, parameter.grad, rtol=1e-9, atol=1e-12)


def test_a_search_and_a_supernet_refuse_what_they_cannot_price_or_watch(tmp_path: Path) -> None:
    for criterion in ("l2", "activation"):
        step = {"transform": "shallow", "criterion": criterion, "min_score": 0.0}
        with pytest.raises(
            ReductionError,
            match=r"with min_score=0\.0 the cost follows from given weights, and a search knows costs before",
        ):
            Pricer(RecipeModel(recipes.load("digits_tiny"))).price(Suggestion((step,), {}))
    run = digits_run(tmp_path, density_weight=1.0)
    point = ({"transform": "shallow", "ratio": 0.5},)
    with pytest.raises(ReductionError, match=r"density_weight=1 watches the MLPs of the whole model"):
        fit(run.model_copy(update={"supernet": SupernetSettings(points=(point,), smallest=point), "steps": ()}))
    with pytest.raises(ReductionError, match="it must be a number"):
        mlpreduce.plan(tiny_vit(), "shallow", criterion="l2", min_score=10**400)


# --- units that are never active ----------------------------------------------------------------------------------------------


def quiet_units(model: nn.Module) -> nn.Module:
    """Of block 0 every other unit is never active, of block 1 the first 10, of block 2 all; of block 3 none."""
    with torch.no_grad():
        for block, units in zip(model.blocks, (slice(1, None, 2), slice(0, 10), slice(None)), strict=False):
            block.mlp.fc1.bias[units] = -100.0
    return model


def test_units_that_are_never_active_go_without_a_change(unchanged: Callable[[nn.Module], Callable[[], None]]) -> None:
    model = quiet_units(tiny_vit().double().eval())
    batch = images().double()
    before = model(batch)
    check = unchanged(model)
    config: dict[str, Any] = {"criterion": "activation", "min_score": 0.0, "data": [batch]}
    made = mlpreduce.plan(model, "shallow", **config)
    check()
    assert {edit.mlp: len(edit.units) for edit in made.of(Slice)} == {
        "blocks.0.mlp": 64,
        "blocks.1.mlp": 118,
        "blocks.2.mlp": 1,
    }
    other = mlpreduce.apply(copy.deepcopy(model), made)
    torch.testing.assert_close(other(batch), before, rtol=0, atol=1e-12)
    made = mlpreduce.plan(model, "shallow", **config, round_to=16)
    assert [len(edit.units) for edit in made.of(Slice)] == [64, 16]  # 118 are rounded up, to all
    with pytest.raises(ReductionError, match="nothing would change"):
        mlpreduce.plan(tiny_vit(), "shallow", criterion="activation", min_score=0.0, data=[images()])
    with pytest.raises(ReductionError, match=r"2 sizes are given \(ratio, min_score\)"):
        mlpreduce.plan(model, "shallow", ratio=0.5, **config)
    with pytest.raises(ReductionError, match=r"min_score is 'none'; it must be a number"):
        mlpreduce.plan(model, "shallow", criterion="l1", min_score="none")
    with pytest.raises(ReductionError, match="orders the units of each MLP, and gives no scores"):
        mlpreduce.plan(model, "shallow", min_score=1.0)


def test_of_groups_as_many_stay_as_the_fullest_needs() -> None:
    model = timm.create_model("visformer_tiny", depth=(1, 0, 0), img_size=64, num_classes=5).eval()
    (mlp,) = (m for m in mlpreduce.find_mlps(model) if m.groups > 1)
    size = mlp.hidden_features // mlp.groups
    scores = torch.zeros(mlp.hidden_features)
    scores[: size // 2] = 1.0
    scores[size : size + 3] = 1.0

    @criteria.register_criterion("given_for_test", needs="nothing")
    def given(units: Any) -> torch.Tensor:
        return scores

    try:
        made = mlpreduce.plan(model, "shallow", criterion="given_for_test", min_score=0.5)
    finally:
        del criteria.registry._CRITERIA["given_for_test"]
    (edit,) = (edit for edit in made.of(Slice) if edit.mlp == mlp.name)
    assert len(edit.units) == size // 2 * mlp.groups
    assert set(range(size // 2)) <= set(edit.units)
    assert {size, size + 1, size + 2} <= set(edit.units)


def test_the_probe_counts_what_is_above_each_threshold() -> None:
    model = quiet_units(tiny_vit().eval())
    batch = images(20)
    found = layer_density(model, batch)
    for name, hidden in zip(found, activations(model, batch), strict=True):
        assert found[name] == pytest.approx([(hidden.abs() > t).double().mean().item() for t in THRESHOLDS])
    assert found["blocks.2.mlp"] == [0.0, 0.0, 0.0]
    assert found["blocks.0.mlp"][0] <= 0.5
    tied = mlpreduce.apply(tiny_vit().eval(), "grouped", group=2)
    hidden = activations(tied, batch)
    both = torch.cat(hidden[:2]).abs()
    assert layer_density(tied, batch)["blocks.0.mlp"] == pytest.approx(
        [(both > t).double().mean().item() for t in THRESHOLDS]
    )
