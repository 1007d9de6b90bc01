"""Batches for training and validation: timm's loader for images, and scikit-learn's handwritten digits.

Validation is sharded over the workers without padding, so counts are exact; training order depends on seed and epoch alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlpreduce.data.reading import CheckedImages
from mlpreduce.data.settings import AugmentSettings, DataSettings, setting_problems
from mlpreduce.data.sources import check, open_source
from mlpreduce.errors import ReductionError, require

if TYPE_CHECKING:
    import torch

__all__ = ["Loaders", "calibration", "digits_tensors", "load", "posterize"]

_CALIBRATION_BATCH = 64  # images that are read at a time; they are used fewer at a time


@dataclass(frozen=True)
class Loaders:
    """Training and validation batches of one worker.

    Attributes:
        train: batches of images (batch, channels, height, width) and targets, (batch,) or (batch, classes) when mixed.
        val: batches of images and labels (batch,); this worker's share.
        num_classes: how many classes the data set has.
        train_samples: images in the training set, over all workers; of streams, images in an epoch.
        val_samples: images in the validation set, over all workers.
        mixup: mixes a batch in the training loop; None where the loader does it, or nothing is mixed.
        set_epoch: sets the order of an epoch, from (seed, epoch).
        skipped: how often, since the loaders were made, an image took the place of an unreadable one; over this worker's
            loading processes. Only with `data.on_bad_image="skip"`, and never in validation.
        skipped_files: the unreadable files that were met, as far as they have names; of streams none.
        side: median of the shorter side of some training pictures in pixels, before they are resized; None = not known.
    """

    train: Any
    val: Iterable[tuple[torch.Tensor, torch.Tensor]]
    num_classes: int
    train_samples: int
    val_samples: int
    mixup: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None
    set_epoch: Callable[[int, int], None]
    skipped: Callable[[], int] = lambda: 0
    skipped_files: Callable[[], list[str]] = list
    side: int | None = None


def load(
    data: DataSettings,
    augment: AugmentSettings,
    *,
    micro_batch: int,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
) -> Loaders:
    """Training and validation batches for worker `rank` of `world`.

    Args:
        data: what to read.
        augment: how training images and targets are changed.
        micro_batch: images per training batch of this worker.
        rank: number of this worker.
        world: number of workers.
        device: where batches go.

    Raises:
        ReductionError: no such data, or an augmentation that this data set does not offer.
    """
    for problem in setting_problems(data, augment, micro_batch=micro_batch, world=world):
        raise ReductionError(problem)
    check(data)
    if data.name == "digits":
        return _digits(data, augment, micro_batch, rank, world, device)
    return _images(data, augment, micro_batch, rank, world, device)


def calibration(
    data: DataSettings, count: int, *, rank: int = 0, world: int = 1
) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Some training images as validation would show them, with labels: to measure a model with, not to train it.

    They are spread evenly over the data set, as those of a class often lie side by side; no seed and no number of processes
    changes which they are. They are read anew each time one iterates.

    Args:
        data: what to read.
        count: how many images, over all workers; fewer where the training set has fewer.
        rank: number of this worker.
        world: number of workers; each gets every `world`-th of the images, which may be none.

    Returns:
        Batches of images (batch, channels, height, width) and labels (batch,), on the CPU.

    Raises:
        ReductionError: `count` is below 1, there is no such data, or it is a stream.

    Example:
        >>> digits = DataSettings(name="digits", image_size=8)
        >>> [len(labels) for _, labels in calibration(digits, 100)]
        [64, 36]
    """
    if count < 1:
        raise ReductionError(f"calibration(count={count}): it is a number of images; use 1 or more")
    check(data)
    if data.name.startswith("wds/"):
        raise ReductionError(
            f"data.name={data.name!r}: calibration takes images by their number, and shards are a stream; choose the units "
            f'by weights (criterion="l2", no repair), or use class folders or hfds/...'
        )
    if data.name == "digits":
        import torch
        from torch.utils.data import BatchSampler, DataLoader, TensorDataset

        images, labels = digits_tensors()[0]
        chosen = _spread(len(labels), count)[rank::world]
        share = TensorDataset(images[chosen], labels[chosen])
        order = BatchSampler(range(len(share)), _CALIBRATION_BATCH, drop_last=False)
        return DataLoader(share, sampler=order, batch_size=None, generator=torch.Generator())
    source = open_source(data, micro_batch=1, rank=rank, world=world)
    return _as_in_validation(source.train, _spread(len(source.train), count)[rank::world], data)


