"""Passwords in the addresses of databases and tracking servers: they are used, and neither shown nor recorded."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from helpers.records import a_record

from mlpreduce import ReductionError
from mlpreduce.budget import COSTS
from mlpreduce.records import Recorder, tracking_uri
from mlpreduce.search.cli import main
from mlpreduce.search.study.storage import folder_of, opened, read_only
from mlpreduce.train.events import Ended, Event, Started
from mlpreduce.train.settings import Run
from mlpreduce.words.addresses import credentials, hidden, quoted, without_credentials

SECRET = "s3cr3t"

ADDRESSES = [
    ("postgresql+psycopg://me:s3cr3t@h/db", "postgresql+psycopg://me:***@h/db"),
    ("postgresql+psycopg://me:p@s3cr3t@h/db", "postgresql+psycopg://me:***@h/db"),
    ("postgresql+psycopg://me:p%40s3cr3t@h/db", "postgresql+psycopg://me:***@h/db"),
    ("postgresql://me:s3/s3cr3t?x#@h:5432/db", "postgresql://me:***@h:5432/db"),
    ("postgresql://me:s3cr3t@[::1]:5432/db", "postgresql://me:***@[::1]:5432/db"),
    ("postgresql://:s3cr3t@h/db", "postgresql://:***@h/db"),
    ("postgresql://me@h/db?password=s3cr3t", "postgresql://me@h/db?password=***"),
    ("mysql://h/db?user=me&passwd=s3cr3t&charset=utf8", "mysql://h/db?user=me&passwd=***&charset=utf8"),
    ("mysql://h/db?SSL_Password=s3cr3t", "mysql://h/db?SSL_Password=***"),
    ("http://me:s3cr3t@h:5000/x?y=a@b", "http://me:***@h:5000/x?y=a@b"),
    ("https://s3cr3t@h", "https://***@h"),
    ("HTTPS://s3cr3t@h/x", "https://***@h/x"),
    ("POSTGRESQL://me:s3cr3t@h/db", "postgresql://me:***@h/db"),
    ("postgresql://me:pa s3cr3t@h/db", "postgresql://me:***@h/db"),
    ("--storage=postgresql://me:pa s3cr3t@h/db", "--storage=postgresql://me:***@h/db"),
    ("postgresql://me:12 s3cr3t@h/db", "postgresql://me:***@h/db"),
    ("http://me:a s3cr3t@h and http://s3cr3t@h2/x", "http://me:***@h and http://***@h2/x"),
    ("mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3Ds3cr3t%3B", "mssql+pyodbc:///?odbc_connect=***"),
    ("s3://bucket/a?X-Amz-Signature=s3cr3t", "s3://bucket/a?X-Amz-Signature=***"),
    ("--storage=postgresql://me:s3cr3t@h/db", "--storage=postgresql://me:***@h/db"),
    ("me:s3cr3t@h/db", "me:***@h/db"),
    ("no connection to 'user=me password=s3cr3t host=h'", "no connection to 'user=me password=*** host=h'"),
]
PLAIN = [
    "sqlite:////home/a@b/optuna.db",
    "postgresql+psycopg://me@host/optuna",
    "mysql://h:3306/db?u=a@b",
    "postgresql://[::1]:5432/db",
    "train.lr=0.1",
    "--resume",
    "http://h:5000",
]


@pytest.mark.parametrize(("text", "shown"), ADDRESSES)
def test_passwords_are_hidden(text: str, shown: str) -> None:
    assert hidden(text) == shown
    assert hidden(shown) == shown


@pytest.mark.parametrize("text", PLAIN)
def test_what_holds_no_password_is_shown_as_it_is(text: str) -> None:
    assert hidden(text) == text


def test_a_password_is_hidden_also_apart_from_its_address() -> None:
    address = "postgresql://me:p%40s3cr3t@h/db"
    assert hidden('no host "s3cr3t@h", tried with p@s3cr3t', address) == 'no host "***@h", tried with ***'
    assert hidden("s3cr3ts of me", address) == "s3cr3ts of me"
    assert hidden("login s3cr3t failed", "mssql:///?odbc_connect=UID%3Dme%3BPWD%3Ds3cr3t%3B") == "login *** failed"
    assert hidden("login pa s3cr3t failed", "postgresql://me:pa s3cr3t@h/db") == "login *** failed"


def test_an_address_is_taken_apart() -> None:
    assert credentials("http://me:p%40w@h:5000/x") == ("me", "p@w")
    assert credentials("HTTP://me:pw@h") == ("me", "pw")
    assert credentials("http://token@h") is None
    assert credentials("postgresql://me:pw@h/db") is None
    assert without_credentials("http://me:p%40w@h:5000/x?y=a@b") == "http://h:5000/x?y=a@b"
    assert quoted("postgresql://me:p@w@h/db") == "postgresql://me:p%40w@h/db"
    assert quoted("postgresql://me:p%40w@h/db") == "postgresql://me:p%40w@h/db"


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+nodriver://me:p@s3cr3t@127.0.0.1:1/db",
        "postgresql+psycopg://me:p@s3cr3t@127.0.0.1:1/db?connect_timeout=2",
        "postgresql+psycopg://me@127.0.0.1:1/db?connect_timeout=2&password=s3cr3t",
        "mssql://me:s3cr3t@127.0.0.1:1/db",
        "me:s3cr3t@h",
        "postgresql://me:s3cr3t@h:port/db",
    ],
)
@pytest.mark.parametrize("use", ["open", "read"])
def test_no_refusal_of_a_storage_has_its_password(
    url: str, use: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("psycopg")
    monkeypatch.chdir(tmp_path)

    def attempt() -> None:
        if use == "read":
            read_only(url)
        else:
            folder_of(url)
            with opened(url, "study"):
                pass

    with pytest.raises(ReductionError, match="storage") as refused:
        attempt()
    error: BaseException | None = refused.value
    while error is not None:  # a traceback shows the causes too
        assert SECRET not in str(error)
        error = error.__cause__


def test_the_command_does_not_repeat_a_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlpreduce.search.driver.run", interrupted)
    assert main(["sharing_width", "--storage", "postgresql://h/db?user=me&password=s3cr3t"]) == 130
    shown = capsys.readouterr().err
    assert "--storage 'postgresql://h/db?user=me&password=***' --resume" in shown


class Server(ThreadingHTTPServer):
    """A tracking server that knows one run, and remembers what it was asked."""

    asked: list[tuple[str, str, str]]  # path, Authorization, body


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            running.asked.append((self.path, self.headers.get("Authorization", ""), body))
            info = {"run_id": "r1", "experiment_id": "7", "status": "RUNNING", "artifact_uri": "mlflow-artifacts:/7/r1"}
            experiment = {"experiment_id": "7", "name": "x", "lifecycle_stage": "active"}
            answer = json.dumps({"run": {"info": info, "data": {}}, "experiment": experiment, "experiment_id": "7"})
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer.encode())

        do_GET = do_POST = do_PUT = do_PATCH = answer

        def log_message(self, *_: Any) -> None:
            pass

    running = Server(("127.0.0.1", 0), Handler)
    running.asked = []
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def a_run(folder: Path) -> Run:
    model = {"name": "vit_tiny_patch16_224", "kwargs": {}}
    data = {"name": "synthetic", "image_size": 16, "classes": 2, "train_samples": 8, "val_samples": 8}
    return Run.model_validate(
        {
            "recipe": "x",
            "variant": "baseline",
            "seed": 1,
            "directory": str(folder),
            "model": model,
            "data": data,
            "train": {"epochs": 1},
        }
    )


def events(run: Run) -> Iterator[Event]:
    facts = {
        "plans": [],
        "profile": dict.fromkeys(COSTS, 1),
        "versions": {},
        "hardware": {},
        "start_digest": None,
        "train_samples": 1,
    }
    for what in (Started(facts), Ended("failed", "stopped here")):
        yield Event(run.variant, run.seed, 1, what)


def test_the_password_of_a_tracking_server_is_used_and_not_recorded(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    host = f"127.0.0.1:{server.server_port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:p%40{SECRET}@{host}")
    for name in ("USERNAME", "PASSWORD"):  # they are put back after the test
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", "other")
    run = a_run(tmp_path / "run")
    recorder = Recorder(tmp_path, {"name": "x"}, [run])
    for event in events(run):
        recorder.handle(event)
    expected = "Basic " + base64.b64encode(f"me:p@{SECRET}".encode()).decode()
    assert {authorization for _, authorization, _ in server.asked} == {expected}
    artifacts = [body for path, _, body in server.asked if path.endswith("/record.json")]
    assert json.loads(artifacts[0])["mlflow_tracking_uri"] == f"http://me:***@{host}"
    assert not any(SECRET in path + body for path, _, body in server.asked)
    assert not any(SECRET in path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert json.loads((tmp_path / "run" / "record.json").read_text())["mlflow_run_id"] == "r1"
    shown = capsys.readouterr()
    assert SECRET not in shown.out + shown.err
    assert tracking_uri(tmp_path) == f"http://me:***@{host}"


def test_a_record_with_a_password_of_before_is_known_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"http://me:{SECRET}@127.0.0.1:{server.server_port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    for name in ("USERNAME", "PASSWORD"):
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", "other")
    run = a_run(tmp_path / "run")
    recorder = Recorder(tmp_path, {"name": "x"}, [run])
    monkeypatch.setattr(recorder._mirror._client, "search_runs", lambda *_: [object()])
    known = a_record(mlflow_run_id="r0", mlflow_tracking_uri=address)
    facts = {"plans": [], "profile": dict.fromkeys(COSTS, 1)}
    assert recorder._mlflow_run(run, facts, known) == "r0"
    assert (
        recorder._mlflow_run(run, facts, known.model_copy(update={"mlflow_tracking_uri": "http://elsewhere"})) == "r1"
    )


@pytest.mark.parametrize("user", [f"me:{SECRET}", SECRET])
def test_a_tracking_server_that_is_not_there(user: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{user}@127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for name in ("TRACKING_USERNAME", "TRACKING_PASSWORD", "SUPPRESS_PRINTING_URL_TO_STDOUT"):
        monkeypatch.setenv(f"MLFLOW_{name}", "true")
    with pytest.raises(
        ReductionError, match=r"MLflow at http://.*\*\*\*@127.0.0.1:1 \(MLFLOW_TRACKING_URI names it\)"
    ) as it:
        Recorder(tmp_path, {"name": "x"}, [])
    assert SECRET not in str(it.value)
    assert it.value.__cause__ is None or SECRET not in str(it.value.__cause__)
