"""How fast layers with fewer weights are, beside the dense ones: `python -m mlpreduce bench layers`.

An MLP of ViT-B/16 by default, in inference: its two projections alone, and the whole MLP with its GELU. What
multiply-accumulates promise is the dense MLP's over the layer's own.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mlpreduce.bench.rounds import at_least_one, ratio_text, ratios, turns, value_text
from mlpreduce.errors import ReductionError
from mlpreduce.layers import BlockDiagonalLinear, LowRankLinear, SvftLinear, block_orders, macs_of
from mlpreduce.report.content import Table
from mlpreduce.report.pages import for_console, markdown_table
from mlpreduce.report.stored import check_page, keep
from mlpreduce.words.console import width

__all__ = ["layers_text", "main"]

Pair = tuple[nn.Module, nn.Module]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; the exit status: 0, or 2 after a ReductionError."""
    parser = argparse.ArgumentParser(prog="mlpreduce bench layers", description="Time layers beside dense ones.")
    parser.add_argument("--batch", type=int, default=64, help="images (default: 64)")
    parser.add_argument("--tokens", type=int, default=197, help="of an image (default: 197)")
    parser.add_argument("--features", type=int, default=768, help="of a token (default: 768)")
    parser.add_argument("--hidden", type=int, default=3072, help="hidden units (default: 3072)")
    parser.add_argument("--groups", type=int, nargs="*", default=[2, 4], help="of block_diagonal (default: 2 4)")
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.5, 0.25], help="of low_rank (default: 0.5 0.25)")
    parser.add_argument("--runs", type=int, default=7, help="turns of all layers (default: 7)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument(
        "--page", type=Path, metavar="FILE.md", help="keep it beside this page as JSON, and its table in it"
    )
    options = parser.parse_args(argv)
    try:
        at_least_one(options, ["batch", "tokens", "features", "hidden", "runs", "threads"], "layers")
        if options.page is not None:
            check_page(options.page)
        torch.set_num_threads(options.threads)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pairs = _pairs(options.features, options.hidden, options.groups, options.ratios)
        document = _measure(pairs, options)
        if options.page is not None:
            keep(document, options.page, layers_text)
        print(layers_text(document, width()))
    except ReductionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _pairs(features: int, hidden: int, groups: Sequence[int], parts: Sequence[float]) -> dict[str, Pair]:
    """Both projections of an MLP, by name: dense, and in place of it."""
    fc1, fc2 = nn.Linear(features, hidden), nn.Linear(hidden, features)
    pairs: dict[str, Pair] = {"dense": (fc1, fc2)}
    for number in groups:
        blocks = [BlockDiagonalLinear.from_linear(layer, number) for layer in (fc1, fc2)]
        pairs[f"block_diagonal {number}"] = (blocks[0], blocks[1])
    for number in groups[:1]:
        orders = block_orders([fc1.weight], fc2.weight, number)
        first = BlockDiagonalLinear.from_linear(fc1, number, inputs_order=orders.inputs)
        second = BlockDiagonalLinear.from_linear(fc2, number, outputs_order=orders.outputs)
        pairs[f"block_diagonal {number}, align all"] = (first, second)
    for part in parts:
        rank = max(1, int(part * features * hidden / (features + hidden)))
        new = [LowRankLinear(layer.in_features, layer.out_features, rank) for layer in (fc1, fc2)]
        pairs[f"low_rank {part:g}"] = (new[0], new[1])
    pairs["svft"] = SvftLinear.from_linear(fc1), SvftLinear.from_linear(fc2)
    return pairs


@torch.inference_mode()
def _measure(pairs: dict[str, Pair], options: argparse.Namespace) -> dict[str, Any]:
    """Time all in turns; the MACs of a token, and the milliseconds of every turn."""
    device = torch.device(options.device)
    x = torch.randn(options.batch, options.tokens, options.features, device=device)
    h = torch.randn(options.batch, options.tokens, options.hidden, device=device)
    jobs: dict[tuple[str, str], Callable[[], object]] = {}
    for name, (fc1, fc2) in pairs.items():
        first, second = fc1.to(device), fc2.to(device)
        jobs["projections", name] = partial(_both, (first, x), (second, h))
        jobs["MLP", name] = partial(nn.Sequential(first, nn.GELU(), second), x)
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in jobs}
    for job in jobs.values():
        job()
    for key in turns(options.runs, list(jobs)):
        _wait(device)
        start = time.perf_counter()
        jobs[key]()
        _wait(device)
        taken[key].append(1e3 * (time.perf_counter() - start))
    macs = {name: sum(macs_of(layer)[0] for layer in pair) for name, pair in pairs.items()}
    threads = f", {options.threads} threads" if device.type == "cpu" else ""
    size = f"{options.batch} x {options.tokens} tokens, {options.features} x {options.hidden}"
    return {
        "schema": 1,
        "conditions": f"{size}, float32, {device}{threads}",
        "layers": [
            {"of": of, "name": name, "macs": macs[name], "ms": [round(ms, 3) for ms in taken[of, name]]}
            for of in ("projections", "MLP")
            for name in pairs
        ],
    }


def layers_text(document: dict[str, Any], columns: int | None = None) -> str:
    """Write what was measured as a table, each layer beside the dense one: markdown, or for a console so many columns wide."""
    dense = {row["of"]: row for row in document["layers"] if row["name"] == "dense"}
    rows = []
    for row in document["layers"]:
        whole = dense[row["of"]]
        promise, faster = whole["macs"] / row["macs"], ratios(whole["ms"], row["ms"])
        rows.append(
            [
                *(f"{row['of']}, {row['name']}", f"{1 / promise:.3f}", value_text(row["ms"], "", digits=1)),
                *(ratio_text(faster), f"{faster[0] / promise:.0%}".replace("%", " %")),
            ]
        )
    headers = ["layer", "MACs", "ms, median (min to max)", "times as fast", "of the promise"]
    table = Table(f"{document['conditions']}, {len(document['layers'][0]['ms'])} turns", headers, rows)
    return f"{table.title}\n\n{markdown_table(table)}" if columns is None else for_console(table).text(columns)


def _both(*calls: tuple[nn.Module, torch.Tensor]) -> None:
    for layer, given in calls:
        layer(given)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
