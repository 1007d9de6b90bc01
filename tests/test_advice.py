"""Settings that silently spoil a run are told: in numbers, with a remedy that works, and never falsely."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from mlpreduce import recipe as recipes
from mlpreduce.recipe.schema import points, runs
from mlpreduce.train import ModelSettings, Run, TrainSettings, build_model, create_ema
from mlpreduce.train.advice import advice, average_lag

GOOD: dict[str, Any] = {
    "epochs": 20,
    "batch_size": 32,
    "warmup_epochs": 2,
    "schedule_per_update": True,
    "ema_decay": 0.0,
}


def told(images: int = 480, side: int | None = None, model: nn.Module | None = None, **train: Any) -> list[str]:
    run = Run(recipe="r", variant="baseline", directory="/r", train=TrainSettings(**{**GOOD, **train}))
    return advice(run, images=images, updates_per_epoch=run.updates_per_epoch(images), side=side, model=model)


def test_good_settings_are_not_warned_of() -> None:
    assert told(side=300) == []


@pytest.mark.parametrize("name", sorted(recipes.list_recipes()))
def test_no_shipped_recipe_is_warned_of_on_its_own_data(name: str) -> None:
    for point in points(recipes.load(name)).values():
        run = runs(point, ".")[0]
        images = point.data.train_samples
        small = name.endswith("_tiny") or name == "digits"
        found = advice(
            run,
            images=images,
            updates_per_epoch=run.updates_per_epoch(images),
            side=400 if point.data.name == "folder" else None,  # ImageNet's pictures
            model=build_model(run.model_copy(update={"steps": ()}), device="meta") if small else None,
        )
        assert found == []


@pytest.mark.parametrize(("decay", "start", "warmup"), [(0.9, 0, False), (0.99, 7, False), (0.9998, 0, True)])
def test_lag_is_that_of_the_average_that_training_makes(decay: float, start: int, warmup: bool) -> None:
    model, updates = nn.Linear(1, 1), 60
    average = create_ema(model, decay, warmup=warmup, start=start)
    for update in range(1, updates + 1):
        nn.init.constant_(model.weight, float(update))  # the number of the update, so that the average tells its age
        nn.init.constant_(
            model.bias, float(update <= start + 1)
        )  # 1 until averaging begins: tells the share that is left
        average.update(model, step=update)
    share, age = average_lag(TrainSettings(ema_decay=decay, ema_start=start, ema_warmup=warmup), updates)
    assert updates - average.module.weight.item() == pytest.approx(age, rel=1e-4)
    assert average.module.bias.item() == pytest.approx(share, rel=1e-4)


def test_an_average_far_too_slow_names_a_decay_that_works() -> None:
    (text,) = told(images=96, epochs=30, ema_decay=0.9998)  # 90 updates
    assert text.startswith("train.ema_decay=0.9998: ")
    assert "98.2% of it is still the weights of update 1" in text
    assert "90 updates" in text
    decay = float(re.findall(r"train\.ema_decay=(0\.\d+)", text)[-1])
    assert decay == 0.78  # 1 - 1 / (0.05 * 90), to two digits: as many as tell it from its neighbours
    assert 0.5 < decay < 0.9
    assert told(images=96, epochs=30, ema_decay=decay) == []
    assert "train.ema_warmup=true" in text
    assert told(images=96, epochs=30, ema_decay=0.9998, ema_warmup=True) == []


def test_an_average_that_begins_late_is_judged_by_its_age() -> None:
    assert told(ema_decay=0.9998, ema_start=280) == []  # of 300 updates: at most 20 behind
    (text,) = told(ema_decay=0.9998, ema_start=100)
    assert "of update 101" in text
    (text,) = told(ema_decay=0.9998, ema_start=300)
    assert text.startswith("train.ema_start=300: averaging begins after that update, and a run has 300")


@pytest.mark.parametrize("epochs", [1, 2, 7, 20])
@pytest.mark.parametrize("decay", [0.9, 0.9998, 1.0 - 1e-7])
def test_an_average_that_never_begins_names_a_start_that_works(epochs: int, decay: float) -> None:
    given = {"images": 96, "epochs": epochs, "warmup_epochs": 0, "ema_decay": decay}  # 3 updates an epoch
    (text, *_) = told(**given, ema_start=500)
    assert "use train.ema_decay=0" in text
    starts = re.findall(r"train\.ema_start=(\d+)", text.partition("use ")[2])
    assert bool(starts) == (epochs > 1)  # of 3 updates, a quarter is none
    for start in starts:
        assert not [text for text in told(**given, ema_start=int(start)) if "ema" in text]


def test_crops_of_small_pictures() -> None:
    (text,) = told(side=28)  # the default is ImageNet's
    assert text.startswith("train.crop_scale=[0.08, 1.0]: ")
    assert "28 pixels" in text
    assert "8 x 8" in text
    assert told(side=28, crop_scale=(0.6, 1.0)) == []
    assert told(side=8, crop_scale=(0.6, 1.0)) == []
    assert told(side=224) == []
    assert told(side=None) == []


def test_a_warm_up_that_takes_most_of_the_run() -> None:
    (text,) = told(epochs=20, warmup_epochs=15)
    assert text.startswith("train.warmup_epochs=15: the learning rate still rises in 15 of 20 epochs")
    assert told(epochs=20, warmup_epochs=int(re.findall(r"warmup_epochs=(\d+)", text)[-1])) == []
    (text,) = told(epochs=10, warmup_epochs=20, images=960)
    assert "still rises in 10 of 10 epochs" in text


def test_batches_beyond_the_data() -> None:
    (text,) = told(images=350, batch_size=256)  # one update an epoch
    assert "350 images give 1 update(s) an epoch, 20 in all 20 epochs" in text
    assert told(images=350, batch_size=int(re.findall(r"train\.batch_size=(\d+)", text)[-1])) == []
    (text,) = told(images=500, batch_size=256, epochs=60)
    assert "leaves out 244 of 500 images" in text
    assert told(images=500, epochs=60, batch_size=int(re.findall(r"train\.batch_size=(\d+)", text)[-1])) == []


SMALL = {"embed_dim": 16, "depth": 1, "num_heads": 1}


def told_of_patches(size: int, name: str = "vit_tiny_patch16_224", **kwargs: Any) -> list[str]:
    run = Run(recipe="r", variant="v", directory="/r", model=ModelSettings(name=name, kwargs=kwargs))
    run = run.model_copy(
        update={"train": TrainSettings(**GOOD), "data": run.data.model_copy(update={"image_size": size})}
    )
    with torch.device("meta"):
        model = timm.create_model(name, **kwargs)
    return advice(run, images=480, updates_per_epoch=15, model=model)


@pytest.mark.parametrize(
    ("size", "patch", "fact", "remedies"),
    [
        (28, 16, "leave out 12 of the 28 pixels", {"patch_size": 4, "image_size": 48}),
        (32, 16, "make 4 token", {"patch_size": 4, "image_size": 48}),
        (31, 4, "leave out 3 of the 31 pixels", {"image_size": 28}),  # 1 and 31 alone divide it
        (31, 31, "make 1 token", {"image_size": 93}),
        (28, (4, 8), "patches of 4 x 8 pixels leave out 4 of the 28 pixels", {"patch_size": 4, "image_size": 24}),
    ],
)
def test_patches_that_do_not_fit_the_images(
    size: int, patch: int | tuple[int, int], fact: str, remedies: dict[str, int]
) -> None:
    (text,) = told_of_patches(size, img_size=size, patch_size=patch, **SMALL)
    assert fact in text
    use = text.partition("; use ")[2]
    assert {
        name: int(value) for name, value in re.findall(r"\b(\w+_size)=(\d+)", use) if name != "img_size"
    } == remedies
    better = remedies.get("patch_size")
    assert better is None or told_of_patches(size, img_size=size, patch_size=better, **SMALL) == []
    other = remedies["image_size"]
    assert told_of_patches(other, img_size=other, patch_size=patch, **SMALL) == []


@pytest.mark.parametrize(
    ("size", "name", "kwargs"),
    [
        (224, "vit_base_r50_s16_224", {}),  # its patches are cells of a feature map
        (224, "vit_tiny_r_s16_p8_224", {}),
        (256, "vit_tiny_patch16_224", {"dynamic_img_size": True, **SMALL}),  # built for 224
        (30, "vit_tiny_patch16_224", {"dynamic_img_pad": True, "patch_size": 4, "img_size": 30, **SMALL}),
    ],
)
def test_patches_that_fit_are_not_warned_of(size: int, name: str, kwargs: dict[str, Any]) -> None:
    assert told_of_patches(size, name, **kwargs) == []


def test_a_point_of_a_sweep_names_its_own_key() -> None:
    run = Run(recipe="r/small", variant="v", directory="/r", train=TrainSettings(**{**GOOD, "ema_decay": 0.9998}))
    (text,) = advice(run, images=480, updates_per_epoch=15)
    assert text.startswith("sweep.small.train.ema_decay=0.9998: ")
    keys = re.findall(r"[\w.]*\btrain\.\w+", text)
    assert len(keys) == 3  # two of them in the remedy
    assert all(key.startswith("sweep.small.train.ema_") for key in keys)


def test_dry_run_warns_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert recipes.main(["digits_tiny", "--dry-run", "train.ema_decay=0.9998"]) == 0
    text = capsys.readouterr().out
    assert text.count("warning: train.ema_decay=0.9998: ") == 1  # once, not for every variant
    assert "1,437 training images, 360 validation images, 10 classes, counted" in text
    assert recipes.main(["digits_tiny", "--dry-run"]) == 0
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "fact"),
    [
        ("train.optimizer=adamv", "timm has no such optimizer; did you mean 'adam'"),
        ("data.name=digit", "unknown data set; did you mean 'digits'"),
        ("data.name=torch/cifar11", "no such data set of torchvision; did you mean 'cifar10'"),
        ("model.kwargs.num_classes=9", "has 9 classes, data.name='digits' has 10"),
    ],
)
def test_dry_run_refuses_what_a_run_would(override: str, fact: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipes.main(["digits_tiny", "--dry-run", "data.image_size=8", override]) == 2
    assert fact in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ..noload.. loader strategy is deprecated:DeprecationWarning")  # mlflow's tables
def test_training_and_report_show_what_the_average_hides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    import json

    torch.manual_seed(0)
    given = [
        "digits_tiny",
        "launch.workers=0",
        "seeds=[42]",
        "train.ema_decay=0.9998",
        "--output",
        str(tmp_path / "out"),
    ]
    assert recipes.main(given) == 0
    text = " ".join(capsys.readouterr().out.split())
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    (warning,) = document["warnings"]
    assert warning.startswith("train.ema_decay=0.9998: ")
    assert text.index("warning: train.ema_decay=0.9998") < text.index("epoch 4/4")  # when training starts
    report = (tmp_path / "out" / "report.md").read_text()
    assert warning in report
    for name, variant in document["variants"].items():
        record = json.loads((tmp_path / "out" / name / "seed42" / "record.json").read_text())
        assert record["warnings"] == [warning]
        (run,) = variant["runs"]
        assert run["raw_top1"] == max(entry["raw_top1"] for entry in record["epochs"])
        assert run["raw_top1"] > run["top1"] + 20  # of the digits, 0.9998 hides nearly all
        fact = f"the averaged weights of {name} have {run['top1']:.2f} %, the trained weights {run['raw_top1']:.2f} %"
        assert fact in text
        assert fact in report
    assert "raw top-1 %" in report
