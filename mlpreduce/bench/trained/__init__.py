"""How good trained models are once they are reduced without training: `python -m mlpreduce bench trained`.

Two trained models are reduced by every criterion, with and without repair, by sharing, and by a peer, and compared with what
they gave before. Each cell is kept in a file as soon as it is measured, so a run that was stopped goes on, and parts of the
table can be measured alone. `--write` makes the page from all cells that are there.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mlpreduce.bench.rounds import at_least_one
from mlpreduce.bench.stored_page import check_page_file, read_page, write_page
from mlpreduce.bench.trained.page import figure_of, page_of
from mlpreduce.bench.trained.subjects import SUBJECTS, Subject, add_options, subject
from mlpreduce.bench.trained.ways import Row, rows
from mlpreduce.budget import Cost
from mlpreduce.errors import ReductionError, check_one_of
from mlpreduce.records import SCHEMA, store
from mlpreduce.report.plotting import as_png
from mlpreduce.report.trained import draw as draw_trained
from mlpreduce.words.waiting import silent

__all__ = ["main"]

KINDS = ("advice", "criteria", "sharing", "peers")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is asked for and not there yet, print the page and write it; the exit status: 0, or 2 after an error."""
    parser = argparse.ArgumentParser(
        prog="mlpreduce bench trained", description="Quality of trained models that are reduced without training."
    )
    add_options(parser, "runs/bench_trained")
    parser.add_argument(
        "--widths",
        type=float,
        nargs="+",
        default=[0.75, 0.5, 0.25, 0.1],
        help="parts of the hidden units that are kept",
    )
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), help=f"of rows: {', '.join(KINDS)}")
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="GLOB", help='names of rows, such as "taylor*"')
    parser.add_argument("--repairs", nargs="+", metavar="NAME", help="only rows with these")
    options = parser.parse_args(argv)
    try:
        check_page_file(options.write)
        at_least_one(options, ["tests", "threads"], "trained")
        for width in options.widths:
            if not 0 < width <= 1:
                raise ReductionError(f"bench trained --widths {width}: a part is above 0 and at most 1")
        for name in options.subjects:
            check_one_of("bench trained", name, SUBJECTS)
        for kind in options.kinds:
            check_one_of("bench trained --kinds", kind, KINDS)
        torch.set_num_threads(options.threads)
        if options.read is None:
            if options.write is not None and (known := options.write.with_suffix(".json")).exists():
                _unpacked(read_page(known, page_of), options.output)
            for name in options.subjects or SUBJECTS:
                _measure(name, options)
            document = _gathered(options.output)
        else:
            document = read_page(options.read, page_of)
        figures = {}
        if options.write is not None:
            shown = {name: entry for name, entry in document["subjects"].items() if _any_measured(entry)}
            figures = {figure_of(name): as_png(draw_trained(name, entry)) for name, entry in shown.items()}
        write_page(document, page_of, options.write, figures)
    except ReductionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _any_measured(entry: dict[str, Any]) -> bool:
    return any("measured" in cell for cell in entry["cells"])


def _measure(name: str, options: argparse.Namespace) -> None:
    """Fill the cells of a model that are wanted and not there."""
    wanted = [
        row
        for row in rows(tuple(options.kinds))
        if any(fnmatch.fnmatch(row.name, glob) for glob in options.rows)
        and (options.repairs is None or row.repair in options.repairs)
    ]
    cells = [
        (draw, width, row)
        for draw in options.draws
        for width in options.widths
        for row in wanted
        if row.kind != "sharing" or width == 0.5  # pairs that share have as many parameters as half the width
    ]
    folder = options.output / name
    left = [cell for cell in cells if not (folder / _file(*cell, options.tests)).exists()]
    if not left:
        return
    there = subject(name, options.weights, options.images, options.tests)
    facts = {"conditions": there.conditions, "tests": len(there.tests), "whole": _cost(there.cost(there.model))}
    folder.mkdir(parents=True, exist_ok=True)
    store(folder, f"subject-{options.tests}.json", facts | {"of_whole": there.measure(there.model)})
    for number, (draw, width, row) in enumerate(left, 1):
        print(f"{name} {number} of {len(left)}: {row.name}, {row.repair}, {width:g}, draw {draw}", file=sys.stderr)
        store(folder, _file(draw, width, row, options.tests), _cell(there, draw, width, row))


def _file(draw: int, width: float, row: Row, tests: int) -> str:
    return f"cell-{tests}-{draw}-{width:g}-{row.key}.json"


def _cell(there: Subject, draw: int, width: float, row: Row) -> dict[str, Any]:
    """One reduction, measured; a refusal is an entry too."""
    data = there.calibration(draw)
    facts = {"row": row.name, "kind": row.kind, "repair": row.repair, "width": width, "draw": draw}
    start = time.perf_counter()
    try:
        with silent():
            model = row.reduce(there, width, data)
    except ReductionError as error:
        return facts | {"refused": str(error)}
    seconds = time.perf_counter() - start
    return facts | {"seconds": round(seconds, 1), **_cost(there.cost(model)), "measured": there.measure(model)}


def _cost(cost: Cost) -> dict[str, int]:
    return {"params": cost.params, "macs": cost.macs}


def _gathered(folder: Path) -> dict[str, Any]:
    """All cells under a folder."""
    found: dict[str, Any] = {"schema": SCHEMA, "subjects": {}}
    for path in sorted(folder.glob("*/*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        entry = found["subjects"].setdefault(path.parent.name, {"of": {}, "cells": []})
        tests = path.stem.split("-")[1]
        if path.stem.startswith("subject"):
            entry["of"][tests] = document
        else:
            document.pop("seconds", None)  # of this machine alone
            entry["cells"].append(document | {"tests": int(tests)})
    if not found["subjects"]:
        raise ReductionError(f"bench trained --output {folder}: no cell lies there")
    return found


def _unpacked(document: dict[str, Any], folder: Path) -> None:
    """Put the cells of a page where they are kept, so that they are not measured again; those that are there stay."""
    known = {(row.name, row.kind, row.repair): row for row in rows()}
    for name, entry in document["subjects"].items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        files = {f"subject-{tests}.json": facts for tests, facts in entry["of"].items()}
        for cell in entry["cells"]:
            if (row := known.get((cell["row"], cell["kind"], cell["repair"]))) is not None:
                facts = {key: value for key, value in cell.items() if key != "tests"}
                files[_file(cell["draw"], cell["width"], row, cell["tests"])] = facts
        for file, facts in files.items():
            if not (folder / name / file).exists():
                store(folder / name, file, facts)
