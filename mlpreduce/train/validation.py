"""Validation: exact counts over the shards of all workers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mlpreduce.train.runtime import Runtime

__all__ = ["evaluate"]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Any,
    runtime: Runtime,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    channels_last: bool = False,
) -> dict[str, float]:
    """Accuracy in percent and mean cross entropy over the shards of all workers; each image counts once.

    Args:
        model: maps images (batch, channels, height, width) to logits (batch, classes).
        loader: this worker's share of the images and labels.
        runtime: tells the worker and the device.
        autocast: context for mixed precision.
        channels_last: memory format of the images.

    Returns:
        `top1` and `top5` in percent, `loss`, `images` counted.
    """
    model.eval()
    counts = torch.zeros(4, dtype=torch.float64, device=runtime.device)  # images, top-1, top-5, sum of losses
    for images, labels in loader:
        images, labels = images.to(runtime.device), labels.to(runtime.device)
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast():
            logits = model(images)
        logits = logits.float()
        right = logits.topk(min(5, logits.shape[-1])).indices == labels[:, None]
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        counts += torch.stack([labels.new_tensor(len(labels)), right[:, 0].sum(), right.sum(), loss]).double()
    if runtime.world > 1:
        dist.all_reduce(counts)
    images_seen, top1, top5, loss_sum = counts.tolist()
    return {
        "top1": 100 * top1 / images_seen,
        "top5": 100 * top5 / images_seen,
        "loss": loss_sum / images_seen,
        "images": images_seen,
    }
