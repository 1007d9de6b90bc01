"""One JSON record per run, mirrored to MLflow. The only module that imports mlflow.

The records are the truth: `results.json` and the report are built from them alone. Only the driver writes, through one
`Recorder`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, median, stdev
from typing import TYPE_CHECKING, Any

from mlpreduce.errors import ReductionError
from mlpreduce.train.settings import Run
from mlpreduce.values import flatten

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = [
    "SCHEMA",
    "Recorder",
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

SCHEMA = 1
_COUNTS = ("params", "mlp_params", "unique_mlps", "macs_linear", "macs", "macs_with_attention")
_MEASURED = ("throughput", "peak_memory_mib")
_METRICS = ("train_loss", "val_loss", "top1", "top5", "raw_val_loss", "raw_top1", "raw_top5", "lr", "images_per_s")


def store(directory: Path, name: str, document: Any) -> None:
    """Write a JSON document into `directory`: whole, or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    draft = directory / f"{name}.tmp"
    draft.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(draft, directory / name)


def read(directory: str | Path) -> list[dict[str, Any]]:
    """All records under an output directory, in the order in which the recipe names variants and seeds.

    Raises:
        ReductionError: a file is no record, or one of another schema.
    """
    found = []
    for path in Path(directory).glob("*/seed*/record.json"):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ReductionError(
                f"{path}: no JSON: {error}; put it back from a copy, or move its folder away"
            ) from error
        if record["schema"] != SCHEMA:
            raise ReductionError(f"{directory}: a record has schema {record['schema']}, this version reads {SCHEMA}")
        found.append(record)
    return sorted(found, key=lambda record: record["order"])


def finished(directory: str | Path) -> list[dict[str, Any]]:
    """The records of the finished runs under an output directory.

    Raises:
        ReductionError: there is none.
    """
    found = [record for record in read(directory) if record["status"] == "finished"]
    if not found:
        raise ReductionError(f"{str(directory)!r}: no finished run lies there; `--resume` goes on with a run")
    return found


def conditions(record: dict[str, Any]) -> tuple[Any, ...]:
    """What speed and memory of a run were measured on: equal for those that may be compared or averaged."""
    hardware = [record["hardware"].get(key) for key in ("device", "machine", "cpu_cores", "workers")]
    return (*hardware, record["profile"].get("device"), record["profile"].get("batch_size"))


