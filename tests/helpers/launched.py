"""Recipes in processes of their own, as a user starts them, and what they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from helpers.runs import TIMES
from helpers.two_processes import Together
from mlpreduce import recipe as recipes
from mlpreduce.recipe.schema import runs as runs_of
from mlpreduce.train import Run, Runtime, fit

ROOT = Path(__file__).resolve().parents[2]
MARK = "MLPREDUCE_TEST_MARK"


def environment(mark: str) -> dict[str, str]:
    """That of a user's shell, but never a developer's cluster or tracking server."""
    without = {"RAY_ADDRESS", "MLFLOW_TRACKING_URI"}
    kept = {key: value for key, value in os.environ.items() if key not in without}
    told = {
        "PYTHONFAULTHANDLER": "1",
        "PYTHONUNBUFFERED": "1",
    }  # a crash would leave no word, a kill no line that waits
    return {**kept, MARK: mark, **told}


def marked(mark: str) -> dict[int, str]:
    """Ids and command lines of all processes that were started with this mark in their environment."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (path / "environ").read_bytes():
                found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it ended meanwhile
            continue
    return found


def start(mark: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        env=environment(mark),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_epochs(process: subprocess.Popen[str], output: Path, run: str, count: int) -> None:
    deadline = time.monotonic() + 300
    while len(records(output).get(run, {}).get("epochs", [])) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "mlpreduce.recipe", *arguments]


def records(output: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in output.glob("*/seed*/record.json")]
    return {f"{record['variant']}-{record['seed']}": record for record in found}


def workers_of(mark: str) -> list[int]:
    return [number for number, line in marked(mark).items() if line.startswith("ray::RayTrainWorker")]


def without_times(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in entry.items() if name not in TIMES} for entry in history]


def last_state(run: Path) -> dict[str, Any]:
    """What the last checkpoint of a run holds, but for times and speeds."""
    epoch = max(int(path.name) for path in (run / "checkpoints").glob("[0-9]*"))
    state: dict[str, Any] = torch.load(run / "checkpoints" / str(epoch) / "state.pt", weights_only=True)
    del state["facts"]
    return {**state, "history": without_times(state["history"])}


def _fit_beside(rank: int, run: str) -> None:
    fit(Run.model_validate_json(run), Runtime(rank=rank, world=2, threads=1))


def undisturbed(together: Together, folder: Path, *overrides: str) -> Path:
    """The directory of the last run of digits_tiny, trained by two plain processes, without Ray."""
    folder.mkdir()
    run = runs_of(recipes.load("digits_tiny", [*overrides]), folder)[-1]
    together(_fit_beside, run.model_dump_json())
    return Path(run.directory)
