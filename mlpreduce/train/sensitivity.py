"""How much a reduction hurts a trained model before any training: the change of its loss on a few images."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from mlpreduce.data import load
from mlpreduce.data.settings import AugmentSettings
from mlpreduce.errors import ReductionError
from mlpreduce.train.parts import build_model
from mlpreduce.train.runtime import Runtime
from mlpreduce.train.settings import Run
from mlpreduce.train.validation import evaluate

__all__ = ["sensitivity"]

# training images as they are: the same for all reductions, and none of the validation set
_AS_THEY_ARE = AugmentSettings(label_smoothing=0, hflip=0, crop_scale=(1, 1), crop_ratio=(1, 1), color_jitter=0)


def sensitivity(run: Run, images: int = 256, runtime: Runtime | None = None) -> float:
    """By how much the reduction of a run raises the loss of the weights it starts from.

    Args:
        run: names trained weights in `model.weights`, or starts from those of another run.
        images: of the training set, without augmentation; the same whatever the reduction.
        runtime: where; by default in this process, on the CPU.

    Returns:
        Mean cross entropy after less before the reduction, in nats.

    Raises:
        ReductionError: the weights are random, or the reduction cannot be made.
    """
    runtime = runtime or Runtime()
    if not run.model.weights:
        raise ReductionError(
            f"sensitivity({run.label}): the weights are random, so the loss tells nothing; give model.weights"
        )
    size = min(images, 64)
    plain = AugmentSettings() if run.data.name == "digits" else _AS_THEY_ARE  # the digits are not augmented, and say so
    loaders = load(run.data, plain, micro_batch=size, device=runtime.device)
    loaders.set_epoch(0, 0)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        missing = images
        for batch, labels in loaders.train:
            yield batch[:missing], labels[:missing]
            missing -= len(batch)
            if missing <= 0:
                return

    kept = list(batches())

    def loss(model: nn.Module) -> float:
        return evaluate(model.to(runtime.device), kept, runtime)["loss"]

    return loss(build_model(run)) - loss(build_model(run.model_copy(update={"steps": ()})))
