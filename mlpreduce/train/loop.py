"""The training loop: the same code for one process and for a worker of a DDP group; `Runtime` is all it knows of either."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mlpreduce
from mlpreduce.errors import ReductionError
from mlpreduce.plugins import run_plugins
from mlpreduce.train import digests, probes
from mlpreduce.train.curvature import CHUNK
from mlpreduce.train.events import Ended, EpochEnded, Event, Progressed, Started
from mlpreduce.train.runtime import Runtime, precision
from mlpreduce.train.sam import random_states, second_pass
from mlpreduce.train.settings import Run
from mlpreduce.train.setup import Setup, prepare
from mlpreduce.train.state import Saved, all_do, read_checkpoint, save_checkpoint
from mlpreduce.train.validation import evaluate

__all__ = ["TrainingStopped", "fit"]

_CHECK_EVERY = 50  # updates between two looks at whether the loss is finite: each waits for the device
_REPORT_EVERY = 2.0  # seconds between two progress events


class TrainingStopped(ReductionError):
    """The loss is no longer finite. The checkpoint of the last whole epoch is kept."""


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
        one), `raw_top1` and `raw_top5` (of the trained weights), `lr` of its first update, `images_per_s` in training; on
        worker 0, in epochs that are probed, `probes`.

    Raises:
        ReductionError: a setting that cannot be carried out, or a checkpoint of other settings.
        TrainingStopped: the loss is no longer finite.
    """
    runtime = runtime or Runtime()
    run_plugins(run.plugins)
    run.accumulation(runtime.world)
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    saved = read_checkpoint(run, runtime)
    notes = [] if saved is None else list(saved.notes)
    if saved is not None and saved.epoch >= run.train.epochs:
        _report(run, runtime, Started(saved.state["facts"], saved.state["history"], notes))
        _report(run, runtime, Ended("finished"))
        return list(saved.state["history"])
    with precision(run.train):
        return _fit(run, runtime, saved, notes)


def _fit(run: Run, runtime: Runtime, saved: Saved | None, notes: list[str]) -> list[dict[str, Any]]:
    all_do(run, runtime, "make its directory", lambda: Path(run.directory).mkdir(parents=True, exist_ok=True))
    parts = prepare(run, runtime, saved)
    if saved is not None and saved.world != runtime.world:
        notes.append(
            f"epoch {saved.epoch} was written by {saved.world} worker(s), and {runtime.world} go on: the batch is the same, "
            f"the random numbers are not, so the run is no longer exact"
        )
    elif parts.facts.get("micro_batch", run.micro_batch) != run.micro_batch:
        notes.append(
            f"it began with {parts.facts['micro_batch']} images at a time, and goes on with {run.micro_batch}: the batch is "
            f"the same, how it is mixed is not, so the run is no longer exact"
        )
    _report(run, runtime, Started(parts.facts, list(parts.history), notes))
    order = run.seed if run.train.fidelity == "corrected" else 0  # as published, the epoch alone decides
    for epoch in range(len(parts.history), run.train.epochs):
        parts.loaders.set_epoch(order, epoch)
        entry = {"epoch": epoch + 1, "lr": float(parts.optimizer.param_groups[0]["lr"]), **_train_epoch(parts, epoch)}
        if run.data.on_bad_image == "skip":
            entry.update(_skipped(parts))
        entry.update(_validate(parts, epoch), workers=runtime.world, random_digest=digests.of_randomness(runtime))
        due = (epoch + 1) % run.train.probe_every == 0 or epoch + 1 == run.train.epochs
        if run.train.probes and due and runtime.rank == 0:  # the others wait where they next meet
            entry["probes"] = _probe(parts)
        if parts.scheduler is not None:
            parts.scheduler.step(epoch + 1)
        best = max((past["top1"] for past in parts.history), default=-1.0)
        parts.history.append(entry)
        if entry["top1"] > best:
            all_do(run, runtime, "save the best model", (lambda: _save_model(parts)) if runtime.rank == 0 else None)
        _save(parts, epoch + 1)
        _report(run, runtime, EpochEnded(entry))
    _report(run, runtime, Ended("finished"))
    return parts.history


