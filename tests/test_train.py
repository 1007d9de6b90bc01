from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mlpreduce
from mlpreduce.errors import ReductionError
from mlpreduce.testing import tiny_vit
from mlpreduce.train import Run, Runtime, TrainingStopped, build_model, create_ema, evaluate, fit, learning_rates
from mlpreduce.train.parts import create_optimizer
from mlpreduce.train.settings import TrainSettings

SMALL_VIT = {
    "img_size": 8,
    "patch_size": 4,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 16,
    "depth": 4,
    "num_heads": 2,
    "class_token": False,
    "global_pool": "avg",
    "drop_path_rate": 0.1,
}
DIGITS = {"name": "digits", "image_size": 8}
TIMES = ("train_seconds", "images_per_s")


def digits_run(directory: Path, **train: Any) -> Run:
    """A tied ViT on the digits, small enough for a second an epoch."""
    settings = {"epochs": 3, "batch_size": 64, "lr": 3e-3, "warmup_epochs": 1, "ema_decay": 0.9, "mixup": 0.5, **train}
    return Run(
        recipe="test",
        variant="grouped",
        steps=({"transform": "grouped", "group": 2},),
        model={"name": "vit_tiny_patch16_224", "kwargs": SMALL_VIT},  # type: ignore[arg-type]
        data=DIGITS,  # type: ignore[arg-type]
        train=settings,  # type: ignore[arg-type]
        directory=str(directory),
    )


def same(left: Any, right: Any, path: str = "") -> None:
    """Assert that two states are equal to the last bit."""
    assert type(left) is type(right), path
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), path
    elif isinstance(left, dict):
        assert list(left) == list(right), path
        for key in left:
            if key not in TIMES and key not in ("facts", "config_hash"):
                same(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), path
        for number, pair in enumerate(zip(left, right, strict=True)):
            same(*pair, f"{path}[{number}]")
    else:
        assert left == right, path


def state(directory: Path) -> dict[str, Any]:
    """All that a run has left, random states included."""
    found = sorted(directory.glob("*.pt"))
    assert len(found) >= 2
    return {path.name: torch.load(path, weights_only=True) for path in found}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Interrupted(Exception):
    pass


def interrupt_after(run: Run, epochs: int, **runtime: Any) -> None:
    def report(event: dict[str, Any]) -> None:
        if event["event"] == "epoch" and event["epoch"] == epochs:
            raise Interrupted

    with pytest.raises(Interrupted):
        fit(run, Runtime(report=report, **runtime))


# --- the moving average and the optimizer -----------------------------------------------------------------------------


def moved(group: int, *, per_alias: bool) -> set[float]:
    """How far each averaged tensor moves in one update from 1 to 0."""
    model = mlpreduce.apply(tiny_vit(depth=12), "grouped", group=group)
    ema = create_ema(model, 0.9, per_alias=per_alias)
    with torch.no_grad():
        for tensor in ema.module.parameters():
            tensor.fill_(1.0)
        for tensor in model.parameters():
            tensor.fill_(0.0)
    ema.update(model)
    return {round(tensor.detach().min().item(), 5) for tensor in ema.module.parameters()}


@pytest.mark.parametrize("group", [2, 3, 4])
def test_ema_decays_a_tied_tensor_once(group: int) -> None:
    assert moved(group, per_alias=False) == {0.9}
    assert moved(group, per_alias=True) == {0.9, round(0.9**group, 5)}  # as published, and what the test can see


def test_ema_copies_buffers_and_stays_tied() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = create_ema(model, 0.5)
    model(torch.randn(8, 2))
    ema.update(model)
    assert torch.equal(ema.module[1].running_mean, model[1].running_mean)
    tied = mlpreduce.apply(tiny_vit(), "grouped", group=2)
    averaged = create_ema(tied, 0.5).module
    assert averaged.blocks[1].mlp.fc1.weight is averaged.blocks[0].mlp.fc1.weight
    with pytest.raises(ReductionError, match="decay=1"):
        create_ema(tied, 1.0)


def test_optimizer_decays_a_tied_tensor_once() -> None:
    model = mlpreduce.apply(tiny_vit(), "grouped", group=2)
    optimizer = create_optimizer(model, TrainSettings(lr=0.1, weight_decay=0.5))
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(model.parameters()))
    weight = model.blocks[0].mlp.fc1.weight
    before = weight.detach().clone()
    for parameter in held:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(weight, before * (1 - 0.1 * 0.5))


def test_unknown_optimizer_and_schedule_are_refused() -> None:
    with pytest.raises(ReductionError, match="did you mean 'adamw'"):
        create_optimizer(nn.Linear(1, 1), TrainSettings(optimizer="adamww"))
    with pytest.raises(ReductionError, match="did you mean 'cosine'"):
        learning_rates(TrainSettings(schedule="cosin"), 1)


