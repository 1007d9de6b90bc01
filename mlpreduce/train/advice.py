"""Settings that silently spoil a run: each with the fact in numbers, and the setting that would work.

A warning is a fact of the settings, the number of images and updates, and the size of the pictures. None of it is an error:
the run trains, and its numbers say less than they seem to.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from mlpreduce.train.parts import create_ema
from mlpreduce.train.settings import Run, TrainSettings

__all__ = ["advice", "average_lag"]

_LAG = 0.25  # of the updates: averages that lag more cost points of top-1
_GOOD_LAG = 0.05  # of the updates: what is recommended
_FEW_UPDATES = 50  # fewer teach a randomly initialised model next to nothing
_LEFT_OUT = 0.2  # share of the images that an epoch may leave out
_LATE = 0.5  # share of the epochs that a warm-up may take
_CROP = 16  # pixels of a picture: a smaller crop shows no object
_TOKENS = 9  # patches, fewer of which leave attention nothing to compare
_KEY = re.compile(r"\b(?:train|data|model)(?:\.\w+)+")  # a key of a recipe, as the texts write it


def advice(
    run: Run, *, images: int, updates_per_epoch: int, side: int | None = None, model: nn.Module | None = None
) -> list[str]:
    """Say which settings of a run will silently spoil it.

    Args:
        run: model, data and training settings.
        images: in the training set.
        updates_per_epoch: optimizer updates in an epoch.
        side: shorter side of a typical training picture in pixels, before it is resized; None = not known.
        model: that of the run, on any device; None = its patches are not looked at.

    Returns:
        One text for each setting, in the form "key=value: fact; remedy". Empty where nothing is wrong.

    Example:
        >>> from mlpreduce.train import Run, TrainSettings
        >>> run = Run(recipe="r", variant="v", directory="/r", train=TrainSettings(epochs=6, batch_size=64))
        >>> print(advice(run, images=960, updates_per_epoch=15)[0][:76])
        train.ema_decay=0.9998: top-1 is measured on averaged weights, and the avera
    """
    found = [
        *_average(run.train, updates_per_epoch * run.train.epochs),
        *_warm_up(run.train),
        *_batch(run, images, updates_per_epoch),
        *_crop(run, side),
        *([] if model is None else _patches(run, model)),
    ]
    return [_KEY.sub(lambda key: run.key(key[0]), text) for text in found]


def average_lag(train: TrainSettings, updates: int) -> tuple[float, float]:
    """Say how far the moving average of the weights is behind them at the end of training.

    Args:
        train: `ema_decay`, `ema_start` and `ema_warmup`.
        updates: optimizer updates of the whole run.

    Returns:
        The share of the average that is still the weights with which averaging began, and the mean age of the averaged
        weights, in updates.

    Example:
        >>> share, age = average_lag(TrainSettings(ema_decay=0.9998), 90)
        >>> f"{share:.1%}, {age:.0f} updates"
        '98.2%, 88 updates'
    """
    if not train.ema_decay:
        return 0.0, 0.0
    # timm's own rule, so that start and warm-up are counted as it counts them
    average = create_ema(nn.Linear(1, 1), train.ema_decay, warmup=train.ema_warmup, start=train.ema_start)
    share, age = 1.0, 0.0
    for update in range(1, updates + 1):
        decay = average.get_decay(update)
        if decay:
            share, age = share * decay, decay * (age + 1)
    return share, age


def _average(train: TrainSettings, updates: int) -> Iterator[str]:
    if not train.ema_decay:
        return
    if train.ema_start >= updates:
        last = int(_LAG * updates)  # updates; an average over no more than these cannot lag too far behind
        later = f", or train.ema_start={updates - last}" if last else ""
        yield (
            f"train.ema_start={train.ema_start}: averaging begins after that update, and a run has {updates:,}, so nothing is "
            f"averaged; use train.ema_decay=0{later}"
        )
        return
    share, age = average_lag(train, updates)
    if age <= _LAG * updates:
        return
    warmed = train.model_copy(update={"ema_warmup": True})
    also = "train.ema_warmup=true, or " if average_lag(warmed, updates)[1] <= _LAG * updates else ""
    yield (
        f"train.ema_decay={train.ema_decay:g}: top-1 is measured on averaged weights, and the average is too slow for "
        f"{updates:,} updates: {share:.1%} of it is still the weights of update {train.ema_start + 1}, and it is "
        f"{age:,.0f} updates behind on average, so it hides what was learned; use {also}{_decay_for(updates)}"
    )


def _decay_for(updates: int) -> str:
    """The setting whose average is a twentieth of the run behind the weights."""
    behind = _GOOD_LAG * updates
    if behind < 2:
        return "train.ema_decay=0 (no averaging)"
    digits = 1 - math.floor(math.log10(1 / behind))
    return f"train.ema_decay={round(1 - 1 / behind, digits):g}"


def _warm_up(train: TrainSettings) -> Iterator[str]:
    if train.warmup_epochs > _LATE * train.epochs:
        yield (
            f"train.warmup_epochs={train.warmup_epochs}: the learning rate still rises in "
            f"{min(train.warmup_epochs, train.epochs)} of {train.epochs} epochs; use "
            f"train.warmup_epochs={train.epochs // 10}, or more train.epochs"
        )


def _batch(run: Run, images: int, updates_per_epoch: int) -> Iterator[str]:
    train = run.train
    updates = updates_per_epoch * train.epochs
    if updates < _FEW_UPDATES and not run.model.weights:
        smaller = _batch_for(images, run)
        remedy = (
            f"train.batch_size={smaller} or more train.epochs" if smaller < train.batch_size else "more train.epochs"
        )
        yield (
            f"train.batch_size={train.batch_size}: {images:,} images give {updates_per_epoch} update(s) an epoch, {updates} in "
            f"all {train.epochs} epochs; use {remedy}"
        )
        return
    seen = math.ceil(images / run.workers) // run.micro_batch * run.micro_batch * run.workers
    if not train.aug_repeats and images - seen > _LEFT_OUT * images:
        yield (
            f"train.batch_size={train.batch_size}: each epoch leaves out {images - seen:,} of {images:,} images, which fill no "
            f"whole batch; use train.batch_size={_batch_for(images, run)}"
        )


def _batch_for(images: int, run: Run) -> int:
    """A power of two that gives about 15 updates an epoch, and splits evenly over workers and accumulation steps."""
    parts = run.workers * run.train.accum_steps
    return parts << max(1, int(math.log2(max(2, images / 15 / parts))))


def _crop(run: Run, side: int | None) -> Iterator[str]:
    low = run.train.crop_scale[0]
    if side is None:
        return
    smallest = math.sqrt(low) * side
    if smallest >= min(_CROP, 0.75 * side):
        return
    yield (
        f"train.crop_scale={list(run.train.crop_scale)}: it is made for large pictures; these have {side} pixels on their "
        f"shorter side, and a crop may show no more than {smallest:.0f} x {smallest:.0f} of them; use "
        f"train.crop_scale=[0.6, 1.0]"
    )


def _patches(run: Run, model: nn.Module) -> Iterator[str]:
    embed: Any = getattr(model, "patch_embed", None)
    if not isinstance(getattr(embed, "proj", None), nn.Conv2d) or hasattr(embed, "backbone"):
        return  # a hybrid cuts the feature map of its backbone into patches, not the image
    patch, grid, built = (getattr(embed, name, None) for name in ("patch_size", "grid_size", "img_size"))
    size = run.data.image_size
    if not patch or not grid or built is None or tuple(built) != (size, size):
        return  # it takes images of other sizes than the one it was built for: its grid is not theirs
    side = math.ceil(math.sqrt(_TOKENS))
    fits = [number for number in range(1, size // side + 1) if size % number == 0 and size // number <= 16]
    step = math.lcm(*patch)
    other = max(size // step, side) * step
    remedies = [f"model.kwargs.patch_size={min(fits, key=lambda number: abs(size // number - 7))}"] if fits else []
    if other != size:
        remedies.append(f"data.image_size={other} with model.kwargs.img_size={other}")
    use = ", or ".join(remedies)
    pixels = f"{patch[0]} x {patch[1]}" if patch[0] != patch[1] else f"{patch[0]}"
    lost = max(size - cells * cell for cells, cell in zip(grid, patch, strict=True))
    if lost > 0 and not getattr(embed, "dynamic_img_pad", False):
        yield (
            f"data.image_size={size}: patches of {pixels} pixels leave out {lost} of the {size} pixels of each side; use {use}"
        )
    elif math.prod(grid) < _TOKENS:
        yield (
            f"data.image_size={size}: patches of {pixels} pixels make {math.prod(grid)} token(s) of an image, which leaves "
            f"attention little to compare; use {use}"
        )
