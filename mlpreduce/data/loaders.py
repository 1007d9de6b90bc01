"""Data sets and loaders: timm's for images, scikit-learn's handwritten digits, and synthetic images made in memory.

Validation is sharded over the workers without padding, so counts are exact; training order depends on seed and epoch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mlpreduce.data.settings import AugmentSettings, DataSettings
from mlpreduce.errors import ReductionError, did_you_mean

if TYPE_CHECKING:
    import torch

__all__ = ["Loaders", "check", "load"]


@dataclass(frozen=True)
class Loaders:
    """Training and validation batches of one worker.

    Attributes:
        train: batches of images (batch, channels, height, width) and targets, (batch,) or (batch, classes) when mixed.
        val: batches of images and labels (batch,); this worker's share.
        num_classes: how many classes the data set has.
        train_samples: images in the training set, over all workers.
        val_samples: images in the validation set, over all workers.
        mixup: mixes a batch in the training loop; None where the loader does it, or nothing is mixed.
        set_epoch: sets the order of an epoch, from (seed, epoch).
    """

    train: Any
    val: Iterable[tuple[torch.Tensor, torch.Tensor]]
    num_classes: int
    train_samples: int
    val_samples: int
    mixup: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None
    set_epoch: Callable[[int, int], None]


def check(data: DataSettings) -> None:
    """Whether the data can be found, before anything is started.

    Raises:
        ReductionError: unknown `data.name`, or `data.root` does not hold what it must.
    """
    if data.name in ("digits", "synthetic"):
        if data.name == "synthetic" and not (data.train_samples and data.val_samples and data.classes > 1):
            raise ReductionError(
                f"data.name='synthetic': train_samples={data.train_samples}, val_samples={data.val_samples}, classes="
                f"{data.classes}; give the number of images to make (at least 1 each) and at least 2 classes"
            )
        return
    if data.name != "folder":
        if "/" not in data.name:
            known = ["folder", "digits", "synthetic"]
            raise ReductionError(f"data.name={data.name!r}: unknown data set{did_you_mean(data.name, known)}")
        return
    root = Path(data.root)
    missing = [
        name for name, found in (("train/", _split(root, "train")), ("val/", _split(root, "val"))) if found is None
    ]
    if not data.root or missing:
        fact = (
            "is not set"
            if not data.root
            else f"has no {' and no '.join(missing)}"
            if root.is_dir()
            else "does not exist"
        )
        raise ReductionError(
            f"data.root={data.root!r} {fact}; it must hold train/ and val/ (or validation/), each with one folder of images "
            "per class, as ImageNet's. Without data: the recipes `digits` (real images, no download) and "
            "`paper_vitb16_tiny` (synthetic images)"
        )


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
    check(data)
    if augment.mixes and micro_batch % 2:
        raise ReductionError(
            f"train.mixup={augment.mixup}, train.cutmix={augment.cutmix}: a batch of {micro_batch} images per worker cannot "
            "be mixed in pairs; choose train.batch_size so that each worker's batch is even"
        )
    if data.name == "digits":
        return _digits(data, augment, micro_batch, rank, world, device)
    return _images(data, augment, micro_batch, rank, world, device)


def _split(root: Path, name: Literal["train", "val"]) -> Path | None:
    for folder in ("train",) if name == "train" else ("val", "validation"):
        if (root / folder).is_dir():
            return root / folder
    return None


def _digits(
    data: DataSettings, augment: AugmentSettings, micro_batch: int, rank: int, world: int, device: torch.device | str
) -> Loaders:
    """1,797 handwritten digits of 8x8 pixels (UCI, shipped with scikit-learn); a fixed stratified 80/20 split."""
    import torch
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from timm.data import Mixup
    from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

    mixing = {"label_smoothing", "mixup", "cutmix", "mixup_prob", "mixup_switch_prob"}
    fields = AugmentSettings.model_fields
    changed = [name for name in fields if name not in mixing and getattr(augment, name) != fields[name].default]
    if changed:
        keys = ", ".join(f"train.{name}={getattr(augment, name)!r}" for name in changed)
        raise ReductionError(
            f"{keys}: data.name='digits' are ready-made tensors of 8x8 pixels, and know only mixup, cutmix and label "
            "smoothing; leave these keys out, or use data.name='synthetic' or 'folder'"
        )
    if data.image_size != 8:
        raise ReductionError(f"data.image_size={data.image_size}: the digits have 8x8 pixels; use data.image_size=8")
    source = load_digits()
    images = torch.tensor(source.images, dtype=torch.float32).unsqueeze(1)  # (1797, 1, 8, 8), pixels 0..16
    labels = torch.tensor(source.target, dtype=torch.int64)
    train_ids, val_ids = train_test_split(range(len(labels)), test_size=0.2, stratify=source.target, random_state=0)
    images = (images - images[train_ids].mean()) / images[train_ids].std()
    train_set = TensorDataset(images[train_ids], labels[train_ids])
    val_set = TensorDataset(images[val_ids][rank::world], labels[val_ids][rank::world])
    order: DistributedSampler[Any] = DistributedSampler(train_set, num_replicas=world, rank=rank)
    # batch_size=None and a sampler of index lists: a batch is one indexing operation, not 32 and a collate.
    train = DataLoader(train_set, sampler=BatchSampler(order, micro_batch, drop_last=True), batch_size=None)
    whole = BatchSampler(range(len(val_set)), data.eval_batch_size, drop_last=False)
    val = DataLoader(val_set, sampler=whole, batch_size=None)
    mixup = Mixup(**_mix_arguments(augment, 10)) if augment.mixes else None
    return Loaders(train, val, 10, len(train_ids), len(val_ids), mixup, _order(order, data.shuffle_by_seed))


def _images(
    data: DataSettings, augment: AugmentSettings, micro_batch: int, rank: int, world: int, device: torch.device | str
) -> Loaders:
    """Images through timm's transforms and loader, with the settings of its training script."""
    import torch
    from timm.data import FastCollateMixup, create_loader
    from torch.utils.data import IterableDataset, Subset

    if augment.aug_repeats and world == 1:
        raise ReductionError(
            f"train.aug_repeats={augment.aug_repeats}: timm's repeated augmentation hands the copies of an image to "
            "different workers, and there is 1; use train.aug_repeats=0, or launch.workers=2 or more"
        )
    train_set, val_set, classes = _image_sets(data)
    if isinstance(train_set, IterableDataset) or isinstance(val_set, IterableDataset):
        raise ReductionError(
            f"data.name={data.name!r}: a streamed data set has no fixed order to resume; use one on disk"
        )
    collate = FastCollateMixup(**_mix_arguments(augment, classes)) if augment.mixes else None
    # persistent_workers=False: their random state would survive the epoch and no checkpoint could hold it.
    common: dict[str, Any] = {
        "input_size": (3, data.image_size, data.image_size),
        "mean": data.mean,
        "std": data.std,
        "num_workers": data.workers,
        "pin_memory": data.pin_memory,
        "device": torch.device(device),
        "persistent_workers": False,
    }
    train = create_loader(
        train_set,
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
    _mend_posterize(train_set.transform)
    shard: Any = Subset(val_set, range(rank, len(val_set), world))
    val = create_loader(
        shard,
        batch_size=data.eval_batch_size,
        is_training=False,
        interpolation=data.interpolation,
        crop_pct=data.crop_pct,
        **common,
    )
    val_set.transform = shard.transform  # timm sets the transform on what it is given, but val_set reads the images
    return Loaders(train, val, classes, len(train_set), len(val_set), None, _order(train.sampler, data.shuffle_by_seed))


def _posterize(image: Any, bits: int, **_: Any) -> Any:
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
                operation.aug_fn = _posterize


def _image_sets(data: DataSettings) -> tuple[Any, Any, int]:
    from timm.data import create_dataset

    if data.name == "synthetic":
        from mlpreduce.data.synthetic import SyntheticImages

        return SyntheticImages(data, "train"), SyntheticImages(data, "val"), data.classes
    name = "" if data.name == "folder" else data.name
    train_set = create_dataset(name, root=data.root or None, split="train", is_training=True)
    val_set = create_dataset(name, root=data.root or None, split="validation")
    reader = getattr(train_set, "reader", train_set)
    names = getattr(reader, "class_to_idx", None) or getattr(train_set, "classes", None)
    if not names:
        raise ReductionError(f"data.name={data.name!r}: the data set does not tell its classes; use class folders")
    return train_set, val_set, len(names)


def _mix_arguments(augment: AugmentSettings, num_classes: int) -> dict[str, Any]:
    return {
        "mixup_alpha": augment.mixup,
        "cutmix_alpha": augment.cutmix,
        "prob": augment.mixup_prob,
        "switch_prob": augment.mixup_switch_prob,
        "label_smoothing": augment.label_smoothing,
        "num_classes": num_classes,
    }


def _order(sampler: Any, by_seed: bool) -> Callable[[int, int], None]:
    """How the order of an epoch is set, for the samplers that torch and timm use."""

    def set_epoch(seed: int, epoch: int) -> None:
        import torch
        from torch.utils.data import DistributedSampler

        seed = seed if by_seed else 0
        if isinstance(sampler, DistributedSampler):
            sampler.seed = seed
            sampler.set_epoch(epoch)
        elif hasattr(sampler, "set_epoch"):  # timm's RepeatAugSampler knows only the epoch
            sampler.set_epoch(seed * 1_000_003 + epoch)
        else:  # RandomSampler, one process
            sampler.generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)

    return set_epoch
