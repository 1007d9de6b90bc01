from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fresh import python
from helpers.marks import slow_but
from helpers.runs import (
    SMALL_VIT,
    Interrupted,
    digits_run,
    interrupt_after,
    last,
    same,
    state,
    synthetic_run,
)
from helpers.two_processes import Failed, Together
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mlpreduce
from mlpreduce import recipe as recipes
from mlpreduce.data import load
from mlpreduce.errors import ReductionError
from mlpreduce.testing import tiny_vit
from mlpreduce.train import Run, Runtime, TrainingStopped, build_model, create_ema, evaluate, fit, learning_rates
from mlpreduce.train.events import Ended, EpochEnded, Event, Progressed, Started
from mlpreduce.train.parts import create_optimizer, images_of
from mlpreduce.train.settings import ModelSettings, TrainSettings
from mlpreduce.train.state import checkpoints, seed_everything
from mlpreduce.train.weight_decay import create_decay_schedule
from mlpreduce.transforms.steps import seeded

pytestmark = pytest.mark.usefixtures("one_thread")


def forge(path: Path, change: Callable[[Any], None]) -> None:
    """Change a file of a checkpoint as if the run had written it so."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    data = path.read_bytes()
    fingerprint = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    forge_manifest(path.parent, lambda manifest: manifest["files"].update({path.name: fingerprint}))


def forge_manifest(folder: Path, change: Callable[[Any], None]) -> None:
    """The same for its manifest, which is sealed."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    change(manifest)
    seal = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**manifest, "sha256": seal}))


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


def test_weight_decay_goes_along_half_a_cosine() -> None:
    train = TrainSettings(lr=0.1, weight_decay=0.04, weight_decay_end=0.2)
    optimizer = create_optimizer(tiny_vit(), train)
    schedule = create_decay_schedule(optimizer, train, 101)
    assert schedule is not None
    taken = []
    for update in range(101):
        taken.append([group["weight_decay"] for group in optimizer.param_groups])
        schedule.step_update(update + 1)
    plain, decayed = sorted(zip(*taken, strict=True))
    assert set(plain) == {0.0}  # biases and norms
    assert [decayed[update] for update in (0, 50, 100)] == pytest.approx([0.04, 0.12, 0.2])
    assert decayed[25] == pytest.approx(0.2 + 0.5 * (0.04 - 0.2) * (1 + 2**-0.5))
    assert list(decayed) == sorted(decayed)
    assert create_decay_schedule(optimizer, TrainSettings(), 101) is None
    with pytest.raises(ReductionError, match=r"train\.weight_decay_end=0\.2: nothing decays at the start"):
        create_decay_schedule(optimizer, TrainSettings(weight_decay=0, weight_decay_end=0.2), 101)


def test_a_model_that_does_not_say_its_size_is_counted_at_that_of_the_data(tmp_path: Path) -> None:
    def macs(size: int) -> int:
        run = digits_run(tmp_path)
        model = {"name": "convnext_atto", "kwargs": {"num_classes": 10, "in_chans": 1}}
        run = Run(
            **{**run.model_dump(), "steps": (), "model": model, "data": {**run.data.model_dump(), "image_size": size}}
        )
        built = build_model(run, device="meta")
        return mlpreduce.profile(built, images_of(run, built)).macs

    assert 3.9 < macs(64) / macs(32) < 4.1


def test_new_values_of_a_reduction_follow_the_seed_of_the_run(tmp_path: Path) -> None:
    steps = (
        ({"transform": "low_rank", "init": "new"}, "blocks.0.mlp.fc1.up"),
        ({"transform": "block_diagonal", "groups": 2, "init": "new", "cca": "covariance"}, "blocks.0.mlp.mix"),
        ({"transform": "lora"}, "blocks.0.mlp.fc1.down"),
        ({"transform": "grouped", "per_use": {"name": "lora", "rank": 2}}, "blocks.0.mlp.fc1.down"),
        ({"transform": "svft", "init": "normal"}, "blocks.0.mlp.fc1.entries"),
    )
    assert seeded({"transform": "grouped", "init": "new"}, 3) == {
        "transform": "grouped",
        "init": "new",
    }  # it takes none
    for step, name in steps:
        runs = [digits_run(tmp_path).model_copy(update={"steps": (step,), "seed": seed}) for seed in (1, 1, 2)]
        first, again, other = (build_model(run).get_parameter(name) for run in runs)
        assert torch.equal(first, again), step
        assert not torch.equal(first, other), step
        named = digits_run(tmp_path).model_copy(update={"steps": ({**step, "seed": 7},)})
        if step["transform"] != "grouped":
            assert "seed=7" in str(mlpreduce.history(build_model(named))[0])


