from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from mlpreduce import recipe as recipes
from mlpreduce.errors import ReductionError
from mlpreduce.launch import LaunchSettings, execute
from mlpreduce.recipe.schema import runs as runs_of

# SQLAlchemy about mlflow's own tables
pytestmark = pytest.mark.filterwarnings("ignore:The ..noload.. loader strategy is deprecated:DeprecationWarning")

ROOT = Path(__file__).resolve().parents[1]
MARK = "MLPREDUCE_TEST_MARK"


def environment(mark: str) -> dict[str, str]:
    """That of a user's shell, but never a developer's cluster or tracking server."""
    without = {"RAY_ADDRESS", "MLFLOW_TRACKING_URI"}
    return {**{key: value for key, value in os.environ.items() if key not in without}, MARK: mark}


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


def test_wrong_address_fails_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    runs = runs_of(recipes.load("digits_tiny"), tmp_path)
    with pytest.raises(
        ReductionError, match=r"RAY_ADDRESS='127.0.0.1:1': no Ray cluster answers there.*unset RAY_ADDRESS"
    ):
        execute(runs, LaunchSettings(), print)


def test_no_gpu_is_told_in_process(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    recipe = recipes.load("digits_tiny", ["launch.workers=0"])
    with pytest.raises(ReductionError, match=r"use launch\.device='cpu'"):
        execute(runs_of(recipe, tmp_path), LaunchSettings(workers=0, device="cuda"), print)


def test_interrupt_waits_for_the_record_that_is_being_written(tmp_path: Path) -> None:
    recipe = recipes.load("digits_tiny", ["launch.workers=0", "train.epochs=3", "model.kwargs.depth=2"])
    written = []

    def consume(event: dict[str, Any]) -> None:
        if event["event"] == "epoch":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            written.append(event["epoch"])

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        execute(runs_of(recipe, tmp_path), recipe.launch, consume)
    assert written == [1]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.ray
def test_digits_tiny_on_two_workers(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    mark = uuid.uuid4().hex
    output = tmp_path / "out"
    done = subprocess.run(
        command("digits_tiny", "--output", str(output)),
        cwd=ROOT,
        env=environment(mark),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads((output / "results.json").read_text())
    assert (document["schema"], document["recipe"]) == (1, "digits_tiny")
    client = MlflowClient(tracking_uri=f"sqlite:///{output}/mlflow.db")
    experiment = client.get_experiment_by_name("digits_tiny")
    assert experiment is not None
    mirrored = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    assert len(mirrored) == 4
    for variant in document["variants"].values():
        for run in variant["runs"]:
            assert run["top1"] > 30
            assert mirrored[run["mlflow_run_id"]].info.status == "FINISHED"
            assert mirrored[run["mlflow_run_id"]].data.metrics["final/top1"] == pytest.approx(run["top1"])
    record = records(output)["grouped-42"]
    assert record["hardware"]["workers"] == 2
    assert len(record["epochs"]) == record["epochs_planned"] == 4
    assert record["epochs"][-1]["top1"] * 3.6 == pytest.approx(round(record["epochs"][-1]["top1"] * 3.6), abs=1e-6)
    assert (output / "baseline" / "seed42" / "rng1-4.pt").is_file()  # the second worker's random states
    assert "Traceback" not in done.stdout + done.stderr
    assert "mlflow ui --backend-store-uri sqlite:///" in done.stdout
    assert marked(mark) == {}


@pytest.mark.ray
def test_interrupt_resume_and_a_lost_worker(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    output = tmp_path / "out"
    arguments = ["digits_tiny", "seeds=[42]", "train.epochs=15", "--output", str(output)]
    process = start(mark, *arguments)
    wait_for_epochs(process, output, "grouped-42", 1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to the whole group
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "--resume --output" in stderr
    assert "Traceback" not in stdout + stderr
    deadline = time.monotonic() + 30
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert marked(mark) == {}
    before = records(output)
    assert before["baseline-42"]["status"] == "finished"
    assert before["grouped-42"]["status"] == "interrupted"
    kept = before["grouped-42"]["epochs"]
    assert 1 <= len(kept) < 15

    process = start(mark, *arguments, "--resume")
    wait_for_epochs(process, output, "grouped-42", len(kept) + 1)
    workers = [number for number, line in marked(mark).items() if line.startswith("ray::RayTrainWorker")]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=400)
    assert process.returncode == 0, stderr
    assert "a worker was lost; going on after epoch" in stdout
    after = records(output)
    assert after["baseline-42"] == before["baseline-42"]
    assert after["grouped-42"]["status"] == "finished"
    assert [entry["epoch"] for entry in after["grouped-42"]["epochs"]] == list(range(1, 16))
    assert after["grouped-42"]["epochs"][: len(kept)] == kept
    assert after["grouped-42"]["mlflow_run_id"] == before["grouped-42"]["mlflow_run_id"]