def _spread(images: int, count: int) -> list[int]:
    """Numbers of `count` images, evenly from the first on; all, if there are no more."""
    count = min(images, count)
    return [number * images // count for number in range(count)]


def _as_in_validation(
    images: Any, numbers: list[int], data: DataSettings
) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Some images of a set, with the transform of validation."""
    import torch
    from timm.data import create_loader
    from torch.utils.data import Subset

    part: Any = Subset(images, numbers)
    loader: Any = create_loader(
        part,
        batch_size=_CALIBRATION_BATCH,
        is_training=False,
        interpolation=data.interpolation,
        crop_pct=data.crop_pct,
        **_reading(data, torch.device("cpu")),
    )
    images.transform = part.transform  # timm sets it on what it is given, but the whole set reads the images
    loader.loader.generator = (
        torch.Generator()
    )  # each iteration draws a seed, and else from the random state of the run
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]] = loader
    return batches


def _digits(
    data: DataSettings, augment: AugmentSettings, micro_batch: int, rank: int, world: int, device: torch.device | str
) -> Loaders:
    """1,797 handwritten digits of 8x8 pixels (UCI, shipped with scikit-learn); a fixed stratified 80/20 split."""
    from timm.data import Mixup
    from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

    known, unknown = digits_tensors()
    train_set = TensorDataset(*known)
    val_set = TensorDataset(*(part[rank::world] for part in unknown))
    order: DistributedSampler[Any] = DistributedSampler(train_set, num_replicas=world, rank=rank)
    # batch_size=None and a sampler of index lists: a batch is one indexing operation, not 32 and a collate.
    train = DataLoader(train_set, sampler=BatchSampler(order, micro_batch, drop_last=True), batch_size=None)
    whole = BatchSampler(range(len(val_set)), data.eval_batch_size, drop_last=False)
    val = DataLoader(val_set, sampler=whole, batch_size=None)
    mixup = Mixup(**_mix_arguments(augment, 10)) if augment.mixes else None
    return Loaders(train, val, 10, len(known[1]), len(unknown[1]), mixup, _order(order))


def digits_tensors() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images (number, 1, 8, 8) and labels (number,) of the training set, then of the validation set."""
    require("data.name='digits'", "sklearn")
    return _read_digits()


@functools.cache  # a search trains many models in one process, and reading takes as long as an epoch of a small one
def _read_digits() -> list[tuple[torch.Tensor, torch.Tensor]]:
    import torch
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source = load_digits()
    images = torch.tensor(source.images, dtype=torch.float32).unsqueeze(1)  # (1797, 1, 8, 8), pixels 0..16
    labels = torch.tensor(source.target, dtype=torch.int64)
    train_ids, val_ids = train_test_split(range(len(labels)), test_size=0.2, stratify=source.target, random_state=0)
    images = (images - images[train_ids].mean()) / images[train_ids].std()
    return [(images[ids], labels[ids]) for ids in (train_ids, val_ids)]


def _images(
    data: DataSettings, augment: AugmentSettings, micro_batch: int, rank: int, world: int, device: torch.device | str
) -> Loaders:
    """Images through timm's transforms and loader, with the settings of its training script."""
    import torch
    from timm.data import FastCollateMixup, create_loader
    from torch.utils.data import Subset

    source = open_source(data, micro_batch=micro_batch, rank=rank, world=world)
    streamed = source.set_epoch is not None
    if augment.aug_repeats and streamed:
        raise ReductionError(
            f"train.aug_repeats={augment.aug_repeats}: data.name={data.name!r} is a stream, and timm's repeated augmentation "
            "needs images by number; use train.aug_repeats=0"
        )
    collate = FastCollateMixup(**_mix_arguments(augment, source.num_classes)) if augment.mixes else None
    common = _reading(data, torch.device(device))
    train = create_loader(
        source.train,
        batch_size=micro_batch,
        is_training=True,
        re_prob=augment.random_erasing,
        re_mode="pixel",
        re_count=1,
        scale=augment.crop_scale,
        ratio=augment.crop_ratio,
        hflip=augment.hflip,
        color_jitter=augment.color_jitter,
        auto_augment=augment.auto_augment or None,
        num_aug_repeats=augment.aug_repeats,
        interpolation=augment.train_interpolation,
        collate_fn=collate,
        distributed=world > 1,
        **common,
    )
    _mend_posterize(source.train.transform)
    shard: Any = source.val if streamed else Subset(source.val, range(rank, len(source.val), world))
    val = create_loader(
        shard,
        batch_size=data.eval_batch_size,
        is_training=False,
        interpolation=data.interpolation,
        crop_pct=data.crop_pct,
        **common,
    )
    source.val.transform = shard.transform  # timm sets it on what it is given, but the whole set reads the images
    tally = source.tally
    return Loaders(
        train=train,
        val=val,
        num_classes=source.num_classes,
        train_samples=source.train_samples,
        val_samples=source.val_samples,
        mixup=None,
        set_epoch=source.set_epoch or _order(train.sampler),
        skipped=lambda: tally.replaced,
        skipped_files=lambda: [source.train.file(index) for index in tally.indices()],
        side=source.train.pictures()[0] if isinstance(source.train, CheckedImages) else None,
    )


def _reading(data: DataSettings, device: torch.device) -> dict[str, Any]:
    """What timm's loader is told of the images, in training and validation."""
    return {
        "input_size": (3, data.image_size, data.image_size),
        "mean": data.mean,
        "std": data.std,
        "num_workers": data.workers,
        "pin_memory": data.pin_memory and device.type == "cuda",  # elsewhere torch warns, and nothing is gained
        "device": device,
        # their random state would survive the epoch and no checkpoint could hold it
        "persistent_workers": False,
    }


def posterize(image: Any, bits: int, **_: Any) -> Any:
    """An image with so many bits a channel left; with 0, as timm's policies may ask for, a black one (Pillow 13 raises)."""
    from PIL import ImageOps

    if bits == 0:
        return image.point(lambda pixel: 0)
    return image if bits >= 8 else ImageOps.posterize(image, bits)


def _mend_posterize(transform: Any) -> None:
    """Let timm's policies keep 0 bits of a pixel, a black image, as they mean to: Pillow 13 raises there."""
    from timm.data.auto_augment import AugmentOp

    for step in getattr(transform, "transforms", []):
        policies = getattr(step, "policy", [getattr(step, "ops", [])])
        for operation in (operation for policy in policies for operation in policy):
            if isinstance(operation, AugmentOp) and operation.name.startswith("Posterize"):
                operation.aug_fn = posterize


def _mix_arguments(augment: AugmentSettings, num_classes: int) -> dict[str, Any]:
    return {
        "mixup_alpha": augment.mixup,
        "cutmix_alpha": augment.cutmix,
        "prob": augment.mixup_prob,
        "switch_prob": augment.mixup_switch_prob,
        "label_smoothing": augment.label_smoothing,
        "num_classes": num_classes,
    }


def _order(sampler: Any) -> Callable[[int, int], None]:
    """How the order of an epoch is set, for the samplers that torch and timm use."""

    def set_epoch(seed: int, epoch: int) -> None:
        import torch
        from torch.utils.data import DistributedSampler

        if isinstance(sampler, DistributedSampler):
            sampler.seed = seed
            sampler.set_epoch(epoch)
        elif hasattr(sampler, "set_epoch"):  # timm's RepeatAugSampler knows only the epoch
            sampler.set_epoch(seed * 1_000_003 + epoch)
        else:  # RandomSampler, one process
            sampler.generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)

    return set_epoch
