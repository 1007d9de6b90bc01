"""Distillation of features, and the calibration data that steps of a run are given."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers.marks import slow_but
from helpers.runs import DIGITS, digits_run, finetune, interrupt_after, same, state, tensors, without_drop_path
from helpers.two_processes import Together
from safetensors.torch import load_file
from torch import nn

import mlpreduce
from mlpreduce import recipe as recipes
from mlpreduce.data import DataSettings, calibration
from mlpreduce.edits import Slice
from mlpreduce.errors import ReductionError
from mlpreduce.recipe.describe import describe
from mlpreduce.train import FeatureDistill, Run, Runtime, build_model, fit, read_checkpoint
from mlpreduce.train.calibrated import calibration_data
from mlpreduce.train.distillation import Features, freeze_unreached
from mlpreduce.train.settings import TrainSettings
from mlpreduce.train.setup import prepare
from mlpreduce.transforms.steps import needs_data, without_data
from mlpreduce.words.marks import Mark, marked

pytestmark = pytest.mark.usefixtures("one_thread")

SPANNING = {"transform": "shallow", "ratio": 0.5, "criterion": "gram_schmidt"}
GLOBAL = {"transform": "shallow", "target_params": 0.8, "criterion": "nvit", "scope": "global", "round_to": 4}
REPAIRED = {"transform": "shallow", "ratio": 0.5, "criterion": "activation", "repair": "least_squares"}
HEAD = ("head.", "fc_norm.")


def taught(directory: Path, weights: Path | str, *steps: dict[str, Any], **train: Any) -> Run:
    return finetune(directory, weights, *(steps or (SPANNING,)), distillation="features", **train)


# --- the loss -------------------------------------------------------------------------------------------------------------


def pair(images: int = 3, tokens: int = 5, channels: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(images, tokens, channels, generator=generator).double() for _ in range(2))
    return student.requires_grad_(), teacher


def mean_square(ours: list[Any], theirs: list[Any]) -> float:
    """The mean of (a - b)^2 over two nested lists."""
    if not isinstance(ours[0], list):
        return sum((a - b) ** 2 for a, b in zip(ours, theirs, strict=True)) / len(ours)
    return sum(mean_square(a, b) for a, b in zip(ours, theirs, strict=True)) / len(ours)


def mean_token(tokens: list[list[float]]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*tokens, strict=True)]


@pytest.mark.parametrize(("cls", "patches"), [(1.0, 1.0), (0.3, 2.5), (0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_the_loss_is_that_of_the_formula(cls: float, patches: float, prefix: int) -> None:
    student, teacher = pair()
    ours, theirs = student.tolist(), teacher.tolist()
    tops = [[tokens[0] if prefix else mean_token(tokens) for tokens in side] for side in (ours, theirs)]
    rest = [[tokens[prefix:] for tokens in side] for side in (ours, theirs)]
    expected = cls * mean_square(*tops) + patches * mean_square(*rest)
    loss = FeatureDistill(cls, patches)(student, teacher, prefix)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    difference = (student - teacher).detach()
    slope = torch.zeros_like(difference)
    slope[:, prefix:] += 2 * patches * difference[:, prefix:] / difference[:, prefix:].numel()
    if prefix:
        slope[:, 0] += 2 * cls * difference[:, 0] / difference[:, 0].numel()
    else:
        slope += 2 * cls * difference.mean(1, keepdim=True) / difference[:, 0].numel() / 5
    assert student.grad is not None
    assert torch.allclose(student.grad, slope, rtol=0, atol=1e-14)


def test_low_precision_is_widened_and_equal_features_give_zero() -> None:
    student, teacher = (part.detach().bfloat16() for part in pair())
    loss = FeatureDistill()(student, teacher, 1)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, FeatureDistill()(student.float(), teacher.float(), 1))
    assert FeatureDistill()(student, student, 1).item() == 0


@pytest.mark.parametrize(("cls", "patches"), [(0.0, 0.0), (-1.0, 1.0), (1.0, math.nan), (math.inf, 1.0)])
def test_weights_out_of_range_are_refused(cls: float, patches: float) -> None:
    with pytest.raises(ReductionError, match=r"FeatureDistill\(cls=.*finite numbers from 0, and not 0 for both"):
        FeatureDistill(cls, patches)


def test_features_that_do_not_fit_are_refused() -> None:
    student, teacher = pair()
    for wrong in (teacher[:2], teacher[:, :, 0], teacher[..., None]):
        with pytest.raises(ReductionError, match=r"student \(3, 5, 4\), teacher .*Features\(model\) makes them"):
            FeatureDistill()(student, wrong, 1)
    with pytest.raises(ReductionError, match=r"no patch token; use patches=0 \(train.distill_patches=0\)"):
        FeatureDistill()(student, teacher, 5)
    assert FeatureDistill(patches=0.0)(student, teacher, 5) > 0
    for prefix in (-1, "1", True):
        with pytest.raises(ReductionError, match="prefix_tokens is a whole number from 0"):
            FeatureDistill()(student, teacher, prefix)  # type: ignore[arg-type]
    for weight in ("1", None, float("nan")):
        with pytest.raises(ReductionError, match="use finite numbers from 0"):
            FeatureDistill(cls=weight)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "prefix", "left_out"),
    [("vit_base_patch16_rope_reg1_gap_256", 0, 1), ("volo_d1_224", 1, 0), ("deit_tiny_distilled_patch16_224", 2, 0)],
)
def test_which_tokens_are_no_patches(name: str, prefix: int, left_out: int) -> None:
    with torch.device("meta"):
        features = Features(timm.create_model(name))
    assert (features.prefix_tokens, features._left_out) == (prefix, left_out)


# --- features of models ---------------------------------------------------------------------------------------------------

SMALL = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
SWIN = {"img_size": 32, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4, "num_classes": 5}
KINDS: dict[
    str, tuple[str, dict[str, Any], int, int, set[str]]
] = {  # prefix tokens, tokens in all, outside the features
    "class token": ("vit_tiny_patch16_224", SMALL, 1, 5, {"head"}),
    "registers too": ("vit_tiny_patch16_224", {**SMALL, "reg_tokens": 2}, 3, 7, {"head"}),
    "registers only": (
        "vit_tiny_patch16_224",
        {**SMALL, "reg_tokens": 2, "class_token": False, "global_pool": "avg"},
        0,
        4,
        {"head", "fc_norm"},
    ),
    "mean": ("vit_tiny_patch16_224", {**SMALL, "class_token": False, "global_pool": "avg"}, 0, 4, {"head", "fc_norm"}),
    "channels last": ("swin_tiny_patch4_window7_224", SWIN, 0, 16, {"head"}),
    "channels first": (
        "convnext_atto",
        {"depths": (1, 1, 1, 1), "dims": (4, 4, 8, 16), "output_stride": 8, "num_classes": 5},
        0,
        16,
        {"head"},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_features_of_all_kinds_of_models(kind: str) -> None:
    name, kwargs, prefix, tokens, outside = KINDS[kind]
    model = timm.create_model(name, **kwargs).eval()
    images = torch.randn(2, 3, 32, 32)
    features = Features(model)
    found, raw = features(images), model.forward_features(images)
    assert features.prefix_tokens == prefix
    assert found.shape == (2, tokens, model.num_features)
    if kind == "channels first":
        assert torch.equal(found[1, 6], raw[1, :, 1, 2])
        assert torch.allclose(found.mean(1), raw.mean((2, 3)))
    elif kind == "channels last":
        assert torch.equal(found[1, 6], raw[1, 1, 2])
        assert torch.allclose(found.mean(1), raw.mean((1, 2)), atol=1e-6)
    else:
        assert torch.equal(found, raw[:, raw.shape[1] - tokens :])
    frozen = freeze_unreached(features)
    assert {name.partition(".")[0] for name in frozen} == outside
    model.train()
    FeatureDistill()(features(images), torch.zeros_like(found), prefix).backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == set(frozen)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == frozen


def test_the_same_model_takes_maps_with_either_axis_of_channels() -> None:
    class Maps(nn.Module):
        num_features = 4
        output_fmt = "NHWC"

        def forward_features(self, images: torch.Tensor) -> torch.Tensor:
            return images

    maps = torch.randn(2, 4, 3, 5)
    assert torch.equal(Features(Maps())(maps), maps.flatten(2).transpose(1, 2))
    assert torch.equal(Features(Maps())(maps.permute(0, 2, 3, 1)), maps.flatten(2).transpose(1, 2))
    square = torch.randn(2, 4, 4, 4)  # what the model says
    assert torch.equal(Features(Maps())(square), square.flatten(1, 2))
    with pytest.raises(ReductionError, match=r"forward_features of Maps gives \(2, 4\), and not tokens"):
        Features(Maps())(square[:, :, 0, 0])
    with pytest.raises(ReductionError, match=r"forward_features of Maps gives list"):
        Features(Maps())([square])


def test_a_model_without_features_is_refused() -> None:
    with pytest.raises(ReductionError, match=r"Linear has no forward_features.*use \"soft\" or \"hard\""):
        Features(nn.Linear(2, 2))


# --- a run ----------------------------------------------------------------------------------------------------------------


def test_an_unreduced_student_starts_where_its_teacher_is(trained: Path, tmp_path: Path) -> None:
    run = without_drop_path(taught(tmp_path, trained)).model_copy(update={"steps": ()})
    parts = prepare(run, Runtime(), None)
    parts.model.train()
    images, targets = next(iter(parts.loaders.train))
    assert parts.training_loss(images, targets).item() == 0
    with torch.no_grad():
        parts.core.blocks[0].mlp.fc1.weight.mul_(1.5)
    loss = parts.training_loss(images, targets)
    teacher = mlpreduce.load(trained / "model").eval()
    ours, theirs = (model.forward_features(images) for model in (parts.core, teacher))
    by_hand = (ours - theirs).square().mean() + (ours.mean(1) - theirs.mean(1)).square().mean()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    same(dict(parts.core.named_parameters()), dict(parts.model.core.named_parameters()))


def test_labels_have_no_influence_and_the_head_stays_bit_for_bit(trained: Path, tmp_path: Path) -> None:
    known = load_file(trained / "weights.safetensors")
    for name, smoothing in (("a", 0.0), ("b", 0.4)):
        fit(taught(tmp_path / name, trained, label_smoothing=smoothing, lr=1e-3, weight_decay=0.3))
    same(state(tmp_path / "a")["state.pt"]["model"], state(tmp_path / "b")["state.pt"]["model"])
    saved = state(tmp_path / "a")["state.pt"]
    assert saved["model"].keys() == known.keys()
    for weights in (saved["model"], saved["ema"], tensors(mlpreduce.load(tmp_path / "a" / "model"))):
        for name, tensor in weights.items():
            kept = name.startswith(HEAD)
            assert kept == (tensor.shape == known[name].shape and torch.equal(tensor, known[name])), name
    assert saved["model"]["blocks.0.mlp.fc1.weight"].shape[0] * 2 == known["blocks.0.mlp.fc1.weight"].shape[0]


def test_labels_are_not_looked_at(trained: Path, tmp_path: Path) -> None:
    parts = prepare(taught(tmp_path, trained), Runtime(), None)
    images, targets = next(iter(parts.loaders.train))
    parts.model.eval()
    first, second = (parts.training_loss(images, labels) for labels in (targets, torch.full_like(targets, 99)))
    assert torch.equal(first, second)


@pytest.mark.parametrize("amp", slow_but(["none", "bfloat16"], "none"))
def test_features_repair_a_reduced_model(trained: Path, tmp_path: Path, amp: str) -> None:
    events: list[Any] = []
    settings: dict[str, Any] = {"epochs": 5, "lr": 3e-3, "amp": amp, "grad_checkpointing": amp != "none"}
    history = fit(taught(tmp_path, trained, **settings), Runtime(report=events.append))
    assert history[-1]["train_loss"] < 0.6 * history[0]["train_loss"]
    assert history[-1]["top1"] > 50
    known = mlpreduce.profile(mlpreduce.load(tmp_path / "model"))
    assert events[0].what.facts["profile"]["params"] == known.params


def test_a_compiled_model_trains_the_same_module(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[nn.Module] = []
    monkeypatch.setattr(torch, "compile", lambda module: given.append(module) or module)
    parts = prepare(taught(tmp_path, trained, compile=True), Runtime(), None)
    assert given == [parts.model, parts.teacher]
    assert all(isinstance(module, Features) for module in given)


@pytest.mark.slow
def test_resumed_runs_give_the_same_bits(trained: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"mixup": 0.5, "epochs": 3, "accum_steps": 2}
    whole, parted = (taught(tmp_path / name, trained, GLOBAL, REPAIRED, **settings) for name in ("whole", "parted"))
    history = fit(whole)
    interrupt_after(parted, 1)
    torch.rand(7)
    resumed = fit(parted)
    same(state(tmp_path / "whole"), state(tmp_path / "parted"))
    same(history, resumed)


def _fit_taught(rank: int, folder: str, weights: str) -> None:
    run = without_drop_path(taught(Path(folder) / "pair", weights, GLOBAL, epochs=2, ema_decay=0.5))
    run = run.model_copy(update={"workers": 2})
    torch.save(fit(run, Runtime(rank=rank, world=2, threads=1)), f"{folder}/history{rank}.pt")


@pytest.mark.processes
def test_two_processes_train_as_one_and_one_goes_on(together: Together, trained: Path, tmp_path: Path) -> None:
    together(_fit_taught, str(tmp_path), str(trained))
    first, second = (torch.load(tmp_path / f"history{rank}.pt", weights_only=True) for rank in range(2))
    same(first, second)
    run = without_drop_path(taught(tmp_path / "alone", trained, GLOBAL, epochs=2, ema_decay=0.5))
    alone = fit(run.model_copy(update={"workers": 2}))
    for left, right in zip(first, alone, strict=True):
        assert left["train_loss"] == pytest.approx(right["train_loss"], rel=1e-4)
        assert left["val_loss"] == pytest.approx(right["val_loss"], rel=1e-4)
    ours, theirs = (state(tmp_path / name)["state.pt"] for name in ("pair", "alone"))
    known = load_file(trained / "weights.safetensors")
    for part in ("model", "ema"):
        assert ours[part].keys() == known.keys()
        for name, tensor in ours[part].items():
            assert torch.allclose(tensor, theirs[part][name], rtol=0, atol=1e-4), name
            if name.startswith(HEAD):
                assert torch.equal(tensor, known[name])
    # another number of processes goes on with the units that were chosen, though the fingerprint of its data would differ
    plans = [mlpreduce.history(mlpreduce.load(tmp_path / name / "model"))[0] for name in ("pair", "alone")]
    assert plans[0].edits == plans[1].edits
    assert plans[0].data is not None
    assert plans[1].data is not None
    assert plans[0].data["samples"] == plans[1].data["samples"] == 512
    assert plans[0].data != plans[1].data
    run = run.model_copy(update={"workers": 2, "directory": str(tmp_path / "pair")})
    resumed = prepare(run, Runtime(), read_checkpoint(run, Runtime()))
    assert mlpreduce.history(resumed.core)[0].data == plans[0].data
    same(tensors(resumed.core), dict(ours["model"]))


# --- what is refused ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ReductionError, match=r"train.distillation='features': there is no trained teacher"):
        fit(taught(tmp_path / "a", ""))
    with pytest.raises(ReductionError, match=r"FeatureDistill\(cls=0.0, patches=0.0\)"):
        fit(taught(tmp_path / "b", trained, distill_cls=0.0, distill_patches=0.0))
    supernet = {"points": ((SPANNING,),), "smallest": (SPANNING,)}
    run = taught(tmp_path / "c", trained).model_copy(update={"steps": ()})
    with pytest.raises(ReductionError, match=r"supernet are run for their logits"):
        fit(Run(**{**run.model_dump(), "supernet": supernet}))
    monkeypatch.setattr(timm.models.VisionTransformer, "forward_features", None)
    with pytest.raises(ReductionError, match=r"VisionTransformer has no forward_features"):
        fit(taught(tmp_path / "d", trained))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train.distill_cls=0", "train.distill_patches=0"], r"nothing is left of train.distillation='features'"),
        (["train.distill_cls=-1"], r"distill_cls=-1: it must be at least 0"),
        (["train.distill_patches=inf"], r"distill_patches=inf: it must be a finite number"),
        (["model.weights="], r"train.distillation='features': there is no trained teacher"),
        (["model.calibration_images=0"], r"calibration_images=0: it must be at least 1"),
        (
            ['variants.x=[{transform="shallow", criterion="nvit"}]', "data.name=wds/"],
            r"variants.x: step 0 looks at training images.*is a stream; use a criterion of weights",
        ),
    ],
)
def test_recipes_are_refused_when_they_are_read(changes: list[str], message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        recipes.load("dgmr_tiny", changes)


def test_outputs_from_before_these_keys_go_on(tmp_path: Path) -> None:
    assert {"model.calibration_images", "train.distill_cls", "train.distill_patches"} <= set(marked(Run, Mark.LATER))
    assert digits_run(tmp_path).config_hash == "69e7700faaa1ba0f"  # that of the versions before
    run = taught(tmp_path, "a")
    hashes = {run.config_hash}
    for key in ("distill_cls", "distill_patches"):
        hashes.add(run.model_copy(update={"train": run.train.model_copy(update={key: 2.0})}).config_hash)
    hashes.add(_with_images(run, 64).config_hash)
    assert len(hashes) == 4
    assert (TrainSettings().distill_cls, TrainSettings().distill_patches) == (1.0, 1.0)


# --- calibration data -----------------------------------------------------------------------------------------------------

MADE = {"name": "synthetic", "image_size": 16, "train_samples": 30, "val_samples": 4, "classes": 3, "workers": 0}


def _with_images(run: Run, count: int) -> Run:
    return run.model_copy(update={"model": run.model.model_copy(update={"calibration_images": count})})


def joined(batches: Any) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize("data", [DIGITS, MADE, {**MADE, "workers": 1}], ids=["digits", "made", "loading process"])
def test_the_images_are_the_same_whoever_reads_them(data: dict[str, Any]) -> None:
    settings = DataSettings(**data)
    images, labels = joined(calibration(settings, 12))
    assert images.shape[0] == 12
    assert images.dtype == torch.float32
    before = torch.get_rng_state()
    loader = calibration(settings, 12)
    for _ in range(2):  # criterion and repair each read them
        again = joined(loader)
        assert torch.equal(images, again[0])
        assert torch.equal(labels, again[1])
    assert torch.equal(torch.get_rng_state(), before)
    if data.get("workers"):
        return
    for world in (2, 5):
        shares = [joined(calibration(settings, 12, rank=rank, world=world)) for rank in range(world)]
        for rank, (part, theirs) in enumerate(shares):
            assert torch.equal(part, images[rank::world])
            assert torch.equal(theirs, labels[rank::world])
    assert list(calibration(settings, 2, rank=2, world=3)) == []


def test_they_are_training_images_without_augmentation_spread_over_the_set() -> None:
    known = mlpreduce.data.load(DataSettings(**DIGITS), TrainSettings(), micro_batch=1437).train.dataset
    images, labels = joined(calibration(DataSettings(**DIGITS), 5))
    places = [number * 1437 // 5 for number in range(5)]
    assert torch.equal(images, known.tensors[0][places])
    assert torch.equal(labels, known.tensors[1][places])
    images, labels = joined(calibration(DataSettings(**DIGITS), 9999))
    assert torch.equal(images, known.tensors[0])
    settings = DataSettings(**MADE, crop_pct=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)
    made = mlpreduce.data.sources.open_source(settings, micro_batch=1, rank=0, world=1).train
    images, _ = joined(calibration(settings, 3))
    for image, place in zip(images, (0, 10, 20), strict=True):
        assert torch.equal((image * 255).round().byte(), torch.from_numpy(made.images[place]).permute(2, 0, 1))


def test_class_folders_are_read_as_validation_reads_them(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in "abc":
            (tmp_path / split / label).mkdir(parents=True)
            for number in range(4):
                Image.fromarray(pixels.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(
                    tmp_path / split / label / f"{number}.png"
                )
    data = DataSettings(name="folder", root=str(tmp_path), image_size=16, workers=0)
    images, labels = joined(calibration(data, 6))
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]  # the first six would all be of two classes
    shutil.rmtree(tmp_path / "val")
    shutil.copytree(tmp_path / "train", tmp_path / "val")
    as_validated, _ = joined(mlpreduce.data.load(data, TrainSettings(hflip=1.0), micro_batch=1).val)
    assert torch.equal(images, as_validated[::2])


def test_streams_and_no_images_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    with pytest.raises(ReductionError, match=r"data.name='wds/': .*shards are a stream; choose the units by weights"):
        calibration(DataSettings(name="wds/", root=str(tmp_path), classes=3), 4)
    with pytest.raises(ReductionError, match=r"count=0\): it is a number of images; use 1 or more"):
        calibration(DataSettings(**DIGITS), 0)


# --- steps that look at data ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "needs"),
    [
        ({"criterion": "nvit"}, True),
        ({"criterion": {"name": "taylor", "site": "fc1"}}, True),
        ({"criterion": "gate"}, True),
        ({"criterion": "entropy_taylor"}, True),
        ({"repair": "least_squares"}, True),
        ({"repair": "none", "criterion": "gram_schmidt"}, False),
        ({"criterion": "l2"}, False),
        ({"criterion": "no such"}, False),
        ({"criterion": 3}, False),
        ({}, False),
    ],
)
def test_which_steps_need_data(step: dict[str, Any], needs: bool) -> None:
    assert needs_data({"transform": "shallow", **step}) == needs


def test_without_data_a_step_costs_about_as_much() -> None:
    full = {"transform": "shallow", "target_macs": 0.7, "scope": "per_stage", "round_to": 4}
    assert without_data({**full, "criterion": "nvit", "repair": "least_squares", "latency_weight": 0.1}) == {
        **full,
        "scope": "uniform",
        "criterion": "first",
    }
    assert without_data(SPANNING) == SPANNING
    tied = {"transform": "grouped", "group": 2, "keep": "first", "repair": "least_squares"}
    assert without_data(tied) == {"transform": "grouped", "group": 2, "keep": "first"}


def test_a_run_is_given_the_images_that_were_asked_for(trained: Path, tmp_path: Path) -> None:
    run = _with_images(finetune(tmp_path, trained, GLOBAL, REPAIRED), 40)
    model = build_model(run)
    by_hand = mlpreduce.load(trained / "model")
    for step in (GLOBAL, REPAIRED):
        config = {key: value for key, value in step.items() if key != "transform"}
        mlpreduce.apply(by_hand, "shallow", data=calibration(run.data, 40), **config)
    same(tensors(model), tensors(by_hand))
    plans = mlpreduce.history(model)
    assert [plan.to_json() for plan in plans] == [plan.to_json() for plan in mlpreduce.history(by_hand)]
    assert plans[0].data is not None
    assert plans[0].data["samples"] == 40
    other = build_model(run.model_copy(update={"seed": 99}))
    same(tensors(model), tensors(other))
    assert len(joined(calibration_data(run))[1]) == 40


def test_plans_of_a_checkpoint_stand_for_data(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlpreduce.train import parts

    run = finetune(tmp_path, trained, SPANNING, GLOBAL, REPAIRED)
    model = build_model(run)
    plans = [plan.to_json() for plan in mlpreduce.history(model)]
    monkeypatch.setattr(parts, "calibration_data", lambda _: pytest.fail("no data is read"))
    again = build_model(run, plans=plans)
    assert [plan.to_json() for plan in mlpreduce.history(again)] == plans
    assert {name: t.shape for name, t in again.state_dict().items()} == {
        name: t.shape for name, t in model.state_dict().items()
    }


def kept(model: nn.Module) -> list[list[int]]:
    return [list(cut.units) for plan in mlpreduce.history(model) for cut in plan.of(Slice)]


def _units(rank: int, folder: str, run: str) -> None:
    model = build_model(Run.model_validate_json(run))
    torch.save(kept(model), f"{folder}/units{rank}.pt")
    torch.save(tensors(model), f"{folder}/weights{rank}.pt")


@pytest.mark.parametrize("count", [65, 2])
@pytest.mark.processes
def test_two_processes_choose_the_units_of_one(together: Together, trained: Path, tmp_path: Path, count: int) -> None:
    repaired = {**REPAIRED, "repair": "parallel"}  # in turn, what is held out depends on the process that has it
    run = _with_images(finetune(tmp_path, trained, GLOBAL, repaired), count)  # of two, each process has one
    together(_units, str(tmp_path), run.model_dump_json())
    model = build_model(run)
    assert all(torch.load(tmp_path / f"units{rank}.pt") == kept(model) for rank in range(2))
    ours, theirs = (torch.load(tmp_path / f"weights{rank}.pt") for rank in range(2))
    same(ours, theirs)
    for name, tensor in tensors(model).items():
        assert torch.allclose(tensor, ours[name], rtol=0, atol=1e-4), name  # products are float32


def test_the_dry_run_reads_neither_weights_nor_data(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlpreduce.train import parts

    monkeypatch.setattr(parts, "calibration_data", lambda _: pytest.fail("no data is read"))
    step = '{transform="shallow", target_params=0.8, criterion="nvit", scope="global", repair="least_squares"}'
    by_weights = '{transform="shallow", ratio=0.5, criterion="l2"}'
    text = describe(recipes.load("nvit_tiny", [f"variants.x=[{step}]", f"variants.y=[{by_weights}, {step}]"]))
    assert text.count("will follow from 512 training images; here: the first units, as many of each MLP") == 4
    assert "target_params=0.8: " in text
    taught_by_features = describe(recipes.load("dgmr_tiny"))
    assert "features, class 1, patches 1, no labels; teacher: the unreduced model" in taught_by_features
    assert "will follow" not in taught_by_features  # rows of fc1 are no data
    model = build_model(finetune(Path("a"), "none", GLOBAL, REPAIRED), device="meta")
    assert model.blocks[0].mlp.fc1.weight.is_meta
    assert [plan.config["criterion"] for plan in mlpreduce.history(model)] == ["first", "first"]
