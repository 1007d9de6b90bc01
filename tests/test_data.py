from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DistributedSampler

from mlpreduce.data import AugmentSettings, DataSettings, Loaders, check, load
from mlpreduce.errors import ReductionError
from mlpreduce.train import Run

DIGITS = DataSettings(name="digits", image_size=8)
SYNTHETIC = DataSettings(name="synthetic", image_size=16, train_samples=64, val_samples=21, classes=3, workers=0)
PLAIN = AugmentSettings()


def rows(loader: object) -> list[bytes]:
    """Each image of a loader, as bytes, in order."""
    return [image.numpy().tobytes() for images, _ in loader for image in images]  # type: ignore[attr-defined]


def test_digits_are_split_once_and_stratified() -> None:
    loaders = load(DIGITS, PLAIN, micro_batch=16)
    assert (loaders.skipped(), loaders.skipped_files()) == (0, [])
    assert (loaders.train_samples, loaders.val_samples, loaders.num_classes) == (1437, 360, 10)
    images, labels = next(iter(loaders.train))
    assert images.shape == (16, 1, 8, 8)
    assert labels.shape == (16,)
    held = torch.cat([labels for _, labels in loaders.val])
    assert torch.bincount(held).min() >= 34  # ten classes of about 36
    seen = set(rows(loaders.train))
    assert not seen & set(rows(loaders.val))


@pytest.mark.parametrize("world", [1, 2, 7])
@pytest.mark.parametrize("data", [DIGITS, SYNTHETIC], ids=["digits", "synthetic"])
def test_validation_shards_are_exact(data: DataSettings, world: int) -> None:
    # The training loader of images needs a process group; validation does not.
    whole = sorted(rows(load(data, PLAIN, micro_batch=4).val))
    shards = [val_shard(data, rank, world) for rank in range(world)]
    assert sorted(row for shard in shards for row in rows(shard.val)) == whole


def val_shard(data: DataSettings, rank: int, world: int) -> Loaders:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "get_world_size", lambda group=None: world)
        patch.setattr(torch.distributed, "get_rank", lambda group=None: rank)
        return load(data, PLAIN, micro_batch=4, rank=rank, world=world)


@pytest.mark.parametrize("data", [DIGITS, SYNTHETIC], ids=["digits", "synthetic"])
def test_order_comes_from_seed_and_epoch(data: DataSettings) -> None:
    plain = AugmentSettings(hflip=0.5)
    loaders = load(data, plain, micro_batch=8)

    def labels(seed: int, epoch: int) -> list[int]:
        loaders.set_epoch(seed, epoch)
        return [int(label) for _, batch in loaders.train for label in batch]

    first = labels(1, 0)
    torch.manual_seed(99)  # the global random state has no part in it
    assert labels(1, 0) == first
    assert labels(1, 1) != first
    assert labels(2, 0) != first


