"""What hidden units do on calibration data: the scores of criteria that look at it.

The data is any iterable of batches. It is read once, a few examples at a time, always as many whatever the batches, so that
neither the answer nor the memory depends on them. Where torch.distributed is initialised, every process reads its share and all
get the same answer; they have to call it together. Nothing of the model changes: a copy of its module tree runs, in evaluation
mode and full precision, whose tensors are the model's own.
"""

from __future__ import annotations

from mlpreduce.calibration.answers import Answers
from mlpreduce.calibration.batches import Batch
from mlpreduce.calibration.learn import measure_gates
from mlpreduce.calibration.measure import Loss, Measured, measure_scores, objective_of, telling
from mlpreduce.calibration.quiet import (
    CHECKPOINTING,
    check_twice_differentiable,
    full_precision,
    quiet_copy,
    running,
    undisturbed_randomness,
)
from mlpreduce.calibration.samples import CHUNK, Samples, all_reduce, in_all, rereadable
from mlpreduce.calibration.taps import Taps
from mlpreduce.calibration.watching import Watcher

__all__ = [
    "CHECKPOINTING",
    "CHUNK",
    "Answers",
    "Batch",
    "Loss",
    "Measured",
    "Samples",
    "Taps",
    "Watcher",
    "all_reduce",
    "check_twice_differentiable",
    "full_precision",
    "in_all",
    "measure_gates",
    "measure_scores",
    "objective_of",
    "quiet_copy",
    "rereadable",
    "running",
    "telling",
    "undisturbed_randomness",
]
