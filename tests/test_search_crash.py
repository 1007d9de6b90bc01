"""Studies whose processes are killed, and drivers that meet: nothing is lost, left running, or done twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from helpers.stores import put_store
from mlflow import MlflowClient
from optuna.trial import TrialState

pytestmark = [
    # SQLAlchemy about mlflow's own tables
    pytest.mark.filterwarnings("ignore:The ..noload.. loader strategy is deprecated:DeprecationWarning"),
    pytest.mark.slow,
]

ROOT = Path(__file__).resolve().parents[1]
MARK = "MLPREDUCE_TEST_MARK"
SMALL = ("model.kwargs.depth=4", "model.kwargs.embed_dim=16", "train.epochs=4", "train.warmup_epochs=0")
TRIALS = 5
SETTINGS = ("sharing_width", *SMALL, "--recipe", "digits_tiny", "--trials", str(TRIALS))
MORE = ("--seeds", "1", "--pruner", "none", "--references", "baseline")


class Drivers:
    """Drivers of one study, as a user starts them, and what they leave; with workers of Ray, or none."""

    def __init__(self, mark: str, folder: Path, storage: str | None, workers: int = 0) -> None:
        self.mark, self.folder, self.storage, self.workers = mark, folder, storage, workers
        self.url = storage or f"sqlite:///{folder}/one/optuna.db"

    def start(self, output: str, *more: str) -> subprocess.Popen[str]:
        """Output goes to files: a full pipe would stop a driver."""
        storage = () if self.storage is None else ("--storage", self.storage)
        without = {"RAY_ADDRESS", "MLFLOW_TRACKING_URI"}
        environment = {key: value for key, value in os.environ.items() if key not in without}
        arguments = [
            *SETTINGS,
            *MORE,
            "--workers",
            str(self.workers),
            *storage,
            *more,
            "--study",
            "any",
            "--output",
            str(self.folder / output),
        ]
        with (self.folder / f"log-{output}-{uuid.uuid4().hex[:4]}").open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "mlpreduce.search", *arguments],
                cwd=ROOT,
                env={**environment, MARK: self.mark, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("log-*")))

    def processes(self, name: str = "") -> list[int]:
        """Ids of all processes that these drivers started, whose command line begins so."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                ours = f"{MARK}={self.mark}".encode() in (path / "environ").read_bytes()
                if ours and (path / "cmdline").read_bytes().startswith(name.encode()):
                    found.append(int(path.name))
            except OSError:  # it ended meanwhile
                continue
        return found

    def trials(self) -> list[optuna.trial.FrozenTrial]:
        try:
            storage = optuna.storages.RDBStorage(self.url)
        except optuna.exceptions.StorageInternalError:  # its tables are being made
            return []
        try:
            return optuna.load_study(study_name="any", storage=storage).get_trials()
        except (KeyError, optuna.exceptions.StorageInternalError):  # not there yet
            return []
        finally:
            storage.remove_session()
            storage.engine.dispose()

    def wait(self, ready: Callable[[], object], *running: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + 240
        while not ready():
            assert all(process.poll() is None for process in running), self.logs()
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.1)

    def count(self, state: TrialState) -> int:
        return sum(trial.state is state for trial in self.trials())


@pytest.fixture
def mark() -> Iterator[str]:
    mark = uuid.uuid4().hex
    yield mark
    for number in Drivers(mark, Path(), None).processes():
        os.kill(number, signal.SIGKILL)


def settled(drivers: Drivers) -> dict[str, dict[str, Any]]:
    """The values and records of all trials that have ended well, by point."""
    found = {}
    for trial in drivers.trials():
        if trial.state is TrialState.COMPLETE and "reference" not in trial.user_attrs:
            found[trial.user_attrs["key"]] = {"number": trial.number, "values": trial.values}
    return found


def two_begin(drivers: Drivers, other: str) -> tuple[subprocess.Popen[str], str]:
    """Start two in the same second: one gets the study, the other is refused and changes nothing.

    Returns:
        The one that goes on, and its output.
    """
    for output in {"one", other}:
        put_store(drivers.folder / output)
    pair = [drivers.start("one", "--resume"), drivers.start(other, "--resume")]
    drivers.wait(lambda: any(process.poll() is not None for process in pair))
    (first,) = [process for process in pair if process.poll() is None]
    (refused,) = [process for process in pair if process is not first]
    assert refused.returncode == 2, drivers.logs()
    assert drivers.logs().count("error:") == 1
    assert "wait for it or end it, or give another " in drivers.logs()
    return first, "one" if first is pair[0] else other


