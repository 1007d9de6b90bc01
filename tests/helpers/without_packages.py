"""Calls and commands where packages are missing; run as a script, it prints one JSON line for each case.

Usage: python without_packages.py STAGE... where a stage is HIDDEN,HIDDEN or HIDDEN,HIDDEN=CASE;CASE. Without cases, all.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
from pathlib import Path
from typing import Any

HIDDEN: set[str] = set(sys.argv[1].partition("=")[0].split(","))


class Hiding:
    """Finds what Python finds, but for the hidden packages."""

    find_distributions = PathFinder.find_distributions
    before = tuple(finder for finder in sys.meta_path if finder not in (BuiltinImporter, FrozenImporter, PathFinder))

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in HIDDEN:
            return None
        for finder in (*cls.before, BuiltinImporter, FrozenImporter, PathFinder):
            if (spec := finder.find_spec(name, path, target)) is not None:
                return spec
        return None


sys.meta_path[:] = [Hiding]

import torch  # noqa: E402
from outcome import outcome  # noqa: E402  (beside this script)

import mlpreduce  # noqa: E402
from mlpreduce.__main__ import main  # noqa: E402
from mlpreduce.testing import tiny_vit  # noqa: E402

CASES: dict[str, Callable[[], Any]] = {}
Case = Callable[[], Any]


def case(call: Case) -> Case:
    CASES[call.__name__] = call
    return call


def command(name: str, *words: str) -> None:
    CASES[name] = lambda: main(words)


TINY = ["vit_tiny_patch16_224", "depth=2", "img_size=32", "embed_dim=24", "num_heads=2"]
command("list", "list")
command("plan", "plan", "vit_tiny_patch16_224", "grouped", "group=2")
command("profile", "profile", *TINY, "shallow", "ratio=0.5", "--measure", "--batch-size", "1")
command("recipe --list", "recipe", "--list")
command("recipe --dry-run", "recipe", "paper_vitb16_tiny", "--dry-run")
command("recipe", "recipe", "digits_tiny", "--output", "out/recipe")
command("recipe workers=0", "recipe", "digits_tiny", "launch.workers=0", "--output", "out/recipe0")
command(
    "recipe synthetic",
    "recipe",
    "paper_vitb16_tiny",
    "train.aug_repeats=0",
    "launch.workers=0",
    "--output",
    "out/synthetic",
)
command("report", "report", "out")
command("search --list", "search", "--list")
command("search", "search", "width", "--recipe", "digits_tiny", "--trials", "4", "--output", "out/search")
command("search workers=0", "search", "width", "--recipe", "digits_tiny", "--workers", "0", "--output", "out/search0")
command("search show", "search", "show", "out")
command("search export", "search", "export", "out", "1")
command("search compare", "search", "compare", "out", "out")
command("bench apply", "bench", "apply", "vit_tiny_patch16_224", "depth=1", "img_size=32", "--runs", "1")
command("bench apply --peer", "bench", "apply", "vit_tiny_patch16_224", "depth=1", "--peer", "torch-pruning")
command("bench search", "bench", "search")
command("bench criteria", "bench", "criteria", "--output", "out/criteria")
command("bench gram_schmidt", "bench", "gram_schmidt", "--units", "16", "--features", "8", "--runs", "1")
command("bench latency", "bench", "latency", *TINY, "--widths", "1", "--points", "2", "--repeats", "1")
command("bench layers", "bench", "layers", "--batch", "1", "--tokens", "2", "--features", "16", "--hidden", "32")


def images() -> torch.Tensor:
    return torch.randn(4, 3, 16, 16)


@case
def save_and_load() -> None:
    mlpreduce.save(mlpreduce.apply(tiny_vit(), "grouped", group=2), "out/model")
    mlpreduce.load("out/model")


@case
def grouped_align_mean() -> None:
    mlpreduce.apply(tiny_vit(), "grouped", group=2, scale="none", keep="align_mean")


@case
def grouped_match_forward() -> None:
    mlpreduce.apply(tiny_vit(), "grouped", group=2, scale="match_forward", data=images())


@case
def grouped_similarity() -> None:
    mlpreduce.apply(tiny_vit(), "grouped", pattern="similarity", data=images())


@case
def every_criterion_and_repair() -> None:
    for name in mlpreduce.list_criteria():
        data = [(images(), torch.tensor([0, 1, 2, 3]))]
        mlpreduce.apply(tiny_vit(), "shallow", criterion=name, repair="least_squares", data=data)


@case
def block_orders() -> None:
    from mlpreduce.layers import block_orders

    fc1, fc2 = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)
    block_orders([fc1.weight], fc2.weight, groups=2, features=False)


@case
def latency_table() -> None:
    from mlpreduce.budget import LatencyTable

    LatencyTable.measure(tiny_vit(), batch_size=1, points=2, repeats=1)


@case
def to_onnx() -> None:
    mlpreduce.to_onnx(tiny_vit(), "out/model.onnx", images())


@case
def examine() -> None:
    from mlpreduce.coverage import examine, prove

    examine("vit_tiny_patch16_224")
    prove("test_vit")


@case
def search_run() -> None:
    mlpreduce.search.run("width", "digits_tiny", workers=0, output="out/run")


@case
def search_names() -> None:
    mlpreduce.search.list_spaces()
    mlpreduce.search.StudySettings(name="study", seeds=(1,))


@case
def report_build() -> None:
    from mlpreduce import report

    report.build("out")


@case
def report_console_table() -> None:
    from mlpreduce import report
    from mlpreduce.records import Results

    report.console_table(Results(schema=1, recipe="none"))


@case
def summarize() -> None:
    from mlpreduce.records import Record, summarize

    runs = [{"train_loss": 1.0, "val_loss": 1.0, "top1": 50.0 + n, "top5": 90.0, "epoch": 1} for n in range(4)]
    counts = ("params", "mlp_params", "unique_mlps", "macs_linear", "macs", "macs_with_attention")
    profile = dict.fromkeys((*counts, "throughput", "peak_memory_mib"), 1)
    summarize(
        [
            Record.model_validate(
                {
                    **{"variant": variant, "steps": steps, "seed": seed, "epochs": [run], "profile": profile},
                    **{"mlflow_run_id": "", "recipe": {"name": "r"}, "order": seed, "status": "finished"},
                    **{"epochs_planned": 1, "train_samples": 1},
                }
            )
            for variant, steps, pair in (("a", [], runs[:2]), ("b", [{}], runs[3:1:-1]))
            for seed, run in enumerate(pair)
        ]
    )


def _run(name: str, *overrides: str) -> Any:
    from mlpreduce import recipe

    known = recipe.load(name, ["launch.workers=0", *overrides])
    return recipe.runs(known, f"out/{name}")[0]


@case
def recorder() -> None:
    from mlpreduce.records import Recorder

    Recorder(Path("out/records"), {"name": "records"}, [])


@case
def execute_on_ray() -> None:
    from mlpreduce import recipe
    from mlpreduce.launch import execute

    known = recipe.load("paper_vitb16_tiny")
    execute(recipe.runs(known, "out/ray"), known.launch, print)


@case
def pool() -> None:
    from mlpreduce.launch import LaunchSettings, pool

    with pool(1, dict, (), print, directories=["out"], launch=LaunchSettings()):
        pass


@case
def fit_digits() -> None:
    from mlpreduce.train import fit

    fit(_run("digits_tiny"))


@case
def fit_synthetic() -> None:
    from mlpreduce.train import fit

    small = (
        "data.train_samples=8",
        "data.val_samples=4",
        "train.batch_size=4",
        "train.accum_steps=1",
        "train.epochs=1",
    )
    fit(_run("paper_vitb16_tiny", *small, "train.aug_repeats=0", "train.warmup_epochs=0", "data.workers=0"))


@case
def data_digits() -> None:
    data("digits")


@case
def data_hfds() -> None:
    data("hfds/cifar10")


@case
def data_wds() -> None:
    data("wds/")


def data(name: str) -> None:
    from mlpreduce.data import AugmentSettings, DataSettings, load

    size = 8 if name == "digits" else 32
    load(DataSettings(name=name, root=".", classes=2, image_size=size, workers=0), AugmentSettings(), micro_batch=2)


@case
def storage_postgresql() -> None:
    from mlpreduce.search.study.storage import opened

    with opened("postgresql+psycopg://me@localhost:1/optuna", "study"):
        pass


if __name__ == "__main__":
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    Path("out").mkdir(exist_ok=True)
    for stage in sys.argv[1:]:
        hidden, _, chosen = stage.partition("=")
        HIDDEN.clear()
        HIDDEN.update(hidden.split(","))
        for module in [name for name in sys.modules if name.partition(".")[0] in HIDDEN]:
            del sys.modules[module]
        for name in chosen.split(";") if chosen else CASES:
            print(json.dumps([hidden, name, outcome(CASES[name])]), flush=True)
