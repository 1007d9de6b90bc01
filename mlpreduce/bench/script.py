"""The keys of a recipe as arguments of timm's training script, whose defaults are not ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["KEYS", "arguments"]

# key of a recipe: argument of the script, which takes its value
_VALUES = {
    "data.workers": "--workers",
    "data.mean": "--mean",
    "data.std": "--std",
    "data.crop_pct": "--crop-pct",
    "data.interpolation": "--interpolation",
    "data.eval_batch_size": "--validation-batch-size",
    "train.epochs": "--epochs",
    "train.accum_steps": "--grad-accum-steps",
    "train.optimizer": "--opt",
    "train.lr": "--lr",
    "train.weight_decay": "--weight-decay",
    "train.schedule": "--sched",
    "train.warmup_epochs": "--warmup-epochs",
    "train.warmup_lr": "--warmup-lr",
    "train.min_lr": "--min-lr",
    "train.label_smoothing": "--smoothing",
    "train.mixup": "--mixup",
    "train.cutmix": "--cutmix",
    "train.mixup_prob": "--mixup-prob",
    "train.mixup_switch_prob": "--mixup-switch-prob",
    "train.random_erasing": "--reprob",
    "train.aug_repeats": "--aug-repeats",
    "train.hflip": "--hflip",
    "train.crop_scale": "--scale",
    "train.crop_ratio": "--ratio",
    "train.color_jitter": "--color-jitter",
    "train.train_interpolation": "--train-interpolation",
}
# the same, left out where the key is off
_OPTIONAL = {"train.clip_grad": "--clip-grad", "train.auto_augment": "--aa"}
_SWITCHES = {
    "data.pin_memory": "--pin-mem",
    "train.channels_last": "--channels-last",
    "train.grad_checkpointing": "--grad-checkpointing",
    "train.schedule_per_update": "--sched-on-updates",
}
# what the script gives to the model itself
_MODEL = {"num_classes": "--num-classes", "drop_path_rate": "--drop-path", "drop_rate": "--drop", "global_pool": "--gp"}

# keys of a recipe that the script has too, so that both can be run with them
KEYS = sorted([*_VALUES, *_OPTIONAL, *_SWITCHES, "train.amp", "train.ema_decay"])


def arguments(
    settings: dict[str, Any], model: str, kwargs: dict[str, Any], *, root: str, size: int, micro_batch: int, device: str
) -> list[str]:
    """The command line of the script, without the script.

    Args:
        settings: values of a recipe by dotted key.
        model: a timm architecture.
        kwargs: arguments of `timm.create_model`.
        root: holds train/ and val/.
        size: pixels a side of an image.
        micro_batch: images in one forward pass of one worker.
        device: "cpu" or "cuda".
    """
    return list(_arguments(settings, model, dict(kwargs), root, size, micro_batch, device))


def _arguments(
    settings: dict[str, Any], model: str, kwargs: dict[str, Any], root: str, size: int, micro_batch: int, device: str
) -> Iterator[str]:
    yield from ("--data-dir", root, "--device", device, "--model", model)
    for key, flag in _MODEL.items():
        if key in kwargs:
            yield from (flag, str(kwargs.pop(key)))
    if kwargs:
        yield from ("--model-kwargs", *(f"{key}={value}" for key, value in kwargs.items()))
    yield from ("--input-size", "3", str(size), str(size), "--batch-size", str(micro_batch))
    for key, flag in _VALUES.items():
        value = settings[key]
        yield from (flag, *map(str, value if isinstance(value, list | tuple) else [value]))
    for key, flag in _OPTIONAL.items():
        if settings[key]:
            yield from (flag, str(settings[key]))
    yield from (flag for key, flag in _SWITCHES.items() if settings[key])
    if settings["train.amp"] != "none":
        yield from ("--amp", "--amp-dtype", settings["train.amp"])
    if settings["train.ema_decay"]:
        yield from ("--model-ema", "--model-ema-decay", str(settings["train.ema_decay"]))
