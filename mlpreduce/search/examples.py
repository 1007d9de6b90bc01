"""The examples of a search on a model in hand: those to calibrate with, those to score by, and the score by default."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from mlpreduce.calibration import Batch, Loss, Samples, in_all, quiet_copy, running, telling
from mlpreduce.errors import ReductionError
from mlpreduce.graph import Inputs, tensors_in
from mlpreduce.repair.judging import nearness
from mlpreduce.repair.outputs import output_of
from mlpreduce.search.scoring import Score
from mlpreduce.search.spaces.hand import digest

__all__ = ["FEWEST", "digest_of", "distance_of", "likeness", "read_twofold"]

FEWEST = 16  # examples to calibrate with, and to score by
_SCARCE = 4  # of data that is no more than that, one example in so many scores

Labelled = tuple[Batch, torch.Tensor | None]


def read_twofold(
    model: nn.Module, data: Any, calibration: int, *, labels: bool
) -> tuple[list[Labelled], list[Labelled]]:
    """Examples to calibrate with, and others to score by; the data is read once, and no further than is needed.

    Raises:
        ReductionError: there are too few.
    """
    samples = Samples(data, model, labels=labels)
    chunks: list[Labelled] = []
    with running(samples.device, gradients=False), samples.shown("tune: data"), in_all():
        for batch, some in samples.chunks():
            chunks.append((batch, some))
            if sum(len(batch) for batch, _ in chunks) >= 2 * calibration:
                break
    count = sum(len(batch) for batch, _ in chunks)
    if count < 2 * FEWEST:
        raise ReductionError(
            f"tune: the data has {count} examples, and at least {2 * FEWEST} are needed, to calibrate with and to score by; "
            f"better give hundreds"
        )
    fitted: list[Labelled] = []
    held: list[Labelled] = []
    start, part = 0, 2 if count >= 2 * calibration else _SCARCE
    for batch, some in chunks:
        numbers = torch.arange(start, start + len(batch))
        scores = numbers % part == part - 1  # not the last ones: data often comes in the order of classes
        for which, kept in ((~scores, fitted), (scores, held)):
            if which.any():
                kept.append((batch[which], None if some is None else some[which]))
        start += len(batch)
    return fitted, held


def digest_of(examples: Sequence[Labelled]) -> str:
    """Of inputs and labels, in their order."""
    parts = [[*tensors_in(batch.inputs), *([] if labels is None else [labels])] for batch, labels in examples]
    return digest({f"{number:09}": tensor for number, tensor in enumerate(chain.from_iterable(parts))})


def _outputs(tree: nn.Module, examples: Sequence[Labelled]) -> list[torch.Tensor]:
    """What a model gives for each example, (examples, values), by batch."""
    found = []
    for batch, _ in examples:
        with telling(batch):
            found.append(output_of(batch.run(tree), batch))
    return found


def likeness(model: nn.Module, held: Sequence[Labelled], loss: Loss | None) -> Score:
    """The default score: how alike outputs are to those of the whole model, or minus the loss."""
    device = next(model.parameters()).device
    if loss is not None:
        return _minus(loss, held, device)
    with running(device, gradients=False):
        wanted = torch.cat(_outputs(quiet_copy(model), held))

    def cosine(tree: nn.Module) -> float:
        with running(device, gradients=False):
            return nearness(wanted, torch.cat(_outputs(quiet_copy(tree), held)))[0]

    return cosine


def _minus(loss: Loss, held: Sequence[Labelled], device: torch.device) -> Score:
    def minus_loss(tree: nn.Module) -> float:
        with running(device, gradients=False):
            quiet = quiet_copy(tree)
            parts = [(float(loss(batch.run(quiet), labels)), len(batch)) for batch, labels in held]  # type: ignore[arg-type]
        return -sum(value * count for value, count in parts) / sum(count for _, count in parts)

    return minus_loss


def distance_of(model: nn.Module, fitted: Sequence[Labelled], seed: int) -> tuple[list[Labelled], Loss]:
    """Data with labels, and a loss: the squared distance to what the whole model gives plus a tenth of it in noise.

    At what the model gives itself no gradient would be left.
    """
    generator = torch.Generator().manual_seed(seed)
    made: list[Labelled] = []
    device = next(model.parameters()).device
    with running(device, gradients=False):
        wanted = _outputs(quiet_copy(model), fitted)
    scale = 0.1 * torch.cat(wanted).std()
    for (batch, _), values in zip(fitted, wanted, strict=True):
        noise = torch.randn(values.shape, generator=generator, dtype=values.dtype).to(values.device)
        mask = values.new_ones(len(batch), 0) if batch.mask is None else batch.mask.to(values)
        made.append((batch, torch.cat([values + scale * noise, mask], 1)))
    size, floats = wanted[0].shape[1], fitted[0][0].floats

    def distance(given: Any, labels: torch.Tensor) -> torch.Tensor:
        mask = labels[:, size:]
        plain: Inputs = labels if floats else {"input_ids": mask.long(), "attention_mask": mask.long()}
        return (output_of(given, Batch(plain)) - labels[:, :size]).square().sum(1).mean()

    return made, distance
