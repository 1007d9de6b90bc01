"""How well a latency table predicts: `python -m mlpreduce bench latency`.

Models with random hidden widths are timed in the same turns as those that a table is made of, and what the table predicts of
each is put beside what it takes. So what is seen is the error of the table, not how the machine has changed since.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import mlpreduce
from mlpreduce.bench.rounds import at_least_one, check_file, read_models
from mlpreduce.budget.latency import Variants, sliced_copy, timed
from mlpreduce.errors import ReductionError
from mlpreduce.graph import example_inputs, find_mlps

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; the exit status: 0, or 2 after a ReductionError."""
    parser = argparse.ArgumentParser(prog="mlpreduce bench latency", description="Predicted and measured latency.")
    parser.add_argument(
        "model", nargs="*", default=["vit_tiny_patch16_224"], help="a timm architecture, key=value after it"
    )
    parser.add_argument("--widths", type=int, default=20, help="models of random widths (default: 20)")
    parser.add_argument("--batch-size", type=int, default=8, help="images (default: 8)")
    parser.add_argument("--points", type=int, default=9, help="widths in the table, at least 2 (default: 9)")
    parser.add_argument("--repeats", type=int, default=15, help="turns (default: 15)")
    parser.add_argument("--seed", type=int, default=0, help="of the widths")
    parser.add_argument("--save", type=Path, help="a file for the table")
    options = parser.parse_args(argv)
    try:
        at_least_one(options, ["widths", "batch_size", "repeats"], "latency")
        check_file(options.save, "--save")
        models = read_models(options.model, "latency")
        if options.save is not None and len(models) > 1:
            raise ReductionError(
                f"--save {options.save}: it is one table, and {len(models)} models are measured; save them one by one"
            )
        for name, kwargs in models:
            print(_measured(name, kwargs, options))
    except ReductionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _measured(name: str, kwargs: dict[str, Any], options: argparse.Namespace) -> str:
    torch.manual_seed(0)
    model = mlpreduce.create_model(name, **kwargs).eval()
    mlps = find_mlps(model)
    owners = [mlp for mlp in mlps if mlp.owner == mlp.name]
    draw = random.Random(options.seed)
    drawn = [
        {mlp.name: draw.randint(1, mlp.hidden_features // mlp.groups) * mlp.groups for mlp in owners}
        for _ in range(options.widths)
    ]
    variants = Variants(model, mlps, f"bench latency {name}", options.points)
    models = variants.models + [sliced_copy(model, mlps, widths) for widths in drawn]
    batch = example_inputs(model, options.batch_size)
    taken = timed(models, batch, next(model.parameters()).device, options.repeats)
    table = variants.table(taken[: len(variants.models)], batch)
    if options.save is not None:
        table.save(options.save)
    lines = [f"{name}, {table.conditions}: whole {taken[0]:.2f} ms", ""]
    errors = []
    for widths, measured in zip(drawn, taken[len(variants.models) :], strict=True):
        predicted = table.predict(widths)
        errors.append(predicted / measured - 1)
        mean = statistics.mean(widths[mlp.name] / mlp.hidden_features for mlp in owners)
        lines.append(
            f"  mean width {mean:4.0%}   predicted {predicted:8.2f} ms   measured {measured:8.2f} ms   {errors[-1]:+.1%}"
        )
    within = sum(abs(error) <= 0.1 for error in errors)
    worst = max(errors, key=abs)
    lines += [
        "",
        f"  within 10 %: {within} of {len(errors)}; worst {worst:+.1%}; median {statistics.median(errors):+.1%}",
    ]
    return "\n".join(lines)
