"""A weight decay that moves while training, as with self-supervised and distilled models (DINO, arXiv 2104.14294)."""

from __future__ import annotations

import math

import torch
from timm.scheduler.scheduler import Scheduler

from mlpreduce.errors import ReductionError
from mlpreduce.train.settings import TrainSettings

__all__ = ["WeightDecaySchedule", "create_decay_schedule"]


class WeightDecaySchedule(Scheduler):
    """Takes the weight decay from what it is to `end` along half a cosine, update by update.

    Groups of parameters that do not decay go on without. It has no state beyond the number of updates it is told.

    Args:
        optimizer: whose decay it moves.
        start: the decay it was made with, above 0.
        end: that of the last update.
        updates: how many there are.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, start: float, end: float, updates: int) -> None:
        super().__init__(optimizer, "weight_decay", t_in_epochs=False)
        self._ratio, self._last = end / start, max(1, updates - 1)

    def _get_lr(self, t: int) -> list[float]:
        """The values of the groups in the update after the first `t`; timm's name for any field."""
        way = (1 - math.cos(math.pi * min(t / self._last, 1))) / 2
        return [value * (1 + (self._ratio - 1) * way) for value in self.base_values]


def create_decay_schedule(
    optimizer: torch.optim.Optimizer, train: TrainSettings, updates: int
) -> WeightDecaySchedule | None:
    """The schedule that `train.weight_decay_end` asks for, if it does.

    Raises:
        ReductionError: there is no decay to begin with.
    """
    if train.weight_decay_end is None:
        return None
    if not train.weight_decay:
        raise ReductionError(
            f"train.weight_decay_end={train.weight_decay_end:g}: nothing decays at the start, so nothing says which parameters "
            f"do; give a small train.weight_decay, such as {train.weight_decay_end / 100 or 0.01:g}"
        )
    return WeightDecaySchedule(optimizer, train.weight_decay, train.weight_decay_end, updates)
