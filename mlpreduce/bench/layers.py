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

import torch
from torch import nn

from mlpreduce.bench.rounds import at_least_one, ratio_text, ratios, turns, value_text
from mlpreduce.errors import ReductionError
from mlpreduce.layers import BlockDiagonalLinear, LowRankLinear, SvftLinear, block_orders, macs_of

__all__ = ["main"]

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
    options = parser.parse_args(argv)
    try:
        at_least_one(options, ["batch", "tokens", "features", "hidden", "runs", "threads"], "layers")
        torch.set_num_threads(options.threads)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pairs = _pairs(options.features, options.hidden, options.groups, options.ratios)
        _measure(pairs, options)
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
def _measure(pairs: dict[str, Pair], options: argparse.Namespace) -> None:
    """Time all in turns, and print what each needs beside the dense one."""
    device = torch.device(options.device)
    x = torch.randn(options.batch, options.tokens, options.features, device=device)
    h = torch.randn(options.batch, options.tokens, options.hidden, device=device)
    jobs: dict[tuple[str, str], Callable[[], object]] = {}
    for name, (fc1, fc2) in pairs.items():
        first, second = fc1.to(device), fc2.to(device)
        jobs[name, "projections"] = partial(_both, (first, x), (second, h))
        jobs[name, "MLP"] = partial(nn.Sequential(first, nn.GELU(), second), x)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in jobs}
    for job in jobs.values():
        job()
    for key in turns(options.runs, list(jobs)):
        _wait(device)
        start = time.perf_counter()
        jobs[key]()
        _wait(device)
        seconds[key].append(time.perf_counter() - start)
    macs = {name: sum(macs_of(layer)[0] for layer in pair) for name, pair in pairs.items()}
    threads = f", {options.threads} threads" if device.type == "cpu" else ""
    print(
        f"{options.batch} x {options.tokens} tokens, {options.features} x {options.hidden}, float32, {device}{threads}"
    )
    print(f"  {'':<32} {'MACs':>6}  {'ms, median (min to max)':<30} {'times as fast':<24} of the promise")
    for what in ("projections", "MLP"):
        dense = seconds["dense", what]
        for name in pairs:
            taken = seconds[name, what]
            promise, faster = macs["dense"] / macs[name], ratios(dense, taken)
            print(
                f"  {f'{what}, {name}':<32} {1 / promise:>6.3f}  {value_text([1e3 * s for s in taken], '', digits=1):<30} "
                f"{ratio_text(faster):<24} {faster[0] / promise:.0%}"
            )


def _both(*calls: tuple[nn.Module, torch.Tensor]) -> None:
    for layer, given in calls:
        layer(given)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
