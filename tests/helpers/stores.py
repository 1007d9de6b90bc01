"""MLflow's database, migrated once: each new one would take seconds to make."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
import warnings
from pathlib import Path

from mlflow import MlflowClient


def put_store(directory: Path, name: str = "mlflow.db") -> Path:
    """Put an empty, migrated MLflow database into a directory, which is made if need be, and return the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copy(_empty(), directory / name)
    return directory


@functools.cache
def _empty() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="mlflow"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "The ..noload.. loader strategy is deprecated"
        )  # SQLAlchemy, of MLflow's tables
        MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db").search_experiments()
    return folder / "mlflow.db"
