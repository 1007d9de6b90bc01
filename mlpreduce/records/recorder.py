"""Keeps the records of a recipe's runs, and their mirror in MLflow."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from mlpreduce.budget import COSTS
from mlpreduce.errors import ReductionError
from mlpreduce.records.files import read, store
from mlpreduce.records.mirror import Mirror
from mlpreduce.records.record import SCHEMA, Epoch, Record
from mlpreduce.records.summaries import summary
from mlpreduce.train.events import Ended, EpochEnded, Event, Started
from mlpreduce.train.settings import DENSITY_THRESHOLDS, Run
from mlpreduce.words.addresses import hidden
from mlpreduce.words.values import flatten

__all__ = ["Recorder"]

_ENDED = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED", "stopped": "FINISHED"}
_METRICS = ("train_loss", "val_loss", "top1", "top5", "raw_val_loss", "raw_top1", "raw_top5", "lr", "images_per_s")


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
        self._records = {record.key: record for record in read(directory)}
        self._started: set[tuple[str, int]] = set()
        self._mirror = Mirror(home or directory, experiment or recipe["name"])

    def nest(self, name: str, settings: dict[str, Any], known: str | None = None) -> str:
        """Let all runs that begin from now on be nested in one of their own.

        Args:
            name: of the parent run.
            settings: logged as its parameters.
            known: the parent run of an earlier process.

        Returns:
            The id of the parent run.
        """
        self._parent = self._mirror.resumed(known)
        if self._parent is None:
            self._parent = self._mirror.begin({"mlflow.runName": name})
            self._mirror.log_params(self._parent, flatten(settings))
        return self._parent

    def close(self, metrics: dict[str, float], files: list[Path], *, whole: bool) -> None:
        """End the parent run, with what the study came to."""
        if self._parent is None:
            return
        self._mirror.log_metrics(self._parent, metrics)
        for path in files:
            self._mirror.log_file(self._parent, path)
        self._mirror.end(self._parent, "FINISHED" if whole else "KILLED")

    def add(self, run: Run, tags: dict[str, str]) -> None:
        """Expect one more run, after those that are known; `tags` are those of its MLflow run."""
        key = (run.variant, run.seed)
        self._runs[key] = run
        before = [*self._order.values(), *(record.order for record in self._records.values())]
        known = self._records.get(key)
        last = 1 + max(before, default=-1)
        self._order.setdefault(key, last if known is None else known.order)
        self._tags[key] = tags

    def record(self, variant: str, seed: int) -> Record | None:
        """The record of a run, if it has begun."""
        return self._records.get((variant, seed))

    def facts(self) -> dict[str, Any] | None:
        """Versions and hardware of the runs, as the last of them has recorded them."""
        last = next(reversed(self._records.values()), None)
        if last is None:
            return None
        return {"versions": last.versions, "hardware": last.hardware.as_json()}

    def stopped(self, run: Run, message: str) -> None:
        """Mark a run that was ended before its last epoch, on purpose; it could be gone on with."""
        if self._status(run) == "running":
            self._end((run.variant, run.seed), "stopped", message)

    def finished(self, run: Run) -> bool:
        """Whether a run has been trained to its end."""
        return self._status(run) == "finished"

    def _status(self, run: Run) -> str | None:
        record = self.record(run.variant, run.seed)
        return None if record is None else record.status

    def handle(self, event: Event) -> None:
        """Record an event of `mlpreduce.train.fit`. What a run tells within an epoch is not kept."""
        key = (event.variant, event.seed)
        match event.what:
            case Started() as started:
                self._start(key, event.epochs, started)
            case EpochEnded(entry):
                self._add(key, entry)
                self._store(key)
            case Ended(status, message):
                self._end(key, status, message)

    def interrupt(self) -> None:
        """Mark the run that was being trained, if any: it can be resumed."""
        for key in self._started:  # another process may train others
            if self._records[key].status == "running":
                self._end(key, "interrupted", "")

    def _start(self, key: tuple[str, int], epochs: int, started: Started) -> None:
        run = self._runs[key]
        self._started.add(key)
        before = self._records.get(key)
        facts = started.facts
        self._check_start(run, facts)
        mlflow_run = self._mlflow_run(run, facts, before)
        # The checkpoint decides what has been trained: it may be an epoch ahead of the record, if the driver was killed.
        # A new MLflow run gets all epochs again.
        same = before is not None and mlflow_run == before.mlflow_run_id
        known = before.epochs[: len(started.history)] if same and before is not None else ()
        document = {
            "schema": SCHEMA,
            "recipe": self._recipe,
            "variant": run.variant,
            "steps": [dict(step) for step in run.steps],
            "seed": run.seed,
            "order": self._order[key],
            "config_hash": run.config_hash,
            "status": "running",
            "message": "",
            "notes": [*(before.notes if before is not None else ()), *started.notes],
            "started": before.started if before is not None else time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "epochs_planned": epochs,
            **facts,
            "plans": [json.loads(plan) for plan in facts["plans"]],
            "mlflow_tracking_uri": self._mirror.uri,
            "mlflow_run_id": mlflow_run,
            "epochs": known,
        }
        self._records[key] = Record.model_validate(document)
        for entry in started.history[len(known) :]:
            self._add(key, entry)
        self._store(key)

    def _check_start(self, run: Run, facts: Mapping[str, Any]) -> None:
        """Whether all variants of a seed start from the same given weights.

        Raises:
            ReductionError: the weights have changed since another variant began.
        """
        for (variant, seed), other in self._records.items():
            before, now = other.start_digest, facts.get("start_digest")
            if seed == run.seed and before != now and None not in (before, now):
                raise ReductionError(
                    f"train({run.label}): model.weights={run.model.weights!r} are no longer those that variant {variant} began "
                    f"with (digest {before}, now {now}); put those back, or start in another --output"
                )

    def _add(self, key: tuple[str, int], entry: Mapping[str, Any]) -> None:
        record = self._records[key]
        self._records[key] = record.model_copy(update={"epochs": (*record.epochs, Epoch.model_validate(entry))})
        values = {name: entry[name] for name in _METRICS} | _probed(entry.get("probes", {}))
        self._mirror.log_metrics(_run_of(record), values, step=entry["epoch"])

    def _end(self, key: tuple[str, int], status: str, message: str) -> None:
        record = self._records[key] = self._records[key].model_copy(update={"status": status, "message": message})
        self._store(key)
        run_id = _run_of(record)
        if status == "finished":
            found = summary(record).model_dump(exclude={"mlflow_run_id"}, exclude_none=True)
            known = {f"final/{name}": float(value) for name, value in found.items()}
            self._mirror.log_metrics(run_id, known)
        self._mirror.log_dict(run_id, record.as_json(), "record.json")
        self._mirror.end(run_id, _ENDED[status])

    def _store(self, key: tuple[str, int]) -> None:
        store(Path(self._runs[key].directory), "record.json", self._records[key].as_json())

    def _mlflow_run(self, run: Run, facts: Mapping[str, Any], before: Record | None) -> str:
        """The MLflow run of a run: the one it had, or a new one."""
        here = before is not None and hidden(before.mlflow_tracking_uri) == self._mirror.uri
        known = before.mlflow_run_id if here and before is not None else None
        if (there := self._mirror.resumed(known)) is not None:
            return there
        tags = {"mlflow.runName": f"{run.variant}-seed{run.seed}", "variant": run.variant, "seed": str(run.seed)}
        tags |= {"mlflow.parentRunId": self._parent} if self._parent else {}
        tags |= self._tags.get((run.variant, run.seed), {})
        run_id = self._mirror.begin(tags)
        settings = run.model_dump(mode="json", include={"model", "data", "train", "workers", "seed", "variant"})
        own = {"plugins": ", ".join(map(str, run.plugins))} if run.plugins else {}
        self._mirror.log_params(run_id, {**flatten(settings), **own, "steps": json.dumps(run.steps)})
        self._mirror.log_metrics(run_id, {f"model/{name}": float(facts["profile"][name]) for name in COSTS})
        for number, plan in enumerate(facts["plans"]):
            self._mirror.log_text(run_id, plan, f"plan{number}.json")
        return run_id

    def log_files(self, paths: list[Path]) -> None:
        """Attach files (the report) to every run."""
        for record in self._records.values():
            for path in paths:
                self._mirror.log_file(_run_of(record), path)


def _run_of(record: Record) -> str:
    """MLflow's id of a run that was begun."""
    return str(record.mlflow_run_id)


def _probed(probes: dict[str, Any]) -> dict[str, float]:
    """The probes of an epoch that are numbers, under names that MLflow takes."""
    values = {f"probe/{key}": value for key, value in probes.get("sharpness", {}).items()}
    for name, value in probes.get("gradients", {}).items():
        plain = re.sub(r"[^\w.-]", "_", name)  # MLflow refuses the @ of a use that has no path of its own
        values[f"probe/gradient_norm/{plain}"[:250]] = value  # its longest name
    for number, shares in enumerate(zip(*probes.get("density", {}).values(), strict=True)):
        values[f"probe/density_above_{DENSITY_THRESHOLDS[number]:g}"] = fmean(shares)
    return {name: value for name, value in values.items() if value is not None}
