"""Calibration data: images, and their labels where they are needed, a few at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from mlpreduce.errors import ReductionError

__all__ = ["CHUNK", "Samples", "all_reduce", "logits_of"]

CHUNK = 16  # examples in one pass
_IMAGES = ("pixel_values", "image", "images")
_LABELS = ("labels", "label")

Value = TypeVar("Value")


class Samples:
    """Examples out of any iterable of batches: images, (images, labels), or a dictionary with them.

    Attributes:
        count: examples that were read, over all processes, once `finish` was called.
        fingerprint: of these examples in their order.

    Args:
        data: the iterable, or one batch of images.
        model: gives the device and the type of its inputs.
        labels: whether labels are needed.

    Raises:
        ReductionError: there is no data, or the model is in half precision or without weights.
    """

    def __init__(self, data: Any, model: nn.Module, *, labels: bool) -> None:
        if data is None:
            wanted = "of (images, labels)" if labels else "of images"
            raise ReductionError(f"needs calibration data; give data=, a loader {wanted}")
        if not isinstance(data, Iterable):
            raise ReductionError(f"data is a {type(data).__name__}; give a loader, or a list of batches")
        parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        if parameter.is_meta:
            raise ReductionError("needs to run the model, which is on the meta device; give it weights first")
        halves = [n for n, p in model.named_parameters() if p.dtype in (torch.float16, torch.bfloat16)]
        if halves:
            kind = model.get_parameter(halves[0]).dtype
            raise ReductionError(f"{halves[0]} is {kind}, too coarse to measure with; use model.float() first")
        self._data = [data] if isinstance(data, torch.Tensor) else data
        self.device, self.dtype, self.labels = parameter.device, parameter.dtype, labels
        self.count = 0
        self._digests = hashlib.sha256(), hashlib.sha256()  # of images and labels
        self.fingerprint = ""
        self._read = False

    def chunks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Images and labels, `CHUNK` examples at a time, whatever the batches are; the last time what is left.

        Raises:
            ReductionError: what the loader gives are no images, or not finite, or labels are missing.
        """
        if self._read and iter(self._data) is self._data:
            raise ReductionError("the data can be read once only, and is needed again; give a list or a DataLoader")
        first, self._read = not self._read, True
        kept: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        waiting = 0
        for batch in self._data:
            images, labels = self._parts(batch)
            if first:
                self._note(images, labels)
            for start in range(0, len(images), CHUNK):
                kept.append(
                    (images[start : start + CHUNK], labels if labels is None else labels[start : start + CHUNK])
                )
                waiting += len(kept[-1][0])
                while waiting >= CHUNK:
                    chunk, kept = _joined(kept)
                    waiting -= CHUNK
                    yield self._placed(*chunk)
        if kept:
            yield self._placed(*_joined(kept)[0])

    def _parts(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Images and labels of one batch."""
        images, labels = batch, None
        if isinstance(batch, Mapping):
            images = next((batch[key] for key in _IMAGES if key in batch), None)
            labels = next((batch[key] for key in _LABELS if key in batch), None)
        elif isinstance(batch, (list, tuple)):
            images, labels = (*batch, None)[:2] if batch else (None, None)
        if not isinstance(images, torch.Tensor):
            keys = f" with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""
            raise ReductionError(
                f"data has a {type(batch).__name__}{keys} for a batch; it must be a tensor of images, or (images, labels)"
            )
        if not images.is_floating_point():
            raise ReductionError(f"data has images of {images.dtype}; give them as the model takes them, normalised")
        if not images.isfinite().all():
            raise ReductionError(f"data has an image that is not finite, within {self.count + len(images)} examples")
        if not self.labels:
            return images, None
        if not isinstance(labels, torch.Tensor) or len(labels) != len(images):
            given = f"{len(labels)} labels" if isinstance(labels, torch.Tensor) else "no labels"
            raise ReductionError(
                f"data has {given} for {len(images)} images, which the loss needs; give (images, labels)"
            )
        return images, labels

    def _note(self, images: torch.Tensor, labels: torch.Tensor | None) -> None:
        self.count += len(images)
        for digest, values in zip(self._digests, (images, labels), strict=True):
            if values is not None:
                flat = values.detach().cpu().contiguous().reshape(-1)
                digest.update(flat.view(torch.uint8).numpy().tobytes())

    def _placed(self, images: torch.Tensor, labels: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        images = images.detach().to(self.device, self.dtype)
        return images, None if labels is None else labels.to(self.device)

    def finish(self, sums: dict[Any, torch.Tensor], problem: ReductionError | None) -> dict[Any, torch.Tensor]:
        """Sums over all processes, once each has read its data; all raise what one of them has met.

        Raises:
            ReductionError: `problem`, or that of another process, or no process has an example.
        """
        digest = "".join(part.hexdigest() for part in self._digests)
        told = _together((None if problem is None else str(problem), self.count, digest))
        for rank, (message, _, _) in enumerate(told):
            if message is not None:
                raise ReductionError(message if len(told) == 1 else f"process {rank}: {message}") from problem
        self.count = sum(count for _, count, _ in told)
        if not self.count:
            raise ReductionError("data is empty: it gave 0 images; a loader that was read once may be used up")
        self.fingerprint = hashlib.sha256("".join(text for _, _, text in told).encode()).hexdigest()[:16]
        return {key: all_reduce(value) for key, value in sums.items()}


def _joined(
    kept: list[tuple[torch.Tensor, torch.Tensor | None]],
) -> tuple[tuple[torch.Tensor, torch.Tensor | None], list[tuple[torch.Tensor, torch.Tensor | None]]]:
    """The first `CHUNK` examples of what is kept, and the others."""
    images = torch.cat([some for some, _ in kept])
    labels = None if kept[0][1] is None else torch.cat([some for _, some in kept if some is not None])
    rest = (images[CHUNK:], None if labels is None else labels[CHUNK:])
    return (images[:CHUNK], None if labels is None else labels[:CHUNK]), [rest] if len(rest[0]) else []


def _together(value: Value) -> list[Value]:
    """What every process has, by rank; in one process its own."""
    if not _is_group():
        return [value]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return every


def all_reduce(value: torch.Tensor) -> torch.Tensor:
    """The sum over all processes; a group of GPUs only knows tensors on them."""
    if not _is_group():
        return value
    there = value.cuda() if dist.get_backend() == "nccl" else value.clone()
    dist.all_reduce(there)
    return there.to(value.device)


def _is_group() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def logits_of(output: Any) -> torch.Tensor:
    """The tensor in what a model gives: itself, its `logits`, or the first of several.

    Raises:
        ReductionError: there is none.
    """
    if isinstance(output, (list, tuple)) and output:
        output = output[0]
    output = getattr(output, "logits", output)
    if not isinstance(output, torch.Tensor):
        raise ReductionError(f"the model gives a {type(output).__name__}, not logits; give loss=, a function of it")
    return output
