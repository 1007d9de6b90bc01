"""What a study knows besides its trials: what it is, and what every run came to. It is kept as attributes of Optuna's study."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import optuna

from mlpreduce.errors import ReductionError
from mlpreduce.recipe import differences
from mlpreduce.records import summary
from mlpreduce.search.front import losses
from mlpreduce.search.goals import COSTS
from mlpreduce.search.points import Point
from mlpreduce.search.settings import StudySettings, changes

__all__ = ["Results"]


class Results:
    """The attributes of a study, and the values of its points.

    Args:
        study: Optuna's.
        settings: of the study.
    """

    def __init__(self, study: optuna.Study, settings: StudySettings) -> None:
        self._study, self._settings = study, settings
        self._known = dict(study.user_attrs)

    def get(self, name: str, default: Any = None) -> Any:
        """What is kept under a name."""
        return self._known.get(name, default)

    def set(self, name: str, value: Any) -> None:
        """Keep something."""
        self._known[name] = value
        self._study.set_user_attr(name, value)

    def keep(self, facts: Mapping[str, Any]) -> None:
        """Keep what the study is (`recipe`, `space` and more), or hold it against what it was.

        Raises:
            ReductionError: the study goes on with something else than it began with.
        """
        if "settings" in self._known:
            before = StudySettings.model_validate(self._known["settings"])
            wrong = [*changes(before, self._settings), *differences(self._known["recipe"], facts["recipe"])]
            if self._known["space"] != facts["space"]:
                wrong.append(f"space: was {self._known['space']}, is {facts['space']}")
            if wrong:
                raise ReductionError(
                    "--resume: the study is another one; repeat its settings, or give another --output:\n  "
                    + "\n  ".join(wrong)
                )
        for name, value in {**facts, "settings": self._settings.model_dump(mode="json")}.items():
            self.set(name, json.loads(json.dumps(value)))

    def add(self, key: str, seed: int, record: Mapping[str, Any]) -> float:
        """Keep what a run came to, and give its top-1."""
        latency = record["profile"].get("latency")
        found = {**summary(dict(record)), "latency": latency, "mlflow_run_id": record["mlflow_run_id"]}
        self.set(f"runs:{key}", {**self.runs(key), str(seed): found})
        return float(found["top1"])

    def runs(self, key: str) -> dict[str, dict[str, Any]]:
        """What the runs of a point came to, by seed."""
        found: dict[str, dict[str, Any]] = self._known.get(f"runs:{key}", {})
        return found

    def top1(self, key: str) -> dict[int, float]:
        """The accuracies of a point in percent, by seed."""
        return {int(seed): run["top1"] for seed, run in self.runs(key).items()}

    def values(self, point: Point) -> list[float]:
        """The objectives of a point, from its run with the first seed."""
        run = self.runs(point.key)[str(self._settings.seeds[0])]
        return [run[name] if name in run else float(getattr(point.cost, name)) for name in self._settings.objectives]

    def costs(self, point: Point) -> tuple[float, ...]:
        """The other objectives of a point that was trained, less is better."""
        others = [name for name in self._settings.objectives if name != "top1"]
        run: dict[str, Any] = next(iter(self.runs(point.key).values()), {})
        return losses({name: run[name] if name in run else getattr(point.cost, name) for name in others}, others)

    def early_losses(self, point: Point, top1: float) -> tuple[float, ...]:
        """Top-1 and what a point costs, less is better, without the latency, which is measured in a trial only."""
        known = [name for name in self._settings.objectives if name in COSTS]
        return losses({"top1": top1, **{name: getattr(point.cost, name) for name in known}}, ["top1", *known])