def test_models_optimizers_and_schedules_that_timm_cannot_make_are_told(tmp_path: Path) -> None:
    wrong = digits_run(tmp_path).model_copy(update={"model": ModelSettings(kwargs={**SMALL_VIT, "num_heads": 5})})
    with pytest.raises(ReductionError, match=r"model\.kwargs: timm cannot build vit_base_patch16_224\("):
        build_model(wrong)
    with pytest.raises(ReductionError, match=r"train\.schedule='wsd', train\.epochs=2"):
        learning_rates(TrainSettings(schedule="wsd", epochs=2, warmup_epochs=1), 10)
    larger = digits_run(tmp_path).model_copy(update={"model": ModelSettings(kwargs={**SMALL_VIT, "img_size": 16})})
    with pytest.raises(ReductionError, match=r"Input height \(8\) doesn't match model \(16\)"):
        fit(larger)


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


def started(events: list[Event]) -> Started:
    assert isinstance(events[0].what, Started)
    return events[0].what


def test_fit_learns_and_reports(tmp_path: Path) -> None:
    events: list[Event] = []
    run = digits_run(tmp_path, epochs=4, mixup=0.0, label_smoothing=0.1)
    history = fit(run, Runtime(report=events.append))
    kinds = [type(event.what) for event in events if not isinstance(event.what, Progressed)]
    assert kinds == [Started, *[EpochEnded] * 4, Ended]
    assert history[-1]["top1"] > 50
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert all(entry["top5"] >= entry["top1"] and 0 <= entry["raw_top1"] <= 100 for entry in history)
    assert history[-1]["top1"] * 3.6 == pytest.approx(
        round(history[-1]["top1"] * 3.6), abs=1e-6
    )  # counts of 360 images
    facts = started(events).facts
    assert facts["profile"]["unique_mlps"] == 2
    assert json.loads(facts["plans"][0])
    assert facts["updates_per_epoch"] == 22
    best = mlpreduce.load(tmp_path / "model")
    assert best.blocks[1].mlp.fc1 is best.blocks[0].mlp.fc1
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


@pytest.mark.parametrize("amp", slow_but(["none", "bfloat16", "float16"], "none"))
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
    ended = {group["weight_decay"] for group in state(tmp_path / "whole")["state.pt"]["optimizer"]["param_groups"]}
    assert sorted(ended) == [0.0, pytest.approx(0.3)]
    parted = whole.model_copy(update={"directory": str(tmp_path / "parted")})
    interrupt_after(parted, 1)
    fit(parted)
    same(state(tmp_path / "whole"), state(tmp_path / "parted"))


def test_resume_without_the_random_states_would_differ(tmp_path: Path) -> None:
    """What the exactness tests rest on: they fail when a random state is lost."""
    run = digits_run(tmp_path / "one")
    interrupt_after(run, 1)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    other = run.model_copy(update={"directory": str(tmp_path / "two")})

    def change(rng: dict[str, Any]) -> None:
        rng["numpy"][1][0] ^= 1
        rng["numpy"][2] = 624

    forge(last(tmp_path / "two") / "rng0.pt", change)
    fit(run)
    fit(other)
    with pytest.raises(AssertionError):
        same(state(tmp_path / "one"), state(tmp_path / "two"))


def test_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    run = digits_run(tmp_path, epochs=2)
    interrupt_after(run, 1)
    with pytest.raises(ReductionError, match=r"written with other settings .* in another --output"):
        fit(run.model_copy(update={"train": run.train.model_copy(update={"lr": 1e-3})}))
    with pytest.raises(
        ReductionError, match=r"3 worker\(s\) cannot share the 1 micro-batches of 64 images .*; 1 could"
    ):
        fit(run, Runtime(world=3))
    forge_manifest(
        last(tmp_path),
        lambda manifest: manifest.update(plans=[p.replace("mlp.fc1", "mlp.fc9") for p in manifest["plans"]]),
    )
    with pytest.raises(ReductionError, match=r"the plans in .* are not those of the model"):
        fit(run)


