"""What calibration costs, in forward passes over the same images: `python -m mlpreduce bench calibration`.

A plan of `shallow(ratio=0.5)` by each criterion, with each repair and without, on a timm model with random weights. The unit is
one pass over the same images in inference mode, in the same chunks. Elimination, the part of `reconstruction` that looks at no
image, is timed alone, in seconds a layer, and is not in the ratio.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import mlpreduce
from mlpreduce.bench.rounds import at_least_one, ends, spread
from mlpreduce.calibration import CHUNK
from mlpreduce.criteria import choose
from mlpreduce.criteria.elimination import eliminate
from mlpreduce.errors import ReductionError
from mlpreduce.graph import find_mlps
from mlpreduce.report.content import Table
from mlpreduce.report.pages import for_console, markdown_table
from mlpreduce.report.stored import check_page, keep
from mlpreduce.words.console import width
from mlpreduce.words.values import Config
from mlpreduce.words.waiting import silent

__all__ = ["calibration_text", "main"]

CRITERIA = ("energy", "activation", "taylor", "fisher", "reconstruction", "reconstruction(metric='loss')")
_SLOW = ("hessian_diag",)
_SIZES = ((384, 1536), (768, 3072))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; the exit status: 0, or 2 after a ReductionError."""
    parser = argparse.ArgumentParser(
        prog="mlpreduce bench calibration", description="Time criteria and repairs in forward passes."
    )
    parser.add_argument("model", nargs="?", default="vit_small_patch16_224", help="of timm (default: ViT-S/16)")
    parser.add_argument("--images", type=int, default=256, help="of calibration (default: 256)")
    parser.add_argument("--runs", type=int, default=3, help="of each (default: 3)")
    parser.add_argument(
        "--criteria", nargs="+", help="by default all but hessian_diag, which takes as long as all others"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument(
        "--page", type=Path, metavar="FILE.md", help="keep it beside this page as JSON, its table in it"
    )
    options = parser.parse_args(argv)
    try:
        at_least_one(options, ["images", "runs", "threads"], "calibration")
        if options.page is not None:
            check_page(options.page)
        torch.set_num_threads(options.threads)
        document = _measure(options)
        if options.page is not None:
            keep(document, options.page, calibration_text)
        print(calibration_text(document, width()))
    except ReductionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a forward pass, of each plan, and of eliminations."""
    if not timm.is_model(options.model):
        raise ReductionError(f"bench calibration {options.model}: timm has no such model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = timm.create_model(options.model).eval()
        size = model.pretrained_cfg["input_size"]
        images, labels = torch.randn(options.images, *size), torch.randint(0, 1000, (options.images,))
    data = list(zip(images.split(CHUNK), labels.split(CHUNK), strict=True))
    known = {str(choose(choice)).removesuffix("()"): choice for choice in (*CRITERIA[:-1], _LOSS, *_SLOW)}
    jobs: dict[tuple[str, str], Callable[[], object]] = {}
    for name in options.criteria or CRITERIA:
        if name not in known:
            raise ReductionError(f"bench calibration --criteria {name}: give some of {', '.join(known)}")
        for repair in ("none", "parallel", "least_squares"):
            config: Config = {"criterion": known[name], "repair": repair}
            jobs[name, repair] = partial(mlpreduce.plan, model, "shallow", ratio=0.5, data=data, **config)
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in jobs}
    forward: list[float] = []
    alone = [_elimination(*size, options.runs) for size in _SIZES]
    with silent():
        for run in range(options.runs):
            for number, (key, job) in enumerate(jobs.items()):
                print(f"run {run + 1} of {options.runs}: {' '.join(key)}", file=sys.stderr)
                if number % 3 == 0:
                    forward.append(_seconds(lambda: _pass(model, data)))
                taken[key].append(_seconds(job))
    layers = find_mlps(model)
    hidden = layers[0].hidden_features
    of_layer = next((statistics.median(one["took"]) for one in alone if one["hidden"] == hidden), 0.0)
    return {
        "schema": 1,
        "conditions": f"{options.model}, {options.images} images, float32, {options.threads} threads",
        "forward": [round(value, 3) for value in forward],
        "elimination": alone,
        "plans": [
            {
                "criterion": name,
                "repair": repair,
                "took": [round(value, 3) for value in values],
                "elimination": round(of_layer * len(layers), 3) if name.startswith("reconstruction") else 0.0,
            }
            for (name, repair), values in taken.items()
        ],
    }


_LOSS = {"name": "reconstruction", "metric": "loss"}


@torch.inference_mode()
def _pass(model: nn.Module, data: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for images, _ in data:
        model(images)


def _seconds(job: Callable[[], object]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def _elimination(outputs: int, hidden: int, runs: int) -> dict[str, Any]:
    """Seconds to order all units of a layer, with random second moments."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, hidden, generator=generator, dtype=torch.float64)
    rows = torch.randn(2 * hidden, hidden, generator=generator, dtype=torch.float64)
    square = rows.T @ rows / len(rows)
    seconds = [_seconds(lambda: eliminate(weight, square, 1e-2)) for _ in range(runs)]
    return {"hidden": hidden, "outputs": outputs, "took": [round(value, 3) for value in seconds]}


def calibration_text(document: dict[str, Any], columns: int | None = None) -> str:
    """Write what was measured as a table: markdown, or for a console so many columns wide."""
    unit = statistics.median(document["forward"])
    rows = []
    for plan in document["plans"]:
        times = [(value - plan["elimination"]) / unit for value in plan["took"]]
        rows.append([plan["criterion"], plan["repair"], spread(statistics.median(times), *ends(times))])
    sizes = "; ".join(
        f"{one['hidden']:,} units {spread(statistics.median(one['took']), *ends(one['took']))} s"
        for one in document["elimination"]
    )
    title = f"{document['conditions']}; a forward pass takes {spread(unit, *ends(document['forward']), digits=1)} s"
    table = Table(title, ["criterion", "repair", "forward passes, without elimination"], rows)
    text = f"{table.title}\n\n{markdown_table(table)}" if columns is None else for_console(table).text(columns)
    return f"{text}\n\nElimination of a layer: {sizes}."
