"""Sharpness-aware minimization: the step, and what it does to a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.marks import slow_but
from helpers.runs import digits_run, interrupt_after, same, state, synthetic_run
from helpers.two_processes import Together
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mlpreduce
from mlpreduce import ReductionError
from mlpreduce import recipe as recipes
from mlpreduce.recipe.describe import describe
from mlpreduce.testing import tiny_vit
from mlpreduce.train import ascended, fit
from mlpreduce.train import loop as loop_module
from mlpreduce.train.sam import random_states, second_pass


def tied() -> nn.Module:
    return mlpreduce.apply(tiny_vit(), "grouped", group=2).double()


def batch_of(rank: int = 0, world: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return images[rank::world], (torch.arange(8) % 5)[rank::world]


def loss_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_step_is_that_of_the_formula(adaptive: bool) -> None:
    model, batch = tied(), batch_of()
    loss_of(model, batch).backward()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    g = gradients(model)
    scaled = {name: g[name] * before[name].abs() if adaptive else g[name] for name in g}
    norm = torch.cat([value.flatten() for value in scaled.values()]).norm()  # tied weights once
    with ascended(model, 0.05, adaptive=adaptive) as found:
        torch.testing.assert_close(found, norm, rtol=1e-12, atol=0)
        steps = {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}
        for name, step in steps.items():
            expected = 0.05 * scaled[name] * (before[name].abs() if adaptive else 1) / norm
            torch.testing.assert_close(step, expected, rtol=1e-9, atol=1e-15)
        length = torch.cat([step.flatten() for step in steps.values()]).norm()
        if not adaptive:
            assert float(length) == pytest.approx(0.05, abs=1e-12)
        model.zero_grad()
        loss_of(model, batch).backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert not torch.equal(parameter.grad, g[name])


def test_a_step_of_zero_changes_no_gradient() -> None:
    model, batch = tied(), batch_of()
    loss_of(model, batch).backward()
    plain = gradients(model)
    second_pass(
        model, [(batch, random_states(torch.device("cpu")))], lambda batch: loss_of(model, batch).backward(), 0.0
    )
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, plain[name])


def test_on_a_quadratic_it_is_the_gradient_further_up() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, dtype=torch.float64, generator=generator)
    hessian = root @ root.T
    model = nn.Linear(6, 1, bias=False, dtype=torch.float64)
    w = model.weight.detach().clone().flatten()

    def backward(_: object) -> None:
        (0.5 * model.weight.flatten() @ hessian @ model.weight.flatten()).backward()

    backward(None)
    second_pass(model, [(None, random_states(torch.device("cpu")))], backward, 0.3)
    g = hessian @ w
    torch.testing.assert_close(model.weight.grad.flatten(), hessian @ (w + 0.3 * g / g.norm()), rtol=1e-12, atol=1e-12)


def check_moved(model: nn.Module, before: torch.Tensor) -> torch.Tensor:
    """An input that the model does not take, if its first weight is not what it was."""
    assert not torch.equal(model[0].weight, before)
    return torch.randn(5, 7)


def test_weights_come_back_after_an_error_and_statistics_stay() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    model(torch.randn(5, 3)).sum().backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="mat1 and mat2"), ascended(model, 1.0):
        model(check_moved(model, before["0.weight"]))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    model(torch.randn(5, 3))
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    model.zero_grad()
    with (
        pytest.raises(ReductionError, match="the model has no gradients; call backward before"),
        ascended(model, 1.0),
    ):
        pass
    with pytest.raises(ReductionError, match=r"rho is -1\.0"), ascended(model, -1.0):
        pass


# --- in a run ---------------------------------------------------------------------------------------------------------------


def test_both_passes_draw_the_same_random_numbers(tmp_path: Path) -> None:
    """With a step too small to move a weight, a run is bit for bit the plain one: same drops and mixes, and none used up."""
    plain = synthetic_run(tmp_path / "plain")
    model = {"name": plain.model.name, "kwargs": {**plain.model.kwargs, "proj_drop_rate": 0.2, "drop_path_rate": 0.2}}
    plain = plain.model_validate({**plain.model_dump(), "model": model})
    train = {**plain.train.model_dump(), "accum_steps": 2, "epochs": 2}
    fit(plain.model_validate({**plain.model_dump(), "train": train}))
    tiny = {**plain.model_dump(), "train": {**train, "sam_rho": 1e-30}, "directory": str(tmp_path / "tiny")}
    fit(plain.model_validate(tiny))
    mine, theirs = (state(tmp_path / name)["state.pt"] for name in ("plain", "tiny"))
    same(mine["model"], theirs["model"])
    same(mine["optimizer"], theirs["optimizer"])


def test_two_backward_passes_an_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    backward = loop_module._backward
    monkeypatch.setattr(loop_module, "_backward", lambda parts, batch: (calls.append(1), backward(parts, batch))[1])
    for rho, each in ((0.0, 2), (0.05, 4)):
        calls.clear()
        run = digits_run(tmp_path / str(rho), sam_rho=rho, accum_steps=2, epochs=1, warmup_epochs=0)
        fit(run)
        assert len(calls) == each * state(Path(run.directory))["state.pt"]["updates"]


ADAPTIVE = {"sam_adaptive": True, "clip_grad": 1.0, "accum_steps": 2}


@pytest.mark.parametrize("options", slow_but([{"amp": "bfloat16"}, ADAPTIVE], ADAPTIVE))
def test_a_run_resumes_exactly_and_is_another_one(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = digits_run(tmp_path / "whole", sam_rho=0.5, epochs=2, **options)
    history = fit(whole)
    parted = whole.model_copy(update={"directory": str(tmp_path / "parted")})
    interrupt_after(parted, 1)
    assert [entry["top1"] for entry in fit(parted)] == [entry["top1"] for entry in history]
    same(state(tmp_path / "whole"), state(tmp_path / "parted"))
    plain = fit(digits_run(tmp_path / "plain", epochs=2, **{**options, "sam_adaptive": False}))
    assert plain[-1]["train_loss"] != history[-1]["train_loss"]


def test_accumulated_micro_batches_are_one_batch(tmp_path: Path) -> None:
    after = []
    for steps in (1, 4):
        train = {"sam_rho": 0.5, "accum_steps": steps, "batch_size": 1436, "optimizer": "sgd", "mixup": 0.0, "lr": 0.5}
        run = digits_run(tmp_path / str(steps), warmup_lr=0.5, **train)
        kwargs = {**run.model.kwargs, "drop_path_rate": 0.0}
        run = run.model_validate({**run.model_dump(), "model": {"name": run.model.name, "kwargs": kwargs}})
        interrupt_after(run, 1)
        after.append(state(Path(run.directory))["state.pt"]["model"])
    for name, tensor in after[0].items():
        assert torch.allclose(tensor, after[1][name], atol=1e-5), name


def test_what_does_not_go_with_it() -> None:
    with pytest.raises(ReductionError, match="takes two gradients for an update, and the scaler"):
        recipes.load("digits_tiny", ["train.sam_rho=0.05", "train.amp=float16"])
    with pytest.raises(ReductionError, match="sam_rho=-1: it must be at least 0"):
        recipes.load("digits_tiny", ["train.sam_rho=-1"])
    with pytest.raises(ReductionError, match=r"train\.sam_sync=true: it does nothing, as train\.sam_rho is 0"):
        recipes.load("digits_tiny", ["train.sam_sync=true"])
    plain, twice = (describe(recipes.load("digits_tiny", [f"train.sam_rho={rho}"])) for rho in (0, 0.05))
    assert "about 3 x those of the forward pass x" in plain
    assert "about 6 x those of the forward pass x" in twice


# --- several processes ------------------------------------------------------------------------------------------------------


def _both(rank: int, folder: str) -> None:
    for sync in (True, False):
        model = tied()
        wrapped, batch = DistributedDataParallel(model), batch_of(rank, 2)
        halves = [((batch[0][part::2], batch[1][part::2]), random_states(torch.device("cpu"))) for part in (0, 1)]

        def backward(half: tuple[torch.Tensor, torch.Tensor], wrapped: nn.Module = wrapped) -> None:
            (loss_of(wrapped, half) / 2).backward()

        with wrapped.no_sync():
            backward(halves[0][0])
            if not sync:
                backward(halves[1][0])
        if sync:
            backward(halves[1][0])
        second_pass(model, halves, backward, 0.1, quiet=wrapped.no_sync)
        torch.save(gradients(model), f"{folder}/{sync}{rank}.pt")


@pytest.mark.processes
def test_two_processes_move_together_or_each_by_its_own(together: Together, tmp_path: Path) -> None:
    together(_both, str(tmp_path))
    whole, parts = batch_of(), [batch_of(rank, 2) for rank in range(2)]
    expected: dict[bool, dict[str, torch.Tensor]] = {True: sharp([whole], whole), False: {}}
    own = [sharp([part], part) for part in parts]
    expected[False] = {name: (own[0][name] + own[1][name]) / 2 for name in own[0]}
    for sync in (True, False):
        one, other = (torch.load(tmp_path / f"{sync}{rank}.pt", weights_only=True) for rank in range(2))
        for name, gradient in expected[sync].items():
            assert torch.equal(one[name], other[name])
            torch.testing.assert_close(one[name], gradient, rtol=1e-9, atol=1e-12)


def sharp(batches: list[tuple[torch.Tensor, torch.Tensor]], first: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Any]:
    """The gradients of a batch where the gradients of another lead."""
    model = tied()
    loss_of(model, first).backward()
    held = [(batch, random_states(torch.device("cpu"))) for batch in batches]
    second_pass(model, held, lambda batch: loss_of(model, batch).backward(), 0.1)
    return gradients(model)
