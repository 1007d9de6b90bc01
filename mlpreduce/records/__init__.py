"""One JSON record per run, mirrored to MLflow. The only package that imports mlflow.

The records are the truth: `results.json` and the report are built from them alone. Only the driver writes, through one
`Recorder`.

    record      what a record is
    study       what a study of many runs is
    files       records on disk
    result      what a recipe comes to
    summaries   it, from records
    mirror      runs in MLflow
    recorder    keeps the records of a recipe's runs, and their mirror in MLflow
"""

from __future__ import annotations

from mlpreduce.records.files import as_json, finished, read, store
from mlpreduce.records.mirror import Mirror, tracking_uri
from mlpreduce.records.record import SCHEMA, Epoch, Record, typed
from mlpreduce.records.recorder import Recorder
from mlpreduce.records.result import Against, Results, RunResult, VariantResult, Variants
from mlpreduce.records.study import Limit, Objective, PointRun, StudyDocument, StudyPoint, Volume
from mlpreduce.records.summaries import baseline_of, conditions, results, summarize, summary

__all__ = [
    "SCHEMA",
    "Against",
    "Epoch",
    "Limit",
    "Mirror",
    "Objective",
    "PointRun",
    "Record",
    "Recorder",
    "Results",
    "RunResult",
    "StudyDocument",
    "StudyPoint",
    "VariantResult",
    "Variants",
    "Volume",
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
    "typed",
]
