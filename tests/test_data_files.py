"""Folders and damaged images."""

from __future__ import annotations

import errno
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.marks import slow_but
from PIL import Image

from mlpreduce.data import AugmentSettings, DataSettings, check, load
from mlpreduce.errors import ReductionError

STILL = AugmentSettings(hflip=0.0, color_jitter=0.0, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
# torch closes the queues of a failed loading process while threads of the process may still write to them
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.usefixtures("loading_processes_end"),
]


def shade(path: Path, value: int) -> None:
    """A plain image whose brightness tells which one it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (value, value, value)).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            for number in range(count):
                shade(tmp_path / split / name / f"{number}.png", 100 * label + 10 * number)
    return tmp_path


def settings(root: Path, **changes: Any) -> DataSettings:
    return DataSettings(**({"root": str(root), "image_size": 16, "workers": 0, "crop_pct": 1.0} | changes))


def refuse(root: Path, match: str) -> None:
    with pytest.raises(ReductionError, match=match):
        check(settings(root))
    with pytest.raises(ReductionError, match=match):
        load(settings(root), STILL, micro_batch=4)


def test_good_folders_pass(root: Path) -> None:
    (root / "train" / ".cache").mkdir()  # empty and hidden: no class, for timm as for us
    (root / "val" / "notes.txt").touch()
    check(settings(root))
    assert load(settings(root), STILL, micro_batch=4).num_classes == 2


def test_different_classes_are_counted_and_named(root: Path) -> None:
    shutil.rmtree(root / "val" / "cat")
    refuse(root, r"val/ has no folder for 1 of the 2 classes of the other \(cat\).*Give both the same class folders")
    shade(root / "val" / "emu" / "0.png", 0)
    refuse(root, r"\(cat\) and train/ has no folder for 1 of the 2 classes of the other \(emu\)")


@pytest.mark.parametrize("split", ["train", "val"])
def test_folders_inside_class_folders_are_refused(split: str, root: Path) -> None:
    # timm takes the innermost folder as the class
    for name in ("cat", "dog"):
        shutil.move(root / split / name, root / split / "inner")
        shutil.move(root / split / "inner", root / split / name / "young")
    refuse(
        root,
        rf"2 folders hold images in '.*{split}'.*\(cat/young, dog/young\).*put them directly into their class folder",
    )


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_folder_beside_the_images_of_a_class_is_refused_when_they_are_listed(split: str, root: Path) -> None:
    shade(root / split / "dog" / "old" / "0.png", 1)
    with pytest.raises(
        ReductionError, match=rf"1 folder holds images in '.*{split}', .*\(dog/old\).*put them directly"
    ):
        load(settings(root), STILL, micro_batch=4)


def test_a_hidden_folder_with_images_is_refused(root: Path) -> None:
    for split in ("train", "val"):
        shade(root / split / ".cache" / "0.png", 1)
    refuse(root, r"\(\.cache\).*remove hidden folders")
    for split in ("train", "val"):
        shutil.move(root / split / ".cache", root / split / "dog" / ".cache")
    with pytest.raises(ReductionError, match=r"\(dog/\.cache\).*remove hidden folders"):
        load(settings(root), STILL, micro_batch=4)


def test_one_class_is_refused(root: Path) -> None:
    for split in ("train", "val"):
        shutil.rmtree(root / split / "dog")
    with pytest.raises(ReductionError, match=r"train/ and val/ hold 1 class folder \(cat\); a model needs at least 2"):
        check(settings(root))


def test_empty_class_folder(root: Path) -> None:
    (root / "train" / "eel").mkdir()
    (root / "train" / "eel" / "readme.txt").touch()
    refuse(root, r"train' has 1 class folder\(s\) of 3 without an image \(eel\).*fill or remove.*images end in .png")


def test_no_image_at_all(root: Path) -> None:
    for path in (root / "val").rglob("*.png"):
        path.unlink()
    refuse(root, r"val' has 2 class folder\(s\) and no image in any of them; it must hold")
    shutil.rmtree(root / "val")
    (root / "val").mkdir()
    refuse(root, r"val' has no class folder and no image")


def test_images_beside_the_class_folders(root: Path) -> None:
    shade(root / "train" / "stray.png", 0)
    refuse(root, r"1 image\(s\) beside the class folders \(stray.png\).*move them")


def test_unreadable_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = root / "file"
    file.touch()
    refuse(file, r"file' cannot be read \(Not a directory\)")
    scandir, forbidden = os.scandir, {str(root)}

    def guarded(path: Any) -> Any:
        if str(path) in forbidden:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    refuse(root, r"cannot be read \(Permission denied\).*this user may list")
    forbidden.clear()
    forbidden.add(str(root / "train" / "dog"))
    refuse(root, r"train/dog' cannot be read \(Permission denied\)")


def damage(root: Path, split: str) -> tuple[Path, Path]:
    """A truncated image and a text that is named as one: images 1 and 2 of the split."""
    first, second = (sorted((root / split / "cat").iterdir()) + sorted((root / split / "dog").iterdir()))[1:3]
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(first, format="JPEG")
    first.write_bytes(first.read_bytes()[:2000])
    second.write_text("not an image")
    return first, second


@pytest.mark.parametrize("workers", slow_but([0, 1], 0))
def test_a_damaged_image_stops_training_and_is_named(root: Path, workers: int) -> None:
    damaged = damage(root, "train")
    loaders = load(settings(root, workers=workers), STILL, micro_batch=8)
    with pytest.raises(ReductionError, match=r"of the training set cannot be read.*on_bad_image='skip'") as caught:
        list(loaders.train)
    assert any(str(path) in str(caught.value) for path in damaged)
    assert "Traceback" not in str(caught.value)
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize("workers", slow_but([0, 1], 0))
def test_a_damaged_image_always_stops_validation(root: Path, workers: int, policy: str) -> None:
    damaged = damage(root, "val")
    loaders = load(settings(root, workers=workers, on_bad_image=policy), STILL, micro_batch=8)
    list(loaders.train)
    with pytest.raises(ReductionError, match=r"of the validation set cannot be read.*no image is replaced") as caught:
        list(loaders.val)
    assert any(str(path) in str(caught.value) for path in damaged)
    assert loaders.skipped() == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_images_are_replaced_by_the_next_and_counted(root: Path, workers: int) -> None:
    damaged = damage(root, "train")
    loaders = load(settings(root, workers=workers, on_bad_image="skip"), STILL, micro_batch=4)
    assert (loaders.skipped(), loaders.skipped_files()) == (0, [])
    for epoch in (1, 2):
        loaders.set_epoch(0, epoch)
        batches = [(images[:, 0, 0, 0], labels) for images, labels in loaders.train]
        shades = torch.cat([shades for shades, _ in batches]).mul(127.5).add(127.5).round().int().tolist()
        # images 1 and 2 of cat are replaced by image 3 of cat
        assert sorted(shades) == [0, 30, 30, 30, 100, 110, 120, 130]
        # the first damaged image leads to the second: three replacements for two images
        assert loaders.skipped() == 3 * epoch
    assert loaders.skipped_files() == [str(path) for path in damaged]


def test_skipped_images_are_named_in_the_log(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    damaged = damage(root, "train")
    list(load(settings(root, on_bad_image="skip"), STILL, micro_batch=8).train)
    for path in damaged:
        assert f"{path}: image" in caplog.text
    assert "the next one takes its place" in caplog.text


def test_many_damaged_images_in_a_row_are_no_accident(root: Path) -> None:
    for path in (root / "train").rglob("*.png"):
        path.write_text("gone")
    loaders = load(settings(root, on_bad_image="skip"), STILL, micro_batch=8)
    with pytest.raises(
        ReductionError, match=r"and the 9 after it cannot be read.*look whether the storage can be read"
    ):
        list(loaders.train)


def test_loading_processes_resume_to_the_same_bits(root: Path) -> None:
    noisy = AugmentSettings(random_erasing=0.5)
    loaders = load(settings(root, workers=2), noisy, micro_batch=4)

    def epoch(number: int) -> torch.Tensor:
        loaders.set_epoch(5, number)
        return torch.cat([images for images, _ in loaders.train])

    epoch(0)
    state = torch.get_rng_state(), random.getstate()  # timm erases after loading, by Python's random numbers
    first = epoch(1)
    loaders = load(settings(root, workers=2), noisy, micro_batch=4)
    torch.set_rng_state(state[0])
    random.setstate(state[1])
    assert torch.equal(epoch(1), first)


def test_torchvision_imagenet(root: Path) -> None:
    # what torchvision keeps beside the images once the archives are unpacked: the names of each class, several for some
    torch.save(({"cat": ("cat", "house cat"), "dog": ("dog",)}, ["cat", "dog"]), root / "meta.bin")
    data = settings(root, name="torch/imagenet")
    check(data)
    loaders = load(data, STILL, micro_batch=4)
    assert (loaders.num_classes, loaders.train_samples, loaders.val_samples) == (2, 8, 4)
    assert next(iter(loaders.train))[0].shape == (4, 3, 16, 16)
    assert sorted(torch.cat([labels for _, labels in loaders.val]).tolist()) == [0, 0, 1, 1]
    damaged = damage(root, "train")
    with pytest.raises(ReductionError, match="of the training set cannot be read") as caught:
        list(load(data, STILL, micro_batch=8).train)
    assert any(str(path) in str(caught.value) for path in damaged)


def test_torchvision_data_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ReductionError, match=r"data.root='' is not set"):
        check(DataSettings(name="torch/imagenet"))
    with pytest.raises(
        ReductionError, match=r"data.name='torch/cifar10'.*'train' cannot be opened \(Dataset not found"
    ):
        load(settings(tmp_path, name="torch/cifar10"), STILL, micro_batch=4)
    with pytest.raises(ReductionError, match=r"no such data set of torchvision; did you mean 'imagenet'"):
        load(settings(tmp_path, name="torch/imagnet"), STILL, micro_batch=4)
