"""Shards and Hugging Face data sets; what needs their packages is skipped where they are absent."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.marks import slow_but
from PIL import Image

from mlpreduce.data import AugmentSettings, DataSettings, Loaders, check, load, sources
from mlpreduce.errors import ReductionError

STILL = AugmentSettings(hflip=0.0, color_jitter=0.0, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
# webdataset and datasets leave closing files to the garbage collector
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    # torch closes the queues of a failed loading process while threads of the process may still write to them
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.usefixtures("loading_processes_end"),
]
needs_webdataset = pytest.mark.skipif(importlib.util.find_spec("webdataset") is None, reason="needs webdataset")
needs_datasets = pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs datasets")


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def shards(root: Path, split: str, sizes: list[int], damaged: tuple[int, ...] = ()) -> None:
    """Shards of plain images: image n has brightness 5 n and label n % 3."""
    number = 0
    names = []
    for shard, size in enumerate(sizes):
        names.append(f"{split}-{shard}.tar")
        with tarfile.open(root / names[-1], "w") as tar:
            for _ in range(size):
                image = io.BytesIO()
                Image.new("RGB", (8, 8), (5 * number,) * 3).save(image, "PNG")
                add(tar, f"{number:04}.png", b"not an image" if number in damaged else image.getvalue())
                add(tar, f"{number:04}.cls", str(number % 3).encode())
                number += 1
    path = root / "_info.json"
    info = json.loads(path.read_text()) if path.exists() else {"splits": {}}
    info["splits"][split] = {"name": split, "num_samples": number, "filenames": names, "shard_lengths": sizes}
    path.write_text(json.dumps(info))


def settings(root: Path, **changes: Any) -> DataSettings:
    given: dict[str, Any] = {
        "name": "wds/", "root": str(root), "image_size": 8, "workers": 0, "crop_pct": 1.0, "classes": 3
    }  # fmt: skip
    return DataSettings(**(given | changes))


def numbers(batches: Any) -> list[int]:
    """Which images a loader gives, in order."""
    shades = torch.cat([images[:, 0, 0, 0] for images, _ in batches]).mul(127.5).add(127.5).div(5).round()
    return [int(shade) for shade in shades]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    shards(tmp_path, "train", [6, 6, 6, 6])
    shards(tmp_path, "validation", [5, 4, 2])
    return tmp_path


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ReductionError, match=r"data.name='wds/' needs webdataset.*mlpreduce\[data\]"):
        check(settings(tmp_path))
    with pytest.raises(ReductionError, match=r"data.name='hfds/cifar10' needs datasets.*mlpreduce\[data\]"):
        check(DataSettings(name="hfds/cifar10"))


@pytest.mark.parametrize("name", ["hfids/cifar10", "tfds/cifar10"])
def test_streams_without_a_fixed_order_are_refused(name: str) -> None:
    with pytest.raises(ReductionError, match=r"could not go on to the same images; use hfds/"):
        check(DataSettings(name=name))


def test_unknown_names() -> None:
    with pytest.raises(ReductionError, match=r"unknown data set; did you mean 'torch/\.\.\.'"):
        check(DataSettings(name="torc/imagenet"))


def test_shards_need_root_and_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "require", lambda what, *modules: None)
    with pytest.raises(ReductionError, match=r"is no directory.*_info.json"):
        check(settings(tmp_path / "none"))
    with pytest.raises(ReductionError, match=r"data.classes=0.*give the number of classes"):
        check(settings(tmp_path, classes=0))


@needs_webdataset
class TestShards:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_an_epoch_of_equal_shards_has_each_image_once(self, root: Path, workers: int) -> None:
        loaders = load(settings(root, workers=workers), STILL, micro_batch=4)
        assert (loaders.num_classes, loaders.train_samples, loaders.val_samples) == (3, 24, 11)
        loaders.set_epoch(1, 0)
        seen = numbers(loaders.train)
        assert len(loaders.train) == 6
        assert sorted(seen) == list(range(24))
        assert sorted(numbers(loaders.val)) == list(range(11))
        images, labels = next(iter(loaders.val))
        assert labels.tolist() == [number % 3 for number in numbers([(images, labels)])]

    def test_counts_are_rounded_up_to_batches_per_process(self, root: Path) -> None:
        # 24 images, 2 processes: 12 each, rounded up to 15: some images come twice
        loaders = load(settings(root, workers=2), STILL, micro_batch=5)
        assert loaders.train_samples == 30
        assert len(loaders.train) == 6
        counted = Counter(numbers(loaders.train))
        assert counted.total() == 30
        assert len(counted) == 24

    @pytest.mark.parametrize("workers", [0, 2])
    def test_an_epoch_can_be_repeated_after_a_restart(self, root: Path, workers: int) -> None:
        def epoch(loaders: Loaders, number: int) -> list[int]:
            loaders.set_epoch(7, number)
            return numbers(loaders.train)

        loaders = load(settings(root, workers=workers), STILL, micro_batch=4)
        first = epoch(loaders, 0)
        state = torch.get_rng_state()
        second = epoch(loaders, 1)
        assert second != first
        again = load(settings(root, workers=workers), STILL, micro_batch=4)
        torch.set_rng_state(state)
        assert epoch(again, 1) == second

    @pytest.mark.parametrize("world", [1, 2, 3])
    @pytest.mark.parametrize("workers", slow_but([0, 1], 0))
    def test_validation_counts_each_image_once_over_all_workers(self, root: Path, world: int, workers: int) -> None:
        shares = [
            load(settings(root, workers=workers), STILL, micro_batch=4, rank=r, world=world) for r in range(world)
        ]
        assert sorted(number for share in shares for number in numbers(share.val)) == list(range(11))

    def test_training_workers_have_shards_of_their_own(self, root: Path) -> None:
        shares = [load(settings(root), STILL, micro_batch=4, rank=rank, world=2) for rank in range(2)]
        for share in shares:
            share.set_epoch(1, 3)
        assert [len(share.train) for share in shares] == [3, 3]
        assert sorted(number for share in shares for number in numbers(share.train)) == list(range(24))

    def test_more_processes_than_shards(self, root: Path) -> None:
        with pytest.raises(ReductionError, match=r"'train' has 4 shard\(s\) for 6 reading process"):
            load(settings(root, workers=3), STILL, micro_batch=4, world=2)
        with pytest.raises(ReductionError, match=r"'validation' has 3 shard\(s\) for 4"):
            load(settings(root), STILL, micro_batch=4, world=4)

    def test_shards_by_pattern(self, root: Path) -> None:
        (root / "_info.json").unlink()
        data = settings(root, train_split="train-{0..3}.tar|24", val_split="validation-{0..2}.tar|11")
        loaders = load(data, STILL, micro_batch=4)
        assert sorted(numbers(loaders.train)) == list(range(24))
        assert sorted(numbers(loaders.val)) == list(range(11))
        with pytest.raises(ReductionError, match=r"split 'train' are not known.*_info.json"):
            load(settings(root), STILL, micro_batch=4)

    def test_repeated_augmentation_is_refused(self, root: Path) -> None:
        with pytest.raises(ReductionError, match=r"train.aug_repeats=3.*is a stream"):
            load(settings(root), AugmentSettings(aug_repeats=3), micro_batch=4, world=2)

    @pytest.mark.parametrize("workers", slow_but([0, 1], 0))
    def test_damaged_images(self, root: Path, workers: int) -> None:
        shards(root, "train", [6, 6, 6, 6], damaged=(7,))
        with pytest.raises(ReductionError, match=r"train-1.tar: 0007: an image of the training set.*'skip'") as caught:
            numbers(load(settings(root, workers=workers), STILL, micro_batch=4).train)
        assert "\n" not in str(caught.value)
        loaders = load(settings(root, workers=workers, on_bad_image="skip"), STILL, micro_batch=4)
        seen = numbers(loaders.train)
        assert len(seen) == 24
        assert set(seen) == set(range(24)) - {7}
        assert loaders.skipped() >= 1
        shards(root, "validation", [5, 4, 2], damaged=(3,))
        loaders = load(settings(root, workers=workers, on_bad_image="skip"), STILL, micro_batch=4)
        with pytest.raises(ReductionError, match=r"validation-0.tar: 0003: an image of the validation set"):
            numbers(loaders.val)

    def test_a_damaged_shard(self, root: Path) -> None:
        shard = root / "train-2.tar"
        shard.write_bytes(shard.read_bytes()[:2600])  # within the third member
        with pytest.raises(ReductionError, match=r"train-2.tar: a shard of split 'train' is damaged.*copy it anew"):
            numbers(load(settings(root, on_bad_image="skip"), STILL, micro_batch=4).train)

    @pytest.mark.parametrize("workers", slow_but([0, 1], 0))
    def test_a_validation_shard_that_was_cut_between_images(self, root: Path, workers: int) -> None:
        shard = root / "validation-0.tar"
        shard.write_bytes(shard.read_bytes()[: 3 * 2048])  # three samples of five, each of two members of 1,024 bytes
        with pytest.raises(ReductionError, match=r"validation-0.tar.* hold \d+ labelled images, _info.json says \d+"):
            numbers(load(settings(root, workers=workers), STILL, micro_batch=4).val)

    def test_labels_beyond_the_classes_and_samples_without_one(self, root: Path) -> None:
        with pytest.raises(ReductionError, match=r"has label 2; data.classes=2 allows 0 to 1"):
            numbers(load(settings(root, classes=2), STILL, micro_batch=4).train)
        with tarfile.open(root / "train-0.tar", "w") as tar:
            add(tar, "0000.cls", b"0")
        with pytest.raises(ReductionError, match=r"train-0.tar: 0000: a sample of the training set cannot be used"):
            numbers(load(settings(root, on_bad_image="skip"), STILL, micro_batch=4).train)


@needs_datasets
def test_hugging_face_data_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for split, count in (("train", 4), ("validation", 3)):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (8, 8), (number,) * 3).save(folder / f"{number}.png")
    data = settings(tmp_path / "cache", name=f"hfds/{tmp_path / 'images'}", classes=0)
    check(data)
    loaders = load(data, STILL, micro_batch=4)
    assert (loaders.num_classes, loaders.train_samples, loaders.val_samples) == (2, 8, 6)
    assert torch.cat([labels for _, labels in loaders.val]).bincount().tolist() == [3, 3]
    with pytest.raises(ReductionError, match=r"the split 'held' cannot be opened"):
        load(data.model_copy(update={"val_split": "held"}), STILL, micro_batch=4)
