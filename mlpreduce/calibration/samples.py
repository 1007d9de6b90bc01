"""Calibration data: images, and their labels where they are needed, a few at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import length_hint
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from mlpreduce.errors import ReductionError
from mlpreduce.waiting import silent, steps

__all__ = ["CHUNK", "Samples", "all_reduce", "in_all", "raise_together", "rereadable", "together"]

CHUNK = 16  # examples in one pass
_IMAGES = ("pixel_values", "image", "images")
_LABELS = ("labels", "label")

Value = TypeVar("Value")


class Samples:
    """Examples out of any iterable of batches: images, (images, labels), or a dictionary with them.

    Attributes:
        count: examples that were read, over all processes, once `finish` was called.
        fingerprint: of these examples in their order.
        rank: of this process.

    Args:
        data: the iterable, or one batch of images.
        model: gives the device and the type of its inputs.
        labels: whether labels are needed.
        compared: whether the images of one pass are compared with each other, so that a few must not be left alone.

    Raises:
        ReductionError: there is no data, or the model is in half precision or without weights, here or in another process.
    """

    def __init__(self, data: Any, model: nn.Module, *, labels: bool, compared: bool = False) -> None:
        parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        problem = None
        try:
            _check(data, model, parameter, labels)
        except ReductionError as error:
            problem = error
        raise_together(problem)
        self._data = [data] if isinstance(data, torch.Tensor) else data
        self.device, self.dtype, self.labels = parameter.device, parameter.dtype, labels
        self._most = 2 * CHUNK - 1 if compared else CHUNK - 1  # examples of the last pass
        self.count = 0
        self.rank = dist.get_rank() if _is_group() else 0
        self._digests = hashlib.sha256(), hashlib.sha256()  # of images and labels
        self.fingerprint = ""
        self._read = False
        self._advance: Callable[[int], None] = _unseen

    @contextmanager
    def shown(self, what: str, passes: int = 1) -> Iterator[None]:
        """Show how many examples were looked at inside the block, if that takes long and somebody is looking.

        Args:
            what: what is done with them, in a few words.
            passes: how often the data is read.
        """
        if self.rank:  # one process of a group shows it for all
            with silent():
                yield
            return
        count = _expected(self._data)
        with steps(what, count and count * passes) as advance:
            self._advance = advance
            try:
                yield
            finally:
                self._advance = _unseen

    def chunks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Images and labels, `CHUNK` examples at a time, whatever the batches are; the last time what is left.

        Where images are compared, what is left goes with the last `CHUNK` examples.

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
            if kept and (there := tuple(kept[0][0].shape[1:])) != tuple(images.shape[1:]):
                raise ReductionError(
                    f"data has images of shapes {there} and {tuple(images.shape[1:])}, which do not go together"
                )
            for start in range(0, len(images), CHUNK):
                kept.append(
                    (images[start : start + CHUNK], labels if labels is None else labels[start : start + CHUNK])
                )
                waiting += len(kept[-1][0])
                while waiting > self._most:
                    chunk, kept = _joined(kept, CHUNK)
                    waiting -= CHUNK
                    yield self._placed(*chunk)
                    self._advance(CHUNK)
        if kept:
            yield self._placed(*_joined(kept, waiting)[0])
            self._advance(waiting)

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
                f"data has a {type(batch).__name__}{keys} for a batch; it must be a tensor of images, (images, labels), or a "
                f"dictionary with {' or '.join(_IMAGES)}, and {' or '.join(_LABELS)} if a loss is needed"
            )
        if images.dim() < 2:
            raise ReductionError(
                f"data has a batch of shape {tuple(images.shape)}; its first dimension must be of images"
            )
        if not images.is_floating_point():
            raise ReductionError(f"data has images of {images.dtype}; give them as the model takes them, normalised")
        if not images.isfinite().all():
            raise ReductionError(f"data has an image that is not finite, within {self.count + len(images)} examples")
        if not self.labels:
            return images, None
        if not isinstance(labels, torch.Tensor) or labels.dim() < 1 or len(labels) != len(images):
            given = f"labels of shape {tuple(labels.shape)}" if isinstance(labels, torch.Tensor) else "no labels"
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

    def finish(self, sums: dict[Any, torch.Tensor], problem: Exception | None) -> dict[Any, torch.Tensor]:
        """Sums over all processes, once each has read its data; all raise what one of them has met.

        Raises:
            ReductionError: as `raise_together`, or no process has an example.
        """
        raise_together(problem)
        told = together((self.count, "".join(part.hexdigest() for part in self._digests)))
        self.count = sum(count for count, _ in told)
        if not self.count:
            raise ReductionError("data is empty: it gave 0 images; a loader that was read once may be used up")
        self.fingerprint = hashlib.sha256("".join(text for _, text in told).encode()).hexdigest()[:16]
        return {key: all_reduce(value) for key, value in sums.items()}


def _check(data: Any, model: nn.Module, parameter: torch.Tensor, labels: bool) -> None:
    """Whether there is data and a model that can be run on it."""
    if data is None:
        wanted = "of (images, labels)" if labels else "of images"
        raise ReductionError(f"needs calibration data; give data=, a loader {wanted}")
    if not isinstance(data, Iterable):
        raise ReductionError(f"data is a {type(data).__name__}; give a loader, or a list of batches")
    if parameter.is_meta:
        raise ReductionError("needs to run the model, which is on the meta device; give it weights first")
    halves = [n for n, p in model.named_parameters() if p.dtype in (torch.float16, torch.bfloat16)]
    if halves:
        kind = model.get_parameter(halves[0]).dtype
        raise ReductionError(f"{halves[0]} is {kind}, too coarse to measure with; use model.float() first")


def _unseen(examples: int) -> None:
    """Show nothing."""


def _expected(data: Any) -> int | None:
    """How many examples the data has, where that can be known without reading it."""
    if isinstance(data, DataLoader):
        return None if isinstance(data.dataset, IterableDataset) else length_hint(data.sampler) or None
    if not isinstance(data, (list, tuple)):
        return None
    firsts = [batch[0] if isinstance(batch, (list, tuple)) and batch else batch for batch in data]
    return sum(map(len, firsts)) if all(isinstance(one, torch.Tensor) and one.dim() for one in firsts) else None


def _joined(
    kept: list[tuple[torch.Tensor, torch.Tensor | None]], count: int
) -> tuple[tuple[torch.Tensor, torch.Tensor | None], list[tuple[torch.Tensor, torch.Tensor | None]]]:
    """The first examples of what is kept, and the others."""
    images = torch.cat([some for some, _ in kept])
    labels = None if kept[0][1] is None else torch.cat([some for _, some in kept if some is not None])
    rest = (images[count:], None if labels is None else labels[count:])
    return (images[:count], None if labels is None else labels[:count]), [rest] if len(rest[0]) else []


class _Replayed:
    """The batches of an iterator, kept as they come, so that they can be read again."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._rest, self._kept = batches, []  # type: Iterator[Any], list[Any]

    def __iter__(self) -> Iterator[Any]:
        yield from self._kept
        for batch in self._rest:
            self._kept.append(batch)
            yield batch


def rereadable(data: Any) -> Any:
    """Data that can be read more than once: as it is, or if it is an iterator, such as a generator, with what it gave kept.

    Example:
        >>> data = rereadable(iter([1, 2]))
        >>> list(data), list(data)
        ([1, 2], [1, 2])
    """
    return _Replayed(data) if isinstance(data, Iterator) else data


@contextmanager
def in_all() -> Iterator[None]:
    """Raise in all processes what one of them meets inside the block, so that none waits for it."""
    problem: Exception | None = None
    try:
        yield
    except Exception as error:  # whatever the data raises, or the model
        problem = error
    raise_together(problem)


def raise_together(problem: Exception | None) -> None:
    """Raise in all processes what one of them has met, so that none waits for it.

    Raises:
        ReductionError: another process has met something.
        Exception: `problem`.
    """
    text = None if problem is None else str(problem)
    if problem is not None and not isinstance(problem, ReductionError):
        text = f"{type(problem).__name__}: {problem}"
    told = together(text)
    if problem is not None and (len(told) == 1 or not isinstance(problem, ReductionError)):
        raise problem
    for rank, message in enumerate(told):
        if message is not None:
            raise ReductionError(f"process {rank}: {message}") from problem


def together(value: Value) -> list[Value]:
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
