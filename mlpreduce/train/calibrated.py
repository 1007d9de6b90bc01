"""Data for steps of a reduction that look at some, and steps that are carried out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import mlpreduce
from mlpreduce.data import calibration
from mlpreduce.edits import Plan
from mlpreduce.reduction.applying import remember
from mlpreduce.surgery.operation import carry_out
from mlpreduce.train.settings import Run
from mlpreduce.words.values import Step

__all__ = ["apply_as_before", "apply_step", "calibration_data"]


def calibration_data(run: Run) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """This process's share of `model.calibration_images` training images, with labels, without augmentation.

    Which images, and their order, follow from the data set alone; of several processes in a group, each takes every n-th.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
    return calibration(run.data, run.model.calibration_images, rank=rank, world=world)


def apply_step(model: nn.Module, step: Step, data: Any = None) -> None:
    """Reduce a model in place by one step."""
    config = {key: value for key, value in step.items() if key != "transform"}
    mlpreduce.apply(model, step["transform"], data=data, **config)


def apply_as_before(model: nn.Module, text: str) -> None:
    """Reduce a model in place by a plan in JSON, which has no values of new weights: a checkpoint does."""
    plan = Plan.from_json(text)
    carry_out(model, plan, weights=False)
    remember(model, plan)