def tracking_uri(directory: Path) -> str:
    """Where MLflow keeps the runs: MLFLOW_TRACKING_URI, or a SQLite file in the output directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{directory.resolve()}/mlflow.db"


class Recorder:
    """Keeps the records of a recipe's runs, and their mirror in MLflow.

    Args:
        directory: output directory of the recipe.
        recipe: the resolved recipe, as JSON-like data; its "name" names the MLflow experiment.
        runs: all runs of the recipe, in order.
        home: directory of MLflow's store, unless MLFLOW_TRACKING_URI names another; by default that of the recipe.
    """

    def __init__(self, directory: Path, recipe: dict[str, Any], runs: list[Run], *, home: Path | None = None) -> None:
        self._recipe = recipe
        self._runs = {(run.variant, run.seed): run for run in runs}
        self._order = {key: number for number, key in enumerate(self._runs)}
        self._records = {(record["variant"], record["seed"]): record for record in read(directory)}
        self._started: set[tuple[str, int]] = set()
        home = home or directory
        self._uri = tracking_uri(home)
        self._client = _client(self._uri)
        self._experiment = _experiment(self._client, recipe["name"], home, self._uri)

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

    def _add(self, record: dict[str, Any], entry: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        record["epochs"].append(entry)
        now = int(time.time() * 1000)
        values = {name: entry[name] for name in _METRICS} | _probed(entry.get("probes", {}))
        metrics = [Metric(name, float(value), now, entry["epoch"]) for name, value in values.items()]
        self._client.log_batch(record["mlflow_run_id"], metrics=metrics)

    def _end(self, key: tuple[str, int], status: str, message: str) -> None:
        record = self._records[key]
        record.update(status=status, message=message)
        self._store(key)
        run_id = record["mlflow_run_id"]
        if status == "finished":
            for name, value in summary(record).items():
                self._client.log_metric(run_id, f"final/{name}", float(value))
        self._client.log_dict(run_id, record, "record.json")
        self._client.set_terminated(
            run_id, {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}[status]
        )

    def _store(self, key: tuple[str, int]) -> None:
        store(Path(self._runs[key].directory), "record.json", self._records[key])

    def _mlflow_run(self, run: Run, facts: dict[str, Any], record: dict[str, Any]) -> str:
        """The MLflow run of a run: the one it had, or a new one."""
        known = record.get("mlflow_run_id") if record.get("mlflow_tracking_uri") == self._uri else None
        if known and self._client.search_runs([self._experiment], f"attributes.run_id = '{known}'"):
            self._client.update_run(known, status="RUNNING")
            return str(known)
        tags = {"mlflow.runName": f"{run.variant}-seed{run.seed}", "variant": run.variant, "seed": str(run.seed)}
        run_id: str = self._client.create_run(self._experiment, tags=tags).info.run_id
        settings = run.model_dump(mode="json", include={"model", "data", "train", "workers", "seed", "variant"})
        for name, value in {**flatten(settings), "steps": json.dumps(run.steps)}.items():
            self._client.log_param(run_id, name, str(value)[:6000])
        for name in _COUNTS:
            self._client.log_metric(run_id, f"model/{name}", float(facts["profile"][name]))
        for number, plan in enumerate(facts["plans"]):
            self._client.log_text(run_id, plan, f"plan{number}.json")
        return run_id

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
    return {name: value for name, value in values.items() if value is not None}


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """The results of one finished run. Accuracies in percent; the best epoch is chosen on the validation set."""
    best = max(record["epochs"], key=lambda entry: entry["top1"])
    final = record["epochs"][-1]
    return {
        "seed": record["seed"],
        "top1": best["top1"],
        "top5": best["top5"],
        "peak_epoch": best["epoch"],
        "final_top1": final["top1"],
        "peak_to_final": best["top1"] - final["top1"],
        "epochs": len(record["epochs"]),
    }


def results(directory: str | Path) -> dict[str, Any]:
    """What a recipe gave, from the records of its finished runs alone; see `summarize`.

    Raises:
        ReductionError: there is no finished run.
    """
    return summarize(finished(directory))


def baseline_of(records: Iterable[dict[str, Any]]) -> str | None:
    """The variant that the others are compared with: the first without steps, if there is one."""
    return next((record["variant"] for record in records if not record["steps"]), None)


def summarize(records: list[dict[str, Any]]) -> dict[str, Any]:
    """What `results.json` holds, from finished records.

    Counts and speed are those of one variant; `throughput` and `peak_memory_mib` are medians over its runs, null where
    those were not measured on equal hardware. Standard deviations have ddof=1 and are null for one run. `vs_baseline`
    compares runs of equal seed with the first variant that has no steps.
    """
    variants: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        variants.setdefault(record["variant"], []).append(record)
    baseline = baseline_of(records)
    reference = {r["seed"]: summary(r)["top1"] for r in variants[baseline]} if baseline is not None else {}
    table: dict[str, Any] = {}
    for name, found in variants.items():
        runs = [{**summary(record), "mlflow_run_id": record["mlflow_run_id"]} for record in found]
        top1 = [run["top1"] for run in runs]
        table[name] = {
            **{count: found[0]["profile"][count] for count in _COUNTS},
            **{measure: _median(found, measure) for measure in _MEASURED},
            "runs": runs,
            "top1_mean": fmean(top1),
            "top1_std": stdev(top1) if len(top1) > 1 else None,
            "top5_mean": fmean([run["top5"] for run in runs]),
            "peak_to_final_mean": fmean([run["peak_to_final"] for run in runs]),
            "vs_baseline": None if baseline is None or name == baseline else _compare(runs, reference),
        }
    names = dict.fromkeys(record["recipe"]["name"] for record in records)
    return {"schema": SCHEMA, "recipe": " + ".join(names), "variants": table}


def _compare(runs: list[dict[str, Any]], reference: dict[int, float]) -> dict[str, Any] | None:
    """Paired two-sided t-test on top-1 over the seeds that both have, and the 95 % confidence interval of the mean difference.

    What is not defined is null: all of it for one pair; p and the interval for equal differences.
    """
    pairs = [(run["top1"], reference[run["seed"]]) for run in runs if run["seed"] in reference]
    if not pairs:
        return None
    differences = [ours - theirs for ours, theirs in pairs]
    p_value = low = high = None
    # equal differences have no variance to test against
    if len(pairs) > 1 and max(differences) - min(differences) > 1e-9:
        from scipy.stats import ttest_rel

        test = ttest_rel(*zip(*pairs, strict=True))
        low, high = (float(bound) for bound in test.confidence_interval(0.95))
        p_value = float(test.pvalue)
    return {
        "delta": fmean(differences),
        "p_value": p_value,
        "n": len(pairs),
        "test": "paired t",
        "df": len(pairs) - 1 if len(pairs) > 1 else None,
        "ci_low": low,
        "ci_high": high,
    }


def _median(found: list[dict[str, Any]], measure: str) -> float | None:
    """Over the runs of a variant; None where nothing was measured, or not on equal hardware."""
    if len({conditions(record) for record in found}) > 1:
        return None
    known = [record["profile"][measure] for record in found if record["profile"][measure] is not None]
    return median(known) if known else None


def _client(uri: str) -> MlflowClient:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # the migrations of a new database, one line each
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def _experiment(client: MlflowClient, name: str, directory: Path, uri: str) -> str:
    """The id of the recipe's experiment; always explicit, since MLflow's global state misfiles runs."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    ours = uri == f"sqlite:///{directory.resolve()}/mlflow.db"
    location = (directory.resolve() / "mlartifacts").as_uri() if ours else None
    return str(client.create_experiment(name, artifact_location=location))
