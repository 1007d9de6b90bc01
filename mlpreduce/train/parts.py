"""The parts of a training run: the reduced model, and timm's moving average, optimizer, schedule and loss for it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

import mlpreduce
from mlpreduce.errors import ReductionError, call_text, check_whole, did_you_mean
from mlpreduce.models import image_size_of, is_model
from mlpreduce.plugins import run_plugins
from mlpreduce.surgery.ties import full_state
from mlpreduce.train.calibrated import apply_as_before, apply_step, calibration_data
from mlpreduce.train.settings import Run, TrainSettings
from mlpreduce.train.weights import inherit_weights, load_weights, no_construction
from mlpreduce.transforms import is_construction
from mlpreduce.transforms.steps import needs_data, seeded, without_data

__all__ = [
    "build_model",
    "check_classes",
    "create_ema",
    "create_loss",
    "create_optimizer",
    "create_scheduler",
    "images_of",
    "learning_rates",
    "outside_mlps",
]


def build_model(run: Run, device: torch.device | str | None = None, plans: Sequence[str] = ()) -> nn.Module:
    """The reduced model of a run: the same weights on every worker.

    It is initialised from the seed of the run, then filled from `model.weights` if they are given, then reduced, then filled
    from those of another reduction if the run inherits them. Steps that look at data are given the first images of the
    training set, as `calibration_data`; in a torch.distributed group all processes build the model together then.

    Args:
        run: names the model, its weights and the steps of its reduction.
        device: where it is built; "meta" gives shapes without memory, and reads no weights and no data: a step that looks at
            data then keeps the first units, as many of each MLP.
        plans: of the same model in a checkpoint, as JSON, whose weights will replace these: steps that look at data are
            carried out as they were then, for their units may depend on how many processes had shared the sums.

    Raises:
        ReductionError: the model or the reduction cannot be made, or the weights do not fit.
    """
    run_plugins(run.plugins)
    steps = [dict(step) for step in run.steps]
    first: dict[str, Any] = steps.pop(0) if steps and is_construction(steps[0]["transform"]) else {}
    name = first.pop("transform", None)
    if name is not None and run.model.weights:
        raise ReductionError(f"train({run.label}): model.weights={run.model.weights!r}: {no_construction(name)}")
    pretrained = run.model.weights == "pretrained" and device is None
    if not is_model(run.model.name):
        import_module(
            "mlpreduce.timm_models"
        )  # its names may stand in recipes, but are taken only where one is asked for

    def create(transform: str | None, **config: Any) -> nn.Module:
        torch.manual_seed(run.seed)
        given = {**run.model.kwargs, **config, **({"pretrained": True} if pretrained else {})}
        try:
            with nullcontext() if device is None else torch.device(device):
                return mlpreduce.create_model(run.model.name, transform, **given)
        except (ReductionError, OSError) as error:
            cause = error.__cause__ if isinstance(error, ReductionError) else error
            if (
                transform is not None or cause is None or isinstance(cause, ReductionError)
            ):  # the reduction, or the name
                raise
            first_line = (str(cause).strip().splitlines() or [""])[0]
            if not pretrained:
                reason = f"{type(cause).__name__}{first_line and f': {first_line}'}"
                raise ReductionError(
                    f"model.kwargs: timm cannot build {call_text(run.model.name, given)}: {reason}{_other_size(run)}"
                ) from error
            raise ReductionError(
                f"model.weights='pretrained': timm cannot load any into {call_text(run.model.name, run.model.kwargs)}: "
                f"{first_line}; choose a model.name of timm.list_models(pretrained=True), with kwargs "
                f"that keep its shapes, or give a path"
            ) from error

    model = create(name, **first)
    if name is not None and run.train.fidelity == "corrected" and device is None:
        _start_alike(model, create(None))
    if (path := run.model.weights_path) is not None and device is None:
        load_weights(model, run.model, path)
    before = plans[len(plans) - len(steps) :] if len(plans) >= len(steps) else ()
    for number, step in enumerate(steps):
        step = seeded(step, run.seed)
        if not needs_data(step):
            apply_step(model, step)
        elif device is not None:
            apply_step(model, without_data(step))
        elif before:
            apply_as_before(model, before[number])
        else:
            apply_step(model, step, calibration_data(run))
    if run.inherit and device is None:
        inherit_weights(model, Path(run.inherit))
    return model


def check_classes(model: nn.Module, run: Run, classes: int) -> None:
    """Check that a model tells as many classes as its data have.

    Raises:
        ReductionError: it does not.
    """
    if getattr(model, "num_classes", classes) != classes:
        raise ReductionError(
            f"model.kwargs.num_classes: {run.model.name} has {model.num_classes} classes, data.name={run.data.name!r} has "
            f"{classes}; use model.kwargs.num_classes={classes}"
        )


def _other_size(run: Run) -> str:
    """The remedy for an image or patch size that an architecture cannot have; empty where none was asked for."""
    given = [key for key in ("img_size", "patch_size") if key in run.model.kwargs]
    size = image_size_of(run.model.name)
    if not given or size is None:
        return ""
    return f"; leave out {' and '.join(given)}, and use data.image_size={size}, the size that it was made for"


def images_of(run: Run, model: nn.Module, batch: int = 1) -> torch.Tensor:
    """Zeros of the shape that a run trains on, (batch, channels, size, size), where the model lies."""
    like, size = next(model.parameters(), torch.empty(0)), run.data.image_size
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    channels = 3 if first is None else first.in_channels  # an architecture may have a number of its own
    shape = (batch, run.model.kwargs.get("in_chans", channels), size, size)
    return torch.zeros(shape, dtype=like.dtype, device=like.device)


def outside_mlps(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and buffers of a model that are no MLP's, by name."""
    inside = tuple(f"{leaf.path}." for mlp in mlpreduce.find_mlps(model) for leaf in mlp.leaves)
    return {name: tensor for name, tensor in full_state(model).items() if not name.startswith(inside)}


