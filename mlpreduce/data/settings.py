"""The keys of a recipe that say which images there are, and how they are read and augmented."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from mlpreduce.words.marks import Free, Later

__all__ = ["AugmentSettings", "DataSettings", "setting_problems"]

Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]


class DataSettings(BaseModel):
    """The `[data]` section of a recipe: which images, and how they are read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "folder"  # "folder", "digits", "fractals", "synthetic", "torch/...", "hfds/...", "wds/": docs/data.md
    root: Free[str] = ""  # folder: holds train/ and val/; torch, wds: where the files lie; hfds: cache; else ""
    val_share: Later[Annotated[float, Field(ge=0, lt=1)]] = (
        0.0  # folder: share of each class held out; 0 = val/ is there
    )
    train_split: str = "train"  # torch, hfds, wds: name of the training split; wds also "part-{00..09}.tar|1000"
    val_split: str = "validation"  # the same for validation
    image_size: Annotated[int, Field(ge=1)] = 224  # pixels a side, after cropping
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # per channel, of pixels in 0..1
    std: tuple[float, ...] = (0.5, 0.5, 0.5)  # per channel, of pixels in 0..1
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 0.9  # validation: resize to image_size / crop_pct, crop the centre
    interpolation: str = "bicubic"  # validation: resampling filter
    workers: Annotated[int, Field(ge=0)] = 4  # loading processes per training worker; 0 = load in the worker itself
    pin_memory: Free[bool] = False  # page-locked host memory, for copies to GPUs; without effect on CPUs
    eval_batch_size: Annotated[int, Field(ge=1)] = 256  # images per validation batch and worker
    train_samples: Annotated[int, Field(ge=0)] = 0  # images; fractals, synthetic: made; else: --dry-run counts with it
    val_samples: Annotated[int, Field(ge=0)] = 0  # images; fractals, synthetic: made
    classes: Annotated[int, Field(ge=0)] = 0  # fractals, synthetic, wds: how many; others mostly tell theirs
    on_bad_image: Free[Literal["raise", "skip"]] = (
        "raise"  # an unreadable training image: stop, or take the next instead
    )


class AugmentSettings(BaseModel):
    """The augmentation keys of `[train]`. All but mixup and cutmix act on images only, not on the digits."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    label_smoothing: Fraction = 0.0  # share of the target spread over all classes
    mixup: NonNegative = 0.0  # alpha of the Beta distribution; 0 = off
    cutmix: NonNegative = 0.0  # alpha of the Beta distribution; 0 = off
    mixup_prob: Fraction = 1.0  # probability that a batch is mixed at all
    mixup_switch_prob: Fraction = 0.5  # probability of cutmix where both are on
    auto_augment: str = ""  # timm's policy, such as "rand-m9-mstd0.5-inc1"; "" = none
    random_erasing: Fraction = 0.0  # probability that a rectangle of an image is erased, with pixel noise
    aug_repeats: Annotated[int, Field(ge=0)] = 0  # copies of an image in an epoch (repeated augmentation); 0 = off
    hflip: Fraction = 0.5  # probability of a horizontal flip
    crop_scale: tuple[float, float] = (0.08, 1.0)  # area of the random crop, as a fraction of the image
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of the random crop
    color_jitter: NonNegative = 0.4  # strength; timm switches it off where auto_augment is set
    train_interpolation: str = "random"  # resampling filter of the random crop

    @property
    def mixes(self) -> bool:
        """Whether batches are mixed, and targets therefore soft."""
        return self.mixup > 0 or self.cutmix > 0


def setting_problems(data: DataSettings, augment: AugmentSettings, *, micro_batch: int, world: int) -> Iterator[str]:
    """What in the settings cannot be carried out, wherever the data lies.

    Args:
        data: what is trained on.
        augment: how the images are changed.
        micro_batch: images that a worker takes at a time.
        world: workers.
    """
    if augment.mixes and micro_batch % 2:
        yield (
            f"train.mixup={augment.mixup}, train.cutmix={augment.cutmix}: a batch of {micro_batch} images per worker cannot "
            "be mixed in pairs; choose train.batch_size so that each worker's batch is even"
        )
    if data.val_share and data.name != "folder":
        yield (
            f"data.val_share={data.val_share:g}: only data.name='folder' holds images out, and data.name={data.name!r} has a "
            f"validation set; leave it out"
        )
    if data.name == "digits":
        mixing = {"label_smoothing", "mixup", "cutmix", "mixup_prob", "mixup_switch_prob"}
        fields = AugmentSettings.model_fields
        changed = [name for name in fields if name not in mixing and getattr(augment, name) != fields[name].default]
        if changed:
            keys = ", ".join(f"train.{name}={getattr(augment, name)!r}" for name in changed)
            yield (
                f"{keys}: data.name='digits' are ready-made tensors of 8x8 pixels, and know only mixup, cutmix and label "
                "smoothing; leave these keys out, or use data.name='synthetic' or 'folder'"
            )
        if data.image_size != 8:
            yield f"data.image_size={data.image_size}: the digits have 8x8 pixels; use data.image_size=8"
    elif augment.aug_repeats and world == 1:
        yield (
            f"train.aug_repeats={augment.aug_repeats}: timm's repeated augmentation hands the copies of an image to "
            "different workers, and there is 1; use train.aug_repeats=0, or launch.workers=2 or more"
        )
