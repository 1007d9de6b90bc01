"""Records of runs written by hand, and the tables of a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlpreduce.records import Record

HARDWARE = {"device": "AVX512", "machine": "x86_64", "cpu_cores": 2, "workers": 1}
COUNTS = {  # ViT-B/16 and its reductions: params, MLP params, unique MLPs, MACs
    "baseline": (86_567_656, 56_669_184, 12, 16_867_412_736),
    "grouped": (58_233_064, 28_334_592, 6, 16_867_412_736),
    "shallow": (58_237_672, 28_339_200, 12, 11_289_717_504),
    "thin": (58_237_672, 28_339_200, 12, 11_289_717_504),
}
SPEED = {"baseline": (1020.4, 1000.0), "grouped": (1017.0, 957.0), "shallow": (1411.0, 710.0)}
PLAN = {"rows": [["blocks.0.mlp", "plain", 3072, 3072, "blocks.0.mlp", "blocks.0.mlp", 4_722_432, 4_722_432]]}


def make_record(variant: str, seed: int, top1: list[float], order: int, recipe: Any = "toy", **changes: Any) -> dict:
    """A record as the recorder writes it, by hand: reports need nothing else."""
    counts = dict(
        zip(("params", "mlp_params", "unique_mlps", "macs"), COUNTS.get(variant, COUNTS["baseline"]), strict=True)
    )
    throughput, memory = SPEED.get(variant, (None, None))
    epochs = [{"epoch": n, "top1": value, "top5": value + 5, "val_loss": 1 / n} for n, value in enumerate(top1, 1)]
    return {
        "schema": 1,
        "recipe": {"name": recipe, "train": {"epochs": len(top1)}} if isinstance(recipe, str) else recipe,
        "variant": variant,
        "steps": [] if variant == "baseline" else [{"transform": variant}],
        "seed": seed,
        "order": order,
        "status": "finished",
        "epochs_planned": len(top1),
        "train_samples": 2048,
        "plans": [PLAN] if variant in ("grouped", "shallow") else [],
        "profile": {
            **counts,
            "macs_linear": 1,
            "macs_with_attention": 3,
            "batch_size": 32,
            "throughput": throughput,
            "latency": 2.0,
            "peak_memory_mib": memory,
            "device": "cpu, float32, 1 threads",
        },
        "hardware": HARDWARE,
        "versions": {"mlpreduce": "0.1.0", "torch": "2.15.0", "timm": "1.0.31"},
        "epochs": epochs,
        "mlflow_run_id": f"id{order}",
        **changes,
    }


def a_record(variant: str = "baseline", seed: int = 1, top1: tuple[float, ...] = (50.0,), **changes: Any) -> Record:
    """The same as the recorder knows it."""
    return Record.model_validate(make_record(variant, seed, list(top1), 0, **changes))


def write(directory: Path, record: dict) -> None:
    folder = directory / record["variant"].replace("/", "_") / f"seed{record['seed']}"
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps(record))


def cells(text: str, title: str) -> dict[tuple[str, str], dict[str, str]]:
    """The rows of one table of report.md, by variant and source."""
    lines = text.split(f"## {title}\n")[1].split("\n## ")[0].splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("|")]
    return {(row[0], row[1]): dict(zip(head, row, strict=True)) for row in rows}
