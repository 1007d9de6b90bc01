"""Small runs on small data, and whether two of them end the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mlpreduce.train import Run, Runtime, fit
from mlpreduce.train.events import EpochEnded, Event
from mlpreduce.train.state import checkpoints

SMALL_VIT = {
    "img_size": 8,
    "patch_size": 4,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 16,
    "depth": 4,
    "num_heads": 2,
    "class_token": False,
    "global_pool": "avg",
    "drop_path_rate": 0.1,
}
DIGITS = {"name": "digits", "image_size": 8}
TIMES = ("train_seconds", "images_per_s")


def digits_run(directory: Path, **train: Any) -> Run:
    """A tied ViT on the digits, small enough for a second an epoch."""
    settings = {"epochs": 3, "batch_size": 64, "lr": 3e-3, "warmup_epochs": 1, "ema_decay": 0.9, "mixup": 0.5, **train}
    return Run(
        recipe="test",
        variant="grouped",
        steps=({"transform": "grouped", "group": 2},),
        model={"name": "vit_tiny_patch16_224", "kwargs": SMALL_VIT},  # type: ignore[arg-type]
        data=DIGITS,  # type: ignore[arg-type]
        train=settings,  # type: ignore[arg-type]
        directory=str(directory),
    )


def synthetic_run(directory: Path) -> Run:
    base = digits_run(directory)
    data = {"name": "synthetic", "image_size": 8, "train_samples": 96, "val_samples": 20, "classes": 10, "workers": 0}
    augment = {"auto_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.5, "cutmix": 1.0, "mixup": 0.8}
    return Run(
        **{
            **base.model_dump(),
            "model": {"name": base.model.name, "kwargs": {**SMALL_VIT, "in_chans": 3}},
            "data": data,
            "train": {**base.train.model_dump(), **augment, "batch_size": 32, "weight_decay_end": 0.3},
        }
    )


def same(left: Any, right: Any, path: str = "") -> None:
    """Assert that two states are equal to the last bit, but for times, speeds and what the run was."""
    assert type(left) is type(right), path
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, path
        assert torch.equal(left, right), path
    elif isinstance(left, dict):
        assert list(left) == list(right), path
        for key in left:
            if key not in TIMES and key not in ("facts", "config_hash"):
                same(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), path
        for number, pair in enumerate(zip(left, right, strict=True)):
            same(*pair, f"{path}[{number}]")
    else:
        assert left == right, path


def state(directory: Path) -> dict[str, Any]:
    """All that a run has left, random states included."""
    found = sorted(last(directory).glob("*.pt"))
    assert len(found) >= 2
    return {path.name: torch.load(path, weights_only=True) for path in found}


def last(directory: Path) -> Path:
    """The last checkpoint of a run."""
    return next(iter(checkpoints(directory).values()))


class Interrupted(Exception):
    pass


def interrupt_after(run: Run, epochs: int, **runtime: Any) -> None:
    def report(event: Event) -> None:
        if isinstance(event.what, EpochEnded) and event.what.entry["epoch"] == epochs:
            raise Interrupted

    with pytest.raises(Interrupted):
        fit(run, Runtime(report=report, **runtime))


def finetune(directory: Path, weights: Path | str, *steps: dict[str, Any], seed: int = 7, **train: Any) -> Run:
    """A short run from given weights; its own initial ones would be those of another seed than the trained model's."""
    settings = {"epochs": 2, "lr": 3e-4, "warmup_epochs": 0, "mixup": 0.0, **train}
    run = digits_run(directory, **settings)
    model = run.model.model_copy(update={"weights": str(weights)})
    return run.model_copy(update={"steps": steps, "model": model, "seed": seed})


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def without_drop_path(run: Run) -> Run:
    kwargs = {**run.model.kwargs, "drop_path_rate": 0.0}
    return run.model_copy(update={"model": run.model.model_copy(update={"kwargs": kwargs})})
