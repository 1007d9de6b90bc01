"""What one run is: the model, its reduction, the data, how it is trained. Plain data; no torch is needed to read it."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mlpreduce.data.settings import AugmentSettings, DataSettings, NonNegative
from mlpreduce.errors import ReductionError
from mlpreduce.plugins import Plugin
from mlpreduce.words.marks import Free, Later, Mark, marked
from mlpreduce.words.values import Step

__all__ = ["ModelSettings", "Run", "Step", "SupernetSettings", "TrainSettings"]

Count = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]

DENSITY_THRESHOLDS = (0.0, 1e-3, 1e-2)  # GELU is next to zero for many inputs, and zero for few


class ModelSettings(BaseModel):
    """The `[model]` section: a timm model."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    name: str = "vit_base_patch16_224"  # timm's name
    kwargs: dict[str, Any] = {}  # arguments of timm.create_model
    weights: Later[str] = (
        ""  # before the reduction: "" = random; "pretrained" = timm's; else a path, see docs/finetune.md
    )
    calibration_images: Later[Count] = 512  # of the training set, for steps that look at data: criteria, repair

    @property
    def weights_path(self) -> Path | None:
        """Where the initial weights lie, if they are in files of the user."""
        return None if self.weights in ("", "pretrained") else Path(self.weights)


class TrainSettings(AugmentSettings):
    """The `[train]` section. The augmentation keys are those of `mlpreduce.data.AugmentSettings`."""

    epochs: Count = 300  # passes over the training set, warm-up included
    batch_size: Count = 1024  # images per update, over all workers and accumulation steps
    accum_steps: Free[Count] = 1  # micro-batches per update and worker
    optimizer: str = "adamw"  # timm's name
    lr: NonNegative = 1e-3  # peak learning rate
    weight_decay: NonNegative = 0.05  # not applied to biases, norms and position embeddings (timm's rule)
    weight_decay_end: Later[NonNegative | None] = (
        None  # where half a cosine takes it by the last update; none = constant
    )
    clip_grad: NonNegative = 0.0  # largest gradient norm; 0 = no clipping
    schedule: str = "cosine"  # timm's name
    warmup_epochs: Annotated[int, Field(ge=0)] = 5  # epochs of linear warm-up, part of `epochs`
    warmup_lr: NonNegative = 1e-5  # learning rate at the start of the warm-up
    min_lr: NonNegative = 0.0  # learning rate the schedule ends at
    schedule_per_update: bool = False  # true: the learning rate moves each update; false: each epoch (as published)
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9998  # per update, of the averaged weights; 0 = no averaging
    ema_warmup: Later[bool] = False  # true: the decay grows to ema_decay, as 1 - (1 + t)^(-2/3) with the updates t
    ema_start: Later[Annotated[int, Field(ge=0)]] = (
        0  # updates before averaging begins; until then the average is a copy
    )
    distillation: Later[Literal["none", "soft", "hard", "features"]] = (
        "none"  # from the unreduced model: docs/finetune.md
    )
    distill_alpha: Later[Annotated[float, Field(ge=0, le=1)]] = 0.5  # weight of the teacher's part of the loss
    distill_tau: Later[Annotated[float, Field(gt=0, allow_inf_nan=False)]] = 1.0  # temperature of soft distillation
    distill_cls: Later[Weight] = 1.0  # of the class token in distillation of features
    distill_patches: Later[Weight] = 1.0  # of the patch tokens
    sam_rho: Later[Weight] = 0.0  # sharpness-aware: how far weights move uphill before the gradient is taken; 0 = plain
    sam_adaptive: Later[bool] = False  # weights move in proportion to their squares; wants a ten times larger sam_rho
    sam_sync: Later[bool] = False  # true: by the gradient of the whole batch; false: of each worker's own part of it
    density_weight: Later[Weight] = 0.0  # of the density of MLP activations in the loss (DEFT); 0 = not measured
    density_eps: Later[Annotated[float, Field(gt=0, allow_inf_nan=False)]] = 1e-7  # squared activation that counts half
    fidelity: Literal["corrected", "published"] = (
        "corrected"  # published: with what is wrong there, see docs/fidelity.md
    )
    amp: Literal["none", "bfloat16", "float16"] = "none"  # automatic mixed precision
    tf32: bool = True  # float32 products of GPUs in TF32, as published
    channels_last: bool = False  # memory format of images and convolutions
    compile: bool = False  # torch.compile, default backend
    grad_checkpointing: Free[bool] = False  # recompute each block in the backward pass: less memory, more time (timm's)
    deterministic: bool = False  # only algorithms that give the same bits each time; an error where there is none
    keep_checkpoints: Free[Count] = 2  # the last ones that are kept, beside the best
    probes: Free[
        tuple[Literal["gradients", "similarity", "sharpness", "density"], ...]
    ] = ()  # measured while training: docs/probes.md
    probe_every: Free[Count] = 10  # epochs between two probes; the last epoch is always probed
    probe_images: Free[Count] = 64  # images of the validation set they use


