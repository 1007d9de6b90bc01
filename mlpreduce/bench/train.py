"""How many images per second the training loop trains on, beside timm's training script: `python -m mlpreduce bench train`.

Both do the work of the recipe `paper_vitb16_tiny`: `mlpreduce.train.fit`, and `train.py` of timm's repository, which is not
in timm's package and is given by its path. They get the same model, images (generated, JPEG files in class folders, read by
timm's loader), batch, augmentation, precision, moving average, and number of processes and threads. Each run is a process of
its own, or a group of them started by `torch.distributed.run`; ours and theirs take turns, and their ratio is reported.

The span is the same for both: from the end of the optimizer's step in the last warm-up update to its end in the last counted
one, all in one epoch. A hook of torch in each process notes it (`watch.py`). It holds loading, forward, loss, backward, step,
moving average and what a loop reports; not start-up, the first batch, validation and checkpoints. The rates that timm's
script prints are not used: its average has the first update of an epoch in it, which waits for the first batch, and divides
the images of the last update by the mean time. The times of whole epochs would do for long epochs only: here, loading
processes take as long to start as the epoch lasts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import mlpreduce
from mlpreduce.bench import ours, script
from mlpreduce.bench.rounds import Ratios, at_least_one, ratio_text, ratios, read_models, reasons, turns, value_text
from mlpreduce.data.synthetic import SyntheticImages
from mlpreduce.errors import ReductionError
from mlpreduce.graph import example_inputs
from mlpreduce.recipe.schema import load as load_recipe
from mlpreduce.train.settings import Run
from mlpreduce.words.values import flatten

__all__ = ["WARM_UP", "Comparison", "Plan", "Rate", "compare", "main", "make_plan", "read_words", "write_images"]

RECIPE = "paper_vitb16_tiny"
WARM_UP = 5  # updates that are not counted
_HERE = "it is train.py of timm's repository (github.com/huggingface/pytorch-image-models), not part of its package"


@dataclass(frozen=True)
class Rate:
    """One tool on one model.

    Attributes:
        images_per_s: of each run, over all workers.
        ran: what was seen to train: optimizer, parameters, device, workers, threads, versions, updates of the epoch.
        failure: why it did not run; empty if it did.
    """

    images_per_s: tuple[float, ...] = ()
    ran: dict[str, Any] = field(default_factory=dict)
    failure: str = ""

    def __str__(self) -> str:
        return value_text(self.images_per_s, self.failure, digits=1)


@dataclass(frozen=True)
class Comparison:
    """The rates of both loops on one model.

    Attributes:
        model: the timm architecture, with its arguments.
        parameters: of the model, trained ones.
        settings: values of the recipe by dotted key, for both.
        ours: rate of `mlpreduce.train.fit`.
        peer: rate of timm's script.
        arguments: what the script was given.
    """

    model: str
    parameters: int
    settings: dict[str, Any]
    ours: Rate
    peer: Rate
    arguments: str = ""

    @property
    def ratios(self) -> Ratios | None:
        """Ours over the peer's, above 1 where ours is faster: of the medians, then the least and the largest of a round."""
        if self.ours.failure or self.peer.failure:
            return None
        return ratios(self.ours.images_per_s, self.peer.images_per_s)

    def __str__(self) -> str:
        line = _ROW.format(self.model, f"{self.parameters:,}", str(self.ours), str(self.peer), ratio_text(self.ratios))
        return "\n".join([line.rstrip(), *reasons(self.ours.failure, self.peer.failure)])

    def to_json(self) -> str:
        """The comparison as one line of JSON."""
        return json.dumps(asdict(self) | {"ratios": self.ratios})


_ROW = "{:<36} {:>12}  {:<26} {:<26} {:<19}"
_HEAD = _ROW.format("model", "parameters", "ours, images/s (range)", "peer, images/s (range)", "ours / peer")


@dataclass(frozen=True)
class Plan:
    """What both tools are to do.

    Attributes:
        run: a `mlpreduce.train.Run`: ours, as plain data.
        settings: its values that are the script's too, by dotted key.
        peer_arguments: the command line of timm's script.
        images: in the training folder.
        updates: counted ones.
        parameters: of the model, trained ones.
        folder: where all of it lies.
    """

    run: Any
    settings: dict[str, Any]
    peer_arguments: tuple[str, ...]
    images: int
    updates: int
    parameters: int
    folder: Path


