"""What a search on a trained model brings: `python -m mlpreduce bench tune`.

A search within a budget, beside equal parts of all MLPs, a random search of as many points, and FastNAS of Model-Optimizer
with the same score, on the same examples. Reduced models are compared on examples that none of them saw. Each cell is kept in
a file as soon as it is measured, so a run that was stopped goes on, and parts can be measured alone.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import re
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import mlpreduce
from mlpreduce.bench.rounds import at_least_one, interval
from mlpreduce.bench.stored_page import check_page_file, read_page, write_page
from mlpreduce.bench.trained import subjects
from mlpreduce.bench.trained.measures import cosine
from mlpreduce.bench.trained.subjects import SUBJECTS, Subject, add_options, subject
from mlpreduce.errors import ReductionError, check_one_of
from mlpreduce.records import SCHEMA, store
from mlpreduce.report.content import Table
from mlpreduce.report.pages import markdown_table
from mlpreduce.search.examples import likeness, read_twofold
from mlpreduce.search.spaces.goals import Budget, read_budgets
from mlpreduce.words.waiting import silent

__all__ = ["main"]

_WAYS = ("tuned", "random", "fastnas")
_BATCH = 64


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is asked for and not there yet, print the page and write it; the exit status: 0, or 2 after an error."""
    parser = argparse.ArgumentParser(
        prog="mlpreduce bench tune", description="What a search on a trained model brings."
    )
    add_options(parser, "runs/bench_tune")
    parser.add_argument("--budgets", nargs="+", default=["params<=0.8", "params<=0.67", "params<=0.5"])
    parser.add_argument("--ways", nargs="+", default=["tuned"], help=f"of {', '.join(_WAYS)} (default: tuned)")
    parser.add_argument("--trials", type=int, default=100, help="points of a search (default: 100)")
    options = parser.parse_args(argv)
    try:
        check_page_file(options.write)
        at_least_one(options, ["trials", "tests", "threads"], "tune")
        for name in options.subjects:
            check_one_of("bench tune", name, SUBJECTS)
        for way in options.ways:
            check_one_of("bench tune --ways", way, _WAYS)
        if options.read is None:
            torch.set_num_threads(options.threads)
            options.output.mkdir(parents=True, exist_ok=True)
            if options.write is not None and (known := options.write.with_suffix(".json")).exists():
                for cell in read_page(known, page_of)["cells"]:
                    if not (options.output / _file(cell)).exists():
                        store(options.output, _file(cell), cell)
            for name in options.subjects or SUBJECTS:
                _measure(name, options)
            files = sorted(options.output.glob("cell-*.json"))
            document = {"schema": SCHEMA, "cells": [json.loads(path.read_text(encoding="utf-8")) for path in files]}
        else:
            document = read_page(options.read, page_of)
        write_page(document, page_of, options.write)
    except ReductionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _file(cell: dict[str, Any]) -> str:
    """Where a cell is kept, by what it is of."""
    facts = [cell[key] for key in ("model", "tests", "draw", "budget", "way", "trials") if key in cell]
    return f"cell-{'-'.join(re.sub('[^A-Za-z0-9.]+', '_', str(fact)) for fact in facts)}.json"


def _measure(name: str, options: argparse.Namespace) -> None:
    """Fill the cells of a model that are wanted and not there; a refusal is one too."""
    cells: list[dict[str, Any]] = [
        {"model": name, "tests": options.tests, "draw": draw, "budget": budget, "way": way}
        | ({} if way == "fastnas" else {"trials": options.trials})
        for draw in options.draws
        for budget in options.budgets
        for way in options.ways
    ]
    left = [cell for cell in cells if not (options.output / _file(cell)).exists()]
    if not left:
        return
    if any(cell["way"] == "fastnas" for cell in left):
        _model_optimizer()  # rather now than after hours
    there = subject(name, options.weights, options.images, options.tests)
    whole = there.cost(there.model)
    for number, cell in enumerate(left, 1):
        (budget,) = read_budgets([cell["budget"]], whole)
        print(f"{name} {number} of {len(left)}: {cell['way']}, {budget.text}, draw {cell['draw']}", file=sys.stderr)
        data = list(there.prepare(there.drawn(cell["draw"], 2 * subjects.CALIBRATION)).split(_BATCH))
        unit = _pass(there, data)
        try:
            with silent():
                model, seconds, found = (
                    _fastnas(there, budget, data) if cell["way"] == "fastnas" else _search(there, cell, data)
                )
        except ReductionError as error:
            store(options.output, _file(cell), cell | {"refused": str(error)})
            continue
        passes = seconds / statistics.mean([unit, _pass(there, data)])
        measured = {"passes": passes, "error": _error(there, model), "params": there.cost(model).params}
        store(options.output, _file(cell), cell | found | measured)


