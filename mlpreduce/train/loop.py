"""The training loop: the same code for one process and for a worker of a DDP group; `Runtime` is all it knows of either."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mlpreduce
from mlpreduce.data import Loaders, load
from mlpreduce.errors import ReductionError
from mlpreduce.train.parts import build_model, create_ema, create_loss, create_optimizer, create_scheduler
from mlpreduce.train.runtime import Runtime, environment
from mlpreduce.train.settings import Run
from mlpreduce.train.state import read_checkpoint, restore_rng, save_checkpoint, seed_everything
from mlpreduce.train.validation import evaluate
from mlpreduce.verification import reentrant_problem

__all__ = ["TrainingStopped", "fit"]

_CHECK_EVERY = 50  # updates between two looks at whether the loss is finite: each waits for the device
_REPORT_EVERY = 2.0  # seconds between two progress events


class TrainingStopped(ReductionError):
    """The loss is no longer finite. The checkpoint of the last whole epoch is kept."""


@dataclass
class _Parts:
    """What one run trains with."""

    run: Run
    runtime: Runtime
    loaders: Loaders
    core: nn.Module  # the model itself
    model: nn.Module  # the same, wrapped by DDP where there is a group
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: torch.amp.GradScaler
    loss: nn.Module
    facts: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)
    updates: int = 0

    def autocast(self) -> AbstractContextManager[Any]:
        if self.run.train.amp == "none":
            return nullcontext()
        return torch.autocast(self.runtime.device.type, dtype=getattr(torch, self.run.train.amp))


def fit(run: Run, runtime: Runtime | None = None) -> list[dict[str, Any]]:
    """Train one run, or go on with it from its checkpoint.

    The effective batch is the mean over all workers and accumulation steps. At the end of each epoch the model (and, with
    `train.ema_decay`, its moving average, whose accuracy is the reported one) is validated, a checkpoint is written, and an
    "epoch" event is reported. The weights of the best epoch so far lie in `run.directory/model`, written by
    `mlpreduce.save`. An interrupted run goes on from its last whole epoch; with as many workers, on CPUs, to the same bits.

    Args:
        run: what to train.
        runtime: where; by default in this process, on the CPU.

    Returns:
        One dictionary per epoch, epochs counted from 1: losses, `top1` and `top5` in percent (of the average where there is
        one), `raw_top1` and `raw_top5` (of the trained weights), `lr` of its first update, `images_per_s` in training.

    Raises:
        ReductionError: a setting that cannot be carried out, or a checkpoint of other settings.
        TrainingStopped: the loss is no longer finite.
    """
    runtime = runtime or Runtime()
    if run.workers != runtime.world:
        raise ReductionError(f"fit({run.label}): the run is for {run.workers} worker(s), the group has {runtime.world}")
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    saved = read_checkpoint(run)
    if saved is not None and saved["epoch"] >= run.train.epochs:
        _report(run, runtime, "start", history=saved["history"], facts=saved["facts"])
        _report(run, runtime, "end", status="finished")
        return list(saved["history"])
    parts = _prepare(run, runtime, saved)
    _report(run, runtime, "start", history=list(parts.history), facts=parts.facts)
    for epoch in range(len(parts.history), run.train.epochs):
        parts.loaders.set_epoch(run.seed, epoch)
        entry = {"epoch": epoch + 1, "lr": float(parts.optimizer.param_groups[0]["lr"]), **_train_epoch(parts, epoch)}
        entry.update(_validate(parts, epoch))
        if parts.scheduler is not None:
            parts.scheduler.step(epoch + 1)
        best = max((past["top1"] for past in parts.history), default=-1.0)
        parts.history.append(entry)
        if runtime.rank == 0 and entry["top1"] > best:
            _save_model(parts)
        _save(parts, epoch + 1)
        _report(run, runtime, "epoch", **entry)
    _report(run, runtime, "end", status="finished")
    return parts.history


def _prepare(run: Run, runtime: Runtime, saved: dict[str, Any] | None) -> _Parts:
    train, device = run.train, runtime.device
    loaders = load(run.data, train, micro_batch=run.micro_batch, rank=runtime.rank, world=runtime.world, device=device)
    updates_per_epoch = run.updates_per_epoch(loaders.train_samples)
    core = build_model(run).to(device)
    if runtime.world > 1 and (problem := reentrant_problem(core)) is not None:
        raise ReductionError(f"fit({run.label}): {problem}")
    if getattr(core, "num_classes", loaders.num_classes) != loaders.num_classes:
        raise ReductionError(
            f"model.kwargs.num_classes: {run.model.name} has {core.num_classes} classes, data.name={run.data.name!r} has "
            f"{loaders.num_classes}; use model.kwargs.num_classes={loaders.num_classes}"
        )
    if train.channels_last:
        core = core.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if saved is not None:
        facts = saved["facts"]
    else:
        facts = _facts(run, runtime, core, loaders, updates_per_epoch) if runtime.rank == 0 else {}
    ema = create_ema(core, train.ema_decay, per_alias=train.ema_per_alias) if train.ema_decay else None
    optimizer = create_optimizer(core, train)
    model: nn.Module = core
    if runtime.world > 1 and dist.is_initialized():
        model = DistributedDataParallel(core, device_ids=[device] if device.type == "cuda" else None)
    parts = _Parts(
        run=run,
        runtime=runtime,
        loaders=loaders,
        core=core,
        model=model,
        ema=ema,
        optimizer=optimizer,
        scheduler=create_scheduler(optimizer, train, updates_per_epoch),
        scaler=torch.amp.GradScaler(device.type, enabled=train.amp == "float16"),
        loss=create_loss(train),
        facts=facts,
    )
    if saved is None:
        seed_everything(run.seed + runtime.rank)  # differs by worker: drop path and augmentation, never the weights
    else:
        _restore(parts, saved)
    return parts


def _train_epoch(parts: _Parts, epoch: int) -> dict[str, float]:
    run, runtime, train = parts.run, parts.runtime, parts.run.train
    parts.model.train()
    batches = len(parts.loaders.train)
    # The last update of an epoch may have fewer micro-batches; its gradient is the mean of those it has.
    last_group = batches % train.accum_steps or train.accum_steps
    total = torch.zeros(2, dtype=torch.float64, device=runtime.device)  # sum of losses, images
    started = told = time.perf_counter()
    # Only the last micro-batch of an update exchanges gradients.
    quiet = parts.model.no_sync if isinstance(parts.model, DistributedDataParallel) else nullcontext
    for number, (images, targets) in enumerate(parts.loaders.train):
        images, targets = images.to(runtime.device), targets.to(runtime.device)
        if parts.loaders.mixup is not None:
            images, targets = parts.loaders.mixup(images, targets)
        if train.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        update = (number + 1) % train.accum_steps == 0 or number + 1 == batches
        group = last_group if number >= batches - last_group else train.accum_steps
        with nullcontext() if update else quiet():
            with parts.autocast():
                loss = parts.loss(parts.model(images), targets)
            parts.scaler.scale(loss / group).backward()
        total += torch.stack([loss.detach().double() * len(images), loss.new_tensor(len(images)).double()])
        if not update:
            continue
        _update(parts)
        if parts.updates % _CHECK_EVERY == 0:
            _mean_loss(parts, total, epoch)
        if runtime.rank == 0 and time.perf_counter() - told > _REPORT_EVERY:
            told = time.perf_counter()
            rate = (number + 1) * run.micro_batch * runtime.world / (told - started)
            _report(
                run,
                runtime,
                "progress",
                epoch=epoch + 1,
                fraction=(number + 1) / batches,
                loss=loss.detach().item(),
                images_per_s=rate,
            )
    mean = _mean_loss(parts, total, epoch)
    seconds = time.perf_counter() - started
    return {
        "train_loss": mean,
        "train_seconds": seconds,
        "images_per_s": batches * run.micro_batch * runtime.world / seconds,
    }


def _update(parts: _Parts) -> None:
    train = parts.run.train
    if train.clip_grad:
        parts.scaler.unscale_(parts.optimizer)
        nn.utils.clip_grad_norm_(parts.core.parameters(), train.clip_grad)
    parts.scaler.step(parts.optimizer)
    parts.scaler.update()
    parts.optimizer.zero_grad()
    parts.updates += 1
    if parts.ema is not None:
        parts.ema.update(
            parts.core, step=parts.updates
        )  # with a step, the first update copies the weights, as timm does
    if parts.scheduler is not None:
        parts.scheduler.step_update(parts.updates)


def _mean_loss(parts: _Parts, total: torch.Tensor, epoch: int) -> float:
    """The mean training loss over all workers so far; all of them stop together when it is not finite."""
    everywhere = total.clone()
    if parts.runtime.world > 1:
        dist.all_reduce(everywhere)
    mean = float(everywhere[0] / everywhere[1])
    _check_finite(parts, mean, "training", epoch)
    return mean


def _check_finite(parts: _Parts, loss: float, name: str, epoch: int) -> None:
    if not math.isfinite(loss):
        kept = f"what {len(parts.history)} whole epoch(s) gave is kept in {parts.run.directory}"
        raise TrainingStopped(
            f"train({parts.run.label}): the {name} loss is {loss} in epoch {epoch + 1}, at update {parts.updates}; {kept}. "
            f"A lower train.lr (now {parts.run.train.lr}), a longer train.warmup_epochs or train.clip_grad=1.0 would help"
        )


def _validate(parts: _Parts, epoch: int) -> dict[str, float]:
    arguments = (parts.loaders.val, parts.runtime, parts.autocast, parts.run.train.channels_last)
    raw = evaluate(parts.core, *arguments)
    reported = raw if parts.ema is None else evaluate(parts.ema.module, *arguments)
    _check_finite(parts, raw["loss"] + reported["loss"], "validation", epoch)
    return {
        "val_loss": reported["loss"],
        "top1": reported["top1"],
        "top5": reported["top5"],
        "raw_val_loss": raw["loss"],
        "raw_top1": raw["top1"],
        "raw_top5": raw["top5"],
    }


def _save(parts: _Parts, epoch: int) -> None:
    state: dict[str, Any] = {}
    if parts.runtime.rank == 0:
        state = {
            "model": parts.core.state_dict(),
            "ema": None if parts.ema is None else parts.ema.module.state_dict(),
            "optimizer": parts.optimizer.state_dict(),
            "scheduler": None if parts.scheduler is None else parts.scheduler.state_dict(),
            "scaler": parts.scaler.state_dict(),
            "updates": parts.updates,
            "best": max(parts.history, key=lambda entry: entry["top1"]),
            "history": parts.history,
            "facts": parts.facts,
        }
    runtime = parts.runtime
    save_checkpoint(parts.run, state, epoch=epoch, rank=runtime.rank, world=runtime.world, device=runtime.device)


def _restore(parts: _Parts, saved: dict[str, Any]) -> None:
    parts.core.load_state_dict(saved["model"])
    if parts.ema is not None:
        parts.ema.module.load_state_dict(saved["ema"])
    parts.optimizer.load_state_dict(saved["optimizer"])
    if parts.scheduler is not None:
        parts.scheduler.load_state_dict(saved["scheduler"])
    parts.scaler.load_state_dict(saved["scaler"])
    parts.updates = saved["updates"]
    parts.history = list(saved["history"])
    restore_rng(parts.run, epoch=saved["epoch"], rank=parts.runtime.rank, device=parts.runtime.device)


def _save_model(parts: _Parts) -> None:
    """The weights of the best epoch. Written before the checkpoint: a run killed in between repeats the epoch, and this."""
    mlpreduce.save(parts.core if parts.ema is None else parts.ema.module, Path(parts.run.directory) / "model")


def _facts(run: Run, runtime: Runtime, core: nn.Module, loaders: Loaders, updates_per_epoch: int) -> dict[str, Any]:
    """What a record keeps besides the epochs: plans, counts and speed of the model, versions, hardware."""
    return {
        "plans": [plan.to_json() for plan in mlpreduce.history(core)],
        "profile": asdict(mlpreduce.profile(core, measure_speed=True, batch_size=32)),
        "train_samples": loaders.train_samples,
        "val_samples": loaders.val_samples,
        "updates_per_epoch": updates_per_epoch,
        "micro_batch": run.micro_batch,
        **environment(runtime),
    }


def _report(run: Run, runtime: Runtime, event: str, **content: Any) -> None:
    if runtime.rank == 0:
        runtime.report(
            {"event": event, "variant": run.variant, "seed": run.seed, "epochs": run.train.epochs, **content}
        )