def make_plan(
    name: str, kwargs: dict[str, Any], keys: Sequence[str], folder: Path, *, workers: int, batch_size: int, updates: int
) -> Plan:
    """The recipe with a folder of images, one epoch long, for both tools.

    Args:
        name: a timm architecture; "" = the recipe's model, with its arguments.
        kwargs: arguments of `timm.create_model`.
        keys: `key=value` of the recipe, dotted.
        folder: where images and results are written.
        workers: processes that train together.
        batch_size: images per update, over all workers.
        updates: counted updates.

    Raises:
        ReductionError: no such architecture or key, or a batch that does not split.
    """
    for key in keys:
        if key.partition("=")[0] not in script.KEYS:
            known = ", ".join(script.KEYS)
            raise ReductionError(f"bench train {key}: timm's script has no such setting; it has {known}")
    fixed = [f"train.batch_size={batch_size}", f"launch.workers={workers}", "train.epochs=1", "train.warmup_epochs=0"]
    single = ["train.aug_repeats=0"] if workers == 1 else []  # timm repeats an image on another worker only
    recipe = load_recipe(RECIPE, [*fixed, *single, *keys, f"data.root={folder / 'data'}", "data.name=folder"])
    train, default = recipe.train, recipe.model
    kwargs = {"num_classes": recipe.data.classes, **kwargs} if name else dict(default.kwargs)
    name = name or default.name
    with torch.device("meta"):
        model = mlpreduce.create_model(name, **kwargs)
    inputs = example_inputs(model)
    shape = tuple(inputs.shape) if isinstance(inputs, torch.Tensor) else ()
    if shape[1:] != (3, *shape[2:3] * 2):
        fact = f"it takes {' x '.join(map(str, shape[1:])) or 'several tensors'}, not 3 x side x side"
        raise ReductionError(f"bench train {name}: {fact}; use a model of square images with 3 channels")
    wanted = (WARM_UP + updates) * batch_size
    if train.aug_repeats:
        wanted = -(-wanted // 256) * 256  # of which timm's sampler takes whole blocks
    images = max(wanted, kwargs["num_classes"])  # each class has one
    sizes = {"image_size": shape[2], "train_samples": images, "val_samples": kwargs["num_classes"]}
    data = recipe.data.model_copy(update={**sizes, "classes": kwargs["num_classes"]})
    run = Run(
        recipe="bench",
        variant="baseline",
        model=default.model_copy(update={"name": name, "kwargs": kwargs}),
        data=data,
        train=train,
        workers=workers,
        directory=str(folder / "ours"),
    )
    settings = flatten(run.model_dump(mode="json", include={"data", "train"}))
    arguments = script.arguments(
        settings, name, kwargs, root=data.root, size=shape[2], micro_batch=run.micro_batch, device=_device()
    )
    arguments += ["--seed", str(run.seed), "--output", str(folder), "--experiment", "peer"]
    told = {key: settings[key] for key in ["train.batch_size", *script.KEYS]}
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Plan(run, told, tuple(arguments), images, updates, parameters, folder)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def write_images(plan: Plan) -> None:
    """Write the generated images as JPEG files into train/ and val/ of `plan.run.data.root`, a folder per class."""
    data = plan.run.data
    for split in ("train", "val"):
        images = SyntheticImages(data, "train" if split == "train" else "val")
        for number in range(len(images)):
            image, label = images[number]
            place = Path(data.root, split, f"{label:05}")
            place.mkdir(parents=True, exist_ok=True)
            image.save(place / f"{number}.jpg", quality=90)


def compare(plan: Plan, timm_train: str | None, *, runs: int, threads: int) -> Comparison:
    """Run both tools on a plan, in turns.

    Args:
        plan: what to do.
        timm_train: path of timm's training script.
        runs: of each tool.
        threads: CPU threads of torch in each worker.
    """
    write_images(plan)
    rates = {"ours": Rate(), "peer": Rate(failure=_skip(timm_train) or "")}
    for number, tool in enumerate(turns(runs, list(rates))):
        if rates[tool].failure:
            continue
        folder = plan.folder / f"{number}"
        folder.mkdir()
        command = [str(timm_train), *plan.peer_arguments] if tool == "peer" else _own_command(plan, folder)
        rates[tool] = _measure(rates[tool], plan, command, folder, threads)
    text = " ".join([plan.run.model.name, *(f"{key}={value}" for key, value in plan.run.model.kwargs.items())])
    told = " ".join(plan.peer_arguments).replace(str(plan.folder), "TEMPORARY")
    return Comparison(text, plan.parameters, plan.settings, rates["ours"], rates["peer"], told)


def _own_command(plan: Plan, folder: Path) -> list[str]:
    """In a directory of its own: where a run has finished, another would only read what it left."""
    file = folder / "run.json"
    run = plan.run.model_copy(update={"directory": str(folder / "ours")})
    file.write_text(run.model_dump_json(), encoding="utf-8")
    return [str(ours.__file__), str(file)]


def _skip(timm_train: str | None) -> str | None:
    if timm_train is None:
        return f"skipped: --timm-train is not given; {_HERE}"
    return None if Path(timm_train).is_file() else f"skipped: --timm-train {timm_train}: no such file; {_HERE}"


def _measure(before: Rate, plan: Plan, command: Sequence[str], folder: Path, threads: int) -> Rate:
    """One more run: the rate with what was measured before, or why there is none."""
    notes = folder / "notes"
    notes.mkdir()
    last = WARM_UP + plan.updates
    workers = plan.run.workers
    group = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(workers), "-m"] if workers > 1 else []
    words = [sys.executable, "-m", *group, "mlpreduce.bench.watch", str(notes), str(WARM_UP), str(last), *command]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, errors="replace", check=False)
    seen = [json.loads(note.read_text(encoding="utf-8")) for note in sorted(notes.glob("*.json"))]
    told = next((one["failure"] for one in seen if one["failure"]), "")
    if told or done.returncode:
        end = done.stderr.strip().splitlines()[-1:] if not told else []
        return Rate(failure=told or ": ".join([f"exit status {done.returncode}", *end]))
    if seen[0]["updates"] != (wanted := plan.run.updates_per_epoch(plan.images)):
        return Rate(failure=f"it made {seen[0]['updates']} updates, and {wanted} are wanted")
    if seen[0]["parameters"] != plan.parameters:
        return Rate(failure=f"it trained {seen[0]['parameters']} parameters, and the model has {plan.parameters}")
    if seen[0]["workers"] != workers:
        return Rate(failure=f"{seen[0]['workers']} worker(s) trained together, and {workers} are wanted")
    ran = {key: value for key, value in seen[0].items() if key not in ("seconds", "failure")}
    rate = plan.updates * plan.run.train.batch_size / seen[0]["seconds"]
    return Rate((*before.images_per_s, rate), ran)


