"""Clusters of simulated nodes with one CPU each, on this machine, with a token."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.launched import (
    ROOT,
    command,
    environment,
    last_state,
    records,
    undisturbed,
    wait_for_epochs,
    without_times,
    workers_of,
)
from helpers.runs import same
from helpers.stores import put_store
from helpers.two_processes import Together

GROUPED = ["seeds=[42]", "train.epochs=5", "variants={grouped=[{transform='grouped', group=2}]}"]
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 32}
# Ray Train waits so long for a worker on a node that was lost before it asks for fewer: 60 s otherwise.
IMPATIENT = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "25"}

# In a process of its own: it installs signal handlers, and Ray remembers the first token it saw.
SCRIPT = """
import sys
from ray.cluster_utils import Cluster

node = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=node)
others = [cluster.add_node(**node) for _ in range(int(sys.argv[1]) - 1)]
cluster.wait_for_nodes()
print(cluster.address, flush=True)
for _ in sys.stdin:
    cluster.remove_node(others.pop(), allow_graceful=False)
    print("done", flush=True)
cluster.shutdown()
"""


class Nodes:
    """The address and mark of a cluster, whose nodes can be lost."""

    def __init__(self, number: int) -> None:
        self.mark = uuid.uuid4().hex
        self._process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(number)],
            env={**environment(self.mark), **TOKEN},
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.address = self._answer()

    def lose_one(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("lose\n")
        self._process.stdin.flush()
        assert self._answer() == "done"

    def end(self) -> None:
        self._process.communicate(timeout=60)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line == "done\n" or line[:1].isdigit():
                return line.strip()
        raise AssertionError("the cluster did not start")


@contextmanager
def cluster_of(number: int) -> Iterator[Nodes]:
    started = Nodes(number)
    try:
        yield started
    finally:
        started.end()


@pytest.fixture
def two_nodes() -> Iterator[Nodes]:
    with cluster_of(2) as started:
        yield started


@pytest.fixture
def three_nodes() -> Iterator[Nodes]:
    """Its own cluster: Ray counts the nodes for an elastic group every 20 s only, and when it is first asked."""
    with cluster_of(3) as started:
        yield started


def start(nodes: Nodes, *arguments: str, token: str = TOKEN["RAY_AUTH_TOKEN"]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("digits_tiny", "--address", nodes.address, *arguments),
        cwd=ROOT,
        env={**environment(uuid.uuid4().hex), **TOKEN, **IMPATIENT, "RAY_AUTH_TOKEN": token},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


# The first, so that its cluster has gone before the next one comes.
@pytest.mark.ray
def test_an_elastic_run_goes_on_without_the_nodes_that_were_lost(three_nodes: Nodes, tmp_path: Path) -> None:
    output = put_store(tmp_path / "out")
    elastic = ["launch.workers=4", "launch.min_workers=1", "launch.max_failures=9"]
    elastic += ["train.epochs=500"]  # more than there is time for
    process = start(three_nodes, *GROUPED, *elastic, "--output", str(output))
    wait_for_epochs(process, output, "grouped-42", 2)
    three_nodes.lose_one()
    three_nodes.lose_one()
    deadline = time.monotonic() + 300
    while records(output)["grouped-42"]["epochs"][-1]["workers"] != 1:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    epochs = records(output)["grouped-42"]["epochs"]
    assert [entry["epoch"] for entry in epochs] == list(range(1, len(epochs) + 1))
    assert [entry["workers"] for entry in epochs] == sorted((entry["workers"] for entry in epochs), reverse=True)
    assert {entry["workers"] for entry in epochs} == {1, 2}
    assert "3 workers were started and 2 of them train: 3 cannot share a batch evenly" in stdout
    assert "was written by 2 worker(s), and 1 go on" in stdout


@pytest.mark.ray
def test_two_nodes_give_the_bits_of_one_and_let_in_who_has_the_token(
    together: Together, two_nodes: Nodes, tmp_path: Path
) -> None:
    output = put_store(tmp_path / "out")
    whole = undisturbed(together, tmp_path / "whole", *GROUPED)
    process = start(two_nodes, *GROUPED, "--output", str(output))
    wait_for_epochs(process, output, "grouped-42", 1)
    workers = workers_of(two_nodes.mark)
    assert len({parent(worker) for worker in workers}) == len(workers) == 2  # each node has a raylet of its own
    stranger = start(two_nodes, *GROUPED, "--output", str(tmp_path / "stranger"), token="1" * 32)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert "Traceback" not in stdout + stderr
    same(last_state(output / "grouped" / "seed42"), last_state(whole))
    assert without_times(records(output)["grouped-42"]["epochs"]) == last_state(whole)["history"]
    _, stderr = stranger.communicate(timeout=120)
    assert stranger.returncode == 2, stderr
    assert "does not let this process in" in stderr
    assert "RAY_AUTH_TOKEN" in stderr


def test_the_cluster_file_in_the_docs_is_one() -> None:
    import yaml
    from ray.autoscaler._private.util import prepare_config, validate_config

    block = re.search(r"```yaml\n(.*?)```", (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    document = yaml.safe_load(block[1])
    validate_config(prepare_config(document))
    assert document["max_workers"] == len(document["provider"]["worker_ips"])