def test_diverged_run_stops_and_keeps_the_last_whole_epoch(tmp_path: Path) -> None:
    run = digits_run(tmp_path)
    interrupt_after(run, 1)
    forge(last(tmp_path) / "state.pt", lambda state: state["model"]["head.weight"].fill_(math.inf))
    with pytest.raises(
        TrainingStopped, match=r"the training loss is nan in epoch 2.*1 whole epoch\(s\).*lower train.lr"
    ):
        fit(run)
    assert list(checkpoints(tmp_path)) == [1]


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
        after.append(state(Path(run.directory))["state.pt"])
    assert [saved["updates"] for saved in after] == [1, 1]
    start = build_model(run).state_dict()
    for name, tensor in after[0]["model"].items():
        assert torch.allclose(tensor, after[1]["model"][name], atol=1e-6), name
    assert any(not torch.allclose(start[name], tensor, atol=1e-3) for name, tensor in after[0]["model"].items())


def by_hand(run: Run) -> tuple[nn.Module, nn.Module, float]:
    """One epoch of a run as timm's pieces make it: the trained model, its average, the mean loss."""
    from timm.loss import SoftTargetCrossEntropy
    from timm.models import create_model
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import ModelEmaV3

    train = run.train
    torch.manual_seed(run.seed)
    model = create_model(run.model.name, **run.model.kwargs)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=train.lr, weight_decay=train.weight_decay)
    average = ModelEmaV3(model, decay=train.ema_decay)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=train.epochs,
        warmup_epochs=train.warmup_epochs,
        warmup_lr=train.warmup_lr,
        min_lr=train.min_lr,
        step_on_epochs=True,
    )
    assert scheduler is not None
    loaders = load(run.data, train, micro_batch=train.batch_size)
    loaders.set_epoch(run.seed, 0)
    seed_everything(run.seed)
    criterion, losses = SoftTargetCrossEntropy(), []
    model.train()
    for number, (images, targets) in enumerate(loaders.train):
        loss = criterion(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(model, step=number + 1)
        losses.append(loss.item())
    return model, average.module, sum(losses) / len(losses)


def against_timm(run: Run, tolerance: float) -> None:
    model, average, loss = by_hand(run)
    (entry,) = fit(run)
    assert entry["train_loss"] == pytest.approx(loss, rel=1e-6)
    after = state(Path(run.directory))["state.pt"]
    for ours, theirs in ((after["model"], model), (after["ema"], average)):
        for name, tensor in theirs.state_dict().items():
            if name.endswith("qkv.bias"):  # that of the keys has no gradient but rounding, which Adam makes steps of
                ours[name][len(tensor) // 3 : -len(tensor) // 3] = tensor[len(tensor) // 3 : -len(tensor) // 3]
            assert torch.allclose(ours[name], tensor, rtol=0, atol=tolerance), name
    start = build_model(run).state_dict()
    assert all(
        not torch.allclose(start[name], tensor, rtol=0, atol=tolerance) for name, tensor in after["model"].items()
    )


@pytest.mark.slow
def test_twenty_updates_equal_the_loop_written_with_timm(tmp_path: Path) -> None:
    recipe = recipes.load("paper_vitb16_tiny", ["train.aug_repeats=0", "train.epochs=1", "train.warmup_epochs=0"])
    train = recipe.train.model_copy(update={"accum_steps": 1, "channels_last": False})
    data = recipe.data.model_copy(update={"train_samples": 20 * train.batch_size})
    run = Run(recipe="tiny", variant="baseline", model=recipe.model, data=data, train=train, directory=str(tmp_path))
    against_timm(run, tolerance=1e-5)


@pytest.mark.slow
def test_one_update_of_vit_base_equals_the_one_written_with_timm(tmp_path: Path) -> None:
    """float32, no augmentation but the mixing of targets; three blocks and 64 x 64 pixels for the time of a CPU."""
    recipe = recipes.load("paper_vitb16", ["train.aug_repeats=0", "train.epochs=1", "train.warmup_epochs=0"])
    plain = {
        "auto_augment": "",
        "random_erasing": 0.0,
        "hflip": 0.0,
        "crop_scale": (1.0, 1.0),
        "crop_ratio": (1.0, 1.0),
    }
    plain |= {"amp": "none", "accum_steps": 1, "batch_size": 8, "channels_last": False, "color_jitter": 0.0}
    data = {"name": "synthetic", "image_size": 64, "train_samples": 8, "val_samples": 4, "classes": 10, "workers": 0}
    run = Run(
        recipe="base",
        variant="baseline",
        model={"name": recipe.model.name, "kwargs": {"img_size": 64, "num_classes": 10, "depth": 3}},  # type: ignore[arg-type]
        data=data,  # type: ignore[arg-type]
        train=recipe.train.model_copy(update=plain),
        directory=str(tmp_path),
    )
    against_timm(run, tolerance=1e-6)


# --- several processes ----------------------------------------------------------------------------------------------------


def _gradients(rank: int, folder: str) -> None:
    model = tied_double()
    images, labels = batch()
    wrapped = DistributedDataParallel(model)
    halves = list(zip(images.chunk(4), labels.chunk(4), strict=True))[rank::2]  # two micro-batches each
    with wrapped.no_sync():
        (nn.functional.cross_entropy(wrapped(halves[0][0]), halves[0][1]) / 2).backward()
    (nn.functional.cross_entropy(wrapped(halves[1][0]), halves[1][1]) / 2).backward()
    torch.save({name: p.grad for name, p in model.named_parameters()}, f"{folder}/grad{rank}.pt")


def tied_double() -> nn.Module:
    torch.manual_seed(0)
    return mlpreduce.apply(tiny_vit(), "grouped", group=2).double()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(16, 3, 16, 16, generator=generator, dtype=torch.float64),
        torch.randint(0, 5, (16,), generator=generator),
    )


@pytest.mark.processes
def test_two_processes_give_the_gradient_of_one(together: Together, tmp_path: Path) -> None:
    together(_gradients, str(tmp_path))
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
    def report(event: Event) -> None:
        if isinstance(event.what, EpochEnded) and event.what.entry["epoch"] == stop_after:
            raise Interrupted

    run = digits_run(Path(folder) / name, epochs=2, accum_steps=2).model_copy(update={"workers": 2})
    history = fit(run, Runtime(rank=rank, world=2, threads=1, report=report))
    torch.save(history, f"{folder}/{name}{rank}.pt")


@pytest.mark.processes
def test_two_processes_agree_and_resume_exactly(together: Together, tmp_path: Path) -> None:
    together(_fit_pair, str(tmp_path), "whole", 0)
    with pytest.raises(Failed, match="Interrupted"):
        together(_fit_pair, str(tmp_path), "parted", 1)
    together(_fit_pair, str(tmp_path), "parted", 0)
    assert len(list(last(tmp_path / "whole").glob("rng*.pt"))) == 2
    same(state(tmp_path / "whole"), state(tmp_path / "parted"))
    first, second = (torch.load(tmp_path / f"whole{rank}.pt", weights_only=True) for rank in range(2))
    same(first, second)  # both know the counts of all 360 images
    assert first[-1]["top1"] * 3.6 == pytest.approx(round(first[-1]["top1"] * 3.6), abs=1e-6)


def _fit_alone_or_together(rank: int, folder: str, world: int) -> None:
    model = {"name": "vit_tiny_patch16_224", "kwargs": {**SMALL_VIT, "drop_path_rate": 0.0}}
    run = digits_run(Path(folder) / str(world), epochs=2, mixup=0.0)
    run = Run(**{**run.model_dump(), "model": model, "workers": 2})
    fit(run, Runtime(rank=rank, world=world, threads=1))


@pytest.mark.processes
def test_another_number_of_workers_keeps_the_batch(together: Together, tmp_path: Path) -> None:
    """One worker where two were planned: as many images in an update, the same ones, and the same losses."""
    together(_fit_alone_or_together, str(tmp_path), 2)
    _fit_alone_or_together(0, str(tmp_path), 1)
    two, one = (state(tmp_path / str(world))["state.pt"] for world in (2, 1))
    assert one["updates"] == two["updates"] == 44
    for left, right in zip(one["history"], two["history"], strict=True):
        assert left["train_loss"] == pytest.approx(right["train_loss"], abs=1e-5)
        assert left["val_loss"] == pytest.approx(right["val_loss"], abs=1e-5)


# --- what happens in 300 epochs -------------------------------------------------------------------------------------------


def test_the_last_checkpoints_and_the_best_one_stay(tmp_path: Path) -> None:
    run = digits_run(tmp_path, epochs=6, keep_checkpoints=2)
    history = fit(run)
    best = max(history, key=lambda entry: entry["top1"])["epoch"]
    assert set(checkpoints(tmp_path)) == {5, 6, best}
    assert not list((tmp_path / "checkpoints").glob(".*"))


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of three epochs, and the same one interrupted after two."""
    folder = tmp_path_factory.mktemp("runs")
    torch.set_num_threads(1)
    fit(digits_run(folder / "whole"))
    interrupt_after(digits_run(folder / "interrupted"), 2)
    return folder / "whole", folder / "interrupted"


@pytest.mark.parametrize("name", ["state.pt", "rng0.pt", "manifest.json"])
@pytest.mark.parametrize("harm", ["cut", "flip", "gone", "folder"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    two_epochs: tuple[Path, Path], tmp_path: Path, name: str, harm: str
) -> None:
    whole, interrupted = two_epochs
    shutil.copytree(interrupted, tmp_path / "parted")
    parted = digits_run(tmp_path / "parted")
    path = last(tmp_path / "parted") / name
    data = path.read_bytes()
    position = torch.randint(1, len(data) - 1, (), generator=torch.Generator().manual_seed(len(name))).item()
    if harm in ("gone", "folder"):
        path.unlink()
        if harm == "folder":
            path.mkdir()
    else:
        rest = b"" if harm == "cut" else bytes([data[position] ^ 1]) + data[position + 1 :]
        path.write_bytes(data[:position] + rest)
    events: list[Event] = []
    fit(parted, Runtime(report=events.append))
    (note,) = started(events).notes
    assert name in note
    assert "going on after epoch 1" in note
    same(state(whole), state(tmp_path / "parted"))


def test_no_whole_checkpoint_is_told_and_nothing_is_lost(tmp_path: Path) -> None:
    run = digits_run(tmp_path)
    interrupt_after(run, 2)
    for folder in checkpoints(tmp_path).values():
        (folder / "state.pt").write_bytes(b"")
    with pytest.raises(ReductionError, match=r"no checkpoint is whole .*state.pt has 0 of .* bytes.*to train it anew"):
        fit(run)
    assert len(checkpoints(tmp_path)) == 2


FULL = """
import resource, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from helpers.runs import digits_run
from mlpreduce import ReductionError
from mlpreduce.train import Runtime, fit
from mlpreduce.train.events import EpochEnded
run = digits_run(Path({folder!r}), epochs=3, keep_checkpoints=1)
def report(event):
    if isinstance(event.what, EpochEnded) and event.what.entry["epoch"] == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # the system refuses larger files
try:
    fit(run, Runtime(report=report, threads=1))
except ReductionError as error:
    print(error)
"""


@pytest.mark.processes
def test_a_full_disk_keeps_what_was_written(tmp_path: Path) -> None:
    tests = str(Path(__file__).parent)
    script = FULL.format(tests=tests, folder=str(tmp_path / "run"))
    done = python("-c", script)
    assert "worker 0 cannot " in done.stdout, done.stderr
    assert "File too large" in done.stdout
    assert "Checkpoints that are kept: 1." in done.stdout
    run = digits_run(tmp_path / "run", epochs=3, keep_checkpoints=1)
    assert len(fit(run)) == 3


def test_a_directory_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    run = digits_run(tmp_path / "file" / "run")
    with pytest.raises(ReductionError, match=r"worker 0 cannot make its directory: Not a directory"):
        fit(run)


def test_a_device_out_of_memory_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.models.vision_transformer import Block

    forward = Block.forward

    def full(self: nn.Module, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self.training and len(x) > 32:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, x, **kwargs)

    run = digits_run(tmp_path)
    interrupt_after(run, 1)
    monkeypatch.setattr(Block, "forward", full)
    with pytest.raises(ReductionError, match=r"64 images do not fit .*2.00 GiB.*train.accum_steps=2 takes half"):
        fit(run)
    advised = {"accum_steps": 2, "grad_checkpointing": True}
    events: list[Event] = []
    assert len(fit(digits_run(tmp_path, **advised), Runtime(report=events.append))) == 3
    assert "it began with 64 images at a time, and goes on with 32" in started(events).notes[0]


# --- options and fidelity ---------------------------------------------------------------------------------------------------


def losses(directory: Path, **train: Any) -> list[float]:
    return [entry["train_loss"] for entry in fit(digits_run(directory, epochs=2, **train))]


@pytest.mark.parametrize(
    "option",
    [
        pytest.param({"compile": True}, marks=[pytest.mark.slow, pytest.mark.processes]),
        {"grad_checkpointing": True},
        {"deterministic": True},
        {"tf32": False},
    ],
)
def test_options_of_speed_and_memory_change_no_loss(tmp_path: Path, option: dict[str, bool]) -> None:
    before = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    assert losses(tmp_path / "with", **option) == pytest.approx(losses(tmp_path / "without"), abs=1e-4)
    assert (torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()) == before


VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "baseline": (),
    "grouped": ({"transform": "grouped", "group": 2},),
    "shallow": ({"transform": "shallow", "ratio": 0.5},),
    "thin": ({"transform": "thin", "mlp_ratio": 2.0},),
}


def facts_of(run: Run) -> tuple[str, list[tuple[str, str]]]:
    events: list[Event] = []
    history = fit(run, Runtime(report=events.append))
    return started(events).facts["weights_digest"], [(e["batch_digest"], e["random_digest"]) for e in history]


@pytest.mark.parametrize("fidelity", ["corrected", "published"])
def test_variants_of_a_seed_see_the_same(tmp_path: Path, fidelity: str) -> None:
    """Weights outside the MLPs, batches with their augmentation, and as many random numbers; as recorded."""
    found = {}
    for variant, steps in VARIANTS.items():
        run = synthetic_run(tmp_path / variant)
        train = run.train.model_copy(update={"fidelity": fidelity, "epochs": 2})
        found[variant] = facts_of(run.model_copy(update={"steps": steps, "train": train}))
    weights = {variant: digest for variant, (digest, _) in found.items()}
    assert weights["baseline"] == weights["grouped"] == weights["shallow"]
    assert (weights["thin"] == weights["baseline"]) == (fidelity == "corrected")
    assert len({str(fed) for _, fed in found.values()}) == 1
    other = synthetic_run(tmp_path / "other").model_copy(update={"seed": 1})
    assert facts_of(other) != found["grouped"]


def test_the_order_of_images_is_the_same_for_all_seeds_only_where_published(tmp_path: Path) -> None:
    for fidelity, orders in (("corrected", 2), ("published", 1)):
        found = set()
        for seed in (42, 123):
            run = digits_run(tmp_path / f"{fidelity}{seed}", epochs=1, warmup_epochs=0, mixup=0.0, fidelity=fidelity)
            found.add(fit(run.model_copy(update={"seed": seed}))[0]["batch_digest"])
        assert len(found) == orders


def test_images_that_cannot_be_read_are_counted_and_named_in_the_record(tmp_path: Path) -> None:
    from PIL import Image

    for split in ("train", "val"):
        for number in range(16):
            path = tmp_path / "images" / split / f"class{number % 2}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (12, 12), (number, 0, 0)).save(path)
    bad = tmp_path / "images" / "train" / "class1" / "3.png"
    bad.write_bytes(b"no image")
    run = synthetic_run(tmp_path / "run")
    data = {"name": "folder", "root": str(tmp_path / "images"), "image_size": 8, "workers": 0, "on_bad_image": "skip"}
    model = {"name": run.model.name, "kwargs": {**SMALL_VIT, "in_chans": 3, "num_classes": 2}}
    train = {**run.train.model_dump(), "batch_size": 8, "epochs": 1, "warmup_epochs": 0}
    skipping = Run(**{**run.model_dump(), "data": data, "model": model, "train": train})
    (entry,) = fit(skipping)
    assert entry["skipped_images"] == 1
    assert entry["skipped_files"] == [str(bad)]
    raising = Run(
        **{**skipping.model_dump(), "data": {**data, "on_bad_image": "raise"}, "directory": str(tmp_path / "other")}
    )
    with pytest.raises(ReductionError, match=r"3\.png"):
        fit(raising)
    assert raising.config_hash == skipping.config_hash


@pytest.mark.parametrize(("classes", "top5"), [(10, 50.0), (3, 100.0)])
def test_top5_counts_labels_among_the_five_largest(classes: int, top5: float) -> None:
    """Logits fall from class 0 on, and each class is a label once: of 10 classes half are among the five largest."""
    logits = -torch.arange(classes, dtype=torch.float32)
    labels = torch.arange(classes)
    found = evaluate(constant_model(logits), [(torch.zeros(classes, 3, 2, 2), labels)], Runtime())
    assert found["top1"] == pytest.approx(100 / classes)
    assert found["top5"] == pytest.approx(top5)
    assert found["images"] == classes


def constant_model(logits: torch.Tensor) -> nn.Module:
    """A model that gives the same logits for every image."""

    class Same(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return logits.expand(len(images), -1)

    return Same()