@pytest.mark.parametrize(
    ("samples", "workers", "batch", "accum"), [(1437, 1, 32, 1), (1437, 2, 32, 2), (700, 3, 24, 2)]
)
def test_updates_per_epoch_counts_what_the_samplers_give(samples: int, workers: int, batch: int, accum: int) -> None:
    run = Run(
        recipe="r",
        variant="v",
        directory="/nowhere",
        workers=workers,
        train={"batch_size": batch, "accum_steps": accum},  # type: ignore[arg-type]
    )
    for repeats in (0, 3):
        if repeats:
            sampler = RepeatAugSampler(range(samples), num_replicas=workers, rank=0, num_repeats=3)
        else:
            sampler = DistributedSampler(range(samples), num_replicas=workers, rank=0)  # type: ignore[arg-type]
        updates = -(-(len(sampler) // run.micro_batch) // accum)
        repeated = run.model_copy(update={"train": run.train.model_copy(update={"aug_repeats": repeats})})
        assert repeated.updates_per_epoch(samples) == updates


def test_published_batch_arithmetic() -> None:
    run = Run(
        recipe="r",
        variant="v",
        directory="/nowhere",
        workers=2,
        train={"accum_steps": 2, "aug_repeats": 3},  # type: ignore[arg-type]
    )
    assert run.micro_batch == 256
    assert run.updates_per_epoch(1_281_167) == 1251


def test_batch_that_does_not_split_is_refused_with_what_would() -> None:
    run = Run(recipe="r", variant="v", directory="/nowhere", workers=3, train={"batch_size": 32})  # type: ignore[arg-type]
    with pytest.raises(ReductionError, match=r"batch_size=32.*3 worker\(s\).*30 or 33 would"):
        _ = run.micro_batch
    with pytest.raises(ReductionError, match="fewer than one batch of 512"):
        run.model_copy(
            update={"workers": 2, "train": run.train.model_copy(update={"batch_size": 1024})}
        ).updates_per_epoch(9)


def test_digits_refuse_image_augmentation() -> None:
    with pytest.raises(ReductionError, match=r"train.random_erasing=0.25.*8x8 pixels"):
        load(DIGITS, AugmentSettings(random_erasing=0.25), micro_batch=8)
    with pytest.raises(ReductionError, match="image_size=8"):
        load(DataSettings(name="digits"), PLAIN, micro_batch=8)


def test_mixed_batches_have_soft_targets_and_must_be_even() -> None:
    mixed = AugmentSettings(mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    images, targets = next(iter(load(SYNTHETIC, mixed, micro_batch=8).train))
    assert images.shape == (8, 3, 16, 16)
    assert images.dtype == torch.float32
    assert targets.shape == (8, 3)
    assert torch.allclose(targets.sum(1), torch.ones(8))
    digits = load(DIGITS, mixed, micro_batch=8)
    assert digits.mixup is not None
    assert digits.mixup(*next(iter(digits.train)))[1].shape == (8, 10)
    with pytest.raises(ReductionError, match="batch of 7 images per worker cannot be mixed"):
        load(DIGITS, mixed, micro_batch=7)


def test_strongest_posterize_gives_a_black_image() -> None:
    # magnitude 10 keeps 0 bits; the published policy (9 +- 0.5) draws it now and then, and Pillow 13 refuses it
    loaders = load(SYNTHETIC, AugmentSettings(auto_augment="rand-m10-n9-p1-inc1"), micro_batch=8)
    step = next(t for t in loaders.train.dataset.transform.transforms if hasattr(t, "ops"))
    operation = next(op for op in step.ops if op.name == "PosterizeIncreasing")
    operation.prob = 1.0
    assert operation(Image.new("RGB", (2, 2), (255, 128, 7))).getextrema() == ((0, 0),) * 3
    operation.magnitude = 5
    assert operation(Image.new("RGB", (1, 1), (255, 128, 63))).getpixel((0, 0)) == (192, 128, 0)
    for images, _ in loaders.train:
        assert images.shape == (8, 3, 16, 16)


def test_repeated_augmentation_needs_several_workers() -> None:
    with pytest.raises(ReductionError, match=r"train.aug_repeats=3.*use train.aug_repeats=0"):
        load(SYNTHETIC, AugmentSettings(aug_repeats=3), micro_batch=8)


def test_synthetic_images_are_the_same_each_time_and_tell_classes_apart() -> None:
    from mlpreduce.data.synthetic import SyntheticImages

    data = SYNTHETIC.model_copy(update={"train_samples": 600})
    once, again = SyntheticImages(data, "train"), SyntheticImages(data, "train")
    assert np.array_equal(once.images, again.images)
    assert not np.array_equal(once.images[:21], SyntheticImages(data, "val").images)
    means = np.stack([once.images[once.labels == label].mean(0).ravel() for label in range(3)])
    between = np.linalg.norm(means[0] - means[1])
    halves = [once.images[once.labels == 0][part].mean(0).ravel() for part in (slice(None, None, 2), slice(1, None, 2))]
    assert between > 2 * np.linalg.norm(halves[0] - halves[1])


def test_image_folder(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("validation", 3)):
        for name in ("cat", "dog"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    data = DataSettings(root=str(tmp_path), image_size=16, workers=0)
    loaders = load(data, AugmentSettings(auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.25), micro_batch=4)
    assert (loaders.num_classes, loaders.train_samples, loaders.val_samples) == (2, 12, 6)
    images, _ = next(iter(loaders.train))
    assert images.shape == (4, 3, 16, 16)
    assert len(loaders.train) == 3
    assert torch.cat([labels for _, labels in loaders.val]).bincount().tolist() == [3, 3]


def test_missing_folder_says_what_it_must_hold(tmp_path: Path) -> None:
    with pytest.raises(
        ReductionError, match=r"data.root='' is not set; it must hold train/ and val/.*paper_vitb16_tiny"
    ):
        check(DataSettings())
    (tmp_path / "train").mkdir()
    with pytest.raises(ReductionError, match=r"has no val/; it must hold"):
        check(DataSettings(root=str(tmp_path)))
    with pytest.raises(ReductionError, match="does not exist"):
        check(DataSettings(root=str(tmp_path / "none")))
    with pytest.raises(ReductionError, match="did you mean 'digits'"):
        check(DataSettings(name="digit"))
    with pytest.raises(ReductionError, match="at least 2 classes"):
        check(DataSettings(name="synthetic"))


def test_made_images_are_the_same_in_every_version() -> None:
    """So that figures of recipes on them can be compared; both splits show the same patterns, each with noise of its own."""
    from mlpreduce.data.synthetic import SyntheticImages

    sums = [int(SyntheticImages(SYNTHETIC, split).images.astype(np.int64).sum()) for split in ("train", "val")]
    assert sums == pytest.approx([6427465, 2134472], rel=1e-4)  # Pillow's rounding may change
