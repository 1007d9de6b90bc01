"""Which architectures of timm the library reduces, and the proof: `python -m mlpreduce coverage`."""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import timm
import torch

from mlpreduce.coverage.entries import Entry, architectures, examine, family_of
from mlpreduce.coverage.proofs import Proof, prove
from mlpreduce.coverage.table import family_row, for_console, markdown, smallest
from mlpreduce.errors import ReductionError, did_you_mean
from mlpreduce.plugins import Plugin, add_option, load_plugins, run_plugins
from mlpreduce.words.console import width

__all__ = ["Entry", "Proof", "examine", "family_row", "main", "prove", "smallest"]

Result = TypeVar("Result")
_EVERY = 3.0  # seconds between two lines of progress
PROVED_PARAMS = 150_000_000  # larger models are not run: several copies of one must fit into memory


def main(argv: Sequence[str]) -> int:
    """Run `mlpreduce coverage` and return its exit status: 0, or 1 if anything does not hold."""
    parser = argparse.ArgumentParser(prog="mlpreduce coverage", description=__doc__)
    parser.add_argument("--family", action="append", help="a timm module, such as swin_transformer, or a glob")
    parser.add_argument("--output", type=Path, help="write the table to this file")
    parser.add_argument("--json", action="store_true", help="print every architecture as JSON instead of the table")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    add_option(parser)
    options = parser.parse_args(argv)
    own = load_plugins(options.plugins)
    families = sorted({family_of(name) for name in architectures()})
    for pattern in options.family or ():
        if not fnmatch.filter(families, pattern):
            raise ReductionError(f"coverage: timm has no module {pattern!r}{did_you_mean(pattern, families)}")
    chosen = {f for f in families if any(fnmatch.fnmatchcase(f, pattern) for pattern in options.family or ("*",))}
    names = [name for name in architectures() if family_of(name) in chosen]
    entries = sorted(_all(examine, names, options.workers, "on the meta device", own), key=lambda e: e.architecture)
    small = [entry.architecture for entry in smallest(entries).values() if entry.params <= PROVED_PARAMS]
    proved = _all(prove, small, options.workers, "on the CPU", own)
    proofs = {proof.architecture: proof for proof in sorted(proved, key=lambda proof: proof.architecture)}
    text = markdown(entries, proofs, f" with timm {timm.__version__}")
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    if options.json:
        rows = {"entries": [asdict(e) for e in entries], "proofs": [asdict(proof) for proof in proofs.values()]}
        print(json.dumps(rows, indent=1))
    elif not options.output:
        print(text if width() is None else for_console(entries, proofs, width()))
    return int(any(e.failure for e in entries) or any(proof.failure for proof in proofs.values()))


def _all(
    function: Callable[[str], Result], names: Iterable[str], workers: int, where: str, own: Sequence[Plugin]
) -> Iterator[Result]:
    """Results in the order they come, with progress on stderr."""
    names = list(names)
    told = time.monotonic()
    print(f"0 of {len(names)} architectures {where}", file=sys.stderr, flush=True)
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(own,)) as pool:
        futures = [pool.submit(function, name) for name in names]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                if done == len(names) or time.monotonic() - told > _EVERY:
                    told = time.monotonic()
                    print(f"{done} of {len(names)} architectures {where}", file=sys.stderr, flush=True)
                yield future.result()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin(own: Sequence[Plugin]) -> None:
    """Use one thread a process, show no warnings of the models', and run the plug-ins."""
    run_plugins(own)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