def _search(there: Subject, cell: dict[str, Any], data: list[torch.Tensor]) -> tuple[nn.Module, float, dict[str, Any]]:
    """The best point of a search, its seconds, and what else it found: the error of equal parts of all MLPs, and all scores."""
    began = time.perf_counter()
    tuning = mlpreduce.tune(
        there.model,
        data=data,
        budget=cell["budget"],
        calibration=subjects.CALIBRATION,
        trials=cell["trials"],
        sampler="random" if cell["way"] == "random" else "auto",
        seed=cell["draw"],
    )
    seconds = time.perf_counter() - began
    named = {point["name"]: point for point in tuning.points}
    told = tuning.document["environment"] or {}
    found = {
        "uniform": _error(there, _apply(there, tuning.plans_of(named["uniform"]))),
        "best": tuning.front[0]["name"],
        "scores": [p["runs"][0]["score"] for p in tuning.points if p["kind"] == "trial"],
        "correlation": next((value for value in told.values() if isinstance(value, float)), None),
    }
    return _apply(there, tuning.plans), seconds, found


def _model_optimizer() -> Any:
    try:
        return importlib.import_module("modelopt.torch.prune")
    except ImportError as error:
        raise ReductionError(
            f"bench tune --ways fastnas: {error}; install mlpreduce, nvidia-modelopt, omegaconf and torchprofile==0.0.4 into "
            f"another environment, and run it there"
        ) from error


def _fastnas(there: Subject, budget: Budget, data: list[torch.Tensor]) -> tuple[nn.Module, float, dict[str, Any]]:
    """What Model-Optimizer finds with our score, its seconds, and how often it asked for one.

    Raises:
        ReductionError: it knows no such constraint.
    """
    if budget.cost != "params":
        raise ReductionError(
            f"bench tune --ways fastnas: {budget.text!r}; it is asked for parameters, such as params<=0.67"
        )
    _, held = read_twofold(there.model, data, subjects.CALIBRATION, labels=False)
    nearness, calls = likeness(there.model, held, None), 0

    def score(model: nn.Module) -> float:
        nonlocal calls
        calls += 1
        return nearness(model)

    began = time.perf_counter()
    with warnings.catch_warnings(action="ignore"):
        found, _ = _model_optimizer().prune(
            copy.deepcopy(there.model),
            mode="fastnas",
            constraints={"params": float(budget.limit)},
            dummy_input=data[0][:1],
            config={"score_func": score, "verbose": False},
        )
    return found.eval(), time.perf_counter() - began, {"calls": calls}


def _apply(there: Subject, plans: Sequence[Any]) -> nn.Module:
    model = copy.deepcopy(there.model)
    for plan in plans:
        mlpreduce.apply(model, plan)
    return model


def _error(there: Subject, model: nn.Module) -> float:
    """What the mean cosine to the whole model lacks to 1, on the tests."""
    return 1 - cosine(there.whole, there.embed(model, there.tests))


def _pass(there: Subject, data: list[torch.Tensor]) -> float:
    """Seconds of the whole model for as many examples as a score looks at."""
    start = time.perf_counter()
    with torch.inference_mode():
        for some in data[::2]:
            there.model(some)
    return time.perf_counter() - start


