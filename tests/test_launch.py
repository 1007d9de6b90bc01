from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import optuna
import pytest
import sqlalchemy
import torch
import torch.distributed as dist
from helpers.launched import (
    ROOT,
    last_state,
    marked,
    records,
    start,
    undisturbed,
    wait_for_epochs,
    without_times,
    workers_of,
)
from helpers.runs import same
from helpers.stores import put_store
from helpers.two_processes import Together

from mlpreduce import recipe as recipes
from mlpreduce.errors import ReductionError
from mlpreduce.launch import LaunchSettings, execute, pool, team
from mlpreduce.launch.interrupts import Shield, interrupts
from mlpreduce.launch.locks import drive, work
from mlpreduce.launch.sharing import check_sharing, regroup, sharers
from mlpreduce.recipe.schema import runs as runs_of
from mlpreduce.train.events import EpochEnded, Event
from mlpreduce.train.settings import Run, TrainSettings

# SQLAlchemy about mlflow's own tables
pytestmark = pytest.mark.filterwarnings("ignore:The ..noload.. loader strategy is deprecated:DeprecationWarning")

EPOCHS = 12
SETTINGS = ["seeds=[42]", f"train.epochs={EPOCHS}", "model.kwargs.depth=2", "model.kwargs.embed_dim=16"]


@pytest.fixture(scope="module")
def whole(together: Together, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return undisturbed(together, tmp_path_factory.mktemp("undisturbed") / "out", *SETTINGS)


def test_wrong_address_fails_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    runs = runs_of(recipes.load("digits_tiny"), tmp_path)
    with pytest.raises(
        ReductionError, match=r"RAY_ADDRESS='127.0.0.1:1': no Ray cluster answers there.*unset RAY_ADDRESS"
    ):
        execute(runs, LaunchSettings(), print)


def test_the_address_overrides_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.255.255.1:6379")
    assert recipes.main(["digits_tiny", "--address", "127.0.0.1:1", "--output", str(tmp_path / "out")]) == 2
    assert "RAY_ADDRESS='127.0.0.1:1': no Ray cluster answers there" in capsys.readouterr().err
    assert recipes.main(["digits_tiny", "launch.workers=0", "--address", "127.0.0.1:1", "--output", str(tmp_path)]) == 2
    assert "launch.workers=0 trains in this process" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["s3://bucket/runs", "gs://bucket/runs"])
def test_object_stores_are_refused(output: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert recipes.main(["digits_tiny", "launch.workers=0", "--output", output]) == 2
    told = capsys.readouterr().err
    assert f"--output {output}: object stores are not supported" in told
    assert "storage that all machines see" in told


def run_of(workers: int, accum_steps: int = 1) -> Run:
    train = TrainSettings(batch_size=96, accum_steps=accum_steps)
    return Run(recipe="any", variant="baseline", train=train, workers=workers, directory="/any")


def test_the_most_workers_that_share_a_batch() -> None:
    assert [sharers(run_of(8), world) for world in range(1, 9)] == [1, 2, 2, 4, 4, 4, 4, 8]
    assert [sharers(run_of(4, 3), world) for world in range(1, 5)] == [1, 2, 3, 4]


def test_elastic_numbers_that_cannot_be_kept_are_refused(tmp_path: Path) -> None:
    check_sharing(run_of(8), 4, 8)
    check_sharing(run_of(4, 3), 3, 4)
    with pytest.raises(ReductionError, match=r"of 6 or 7 workers, .*only 4 .*8 micro-batches.*min_workers=4,"):
        check_sharing(run_of(8), 6, 8)
    recipe = recipes.load("digits_tiny", ["launch.min_workers=3"])
    with pytest.raises(ReductionError, match=r"launch\.min_workers=3: more than launch\.workers=2"):
        execute(runs_of(recipe, tmp_path), recipe.launch, print)


def _join_team(rank: int, folder: str) -> None:
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=3)
    member = regroup(rank, 3, 2, "gloo")
    assert member == (rank < 2)
    if member:
        total = torch.tensor([rank + 1.0])
        dist.all_reduce(total)
        assert (dist.get_world_size(), total.item()) == (2, 3.0)
    assert dist.is_initialized() == member
    if member:
        dist.destroy_process_group()  # a process that ends with its group's threads running may be aborted


