"""What a model is called with for a few examples: one tensor, several, or named ones as a tokenizer gives them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from mlpreduce.errors import ReductionError
from mlpreduce.graph import Inputs, call_with, map_tensors, tensors_in

__all__ = ["Batch", "Labelled", "accepted", "calls_of", "chunked", "described", "read_batch"]

_IMAGES = ("pixel_values", "image", "images")
_LABELS = ("labels", "label")
_MASK = "attention_mask"


@dataclass(frozen=True)
class Batch:
    """A few examples, along the first dimension of each tensor that has as many rows as the first one.

    Attributes:
        inputs: a tensor, a tuple of positional arguments, or keyword arguments.
    """

    inputs: Inputs

    def __len__(self) -> int:
        return len(tensors_in(self.inputs)[0])

    def __getitem__(self, which: slice | torch.Tensor) -> Batch:
        count = len(self)
        return Batch(map_tensors(self.inputs, lambda t: t[which] if t.dim() and len(t) == count else t))

    @property
    def mask(self) -> torch.Tensor | None:
        """Which positions hold something, (examples, positions), where a tokenizer says so; others are padding."""
        mask = self.inputs.get(_MASK) if isinstance(self.inputs, Mapping) else None
        return mask.bool() if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of its tensors, without the examples."""
        return [tuple(tensor.shape[1:]) for tensor in tensors_in(self.inputs)]

    @property
    def floats(self) -> bool:
        """Whether what it is of is a floating-point tensor, such as images."""
        return tensors_in(self.inputs)[0].is_floating_point()

    def run(self, model: nn.Module) -> Any:
        """What the model gives for it."""
        return call_with(model, self.inputs)

    def run_by(self, interpreter: fx.Interpreter) -> Any:
        """What an interpreter of a graph gives for it."""
        if not isinstance(self.inputs, Mapping):
            return interpreter.run(*self.inputs) if isinstance(self.inputs, tuple) else interpreter.run(self.inputs)
        graph: Any = interpreter.module.graph
        places = [node for node in graph.nodes if node.op == "placeholder"]
        defaults = (node.args[0] if node.args else None for node in places)
        return interpreter.run(*(self.inputs.get(n.target, d) for n, d in zip(places, defaults, strict=True)))

    def seen_by(self, function: Callable[[Any, torch.Tensor], torch.Tensor], model: nn.Module) -> torch.Tensor:
        """What a function of a model and images gives; where there is more, it calls the model with this."""
        if isinstance(self.inputs, torch.Tensor):
            return function(model, self.inputs)
        return function(lambda *_, **__: self.run(model), tensors_in(self.inputs)[0])

    def placed(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """The same where a model is, in its type if in floating point."""
        return Batch(
            map_tensors(self.inputs, lambda t: t.detach().to(device, dtype if t.is_floating_point() else t.dtype))
        )

    def spoilt(self) -> Batch:
        """The same with NaN in place of numbers; of whole numbers the same in another order."""
        if self.floats:
            return Batch(
                map_tensors(self.inputs, lambda t: torch.full_like(t, torch.nan) if t.is_floating_point() else t)
            )
        first = tensors_in(self.inputs)[0]
        return Batch(map_tensors(self.inputs, lambda t: t.flip(-1) if t is first else t))

    @staticmethod
    def joined(batches: Sequence[Batch]) -> Batch:
        """One after the other."""
        rest = [iter(tensors_in(batch.inputs)) for batch in batches]
        count = len(batches[0])

        def join(tensor: torch.Tensor) -> torch.Tensor:
            parts = [next(some) for some in rest]
            return torch.cat(parts) if tensor.dim() and len(tensor) == count else tensor

        return Batch(map_tensors(batches[0].inputs, join))


Labelled = tuple[Batch, torch.Tensor | None]


def described(batch: Batch) -> str:
    """Names and shapes, for messages."""
    if isinstance(batch.inputs, torch.Tensor):
        return f"{'images' if batch.floats else 'token ids'} {tuple(batch.inputs.shape)}"
    named = batch.inputs.items() if isinstance(batch.inputs, Mapping) else enumerate(batch.inputs, 1)
    return ", ".join(f"{name} {tuple(value.shape)}" for name, value in named if isinstance(value, torch.Tensor))


def accepted(model: nn.Module) -> tuple[frozenset[str], bool]:
    """Names of the arguments of a model's forward, and whether it names none and takes any, as layers around models do."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return frozenset(named), not named and any(p.kind is p.VAR_KEYWORD for p in parameters)


def read_batch(batch: Any, names: frozenset[str], others: bool) -> tuple[Inputs | None, Any]:
    """What a loader gave: inputs, None if it has none, and labels, None if it has none.

    Args:
        batch: a tensor, (inputs, labels), or a dictionary; inputs are a tensor, a tuple, or a dictionary.
        names: arguments of the model by name.
        others: whether it takes any name.

    Raises:
        ReductionError: a tuple that may be read in two ways.
    """
    inputs, labels = batch, None
    if isinstance(batch, (list, tuple)):
        inputs, labels = (*batch, None)[:2] if batch else (None, None)
        if len(batch) > 2 and isinstance(inputs, torch.Tensor) and not inputs.is_floating_point():
            raise ReductionError(
                f"data has a batch of {len(batch)} parts that begins with token ids, and which are labels is not known; give "
                f"(inputs, labels), with a tuple or a dictionary for inputs"
            )
        if _is_mask(inputs, labels):
            raise ReductionError(
                f"data has a batch of token ids {tuple(inputs.shape)} and, where labels are looked for, zeros and ones of the "
                f"same shape; if that is a mask, give a dictionary, as a tokenizer does, or ((ids, mask), labels); if they are "
                f'labels, give {{"input_ids": ids, "labels": labels}}'
            )
    if isinstance(inputs, Batch):
        return inputs.inputs, labels
    if isinstance(inputs, Mapping):
        named = {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor) and key not in _LABELS}
        labels = next((inputs[key] for key in _LABELS if key in inputs), None) if labels is None else labels
        known = {key: value for key, value in named.items() if key in names}
        image = next((named[key] for key in _IMAGES if key in named), None)
        inputs = known or (named if others and image is None else image)
    elif isinstance(inputs, (list, tuple)):
        inputs = tuple(inputs)
    return (inputs if tensors_in(inputs) else None) if inputs is not None else None, labels


def _is_mask(inputs: Any, labels: Any) -> bool:
    """Whether what is in the place of labels looks like the mask of token ids."""
    if not isinstance(inputs, torch.Tensor) or not isinstance(labels, torch.Tensor) or inputs.is_floating_point():
        return False
    return inputs.dim() == 2 and inputs.shape == labels.shape and bool(((labels == 0) | (labels == 1)).all())


def calls_of(model: nn.Module, run: Callable[[nn.Module], Any]) -> list[Batch]:
    """What a function calls a model with.

    Args:
        model: is called as it is; a copy whose tensors must not change.
        run: the function; what it gives does not count.

    Raises:
        ReductionError: it does not call the model.
    """
    found: list[Batch] = []
    names = list(inspect.signature(model.forward).parameters)

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        plain: Inputs = args[0] if len(args) == 1 else args
        found.append(Batch({**dict(zip(names, args, strict=False)), **kwargs} if kwargs else plain))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        run(model)
    finally:
        handle.remove()
    if not found:
        raise ReductionError(
            "data is a function that does not call the model that it is given; call it with each batch"
        )
    return found


def chunked(batches: Iterator[Labelled], size: int, most: int) -> Iterator[Labelled]:
    """The examples of batches, `size` at a time, whatever the batches are; the last time what is left, up to `most`.

    Inputs of other shapes than those before them begin anew.
    """
    kept: list[Labelled] = []
    waiting = 0
    for batch, labels in batches:
        if kept and kept[0][0].shapes != batch.shapes:
            yield _joined(kept)
            kept, waiting = [], 0
        kept.append((batch, labels))
        waiting += len(batch)
        while waiting > most:
            whole, of_whole = _joined(kept)
            rest = whole[size:], None if of_whole is None else of_whole[size:]
            yield whole[:size], None if of_whole is None else of_whole[:size]
            kept, waiting = [rest], waiting - size
    if waiting:
        yield _joined(kept)


def _joined(kept: Sequence[Labelled]) -> Labelled:
    if len(kept) == 1:  # no copy of a large batch for each part of it
        return kept[0]
    labels = [some for _, some in kept if some is not None]
    return Batch.joined([batch for batch, _ in kept]), torch.cat(labels) if labels else None