def test_published_learning_rates() -> None:
    rates = learning_rates(TrainSettings(), 1251)
    assert rates[:6] == pytest.approx([1e-5, 2.08e-4, 4.06e-4, 6.04e-4, 8.02e-4, 9.993e-4], rel=1e-4)
    assert rates[-1] == pytest.approx(2.7e-8, rel=0.02)
    assert len(rates) == 300


# --- one run ------------------------------------------------------------------------------------------------------------


def test_fit_learns_and_reports(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    run = digits_run(tmp_path, epochs=4, mixup=0.0, label_smoothing=0.1)
    history = fit(run, Runtime(report=events.append))
    assert [event["event"] for event in events if event["event"] != "progress"] == ["start", *["epoch"] * 4, "end"]
    assert history[-1]["top1"] > 50
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert all(entry["top5"] >= entry["top1"] and 0 <= entry["raw_top1"] <= 100 for entry in history)
    assert history[-1]["top1"] * 3.6 == pytest.approx(
        round(history[-1]["top1"] * 3.6), abs=1e-6
    )  # counts of 360 images
    facts = events[0]["facts"]
    assert facts["profile"]["unique_mlps"] == 2
    assert json.loads(facts["plans"][0])
    assert facts["updates_per_epoch"] == 22
    best = mlpreduce.load(tmp_path / "model")
    assert best.blocks[1].mlp.fc1 is best.blocks[0].mlp.fc1
    from mlpreduce.data import load

    again = evaluate(best, load(run.data, run.train, micro_batch=64).val, Runtime())
    assert again["top1"] == max(entry["top1"] for entry in history)
    assert again["images"] == 360


def test_all_variants_of_a_seed_start_from_the_same_weights(tmp_path: Path) -> None:
    run = digits_run(tmp_path)
    baseline = build_model(run.model_copy(update={"steps": ()}))
    shallow = build_model(run.model_copy(update={"steps": ({"transform": "shallow", "ratio": 0.5},)}))
    assert torch.equal(baseline.blocks[3].attn.qkv.weight, shallow.blocks[3].attn.qkv.weight)
    thin = build_model(run.model_copy(update={"steps": ({"transform": "thin", "mlp_ratio": 2.0},)}))
    assert thin.blocks[0].mlp.fc1.out_features == 32


@pytest.mark.parametrize("amp", ["none", "bfloat16", "float16"])
def test_resumed_run_is_exact(tmp_path: Path, amp: str) -> None:
    whole = digits_run(tmp_path / "whole", amp=amp, mixup=0.5, cutmix=1.0, accum_steps=3, batch_size=66, clip_grad=1.0)
    parted = whole.model_copy(update={"directory": str(tmp_path / "parted")})
    history = fit(whole)
    interrupt_after(parted, 1)
    torch.rand(7)  # whatever else the process did in between
    resumed = fit(parted)
    same(state(tmp_path / "whole"), state(tmp_path / "parted"))
    same(history, resumed)
    assert fit(parted) == resumed  # a finished run is not trained again


def test_resumed_run_on_augmented_images_is_exact(tmp_path: Path) -> None:
    whole = synthetic_run(tmp_path / "whole")
    fit(whole)
    parted = whole.model_copy(update={"directory": str(tmp_path / "parted")})
    interrupt_after(parted, 1)
    fit(parted)
    same(state(tmp_path / "whole"), state(tmp_path / "parted"))


def synthetic_run(directory: Path) -> Run:
    base = digits_run(directory)
    data = {"name": "synthetic", "image_size": 8, "train_samples": 96, "val_samples": 20, "classes": 10, "workers": 0}
    augment = {"auto_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.5, "cutmix": 1.0, "mixup": 0.8}
    return Run(
        **{
            **base.model_dump(),
            "model": {"name": base.model.name, "kwargs": {**SMALL_VIT, "in_chans": 3}},
            "data": data,
            "train": {**base.train.model_dump(), **augment, "batch_size": 32},
        }
    )


def test_resume_without_the_random_states_would_differ(tmp_path: Path) -> None:
    """What the exactness tests rest on: they fail when a random state is lost."""
    run = digits_run(tmp_path / "one")
    interrupt_after(run, 1)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    other = run.model_copy(update={"directory": str(tmp_path / "two")})
    path = tmp_path / "two" / "rng0-1.pt"
    rng = torch.load(path, weights_only=True)
    rng["numpy"][1][0] ^= 1
    rng["numpy"][2] = 624
    torch.save(rng, path)
    fit(run)
    fit(other)
    with pytest.raises(AssertionError):
        same(state(tmp_path / "one"), state(tmp_path / "two"))


def test_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    run = digits_run(tmp_path, epochs=2)
    interrupt_after(run, 1)
    with pytest.raises(ReductionError, match=r"written with other settings .* in another --output"):
        fit(run.model_copy(update={"train": run.train.model_copy(update={"lr": 1e-3})}))
    with pytest.raises(ReductionError, match=r"for 2 worker\(s\), the group has 1"):
        fit(run.model_copy(update={"workers": 2}))
    (tmp_path / "rng0-1.pt").unlink()
    with pytest.raises(ReductionError, match="storage that all workers share"):
        fit(run)


def test_diverged_run_stops_and_keeps_the_last_whole_epoch(tmp_path: Path) -> None:
    run = digits_run(tmp_path)
    interrupt_after(run, 1)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    saved["model"]["head.weight"].fill_(math.inf)
    torch.save(saved, tmp_path / "checkpoint.pt")
    with pytest.raises(
        TrainingStopped, match=r"the training loss is nan in epoch 2.*1 whole epoch\(s\).*lower train.lr"
    ):
        fit(run)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["epoch"] == 1


def test_wrong_number_of_classes_is_refused(tmp_path: Path) -> None:
    run = digits_run(tmp_path)
    model = run.model.model_copy(update={"kwargs": {**SMALL_VIT, "num_classes": 7}})
    with pytest.raises(ReductionError, match=r"use model\.kwargs\.num_classes=10"):
        fit(run.model_copy(update={"model": model}))


def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    after = []
    for steps in (1, 4):  # one update of 1,436 images: at once, or as 4 x 359
        run = digits_run(tmp_path / str(steps), accum_steps=steps, batch_size=1436, optimizer="sgd", mixup=0.0)
        model = {"name": run.model.name, "kwargs": {**SMALL_VIT, "drop_path_rate": 0.0}}
        run = Run(
            **{**run.model_dump(), "model": model, "train": {**run.train.model_dump(), "lr": 0.5, "warmup_lr": 0.5}}
        )
        interrupt_after(run, 1)
        after.append(torch.load(Path(run.directory) / "checkpoint.pt", weights_only=True))
    assert [saved["updates"] for saved in after] == [1, 1]
    start = build_model(run).state_dict()
    for name, tensor in after[0]["model"].items():
        assert torch.allclose(tensor, after[1]["model"][name], atol=1e-6), name
    assert any(not torch.allclose(start[name], tensor, atol=1e-3) for name, tensor in after[0]["model"].items())


# --- several processes ----------------------------------------------------------------------------------------------------


def join(rank: int, folder: str, group: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{group}", rank=rank, world_size=2)


def _gradients(rank: int, folder: str) -> None:
    join(rank, folder, "gradients")
    model = tied_double()
    images, labels = batch()
    wrapped = DistributedDataParallel(model)
    halves = list(zip(images.chunk(4), labels.chunk(4), strict=True))[rank::2]  # two micro-batches each
    with wrapped.no_sync():
        (nn.functional.cross_entropy(wrapped(halves[0][0]), halves[0][1]) / 2).backward()
    (nn.functional.cross_entropy(wrapped(halves[1][0]), halves[1][1]) / 2).backward()
    torch.save({name: p.grad for name, p in model.named_parameters()}, f"{folder}/grad{rank}.pt")
    dist.destroy_process_group()


def tied_double() -> nn.Module:
    torch.manual_seed(0)
    return mlpreduce.apply(tiny_vit(), "grouped", group=2).double()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(16, 3, 16, 16, generator=generator, dtype=torch.float64),
        torch.randint(0, 5, (16,), generator=generator),
    )


@pytest.mark.slow
def test_two_processes_give_the_gradient_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_gradients, args=(str(tmp_path),), nprocs=2)
    model = tied_double()
    images, labels = batch()
    nn.functional.cross_entropy(model(images), labels).backward()
    for rank in range(2):
        gradients = torch.load(tmp_path / f"grad{rank}.pt", weights_only=True)
        assert list(gradients) == [name for name, _ in model.named_parameters()]
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert torch.allclose(gradients[name], parameter.grad, rtol=0, atol=1e-12), name
            assert parameter.grad.abs().max() > 0, name


def _fit_pair(rank: int, folder: str, name: str, stop_after: int) -> None:
    join(rank, folder, f"{name}{stop_after}")

    def report(event: dict[str, Any]) -> None:
        if event["event"] == "epoch" and event["epoch"] == stop_after:
            raise Interrupted

    run = digits_run(Path(folder) / name, epochs=2, accum_steps=2).model_copy(update={"workers": 2})
    history = fit(run, Runtime(rank=rank, world=2, threads=1, report=report))
    torch.save(history, f"{folder}/{name}{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_agree_and_resume_exactly(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_fit_pair, args=(str(tmp_path), "whole", 0), nprocs=2)
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="Interrupted"):
        torch.multiprocessing.spawn(_fit_pair, args=(str(tmp_path), "parted", 1), nprocs=2)
    torch.multiprocessing.spawn(_fit_pair, args=(str(tmp_path), "parted", 0), nprocs=2)
    assert len(list((tmp_path / "whole").glob("rng*.pt"))) == 2
    same(state(tmp_path / "whole"), state(tmp_path / "parted"))
    first, second = (torch.load(tmp_path / f"whole{rank}.pt", weights_only=True) for rank in range(2))
    same(first, second)  # both know the counts of all 360 images
    assert first[-1]["top1"] * 3.6 == pytest.approx(round(first[-1]["top1"] * 3.6), abs=1e-6)