@pytest.mark.processes
def test_workers_beyond_those_that_share_a_batch_leave_the_group(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_join_team, args=(str(tmp_path),), nprocs=3)


HOLD = """
import sys
from mlpreduce.launch.locks import drive, work
directory, rank, text = sys.argv[1], int(sys.argv[2]), sys.argv[3]
with drive([directory]) if rank < 0 else work(directory, rank, text):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(directory: Path, rank: int, text: str = "") -> subprocess.Popen[str]:
    """Another process that holds a run: as its driver (rank -1) or as a worker."""
    arguments = [sys.executable, "-c", HOLD, str(directory), str(rank), text]
    process = subprocess.Popen(arguments, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.processes
def test_a_run_has_one_driver(tmp_path: Path) -> None:
    recipe = recipes.load("digits_tiny", ["launch.workers=0", "seeds=[42]"])
    runs = runs_of(recipe, tmp_path)
    with holder(Path(runs[1].directory), -1) as other:
        told = rf"grouped/seed42/\.lock: process {other.pid} on {socket.gethostname()}, .*trains this run"
        with pytest.raises(ReductionError, match=told):
            execute(runs, recipe.launch, print)
        other.kill()
    with drive([run.directory for run in runs], patience=0):
        pass


@pytest.mark.processes
def test_a_driver_waits_for_the_workers_of_one_that_was_killed(tmp_path: Path) -> None:
    with drive([str(tmp_path)]) as text:
        orphan = holder(tmp_path, 1, text)
    with orphan:
        with pytest.raises(
            ReductionError, match=r"after 0 s, workers of process \d+ on .* still train this run; end them"
        ):
            take_over(tmp_path)
        orphan.kill()
    take_over(tmp_path)


def take_over(directory: Path) -> None:
    with drive([str(directory)], patience=0):
        pass


@pytest.mark.processes
def test_a_worker_waits_for_the_one_of_a_lost_group(tmp_path: Path) -> None:
    with drive([str(tmp_path)]) as text:
        pass
    with holder(tmp_path, 0, text) as orphan:
        with work(str(tmp_path), 1, text, patience=0):
            pass
        with (
            pytest.raises(TimeoutError, match="worker 0 of the group before"),
            work(str(tmp_path), 0, text, patience=0),
        ):
            pass
        orphan.kill()
        with work(str(tmp_path), 0, text, patience=10):
            pass


def test_storage_that_is_not_shared_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlpreduce.launch.locks._SHOWN_WITHIN", 0)
    with drive([str(tmp_path / "here")]) as text:
        pass
    for directory in (tmp_path / "there", tmp_path):
        with (
            pytest.raises(ReductionError, match="must lie on storage that all machines share"),
            work(str(directory), 0, text),
        ):
            pass
    with (
        pytest.raises(ReductionError, match="does not see what the driver wrote"),
        work(str(tmp_path / "here"), 0, "older"),
    ):
        pass


def test_no_gpu_is_told_in_process(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    recipe = recipes.load("digits_tiny", ["launch.workers=0"])
    with pytest.raises(ReductionError, match=r"use launch\.device='cpu'"):
        execute(runs_of(recipe, tmp_path), LaunchSettings(workers=0, device="cuda"), print)


def test_interrupt_waits_for_the_record_that_is_being_written(tmp_path: Path) -> None:
    recipe = recipes.load("digits_tiny", ["launch.workers=0", "train.epochs=3", "model.kwargs.depth=2"])
    written = []

    def consume(event: Event) -> None:
        if isinstance(event.what, EpochEnded):
            signal.raise_signal(signal.SIGINT)
            written.append(event.what.entry["epoch"])

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        execute(runs_of(recipe, tmp_path), recipe.launch, consume)
    assert written == [1]
    assert signal.getsignal(signal.SIGINT) is before


def test_who_interrupts_again_waits_no_longer_and_then_lets_the_workers_end() -> None:
    told = []

    def twice(shield: Shield) -> None:
        with shield():
            for word in ("waits", "never"):
                signal.raise_signal(signal.SIGINT)
                told.append(word)

    with interrupts() as shield:
        with pytest.raises(KeyboardInterrupt):
            twice(shield)
        signal.raise_signal(signal.SIGINT)  # the workers are being ended
        with shield():
            told.append("kept")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert told == ["waits", "kept"]


@pytest.mark.parametrize(("raised", "expected"), [(ValueError, KeyboardInterrupt), (ReductionError, ReductionError)])
def test_an_interrupt_is_told_also_where_the_block_raises(
    raised: type[Exception], expected: type[BaseException]
) -> None:
    def interrupted(shield: Shield) -> None:
        with shield():
            signal.raise_signal(signal.SIGINT)
            raise raised("what the block came to")

    with interrupts() as shield:
        with pytest.raises(expected):
            interrupted(shield)
        with shield():
            pass  # and is not told again


class Keeper:
    """An owner whose storage is interrupted inside a write."""

    def __init__(self, place: Path) -> None:
        storage = optuna.storages.RDBStorage(f"sqlite:///{place}/optuna.db", {"connect_args": {"timeout": 1}})
        self.study = optuna.create_study(storage=storage)
        sqlalchemy.event.listen(
            storage.engine, "commit", lambda connection: signal.raise_signal(signal.SIGINT), once=True
        )

    def keep(self, name: str) -> None:
        self.study.set_user_attr(name, True)

    def kept(self) -> set[str]:
        return set(self.study.user_attrs)

    def close(self) -> None:
        self.study.set_user_attr("closed", True)


@pytest.mark.parametrize("kind", ["pool", "team"])
def test_an_owner_that_is_interrupted_inside_a_write_goes_on(kind: str, tmp_path: Path) -> None:
    found: list[Keeper] = []

    def owner() -> Keeper:
        found.append(Keeper(tmp_path))
        return found[0]

    blocks = {
        "pool": pool(0, owner, (), print, directories=[str(tmp_path)], launch=LaunchSettings(workers=0)),
        "team": team(0, owner, print, directories=[str(tmp_path)]),
    }
    with blocks[kind] as workers:
        with pytest.raises(KeyboardInterrupt):
            workers.call("keep", "first")
        workers.call("keep", "second")  # told once only, and nothing is locked
        assert workers.call("kept") == {"first", "second"}
    assert found[0].kept() == {"first", "second", "closed"}


@pytest.mark.ray
def test_a_recipe_outlives_an_interrupt_a_worker_and_its_driver(tmp_path: Path, whole: Path) -> None:
    """One run of a recipe, which ends with the bits of one that nothing happened to."""
    marks = [uuid.uuid4().hex for _ in range(3)]
    output = put_store(tmp_path / "out")
    run = output / "grouped" / "seed42"
    arguments = ["digits_tiny", *SETTINGS, "--output", str(output)]

    process = start(marks[0], *arguments)
    wait_for_epochs(process, output, "grouped-42", 1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to the whole group
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "--resume --output" in stderr
    assert "Traceback" not in stdout + stderr
    deadline = time.monotonic() + 30
    while marked(marks[0]) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert marked(marks[0]) == {}
    before = records(output)
    assert before["baseline-42"]["status"] == "finished"
    assert before["grouped-42"]["status"] == "interrupted"
    kept = before["grouped-42"]["epochs"]
    assert 1 <= len(kept) < EPOCHS

    process = start(marks[1], *arguments, "--resume")
    wait_for_epochs(process, output, "grouped-42", len(kept) + 1)
    workers = workers_of(marks[1])
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    printed = read_until(process, "the workers were started again; going on after epoch")
    wait_for_epochs(process, output, "grouped-42", len(records(output)["grouped-42"]["epochs"]) + 1)
    orphan = holder(run, 5, (run / ".lock").read_text())  # stands for a worker that does not notice that Ray is gone
    process.kill()  # that process alone
    stdout, stderr = process.communicate()
    assert "Traceback" not in printed + stdout + stderr
    lost = records(output)["grouped-42"]
    assert lost["status"] == "running"
    assert lost["epochs"][: len(kept)] == kept

    process = start(marks[2], *arguments, "--resume")
    printed = read_until(process, "2 variants x 1 seeds")
    time.sleep(3)  # in which it must not start Ray
    assert workers_of(marks[1]) == []
    assert process.poll() is None
    assert not any(line.startswith("ray::") for line in marked(marks[2]).values())  # it waits before it starts Ray
    with orphan:
        orphan.kill()
    stdout, stderr = process.communicate(timeout=400)
    assert process.returncode == 0, stderr
    assert "Traceback" not in printed + stdout + stderr
    assert "going on after epoch" in stdout
    after = records(output)
    assert after["baseline-42"] == before["baseline-42"]
    assert after["grouped-42"]["status"] == "finished"
    assert [entry["epoch"] for entry in after["grouped-42"]["epochs"]] == list(range(1, EPOCHS + 1))
    assert after["grouped-42"]["epochs"][: len(kept)] == kept
    assert after["grouped-42"]["mlflow_run_id"] == before["grouped-42"]["mlflow_run_id"]
    same(last_state(run), last_state(whole))
    assert without_times(after["grouped-42"]["epochs"]) == last_state(whole)["history"]
    assert not list(output.rglob(".ray*"))
    assert_complete(output)
    assert "mlflow ui --backend-store-uri sqlite:///" in stdout
    assert marked(marks[2]) == {}


def read_until(process: subprocess.Popen[str], words: str) -> str:
    """What a process prints, up to the line that has these words."""
    assert process.stdout is not None
    printed = b""
    deadline = time.monotonic() + 120
    while not printed.endswith(b"\n") or words not in printed.decode().splitlines()[-1]:
        one = os.read(process.stdout.fileno(), 1)  # a buffer would keep what follows from `communicate`
        assert one, process.communicate()
        printed += one
        assert time.monotonic() < deadline
    return printed.decode()


def assert_complete(output: Path) -> None:
    """Assert that a run of digits_tiny by two workers has left what it should."""
    from mlflow import MlflowClient

    document = json.loads((output / "results.json").read_text())
    assert (document["schema"], document["recipe"]) == (1, "digits_tiny")
    client = MlflowClient(tracking_uri=f"sqlite:///{output}/mlflow.db")
    experiment = client.get_experiment_by_name("digits_tiny")
    assert experiment is not None
    mirrored = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    assert len(mirrored) == 2
    for variant in document["variants"].values():
        for run in variant["runs"]:
            assert run["top1"] > 30
            assert mirrored[run["mlflow_run_id"]].info.status == "FINISHED"
            assert mirrored[run["mlflow_run_id"]].data.metrics["final/top1"] == pytest.approx(run["top1"])
    record = records(output)["grouped-42"]
    assert record["hardware"]["workers"] == 2
    assert len(record["epochs"]) == record["epochs_planned"] == EPOCHS
    assert record["epochs"][-1]["top1"] * 3.6 == pytest.approx(round(record["epochs"][-1]["top1"] * 3.6), abs=1e-6)
    state = output / "baseline" / "seed42" / "checkpoints" / str(EPOCHS)
    assert (state / "rng1.pt").is_file()  # the second worker's random states
