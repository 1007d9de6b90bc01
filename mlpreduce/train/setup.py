"""What one run trains with, made of timm's parts, and set as a checkpoint left it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mlpreduce
from mlpreduce.data import Loaders, load
from mlpreduce.errors import ReductionError
from mlpreduce.reduction.verification import reentrant_problem
from mlpreduce.train import digests, distillation
from mlpreduce.train.advice import advice
from mlpreduce.train.density import DensityLoss
from mlpreduce.train.parts import (
    build_model,
    check_classes,
    create_ema,
    create_loss,
    create_optimizer,
    create_scheduler,
    images_of,
    outside_mlps,
)
from mlpreduce.train.runtime import Runtime, environment
from mlpreduce.train.settings import Run
from mlpreduce.train.state import Saved, restore_rng, seed_everything
from mlpreduce.train.supernet import Supernet, check_supernet, entangle
from mlpreduce.train.weight_decay import WeightDecaySchedule, create_decay_schedule
from mlpreduce.train.weights import start_digest

__all__ = ["Setup", "prepare"]


@dataclass
class Setup:
    """What one run trains with."""

    run: Run
    runtime: Runtime
    loaders: Loaders
    core: nn.Module  # the model itself
    model: nn.Module  # the same, wrapped by DDP where there is a group, and compiled if asked for
    replica: nn.Module  # the same, wrapped by DDP only; under distillation of features, both give features
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scheduler: Any
    decay_scheduler: WeightDecaySchedule | None
    scaler: torch.amp.GradScaler
    loss: nn.Module  # of the task, from logits and targets
    teacher: nn.Module | None  # the unreduced model, for distillation; it gives what the student gives
    feature_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None  # in place of that of the task
    density: DensityLoss | None  # of the activations, which is added to the loss
    supernet: Supernet | None  # the sub-models that are trained together
    facts: dict[str, Any]
    plans: list[str]  # the reductions of the model, as JSON
    history: list[dict[str, Any]] = field(default_factory=list)
    updates: int = 0
    probed: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # images and labels, on the CPU

    def autocast(self) -> AbstractContextManager[Any]:
        if self.run.train.amp == "none":
            return nullcontext()
        return torch.autocast(self.runtime.device.type, dtype=getattr(torch, self.run.train.amp))

    def training_loss(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """What is minimised, of one micro-batch: the loss of the task, with distillation blended with the teacher's.

        With distillation of features it is their loss alone, and the targets are not looked at. Of a supernet it is the mean
        over the sub-models of this update. The density of activations is added, if it has a weight.

        Args:
            images: (batch, channels, height, width), mixed already.
            targets: labels (batch,), or class probabilities (batch, classes).

        Returns:
            A scalar: the mean over the batch.
        """
        if self.density is None:
            return self._task_loss(images, targets)
        with self.density.watching() as density:
            loss = self._task_loss(images, targets)
        return loss + self.run.train.density_weight * density()

    def _task_loss(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():  # before the student, whose activations are kept for the backward pass
            aims = None if self.teacher is None else self.teacher(images)
        if self.feature_loss is not None and aims is not None:
            return self.feature_loss(self.model(images), aims)

        def loss(logits: torch.Tensor) -> torch.Tensor:
            task: torch.Tensor = self.loss(logits, targets)
            return task if aims is None else distillation.blend(task, logits, aims, self.run.train)

        if self.supernet is None:
            return loss(self.model(images))
        return torch.stack([loss(logits) for logits in self.supernet.logits(images)]).mean()


def prepare(run: Run, runtime: Runtime, saved: Saved | None) -> Setup:
    """Make what a run trains with, and set it as a checkpoint left it.

    Raises:
        ReductionError: a setting that cannot be carried out, a checkpoint of another model, or other initial weights.
    """
    train, device = run.train, runtime.device
    if run.supernet is not None:
        check_supernet(run, runtime)
    loaders = load(run.data, train, micro_batch=run.micro_batch, rank=runtime.rank, world=runtime.world, device=device)
    updates_per_epoch = run.updates_per_epoch(loaders.train_samples, runtime.world)
    digest, teacher = _start(run, runtime, saved) if run.model.weights else (None, None)
    core = build_model(run, plans=() if saved is None else saved.plans).to(device)
    trained, feature_loss = _trained(core, run)
    if train.grad_checkpointing:
        _checkpoint_blocks(core, run)
    if runtime.world > 1 and (problem := reentrant_problem(core)) is not None:
        raise ReductionError(f"fit({run.label}): {problem}")
    check_classes(core, run, loaders.num_classes)
    if train.channels_last:
        core = core.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    plans = [plan.to_json() for plan in mlpreduce.history(core)]
    if saved is not None:
        if saved.plans != plans:
            raise ReductionError(
                f"resume({run.label}): the plans in {saved.folder} are not those of the model; start in another --output"
            )
        facts = saved.state["facts"]
    else:
        facts = _facts(run, runtime, core, plans, loaders, updates_per_epoch) if runtime.rank == 0 else {}
        if digest is not None:
            facts["start_digest"] = digest
    per_alias = train.fidelity == "published"
    ema = None
    if train.ema_decay:
        variant: dict[str, Any] = {"warmup": train.ema_warmup, "start": train.ema_start, "per_alias": per_alias}
        ema = create_ema(core, train.ema_decay, **variant)
    optimizer = create_optimizer(core, train)
    replica = trained
    if runtime.world > 1 and dist.is_initialized():
        replica = DistributedDataParallel(trained, device_ids=[device] if device.type == "cuda" else None)
    parts = Setup(
        run=run,
        runtime=runtime,
        loaders=loaders,
        core=core,
        model=torch.compile(replica) if train.compile else replica,  # type: ignore[arg-type]
        replica=replica,
        ema=ema,
        optimizer=optimizer,
        scheduler=create_scheduler(optimizer, train, updates_per_epoch),
        decay_scheduler=create_decay_schedule(optimizer, train, train.epochs * updates_per_epoch),
        scaler=torch.amp.GradScaler(device.type, enabled=train.amp == "float16"),
        loss=create_loss(train),
        teacher=torch.compile(teacher) if train.compile and teacher is not None else teacher,  # type: ignore[arg-type]
        feature_loss=feature_loss,
        density=DensityLoss(core, eps=train.density_eps) if train.density_weight else None,
        supernet=None if run.supernet is None else entangle(core, run),
        facts=facts,
        plans=plans,
    )
    if saved is None:
        seed_everything(run.seed + runtime.rank)  # differs by worker: drop path and augmentation, never the weights
    else:
        _restore(parts, saved)
    return parts


def _start(run: Run, runtime: Runtime, saved: Saved | None) -> tuple[str, nn.Module | None]:
    """The digest of the given weights before the reduction, and the teacher that they make, if there is to be one.

    Raises:
        ReductionError: they are not those of the checkpoint, or not the same on all workers.
    """
    unreduced = build_model(run.model_copy(update={"steps": ()}))
    digest = start_digest(unreduced, run, runtime)
    before = digest if saved is None else saved.state["facts"].get("start_digest")
    if digest != before:
        raise ReductionError(
            f"resume({run.label}): model.weights={run.model.weights!r} are no longer the weights that the run began with "
            f"(digest {before}, now {digest}); put those back, or start in another --output"
        )
    if run.train.distillation == "none":
        return digest, None
    teacher = distillation.as_teacher(unreduced, run).to(runtime.device)
    return digest, distillation.Features(teacher).eval() if run.train.distillation == "features" else teacher


def _trained(
    core: nn.Module, run: Run
) -> tuple[nn.Module, Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None]:
    """The module that gives what is learned by: the model, or its features, with the head frozen; and their loss.

    Raises:
        ReductionError: there is no teacher, the model gives no features, or it is a supernet, which is run otherwise.
    """
    train = run.train
    if train.distillation != "features":
        return core, None
    call = f"fit({run.label}): train.distillation='features'"
    if not run.model.weights:
        raise ReductionError(f"{call}: there is no trained teacher; give model.weights")
    if run.supernet is not None:
        raise ReductionError(f'{call}: the sub-models of a supernet are run for their logits; use "soft" or "hard"')
    features = distillation.Features(core)
    distillation.freeze_unreached(features)
    loss = distillation.FeatureDistill(train.distill_cls, train.distill_patches)
    return features, partial(loss, prefix_tokens=features.prefix_tokens)


def _checkpoint_blocks(core: nn.Module, run: Run) -> None:
    enable = getattr(core, "set_grad_checkpointing", None)
    if enable is None:
        raise ReductionError(f"train.grad_checkpointing=true: {run.model.name} does not offer it; leave it out")
    enable(True)


def _restore(parts: Setup, saved: Saved) -> None:
    state = saved.state
    parts.core.load_state_dict(state["model"])
    if parts.ema is not None:
        parts.ema.module.load_state_dict(state["ema"])
    parts.optimizer.load_state_dict(state["optimizer"])
    if parts.scheduler is not None:
        parts.scheduler.load_state_dict(state["scheduler"])
    parts.scaler.load_state_dict(state["scaler"])
    parts.updates = state["updates"]
    parts.history = list(state["history"])
    restore_rng(saved, parts.run, parts.runtime)


def _facts(
    run: Run, runtime: Runtime, core: nn.Module, plans: list[str], loaders: Loaders, updates_per_epoch: int
) -> dict[str, Any]:
    """What a record keeps besides the epochs: plans, counts and speed of the model, warnings, versions, hardware."""
    return {
        "plans": plans,
        "profile": asdict(mlpreduce.profile(core, images_of(run, core, 32), measure_speed=True)),
        "train_samples": loaders.train_samples,
        "val_samples": loaders.val_samples,
        "updates_per_epoch": updates_per_epoch,
        "warnings": advice(
            run, images=loaders.train_samples, updates_per_epoch=updates_per_epoch, side=loaders.side, model=core
        ),
        "micro_batch": run.micro_batch,
        "weights_digest": digests.of_tensors(outside_mlps(core)),
        **environment(runtime),
    }
