"""A supernet: one model trained so that its sub-models can be ranked without training each of them.

Every update sees the whole model, the smallest sub-model and a few others at random, all with the same images, and
minimises the mean of their losses (the sandwich rule). The weights of all sub-models are those of the one model; see
`mlpreduce.train.submodels`.

Source: the sandwich rule is that of J. Yu and T. Huang, "Universally Slimmable Networks and Improved Training Techniques",
arXiv 1903.05134, section 3.2. There narrower models learn from the whole one's outputs; here all learn from the targets.
Entangled weights: M. Chen et al., "AutoFormer", arXiv 2107.00651, who draw one sub-model an update.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import mlpreduce
from mlpreduce.building.checkpoint import DESCRIPTION
from mlpreduce.data import load
from mlpreduce.errors import ReductionError
from mlpreduce.graph import structural_copy
from mlpreduce.train.blocks import Remembering
from mlpreduce.train.parts import build_model
from mlpreduce.train.runtime import Runtime, precision
from mlpreduce.train.settings import Run, Step
from mlpreduce.train.submodels import Entangled, Planner, View, check_views

__all__ = ["Supernet", "check_points", "check_supernet", "entangle", "estimate"]

_REPORT_EVERY = 1.0  # seconds between two reports of an estimate
_CHUNK = 128  # images at a time on a CPU: what is in between stays in its caches


@dataclass(frozen=True)
class Supernet:
    """The sub-models that an update draws from.

    Attributes:
        whole: the full model, which has all weights.
        smallest: the sub-model that is part of every update, as the full model is.
        pool: the others.
        per_update: how many of these are drawn for an update.
    """

    whole: Entangled
    smallest: View
    pool: tuple[View, ...]
    per_update: int

    def logits(self, images: torch.Tensor) -> Iterator[torch.Tensor]:
        """Logits (batch, classes) of the largest, the smallest and some random sub-models, in this order.

        Which ones is drawn from torch's CPU generator, whose state is part of a checkpoint; one may be drawn twice.
        """
        drawn = torch.randint(len(self.pool), (self.per_update,)).tolist()
        for view in ({}, self.smallest, *(self.pool[number] for number in drawn)):
            yield self.whole.run(view, images)


def check_supernet(run: Run, runtime: Runtime) -> None:
    """Whether the settings of a run allow a supernet.

    Raises:
        ReductionError: they do not; the message has the key.
    """
    call, train = _call(run), run.train
    if run.steps:
        raise ReductionError(f"{call}: a supernet is the whole model, and the run has steps; put them into its points")
    if max(run.workers, runtime.world) > 1:
        raise ReductionError(
            f"{call}: {max(run.workers, runtime.world)} workers would not exchange the gradients of sub-models; train it with "
            f"one (launch.workers=1, in a search trial_workers=1)"
        )
    if train.compile:
        raise ReductionError(f"{call}: train.compile=true would compile each sub-model anew; leave it out")
    if train.density_weight:
        raise ReductionError(
            f"{call}: train.density_weight={train.density_weight:g} watches the MLPs of the whole model, and sub-models are "
            f"narrower; leave it out"
        )
    if train.grad_checkpointing:
        raise ReductionError(
            f"{call}: train.grad_checkpointing=true computes blocks again when their sub-model is gone; use more "
            f"train.accum_steps instead"
        )


def check_points(run: Run) -> None:
    """Whether plans make sub-models of the points of a run: before anything is trained, and without weights.

    What only shows when a model runs, a width that a forward reads elsewhere, is checked when training begins.

    Raises:
        ReductionError: a point cannot be a sub-model.
    """
    check_supernet(run, Runtime())
    if run.supernet is not None:
        planner = Planner(build_model(run, device="meta"), _call(run))
        for steps in (run.supernet.smallest, *run.supernet.points):
            planner.view(steps)


def entangle(model: nn.Module, run: Run) -> Supernet:
    """The supernet of a run, after a check of all its sub-models.

    Args:
        model: the full model, where it will be trained.
        run: has `supernet`.

    Raises:
        ReductionError: a point cannot be a sub-model.
    """
    settings = run.supernet
    if settings is None:
        raise ReductionError(f"{_call(run)}: the run has no supernet")
    planner = Planner(model, _call(run))
    smallest, *pool = check_views(model, planner, [settings.smallest, *settings.points], _call(run))
    return Supernet(Entangled.of(model), smallest, tuple(pool), settings.per_update)


def estimate(
    run: Run,
    points: Sequence[Sequence[Step]],
    *,
    images: int | None = None,
    report: Callable[[int, int], object] | None = None,
    runtime: Runtime | None = None,
) -> list[dict[str, float]]:
    """How good sub-models of a trained supernet are, without training them.

    Points that begin alike are evaluated one after the other, so that what their first blocks compute is computed once.

    Args:
        run: trained the supernet; the weights of its best epoch are in `run.directory/model`.
        points: reductions, of the full model; those of `run.supernet` or others.
        images: of the validation set, the first ones; by default all. They are kept in memory.
        report: called now and then with the number of evaluations (a point on some of the images) that are done, and of
            all.
        runtime: where; by default in this process, on the CPU.

    Returns:
        For each point `loss`, the mean cross entropy in nats, and `top1` in percent.

    Raises:
        ReductionError: there is no trained supernet, or a point cannot be a sub-model of it.
    """
    runtime = runtime or Runtime()
    call = f"estimate({run.label})"
    if runtime.world > 1:
        raise ReductionError(f"{call}: it is for one worker, and there are {runtime.world}")
    if images is not None and images < 1:
        raise ReductionError(f"{call}: images={images}; give at least one, or None for all")
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    folder = Path(run.directory) / "model"
    if not (folder / DESCRIPTION).is_file():
        raise ReductionError(
            f"{call}: no supernet is trained in {run.directory}: {folder.name}/{DESCRIPTION} is missing"
        )
    trained = mlpreduce.load(folder)
    if plans := mlpreduce.history(trained):
        raise ReductionError(f"{call}: {folder} has a model reduced by {plans[0].transform}, which is no supernet")
    model = structural_copy(trained.to(runtime.device)).eval()
    planner = Planner(model, call)
    views = check_views(model, planner, points, call)
    whole, batches = Entangled.of(model), _kept(run, runtime, images)
    blocks = Remembering(model, planner.mlps, views)
    counts = torch.zeros(len(views), 2, dtype=torch.float64, device=runtime.device)  # sums of losses, right ones
    done, total, told = 0, len(views) * len(batches), time.perf_counter()
    amp = run.train.amp
    with precision(run.train), torch.no_grad():
        for batch, labels in batches:
            for number in blocks.order:
                blocks.choose(number)
                with nullcontext() if amp == "none" else torch.autocast(runtime.device.type, getattr(torch, amp)):
                    logits = whole.run(views[number], batch)
                logits = logits.float()
                loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
                counts[number] += torch.stack([loss, (logits.argmax(-1) == labels).sum()])
                done += 1
                if report is not None and (done == total or time.perf_counter() - told > _REPORT_EVERY):
                    told = time.perf_counter()
                    report(done, total)
    seen = sum(len(labels) for _, labels in batches)
    return [{"loss": loss / seen, "top1": 100 * right / seen} for loss, right in counts.tolist()]


def _kept(run: Run, runtime: Runtime, images: int | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The first validation images with their labels, on the device."""
    loaders = load(run.data, run.train, micro_batch=run.micro_batch, device=runtime.device)
    missing = loaders.val_samples if images is None else images
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    for batch, labels in loaders.val:
        batch, labels = batch[:missing].to(runtime.device), labels[:missing].to(runtime.device)
        missing -= len(labels)
        size = _CHUNK if runtime.device.type == "cpu" else len(labels)
        if run.train.channels_last:
            batch = batch.contiguous(memory_format=torch.channels_last)
        kept += zip(batch.split(size), labels.split(size), strict=True)
        if missing <= 0:
            break
    return kept


def _call(run: Run) -> str:
    return f"supernet({run.label})"
