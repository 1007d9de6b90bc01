"""Calibration data: what a model is called with, and labels where they are needed, a few examples at a time."""

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

from mlpreduce.calibration.batches import Batch, Labelled, accepted, calls_of, chunked, read_batch
from mlpreduce.calibration.quiet import quiet_copy, running
from mlpreduce.errors import ReductionError
from mlpreduce.graph import tensors_in
from mlpreduce.words.waiting import silent, steps

__all__ = ["CHUNK", "Samples", "all_reduce", "in_all", "raise_together", "rereadable", "together"]

CHUNK = 16  # examples in one pass

Value = TypeVar("Value")


class Samples:
    """Examples out of any iterable of batches: inputs, (inputs, labels), or a dictionary with both, see `read_batch`.

    Attributes:
        count: examples that were read, over all processes, once `finish` was called.
        fingerprint: of these examples in their order, and their labels.
        of_inputs: the same without labels.
        rank: of this process.

    Args:
        data: the iterable, one batch, or a function that is given a model and calls it with each batch.
        model: gives the device and the type of its inputs.
        labels: whether labels are needed.
        compared: whether the examples of one pass are compared with each other, so that a few must not be left alone.

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
        self._data = [data] if isinstance(data, torch.Tensor | Mapping) else data
        if callable(data) and not isinstance(data, Iterable):
            self._data = _Called(data, model)
        self._names = accepted(model)
        self.device, self.dtype, self.labels = parameter.device, parameter.dtype, labels
        self._most = 2 * CHUNK - 1 if compared else CHUNK - 1  # examples of the last pass
        self.count = 0
        self.rank = dist.get_rank() if _is_group() else 0
        self._digests = hashlib.sha256(), hashlib.sha256()  # of images and labels
        self.fingerprint = self.of_inputs = ""
        self._read = False
        self._advance: Callable[[int], None] = _unseen

    @property
    def like(self) -> torch.Tensor:
        """An empty tensor of the model's place and type."""
        return torch.empty(0, device=self.device, dtype=self.dtype)

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

    def chunks(self) -> Iterator[Labelled]:
        """Batches and labels, `CHUNK` examples at a time, whatever the loader's batches are; the last time what is left.

        Where examples are compared, what is left goes with the last `CHUNK`. Token ids of another length begin anew.

        Raises:
            ReductionError: what the loader gives is nothing to call a model with, or not finite, or labels are missing.
        """
        if self._read and iter(self._data) is self._data:
            raise ReductionError("the data can be read once only, and is needed again; give a list or a DataLoader")
        first, self._read = not self._read, True
        for batch, labels in chunked(self._batches(first), CHUNK, self._most):
            yield batch.placed(self.device, self.dtype), None if labels is None else labels.to(self.device)
            self._advance(len(batch))

    def _batches(self, first: bool) -> Iterator[Labelled]:
        """The batches of the loader; those of the first reading count."""
        shapes: list[tuple[int, ...]] | None = None
        for given in self._data:
            batch, labels = self._parts(given)
            if first:
                self._note(batch, labels)
            if shapes is not None and shapes != batch.shapes and batch.floats:
                raise ReductionError(
                    f"data has images of shapes {shapes[0]} and {batch.shapes[0]}, which do not go together"
                )
            shapes = batch.shapes
            yield batch, labels

    def _parts(self, given: Any) -> Labelled:
        """One batch, checked, and its labels."""
        inputs, labels = read_batch(given, *self._names)
        if inputs is None:
            keys = f" with {', '.join(map(str, given))}" if isinstance(given, Mapping) else ""
            raise ReductionError(
                f"data has a {type(given).__name__}{keys} for a batch; it must be a tensor, (inputs, labels), or a dictionary "
                f"with pixel_values, image or names that the model's forward has, and labels or label if a loss is needed"
            )
        batch = Batch(inputs)
        tensors = tensors_in(inputs)
        if tensors[0].dim() < 2:
            raise ReductionError(
                f"data has a batch of shape {tuple(tensors[0].shape)}; its first dimension must be of examples"
            )
        if not batch.floats and tensors[0].dim() > 2:
            raise ReductionError(
                f"data has images of {tensors[0].dtype}; give them as the model takes them, normalised"
            )
        if not all(tensor.isfinite().all() for tensor in tensors if tensor.is_floating_point()):
            raise ReductionError(f"data has an image that is not finite, within {self.count + len(batch)} examples")
        if not self.labels:
            return batch, None
        if not isinstance(labels, torch.Tensor) or labels.dim() < 1 or len(labels) != len(batch):
            noun = "images" if batch.floats else "examples"
            what = f"labels of shape {tuple(labels.shape)}" if isinstance(labels, torch.Tensor) else "no labels"
            raise ReductionError(
                f"data has {what} for {len(batch)} {noun}, which the loss needs; give (inputs, labels)"
            )
        return batch, labels

    def _note(self, batch: Batch, labels: torch.Tensor | None) -> None:
        self.count += len(batch)
        every: list[list[torch.Tensor]] = [tensors_in(batch.inputs), [] if labels is None else [labels]]
        for digest, some in zip(self._digests, every, strict=True):
            for values in some:
                flat = values.detach().cpu().contiguous().reshape(-1)
                digest.update(flat.view(torch.uint8).numpy().tobytes())

    def finish(self, sums: dict[Any, torch.Tensor], problem: Exception | None) -> dict[Any, torch.Tensor]:
        """Sums over all processes, once each has read its data; all raise what one of them has met.

        Raises:
            ReductionError: as `raise_together`, or no process has an example.
        """
        raise_together(problem)
        told = together((self.count, [part.hexdigest() for part in self._digests]))
        self.count = sum(count for count, _ in told)
        if not self.count:
            raise ReductionError("data is empty: it gave 0 images; a loader that was read once may be used up")
        self.fingerprint = _joined(text for _, parts in told for text in parts)
        self.of_inputs = _joined(parts[0] for _, parts in told)
        return {key: all_reduce(value) for key, value in sums.items()}