def _start_alike(model: nn.Module, baseline: nn.Module) -> None:
    """Give a model that was built narrower the initial weights of the baseline outside of its MLPs.

    MLPs of another width take another amount of random numbers, and all that is drawn after them would differ.
    """
    theirs = full_state(baseline)
    with torch.no_grad():
        for name, tensor in outside_mlps(model).items():
            tensor.copy_(theirs[name])


class _PerAliasEma(ModelEmaV3):
    """timm's moving average where the state dict has a tied tensor once per use: it is averaged as often."""

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        for average, now in zip(full_state(self.module).values(), full_state(model).values(), strict=True):
            if average.is_floating_point():
                average.lerp_(now.to(average.dtype), weight=1 - decay)
            else:
                average.copy_(now)


def create_ema(
    model: nn.Module, decay: float, *, warmup: bool = False, start: int = 0, per_alias: bool = False
) -> ModelEmaV3:
    """A moving average of the weights in which a tied tensor moves once per update, by exactly `decay`.

    Buffers are copied. timm's own averages do the same for a model with ties, whose state dict
    has a tied tensor once. In the published runs it stood there once per block that uses it: with groups of g blocks it
    was averaged g times per update, and its effective decay was decay**g.

    Args:
        model: the reduced model, before DDP or compilation wraps it.
        decay: weight of the old average, per update.
        warmup: let the decay grow from 0 with the updates t after the start: 1 - (1 + t)^(-2/3), until it is `decay`.
        start: updates before averaging begins; until then the average is a copy. Both need `update(model, step=updates)`.
        per_alias: average a tied tensor once per use, as in the published runs.

    Returns:
        timm's `ModelEmaV3`: call `update(model)` after each optimizer update; the averaged model is `.module`.

    Raises:
        ReductionError: `decay` is no fraction below 1, or `start` no whole number from 0.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1)
        >>> ema = create_ema(model, 0.9)
        >>> _ = torch.nn.init.constant_(model.weight, 0.0), torch.nn.init.constant_(ema.module.weight, 1.0)
        >>> ema.update(model)
        >>> round(ema.module.weight.item(), 4)
        0.9

    Source:
        timm `utils/model_ema.py`; the published runs (arXiv 2512.01059) use its default on a model without our state dict.
    """
    if not 0 <= decay < 1:
        raise ReductionError(
            f"create_ema(decay={decay!r}): the decay is the weight of the old average; use 0 <= decay < 1"
        )
    check_whole("create_ema: start", start, least=0)
    kind = _PerAliasEma if per_alias else ModelEmaV3
    return kind(model, decay=decay, use_warmup=warmup, update_after_step=start, exclude_buffers=not per_alias)