@contextmanager
def _memory(run: Run, images: int) -> Iterator[None]:
    """Tell what to do where a device is out of memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        steps = 2 * run.train.accum_steps
        fewer, less = run.key("train.accum_steps"), run.key("train.grad_checkpointing")
        raise ReductionError(
            f"train({run.label}): {images} images do not fit into the memory of a worker: {str(error).splitlines()[0]} "
            f"{fewer}={steps} takes half as many at a time for the same batch of {run.train.batch_size}, and {less}=true takes "
            f"less too; with either, --resume goes on after the last epoch"
        ) from error


def _train_epoch(parts: Setup, epoch: int) -> dict[str, Any]:
    run, runtime, train = parts.run, parts.runtime, parts.run.train
    parts.model.train()
    batches = len(parts.loaders.train)
    # The last update of an epoch may have fewer micro-batches; its gradient is the mean of those it has.
    steps = run.accumulation(runtime.world)
    last_group = batches % steps or steps
    total, seen = torch.zeros((), dtype=torch.float64, device=runtime.device), 0  # sum of losses, images
    started = told = time.perf_counter()
    held: list[tuple[Any, list[torch.Tensor]]] = []  # micro-batches of an update that has a second pass
    # Only the last micro-batch of an update exchanges gradients.
    quiet = parts.replica.no_sync if isinstance(parts.replica, DistributedDataParallel) else nullcontext
    for number, (images, targets) in enumerate(parts.loaders.train):
        images, targets = images.to(runtime.device), targets.to(runtime.device)
        if parts.loaders.mixup is not None:
            images, targets = parts.loaders.mixup(images, targets)
        if number == 0:
            first = digests.of_tensors({"images": images, "targets": targets})
        if train.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        update = (number + 1) % steps == 0 or number + 1 == batches
        group = last_group if number >= batches - last_group else steps
        batch = (images, targets, group)
        if train.sam_rho:
            held.append((batch, random_states(runtime.device)))
        with nullcontext() if update and (train.sam_sync or not train.sam_rho) else quiet(), _memory(run, len(images)):
            loss = _backward(parts, batch)
        total.add_(loss.detach(), alpha=len(images))
        seen += len(images)
        if not update:
            continue
        if held:
            with _memory(run, len(images)):
                again = partial(_backward, parts)
                second_pass(parts.core, held, again, train.sam_rho, adaptive=train.sam_adaptive, quiet=quiet)
            held.clear()
        _update(parts)
        if parts.updates % _CHECK_EVERY == 0:
            _mean_loss(parts, total, seen, epoch)
        if runtime.rank == 0 and time.perf_counter() - told > _REPORT_EVERY:
            told = time.perf_counter()
            rate = (number + 1) * run.micro_batch * runtime.world / (told - started)
            _report(run, runtime, Progressed(epoch + 1, (number + 1) / batches, loss.detach().item(), rate))
    mean = _mean_loss(parts, total, seen, epoch)
    seconds = time.perf_counter() - started
    return {
        "train_loss": mean,
        "batch_digest": digests.together(first, runtime),
        "train_seconds": seconds,
        "images_per_s": batches * run.micro_batch * runtime.world / seconds,
    }


def _backward(parts: Setup, batch: tuple[torch.Tensor, torch.Tensor, int]) -> torch.Tensor:
    """The loss of a micro-batch (images, targets, micro-batches of its update), whose gradient is added to those before."""
    images, targets, group = batch
    with parts.autocast():
        loss = parts.training_loss(images, targets)
    parts.scaler.scale(loss / group).backward()
    return loss


def _skipped(parts: Setup) -> dict[str, Any]:
    """Images that could not be read since this process began, over all workers: how many, and which files."""
    every: list[Any] = [(parts.loaders.skipped(), parts.loaders.skipped_files())]
    if parts.runtime.world > 1:
        mine, every = every[0], [None] * parts.runtime.world
        dist.all_gather_object(every, mine)
    files = sorted({file for _, found in every for file in found})
    return {"skipped_images": sum(count for count, _ in every), "skipped_files": files}


def _update(parts: Setup) -> None:
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
    if parts.decay_scheduler is not None:
        parts.decay_scheduler.step_update(parts.updates)


def _mean_loss(parts: Setup, total: torch.Tensor, seen: int, epoch: int) -> float:
    """The mean training loss over all workers so far; all of them stop together when it is not finite."""
    everywhere = torch.stack([total, total.new_tensor(seen)])
    if parts.runtime.world > 1:
        dist.all_reduce(everywhere)
    mean = float(everywhere[0] / everywhere[1])
    _check_finite(parts, mean, "training", epoch)
    return mean


def _check_finite(parts: Setup, loss: float, name: str, epoch: int) -> None:
    if not math.isfinite(loss):
        kept = f"what {len(parts.history)} whole epoch(s) gave is kept in {parts.run.directory}"
        raise TrainingStopped(
            f"train({parts.run.label}): the {name} loss is {loss} in epoch {epoch + 1}, at update {parts.updates}; {kept}. "
            f"A lower train.lr (now {parts.run.train.lr}), a longer train.warmup_epochs or train.clip_grad=1.0 would help"
        )


def _validate(parts: Setup, epoch: int) -> dict[str, float]:
    arguments = (parts.runtime, parts.autocast, parts.run.train.channels_last)
    raw = evaluate(parts.core, _keeping(parts), *arguments)
    reported = raw if parts.ema is None else evaluate(parts.ema.module, parts.loaders.val, *arguments)
    _check_finite(parts, raw["loss"] + reported["loss"], "validation", epoch)
    return {
        "val_loss": reported["loss"],
        "top1": reported["top1"],
        "top5": reported["top5"],
        "raw_val_loss": raw["loss"],
        "raw_top1": raw["top1"],
        "raw_top5": raw["top5"],
    }


def _keeping(parts: Setup) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """The validation batches; the first time, those of worker 0 leave the images of the probes behind.

    So nothing is read for the probes, and no loader or random state knows of them.
    """
    train = parts.run.train
    if not train.probes or parts.probed or parts.runtime.rank != 0:
        return parts.loaders.val

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        missing = train.probe_images
        for images, labels in parts.loaders.val:
            if missing > 0:
                parts.probed.append((images[:missing].to("cpu", copy=True), labels[:missing].to("cpu", copy=True)))
                missing -= len(images)
            yield images, labels

    return batches()


def _probe(parts: Setup) -> dict[str, Any]:
    """The probes of the trained weights, on the same images each time."""
    train, device = parts.run.train, parts.runtime.device
    if not parts.probed:
        raise ReductionError(
            f"train({parts.run.label}): worker 0 has no validation image for {parts.run.key('train.probes')}; leave it out"
        )
    images, labels = (torch.cat(tensors).to(device) for tensors in zip(*parts.probed, strict=True))
    if train.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    try:
        return probes.measure(parts.core, images, labels, train.probes)
    except torch.OutOfMemoryError as error:
        fewer = min(CHUNK, len(images)) // 2
        remedy = f"{parts.run.key('train.probe_images')}={fewer} takes less, and so does" if fewer else "What helps is"
        raise ReductionError(
            f"train({parts.run.label}): the probes {', '.join(train.probes)} of {len(images)} images do not fit into the "
            f"memory of worker 0, {CHUNK} at a time: {str(error).splitlines()[0]} {remedy} a shorter "
            f"{parts.run.key('train.probes')}; with "
            f"either, --resume goes on after the last epoch"
        ) from error


def _save(parts: Setup, epoch: int) -> None:
    state: dict[str, Any] = {}
    if parts.runtime.rank == 0:
        state = {
            "model": parts.core.state_dict(),
            "ema": None if parts.ema is None else parts.ema.module.state_dict(),
            "optimizer": parts.optimizer.state_dict(),
            "scheduler": None if parts.scheduler is None else parts.scheduler.state_dict(),
            "scaler": parts.scaler.state_dict(),
            "updates": parts.updates,
            "history": parts.history,
            "facts": parts.facts,
        }
    best = max(parts.history, key=lambda entry: entry["top1"])["epoch"]
    save_checkpoint(parts.run, parts.runtime, state, epoch=epoch, best=best, plans=parts.plans)


def _save_model(parts: Setup) -> None:
    """The weights of the best epoch. Written before the checkpoint: a run killed in between repeats the epoch, and this."""
    mlpreduce.save(parts.core if parts.ema is None else parts.ema.module, Path(parts.run.directory) / "model")


def _report(run: Run, runtime: Runtime, what: Started | Progressed | EpochEnded | Ended) -> None:
    if runtime.rank == 0:
        runtime.report(Event(run.variant, run.seed, run.train.epochs, what))