def _joined(digests: Iterable[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


def _check(data: Any, model: nn.Module, parameter: torch.Tensor, labels: bool) -> None:
    """Whether there is data and a model that can be run on it."""
    if data is None:
        wanted = "of (images, labels)" if labels else "of images"
        raise ReductionError(f"needs calibration data; give data=, a loader {wanted}")
    if not isinstance(data, Iterable) and not callable(data):
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


class _Replayed:
    """The batches of an iterator, kept as they come, so that they can be read again."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._rest, self._kept = batches, []  # type: Iterator[Any], list[Any]

    def __iter__(self) -> Iterator[Any]:
        yield from self._kept
        for batch in self._rest:
            self._kept.append(batch)
            yield batch


class _Called:
    """What a function calls a model with, as batches; it runs once, when they are first read."""

    def __init__(self, run: Callable[[nn.Module], Any], model: nn.Module) -> None:
        self._run, self._model, self._kept = run, model, []  # type: Callable[[nn.Module], Any], nn.Module, list[Batch]

    def __iter__(self) -> Iterator[Batch]:
        if not self._kept:
            device = next((p.device for p in self._model.parameters()), torch.device("cpu"))
            with running(device, gradients=False):
                self._kept = calls_of(quiet_copy(self._model), self._run)
        return iter(self._kept)


def rereadable(data: Any, model: nn.Module) -> Any:
    """Data that can be read more than once: of an iterator, such as a generator, with what it gave kept.

    A function is run on a copy of the model, and what it calls that with is the data.

    Example:
        >>> data = rereadable(iter([1, 2]), nn.Identity())
        >>> list(data), list(data)
        ([1, 2], [1, 2])
    """
    if isinstance(data, Iterator):
        return _Replayed(data)
    return _Called(data, model) if callable(data) and not isinstance(data, Iterable) else data


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