def create_optimizer(model: nn.Module, train: TrainSettings) -> torch.optim.Optimizer:
    """timm's optimizer over the unique parameters of `model`: a tied tensor is updated and decayed once.

    Raises:
        ReductionError: timm knows no such optimizer.
    """
    known = [str(name) for name in list_optimizers()]
    if train.optimizer not in known:
        near = did_you_mean(train.optimizer, known)
        raise ReductionError(f"train.optimizer={train.optimizer!r}: timm has no such optimizer{near}")
    # torch's fused kernel: one call instead of one per tensor, also on CPUs.
    fused: dict[str, Any] = {"fused": True} if train.optimizer in ("adam", "adamw") else {}
    try:
        made: torch.optim.Optimizer = create_optimizer_v2(
            model, train.optimizer, lr=train.lr, weight_decay=train.weight_decay, **fused
        )
    except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:
        raise ReductionError(f"train.optimizer={train.optimizer!r}: timm cannot make it here: {error}") from error
    return made


def create_scheduler(
    optimizer: torch.optim.Optimizer, train: TrainSettings, updates_per_epoch: int
) -> Scheduler | None:
    """timm's learning-rate schedule; it moves each epoch, or each update with `schedule_per_update`.

    Raises:
        ReductionError: timm knows no such schedule.
    """
    known = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none")
    if train.schedule not in known:
        near = did_you_mean(train.schedule, known)
        raise ReductionError(f"train.schedule={train.schedule!r}: unknown schedule{near}")
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            train.schedule,
            num_epochs=train.epochs,
            min_lr=train.min_lr,
            warmup_lr=train.warmup_lr,
            warmup_epochs=train.warmup_epochs,
            step_on_epochs=not train.schedule_per_update,
            updates_per_epoch=updates_per_epoch,
        )
    except (AssertionError, ValueError, ZeroDivisionError) as error:
        raise ReductionError(
            f"train.schedule={train.schedule!r}, train.epochs={train.epochs}, train.warmup_epochs={train.warmup_epochs}: timm "
            f"cannot make it: {error}"
        ) from error
    return cast("Scheduler | None", scheduler)


def learning_rates(train: TrainSettings, updates_per_epoch: int) -> list[float]:
    """The learning rate in the first update of every epoch, read off timm's schedule."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=train.lr)
    scheduler = create_scheduler(optimizer, train, updates_per_epoch)
    rates = []
    for epoch in range(train.epochs):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        if scheduler is not None:
            scheduler.step_update((epoch + 1) * updates_per_epoch)
            scheduler.step(epoch + 1)
    return rates


def create_loss(train: TrainSettings) -> nn.Module:
    """Cross entropy for what the loader delivers: mixed targets (already smoothed), smoothed labels, or labels."""
    if train.mixes:
        return SoftTargetCrossEntropy()
    if train.label_smoothing > 0:
        return LabelSmoothingCrossEntropy(train.label_smoothing)
    return nn.CrossEntropyLoss()