def page_of(document: dict[str, Any]) -> str:
    """Make the page from the JSON that `--write` stores beside it."""
    cells = [cell for cell in document["cells"] if "refused" not in cell]
    lines = [
        "# What a search on a trained model brings",
        "",
        "`mlpreduce.tune` with the space `trained`, its score, and 1,024 examples: 512 to calibrate with, 512 to score by. An",
        "error is 1 minus the mean cosine to what the whole model gives, on test examples that neither saw. A pass is one of",
        "the whole model over 512 examples, in the same run. Models and data are those of [trained models](trained.md).",
        "",
    ]
    for title, table in (
        ("Beside equal parts of all MLPs", _beside_uniform(cells)),
        ("Beside a random search of as many points", _beside_random(cells)),
        ("Beside FastNAS of Model-Optimizer, with the same score and constraint", _beside_fastnas(cells)),
    ):
        if table.rows:
            lines += [f"## {title}", "", markdown_table(table), ""]
    refused = [cell for cell in document["cells"] if "refused" in cell]
    lines += [f"- {one['model']}, {one['way']}, draw {one['draw']}: {one['refused']}" for one in refused]
    return "\n".join(lines).rstrip() + "\n"


Cells = Sequence[dict[str, Any]]


def _groups(cells: Cells, way: str, *keys: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Cells of a way that agree in some values, by these."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for cell in sorted(cells, key=lambda cell: [str(cell[key]) for key in ("model", "budget", "draw")]):
        if cell["way"] == way:
            found.setdefault(tuple(cell[key] for key in keys), []).append(cell)
    return found


def _beside_uniform(cells: Cells) -> Table:
    rows = []
    for (model, budget, trials), some in _groups(cells, "tuned", "model", "budget", "trials").items():
        errors, equal = ([cell[key] for cell in some] for key in ("error", "uniform"))
        ratio = _interval_text([ours / other for ours, other in zip(errors, equal, strict=True)])
        passes = f"{statistics.mean(cell['passes'] for cell in some):.0f}"
        rows.append(
            [model, budget, str(trials), str(len(some)), _error_text(errors), _error_text(equal), ratio, passes]
        )
    return Table("", ["model", "budget", "points", "draws", "tuned", "equal parts", "ratio of errors", "passes"], rows)


def _beside_random(cells: Cells) -> Table:
    """Hypervolume of what was found by the sampler: all points lie at the budget, so it is how far the best score is above."""
    rows = []
    others = _groups(cells, "random", "model", "budget", "trials", "draw")
    for key, some in _groups(cells, "tuned", "model", "budget", "trials").items():
        pairs = [(one, other) for one in some for other in others.get((*key, one["draw"]), ())]
        volumes = []
        for one, other in pairs:
            least = min(*one["scores"], *other["scores"])
            if max(other["scores"]) > least:  # else random points span no volume
                volumes.append((max(one["scores"]) - least) / (max(other["scores"]) - least))
        if volumes:
            errors = [[cell["error"] for cell in side] for side in zip(*pairs, strict=True)]
            rows.append([*map(str, key), str(len(volumes)), _interval_text(volumes), *map(_error_text, errors)])
    return Table("", ["model", "budget", "points", "seeds", "ratio of hypervolumes", "tuned", "random"], rows)


def _beside_fastnas(cells: Cells) -> Table:
    rows = []
    ours = _groups(cells, "tuned", "model", "budget", "draw")
    for key, some in _groups(cells, "fastnas", "model", "budget", "draw").items():
        named = [(f"tuned, {one['trials']} points", one) for one in ours.get(key, ())]
        named += [(f"FastNAS, {one['calls']} scores", one) for one in some]
        for name, one in named:
            facts = [f"{one['params']:,}", _error_text([one["error"]]), f"{one['passes']:.0f}"]
            rows.append([*map(str, key), name, *facts])
    return Table("", ["model", "budget", "draw", "search", "parameters", "error", "passes"], rows)


def _error_text(errors: Sequence[float]) -> str:
    return f"{statistics.mean(errors):.5f}"


def _interval_text(values: Sequence[float]) -> str:
    """The mean, and of several its 95 % interval."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    mean, low, high = interval(values)
    return f"{mean:.3f} ({low:.3f} to {high:.3f})"
