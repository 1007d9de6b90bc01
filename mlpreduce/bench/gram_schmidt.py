"""How fast `gram_schmidt` orders rows, beside the published loop: `python -m mlpreduce bench gram_schmidt`.

One round on a float32 matrix of normal numbers, in float32 and in float64. The plain loop takes the direction of the longest
row out of all rows at each pick, in float32.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from mlpreduce.bench.rounds import at_least_one, ratio_text, ratios, turns, value_text
from mlpreduce.criteria.gram_schmidt import pivots
from mlpreduce.errors import ReductionError

__all__ = ["main"]


def plain_loop(rows: torch.Tensor, wanted: int) -> list[int]:
    """The picks of one round, by the description of DGMR (arXiv 2506.08591), in the type of the rows."""
    rest, picked = rows.clone(), []
    for _ in range(wanted):
        pick = int(torch.linalg.vector_norm(rest, dim=1).argmax())
        direction = rest[pick] / torch.linalg.vector_norm(rest[pick])
        picked.append(pick)
        rest = rest - torch.outer(rest @ direction, direction)
    return picked


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; the exit status: 0, or 2 after a ReductionError."""
    parser = argparse.ArgumentParser(prog="mlpreduce bench gram_schmidt", description="Time one round of gram_schmidt.")
    parser.add_argument("--units", type=int, default=3072, help="hidden units (default: 3072)")
    parser.add_argument("--features", type=int, default=768, help="values of a row (default: 768)")
    parser.add_argument("--runs", type=int, default=5, help="rounds of all tools (default: 5)")
    parser.add_argument("--only-ours", action="store_true", help="leave the plain loop out, for large matrices")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    options = parser.parse_args(argv)
    try:
        at_least_one(options, ["units", "features", "runs", "threads"], "gram_schmidt")
    except ReductionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    rows = torch.randn(options.units, options.features, generator=torch.Generator().manual_seed(0))
    wanted = min(options.units, options.features)
    ours: dict[str, Callable[[torch.Tensor, int], list[int]]] = {
        "ours": pivots,
        "ours, float64": partial(pivots, dtype="float64"),
    }
    tools = ours if options.only_ours else ours | {"plain loop": plain_loop}
    seconds: dict[str, list[float]] = {name: [] for name in tools}
    pivots(rows[:1], 1)  # loads what the first call loads
    before = _highest_memory()
    memory = []
    for tool in ours.values():  # the one that needs less goes first
        tool(rows, wanted)
        memory.append(f"{_highest_memory() - before:.0f} MiB")
    for name in turns(options.runs, list(tools)):
        start = time.perf_counter()
        tools[name](rows, wanted)
        seconds[name].append(time.perf_counter() - start)
    print(
        f"one round of {options.units} x {options.features}, float32, {options.threads} threads; s, median (min to max)"
    )
    for name, taken in seconds.items():
        against = "" if name == "ours" else f"   {name} / ours {ratio_text(ratios(taken, seconds['ours']))}"
        print(f"  {name:<14} {value_text(taken, '', digits=3)}{against}")
    size = rows.nbytes / 2**20
    print(f"  memory beyond the matrix of {size:.0f} MiB: ours {memory[0]}, ours, float64 {memory[1]}")
    return 0


def _highest_memory() -> float:
    """MiB that the process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
