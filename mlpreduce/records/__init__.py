"""One JSON record per run, mirrored to MLflow. The only package that imports mlflow.

The records are the truth: `results.json` and the report are built from them alone. Only the driver writes, through one
`Recorder`.

    files       records on disk
    summaries   what records come to
    recorder    keeps the records of a recipe's runs, and their mirror in MLflow
"""

from __future__ import annotations

from mlpreduce.records.files import SCHEMA, as_json, finished, read, store
from mlpreduce.records.recorder import Recorder, tracking_uri
from mlpreduce.records.summaries import baseline_of, conditions, results, summarize, summary

__all__ = [
    "SCHEMA",
    "Recorder",
    "as_json",
    "baseline_of",
    "conditions",
    "finished",
    "read",
    "results",
    "store",
    "summarize",
    "summary",
    "tracking_uri",
]