class SupernetSettings(BaseModel):
    """Sub-models that are trained together, with the weights of one model: see `mlpreduce.train.supernet`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    points: Annotated[tuple[tuple[Step, ...], ...], Field(min_length=1)]  # reductions that updates draw from
    smallest: tuple[Step, ...]  # part of every update, as is the whole model
    per_update: Annotated[int, Field(ge=0)] = 2  # drawn from the points, besides the largest and the smallest


class Run(BaseModel):
    """One variant trained with one seed: everything `mlpreduce.train.fit` needs, as plain data."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    recipe: str  # name, for messages
    variant: str  # name, for messages
    steps: tuple[Step, ...] = ()  # the reduction: {transform=..., **config}, in order
    seed: int = 42
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    train: TrainSettings = TrainSettings()
    workers: Count = 1  # processes that train together
    inherit: str = ""  # folder of another run, reduced or not, whose weights are copied as far as they fit; "" = none
    supernet: SupernetSettings | None = None  # train sub-models of the whole model together; `steps` are then empty
    plugins: tuple[Plugin, ...] = ()  # your own code, which every process runs before it trains
    directory: str  # absolute; checkpoints and the best model lie here

    @property
    def label(self) -> str:
        """Variant and seed, for messages."""
        return f"{self.recipe}, variant {self.variant}, seed {self.seed}"

    def key(self, name: str) -> str:
        """How a key of a recipe is written on the command line: at a point of a sweep, the point's own goes before."""
        point = self.recipe.partition("/")[2]
        return f"sweep.{point}.{name}" if point else name

    def accumulation(self, world: int) -> int:
        """Micro-batches per update of each worker, where another number of workers than planned shares the batch.

        Raises:
            ReductionError: they cannot share it evenly.
        """
        parts = self.workers * self.train.accum_steps
        steps, rest = divmod(parts, world)
        if rest:
            possible = ", ".join(str(n) for n in range(1, parts + 1) if parts % n == 0)
            raise ReductionError(
                f"train({self.label}): {world} worker(s) cannot share the {parts} micro-batches of {self.micro_batch} images "
                f"in an update; {possible} could"
            )
        return steps

    @property
    def micro_batch(self) -> int:
        """Images in one forward pass of one worker.

        Raises:
            ReductionError: the effective batch does not split evenly.
        """
        parts = self.workers * self.train.accum_steps
        size, rest = divmod(self.train.batch_size, parts)
        if rest or not size:
            near = sorted({max(parts, size * parts), (size + 1) * parts})
            raise ReductionError(
                f"train.batch_size={self.train.batch_size}: it is the effective batch and must split evenly over "
                f"{self.workers} worker(s) x {self.train.accum_steps} accumulation step(s); "
                f"{' or '.join(str(n) for n in near)} would"
            )
        return size

    def updates_per_epoch(self, train_samples: int, world: int | None = None) -> int:
        """Optimizer updates in one epoch over `train_samples` images; incomplete batches are dropped.

        Args:
            train_samples: images in the training set.
            world: workers that share them; as many as planned by default.

        Raises:
            ReductionError: not even one batch per worker.
        """
        world = self.workers if world is None else world
        share = math.ceil(train_samples / world)
        if self.train.aug_repeats:  # as timm's RepeatAugSampler counts: whole blocks of 256 images
            whole = train_samples // 256 * 256 if train_samples >= 256 else train_samples
            share = whole // world if train_samples >= 256 else share
        batches = share // self.micro_batch
        if not batches:
            raise ReductionError(
                f"train.batch_size={self.train.batch_size}: {train_samples} training images give each of {world} "
                f"worker(s) {share}, fewer than one batch of {self.micro_batch}; use a smaller train.batch_size"
            )
        return math.ceil(batches / self.accumulation(world))

    @property
    def config_hash(self) -> str:
        """Identifies what is computed. Where the data and the output lie is no part of it, nor how the batch is shared.

        Neither are the paths of initial weights: what they are is told by their digest in the checkpoint. A plug-in counts by
        its text, wherever it was read.
        """
        apart = {"recipe", "variant", "directory", "workers", "inherit", "plugins"}
        document = self.model_dump(mode="json", exclude=apart)
        if self.plugins:  # earlier versions know no such key
            document["plugins"] = sorted(plugin.digest for plugin in self.plugins)
        if self.model.weights_path is not None:
            document["model"]["weights"] = "path"
        if self.supernet is None:
            del document["supernet"]  # earlier versions know no such key
        for section, key in (name.split(".") for name in marked(Run, Mark.LATER)):
            if document[section][key] == type(getattr(self, section)).model_fields[key].default:
                del document[section][key]
        for section, key in (name.split(".") for name in marked(Run, Mark.FREE)):
            del document[section][key]
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]
