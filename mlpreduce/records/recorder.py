"""Keeps the records of a recipe's runs, and their mirror in MLflow."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from mlpreduce.addresses import credentials, hidden, quoted, without_credentials
from mlpreduce.errors import ReductionError
from mlpreduce.extras import require
from mlpreduce.records.files import SCHEMA, read, store
from mlpreduce.records.summaries import COUNTS, summary
from mlpreduce.train.settings import DENSITY_THRESHOLDS, Run
from mlpreduce.values import flatten

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["Recorder", "tracking_uri"]

_ENDED = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED", "stopped": "FINISHED"}
_METRICS = ("train_loss", "val_loss", "top1", "top5", "raw_val_loss", "raw_top1", "raw_top5", "lr", "images_per_s")


def tracking_uri(directory: Path) -> str:
    """Where MLflow keeps the runs: MLFLOW_TRACKING_URI, or a SQLite file in the output directory. Passwords are hidden."""
    return hidden(_tracking_address(directory))


def _tracking_address(directory: Path) -> str:
    """The same with its passwords, for the client alone: it is neither shown nor recorded."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{directory.resolve()}/mlflow.db"


class Recorder:
    """Keeps the records of a recipe's runs, and their mirror in MLflow.

    Args:
        directory: output directory of the recipe.
        recipe: the resolved recipe, as JSON-like data; its "name" names the MLflow experiment.
        runs: all runs of the recipe, in order.
        home: directory of MLflow's store, unless MLFLOW_TRACKING_URI names another; by default that of the recipe.
        experiment: the MLflow experiment; by default the recipe's name.
    """

    def __init__(
        self,
        directory: Path,
        recipe: dict[str, Any],
        runs: list[Run],
        *,
        home: Path | None = None,
        experiment: str | None = None,
    ) -> None:
        self._recipe = recipe
        self._tags: dict[tuple[str, int], dict[str, str]] = {}
        self._parent: str | None = None
        self._runs = {(run.variant, run.seed): run for run in runs}
        self._order = {key: number for number, key in enumerate(self._runs)}
        self._records = {(record["variant"], record["seed"]): record for record in read(directory)}
        self._started: set[tuple[str, int]] = set()
        home = home or directory
        self._uri = tracking_uri(home)
        self._client, self._experiment = _connected(home, experiment or recipe["name"])

    def nest(self, name: str, settings: dict[str, Any], known: str | None = None) -> str:
        """Let all runs that begin from now on be nested in one of their own.

        Args:
            name: of the parent run.
            settings: logged as its parameters.
            known: the parent run of an earlier process.

        Returns:
            The id of the parent run.
        """
        if known and self._client.search_runs([self._experiment], f"attributes.run_id = '{known}'"):
            self._client.update_run(known, status="RUNNING")
            self._parent = known
        else:
            self._parent = str(self._client.create_run(self._experiment, run_name=name).info.run_id)
            self._log_params(self._parent, flatten(settings))
        return self._parent

    def close(self, metrics: dict[str, float], files: list[Path], *, whole: bool) -> None:
        """End the parent run, with what the study came to."""
        if self._parent is None:
            return
        self._log_metrics(self._parent, metrics)
        for path in files:
            self._client.log_artifact(self._parent, str(path))
        self._client.set_terminated(self._parent, "FINISHED" if whole else "KILLED")

    def add(self, run: Run, tags: dict[str, str]) -> None:
        """Expect one more run, after those that are known; `tags` are those of its MLflow run."""
        key = (run.variant, run.seed)
        self._runs[key] = run
        before = [*self._order.values(), *(record["order"] for record in self._records.values())]
        known = self._records.get(key, {}).get("order")
        self._order.setdefault(key, 1 + max(before, default=-1) if known is None else known)
        self._tags[key] = tags

    def record(self, variant: str, seed: int) -> dict[str, Any] | None:
        """The record of a run, if it has begun."""
        return self._records.get((variant, seed))

    def facts(self) -> dict[str, Any] | None:
        """Versions and hardware of the runs, as the last of them has recorded them."""
        last = next(reversed(self._records.values()), None)
        return None if last is None else {key: last[key] for key in ("versions", "hardware")}

    def stopped(self, run: Run, message: str) -> None:
        """Mark a run that was ended before its last epoch, on purpose; it could be gone on with."""
        if self._records.get((run.variant, run.seed), {}).get("status") == "running":
            self._end((run.variant, run.seed), "stopped", message)

    def finished(self, run: Run) -> bool:
        """Whether a run has been trained to its end."""
        return self._records.get((run.variant, run.seed), {}).get("status") == "finished"

    def handle(self, event: dict[str, Any]) -> None:
        """Record an event of `mlpreduce.train.fit`."""
        key = (event["variant"], event["seed"])
        if event["event"] == "start":
            self._start(key, event)
        elif event["event"] == "epoch":
            entry = {name: value for name, value in event.items() if name not in ("event", "variant", "seed", "epochs")}
            self._add(self._records[key], entry)
            self._store(key)
        elif event["event"] == "end":
            self._end(key, event["status"], event.get("message", ""))

    def interrupt(self) -> None:
        """Mark the run that was being trained, if any: it can be resumed."""
        for key in self._started:  # another process may train others
            if self._records[key]["status"] == "running":
                self._end(key, "interrupted", "")

    def _start(self, key: tuple[str, int], event: dict[str, Any]) -> None:
        run = self._runs[key]
        self._started.add(key)
        record = self._records.get(key, {})
        facts = event["facts"]
        self._check_start(run, facts)
        mlflow_run = self._mlflow_run(run, facts, record)
        # The checkpoint decides what has been trained: it may be an epoch ahead of the record, if the driver was killed.
        # A new MLflow run gets all epochs again.
        same = mlflow_run == record.get("mlflow_run_id")
        known = record["epochs"][: len(event["history"])] if same else []
        record = {
            "schema": SCHEMA,
            "recipe": self._recipe,
            "variant": run.variant,
            "steps": [dict(step) for step in run.steps],
            "seed": run.seed,
            "order": self._order[key],
            "config_hash": run.config_hash,
            "status": "running",
            "message": "",
            "notes": [*record.get("notes", []), *event.get("notes", [])],
            "started": record.get("started", time.strftime("%Y-%m-%dT%H:%M:%S%z")),
            "epochs_planned": event["epochs"],
            **facts,
            "plans": [json.loads(plan) for plan in facts["plans"]],
            "mlflow_tracking_uri": self._uri,
            "mlflow_run_id": mlflow_run,
            "epochs": known,
        }
        self._records[key] = record
        for entry in event["history"][len(known) :]:
            self._add(record, entry)
        self._store(key)

    def _check_start(self, run: Run, facts: dict[str, Any]) -> None:
        """Whether all variants of a seed start from the same given weights.

        Raises:
            ReductionError: the weights have changed since another variant began.
        """
        for (variant, seed), other in self._records.items():
            before, now = other.get("start_digest"), facts.get("start_digest")
            if seed == run.seed and before != now and None not in (before, now):
                raise ReductionError(
                    f"train({run.label}): model.weights={run.model.weights!r} are no longer those that variant {variant} began "
                    f"with (digest {before}, now {now}); put those back, or start in another --output"
                )

    def _add(self, record: dict[str, Any], entry: dict[str, Any]) -> None:
        record["epochs"].append(entry)
        values = {name: entry[name] for name in _METRICS} | _probed(entry.get("probes", {}))
        self._log_metrics(record["mlflow_run_id"], values, step=entry["epoch"])

    def _end(self, key: tuple[str, int], status: str, message: str) -> None:
        record = self._records[key]
        record.update(status=status, message=message)
        self._store(key)
        run_id = record["mlflow_run_id"]
        if status == "finished":
            known = {f"final/{name}": float(value) for name, value in summary(record).items() if value is not None}
            self._log_metrics(run_id, known)
        self._client.log_dict(run_id, record, "record.json")
        self._client.set_terminated(run_id, _ENDED[status])

    def _store(self, key: tuple[str, int]) -> None:
        store(Path(self._runs[key].directory), "record.json", self._records[key])

    def _mlflow_run(self, run: Run, facts: dict[str, Any], record: dict[str, Any]) -> str:
        """The MLflow run of a run: the one it had, or a new one."""
        known = record.get("mlflow_run_id") if hidden(record.get("mlflow_tracking_uri", "")) == self._uri else None
        if known and self._client.search_runs([self._experiment], f"attributes.run_id = '{known}'"):
            self._client.update_run(known, status="RUNNING")
            return str(known)
        tags = {"mlflow.runName": f"{run.variant}-seed{run.seed}", "variant": run.variant, "seed": str(run.seed)}
        tags |= {"mlflow.parentRunId": self._parent} if self._parent else {}
        tags |= self._tags.get((run.variant, run.seed), {})
        run_id: str = self._client.create_run(self._experiment, tags=tags).info.run_id
        settings = run.model_dump(mode="json", include={"model", "data", "train", "workers", "seed", "variant"})
        own = {"plugins": ", ".join(map(str, run.plugins))} if run.plugins else {}
        self._log_params(run_id, {**flatten(settings), **own, "steps": json.dumps(run.steps)})
        self._log_metrics(run_id, {f"model/{name}": float(facts["profile"][name]) for name in COUNTS})
        for number, plan in enumerate(facts["plans"]):
            self._client.log_text(run_id, plan, f"plan{number}.json")
        return run_id

    def _log_metrics(self, run_id: str, values: dict[str, float], step: int = 0) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(
            run_id, metrics=[Metric(name, float(value), now, step) for name, value in values.items()]
        )

    def _log_params(self, run_id: str, values: dict[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(name, str(value)[:6000]) for name, value in values.items()]
        for start in range(0, len(params), 100):  # the most that one call takes
            self._client.log_batch(run_id, params=params[start : start + 100])

    def log_files(self, paths: list[Path]) -> None:
        """Attach files (the report) to every run."""
        for record in self._records.values():
            for path in paths:
                self._client.log_artifact(record["mlflow_run_id"], str(path))


def _probed(probes: dict[str, Any]) -> dict[str, float]:
    """The probes of an epoch that are numbers, under names that MLflow takes."""
    values = {f"probe/{key}": value for key, value in probes.get("sharpness", {}).items()}
    for name, value in probes.get("gradients", {}).items():
        plain = re.sub(r"[^\w.-]", "_", name)  # MLflow refuses the @ of a use that has no path of its own
        values[f"probe/gradient_norm/{plain}"[:250]] = value  # its longest name
    for number, shares in enumerate(zip(*probes.get("density", {}).values(), strict=True)):
        values[f"probe/density_above_{DENSITY_THRESHOLDS[number]:g}"] = fmean(shares)
    return {name: value for name, value in values.items() if value is not None}


def _connected(home: Path, name: str) -> tuple[MlflowClient, str]:
    """The client, and the id of the experiment.

    Raises:
        ReductionError: MLflow's server or database cannot be reached.
    """
    require("a record in MLflow", "mlflow")
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    address, uri = _tracking_address(home), tracking_uri(home)
    try:
        client = _client(address)
        return client, _experiment(client, name, home, uri)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        lines = hidden(str(error), address).strip().splitlines() or [type(error).__name__]
        whose = "MLFLOW_TRACKING_URI names it" if os.environ.get("MLFLOW_TRACKING_URI") else "it lies in the output"
        raise ReductionError(f"MLflow at {uri} ({whose}) cannot keep the runs: {lines[0]}") from (
            error if hidden(str(error), address) == str(error) else None
        )


def _client(address: str) -> MlflowClient:
    """The client of a tracking server or database. MLflow prints its address and names it in errors, so the client does not
    have the password in it: of a server, MLflow reads user and password from the environment at each request."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    if (known := credentials(address)) is not None:
        os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"] = known
        address = without_credentials(address)
    elif hidden(address) != address:  # a token alone has no other place
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # the migrations of a new database, one line each
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=quoted(address))


def _experiment(client: MlflowClient, name: str, directory: Path, uri: str) -> str:
    """The id of the recipe's experiment; always explicit, since MLflow's global state misfiles runs."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    ours = uri == f"sqlite:///{directory.resolve()}/mlflow.db"
    location = (directory.resolve() / "mlartifacts").as_uri() if ours else None
    return str(client.create_experiment(name, artifact_location=location))