def read_words(words: Sequence[str]) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """Models with their arguments, and keys of the recipe: those have a dot.

    Raises:
        ReductionError: an argument stands before the first model.
    """
    keys = [word for word in words if "." in word.partition("=")[0] and "=" in word]
    return read_models([word for word in words if word not in keys], "train"), keys


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, a model at a time, and return its exit status: 0, or 2 after a ReductionError."""
    options = _parser().parse_intermixed_args(argv)
    try:
        at_least_one(options, ["runs", "workers", "batch_size", "updates", "threads"], "train")
        if options.workers > 1 and 0 < torch.cuda.device_count() < options.workers:
            fact = f"there are {torch.cuda.device_count()} GPU(s)"
            raise ReductionError(f"bench train --workers {options.workers}: {fact}, and each worker takes one")
        models, keys = read_words(options.models)
        for number, (name, kwargs) in enumerate(models or [("", {})]):
            with tempfile.TemporaryDirectory(prefix="mlpreduce-bench-") as folder:
                sizes = {key: getattr(options, key) for key in ("workers", "batch_size", "updates")}
                plan = make_plan(name, kwargs, keys, Path(folder), **sizes)
                result = compare(plan, options.timm_train, runs=options.runs, threads=options.threads)
            if not options.json and not number:
                print(_HEAD.rstrip())
            print(result.to_json() if options.json else f"{result}\n{_conditions(result, plan, options)}", flush=True)
    except ReductionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _conditions(result: Comparison, plan: Plan, options: argparse.Namespace) -> str:
    run = plan.run
    batch = f"{run.workers} worker(s) x {run.micro_batch} images x {run.train.accum_steps} steps"
    lines = [
        f"batch {run.train.batch_size} = {batch}; updates: {options.updates} after {WARM_UP} of warm-up; images: "
        f"{plan.images} of {run.data.image_size} pixels; runs of each: {options.runs}; threads: {options.threads}; "
        f"device: {_device()}",
        "ours ran with: " + " ".join(f"{key}={value}" for key, value in result.settings.items()),
    ]
    if not result.peer.failure:
        lines.append(f"peer ran with: {Path(options.timm_train).name} {result.arguments}")
        lines.append(f"optimizers: ours {result.ours.ran.get('optimizer')}, peer {result.peer.ran['optimizer']}")
    return "\n".join(f"    {line}" for line in lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlpreduce bench train",
        description="Images per second of the training loop on this machine, beside timm's training script.",
    )
    words = f"timm architectures, each followed by its arguments as key=value (default: that of the recipe {RECIPE}); a key "
    words += "with a dot is the recipe's, such as train.amp=bfloat16 or data.workers=4"
    parser.add_argument("models", nargs="*", metavar="MODEL key=value", help=words)
    parser.add_argument("--timm-train", metavar="PATH", help="timm's training script, train.py of its repository")
    parser.add_argument("--runs", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--workers", type=int, default=1, help="processes that train together, by DDP (default: 1)")
    parser.add_argument("--batch-size", type=int, default=64, help="images per update, over all workers (default: 64)")
    parser.add_argument(
        "--updates", type=int, default=40, help=f"counted updates, after {WARM_UP} others (default: 40)"
    )
    threads = "threads of each worker (default: 1: as many workers as there are cores should not wait for each other)"
    parser.add_argument("--threads", type=int, default=1, help=threads)
    parser.add_argument("--json", action="store_true", help="print JSON, one line for each model")
    return parser
