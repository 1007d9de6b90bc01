"""Runs in MLflow: how they begin, what is logged to them, and how they end."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlpreduce.errors import ReductionError, require
from mlpreduce.words.addresses import credentials, hidden, quoted, without_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["Mirror", "tracking_uri"]


def tracking_uri(directory: Path) -> str:
    """Where MLflow keeps the runs: MLFLOW_TRACKING_URI, or a SQLite file in the output directory. Passwords are hidden."""
    return hidden(_tracking_address(directory))


def _tracking_address(directory: Path) -> str:
    """The same with its passwords, for the client alone: it is neither shown nor recorded."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{directory.resolve()}/mlflow.db"


class Mirror:
    """Runs of an experiment.

    Args:
        home: directory of MLflow's store, unless MLFLOW_TRACKING_URI names another.
        experiment: its name; made if it is not there.

    Raises:
        ReductionError: MLflow's server or database cannot be reached.
    """

    def __init__(self, home: Path, experiment: str) -> None:
        self.uri = tracking_uri(home)
        self._client, self._experiment = _connected(home, experiment)

    def resumed(self, known: str | None) -> str | None:
        """The run of an earlier process, running again; None if it is not there."""
        if known and self._client.search_runs([self._experiment], f"attributes.run_id = '{known}'"):
            self._client.update_run(known, status="RUNNING")
            return str(known)
        return None

    def begin(self, tags: Mapping[str, str]) -> str:
        """The id of a new run."""
        return str(self._client.create_run(self._experiment, tags=dict(tags)).info.run_id)

    def end(self, run_id: str, status: str) -> None:
        """End a run as FINISHED, FAILED or KILLED."""
        self._client.set_terminated(run_id, status)

    def log_metrics(self, run_id: str, values: Mapping[str, float], step: int = 0) -> None:
        """Numbers, by name."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(
            run_id, metrics=[Metric(name, float(value), now, step) for name, value in values.items()]
        )

    def log_params(self, run_id: str, values: Mapping[str, Any]) -> None:
        """What a run is made by."""
        from mlflow.entities import Param

        params = [Param(name, str(value)[:6000]) for name, value in values.items()]
        for start in range(0, len(params), 100):  # the most that one call takes
            self._client.log_batch(run_id, params=params[start : start + 100])

    def log_text(self, run_id: str, text: str, name: str) -> None:
        """A file of a run."""
        self._client.log_text(run_id, text, name)

    def log_dict(self, run_id: str, values: Mapping[str, Any], name: str) -> None:
        """A JSON file of a run."""
        self._client.log_dict(run_id, dict(values), name)

    def log_file(self, run_id: str, path: Path) -> None:
        """A file that is there."""
        self._client.log_artifact(run_id, str(path))


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