def lose_a_worker(drivers: Drivers, first: subprocess.Popen[str]) -> None:
    drivers.wait(lambda: drivers.count(TrialState.COMPLETE) >= 1 and drivers.processes("ray::_task"), first)
    drivers.wait(lambda: drivers.count(TrialState.RUNNING) == 2 and drivers.processes("ray::_task"), first)
    os.kill(drivers.processes("ray::_task")[0], signal.SIGKILL)
    drivers.wait(lambda: drivers.count(TrialState.FAIL) >= 1, first)
    lost = [trial for trial in drivers.trials() if trial.user_attrs.get("why") == "lost"]
    assert len(lost) == 1


def lose_the_driver_and_go_on(drivers: Drivers, first: subprocess.Popen[str], kept: str, lost: int) -> None:
    """Kill the driver and start another, which ends the study: what was being trained is lost beside the `lost` ones."""
    at_once = max(1, drivers.workers)
    drivers.wait(lambda: len(settled(drivers)) >= 2 and drivers.count(TrialState.RUNNING) == at_once, first)
    os.kill(first.pid, signal.SIGKILL)
    first.wait(timeout=30)
    before = settled(drivers)
    assert len(before) < TRIALS

    again = drivers.start(kept, "--resume")
    assert again.wait(timeout=240) == 0, drivers.logs()
    trials, after = drivers.trials(), settled(drivers)
    assert not [trial for trial in trials if not trial.state.is_finished() and trial.state is not TrialState.WAITING]
    assert {key: after[key] for key in before} == before
    trained = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    keys = [trial.user_attrs["key"] for trial in trained if "reference" not in trial.user_attrs]
    assert len(keys) == len(set(keys)) == TRIALS
    document = json.loads((drivers.folder / kept / "study.json").read_text())
    assert document["counts"]["trained"] == TRIALS
    assert document["counts"]["lost"] >= lost + at_once
    # what was being trained went on from its last epoch, and its retries are the points that were lost
    asked = {trial.number: trial.user_attrs["key"] for trial in trials if "key" in trial.user_attrs}
    for trial in trials:
        if "retry_of" in trial.user_attrs and "key" in trial.user_attrs:
            assert trial.user_attrs["key"] == asked[trial.user_attrs["retry_of"]]
    # every run is in MLflow once, and has ended
    client = MlflowClient(f"sqlite:///{drivers.folder}/{kept}/mlflow.db")
    (experiment,) = [one for one in client.search_experiments() if one.name == "mlpreduce search"]
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    nested = [run.data.tags["mlflow.runName"] for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert len(nested) == len(set(nested)) == TRIALS + 1
    drivers.wait(lambda: not drivers.processes())


@pytest.mark.ray
def test_killed_and_resumed(tmp_path: Path, mark: str) -> None:
    drivers = Drivers(mark, tmp_path, None, workers=2)
    first, kept = two_begin(drivers, other="one")
    lose_a_worker(drivers, first)
    lose_the_driver_and_go_on(drivers, first, kept, lost=1)


@pytest.fixture
def postgres() -> Iterator[str]:
    """The URL of a database of a server that ends with the test.

    Its files lie beside pytest's folders: those are made private each time another process of the tests takes one.
    """
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found and shutil.which("initdb") is None:
        pytest.skip("there is no PostgreSQL server: apt-get install postgresql")
    programs = found[-1].parent if found else Path(str(shutil.which("initdb"))).parent
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    person: list[str] = []
    if os.geteuid() == 0:  # the server refuses to be run by root
        person = ["runuser", "-u", "postgres", "--"]
        shutil.chown(folder, "postgres")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def call(program: str, *arguments: str) -> None:
        subprocess.run([*person, str(programs / program), *arguments], check=True, cwd="/", stdout=subprocess.DEVNULL)

    call("initdb", "-D", str(folder / "data"), "-A", "trust", "-U", "me")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories="
    call("pg_ctl", "-D", str(folder / "data"), "-l", str(folder / "log"), "-o", options, "-w", "start")
    try:
        yield f"postgresql+psycopg://me@127.0.0.1:{port}/postgres"
    finally:
        call("pg_ctl", "-D", str(folder / "data"), "-m", "immediate", "stop")
        shutil.rmtree(folder)


@pytest.mark.postgres
def test_killed_and_resumed_on_postgresql(tmp_path: Path, mark: str, postgres: str) -> None:
    """The database says who has the study, so a second output does not make a second study. That needs no worker of Ray."""
    drivers = Drivers(mark, tmp_path, postgres)
    first, kept = two_begin(drivers, other="two")
    lose_the_driver_and_go_on(drivers, first, kept, lost=0)
