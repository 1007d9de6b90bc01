"""What a study knows besides its trials: what it is, and what every job came to. It is kept as attributes of Optuna's study."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import optuna

from mlpreduce.budget import COSTS
from mlpreduce.errors import ReductionError
from mlpreduce.search.spaces.goals import value_of
from mlpreduce.search.spaces.points import Point
from mlpreduce.search.study.front import losses
from mlpreduce.search.study.settings import StudySettings, changes

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
        self._value = value_of(settings.objectives)

    def get(self, name: str, default: Any = None) -> Any:
        """What is kept under a name."""
        return self._known.get(name, default)

    def set(self, name: str, value: Any) -> None:
        """Keep something."""
        self._known[name] = value
        self._study.set_user_attr(name, value)

    def keep(self, facts: Mapping[str, Any], differences: Callable[[Mapping[str, Any]], list[str]]) -> None:
        """Keep what the study is (`space` and more), or hold it against what it was.

        Args:
            facts: JSON values.
            differences: by what the facts differ from those that were kept, besides settings and space.

        Raises:
            ReductionError: the study goes on with something else than it began with.
        """
        if "settings" in self._known:
            before = StudySettings.model_validate(self._known["settings"])
            wrong = [*changes(before, self._settings), *differences(self._known)]
            if self._known["space"] != facts["space"]:
                wrong.append(f"space: was {self._known['space']}, is {facts['space']}")
            if wrong:
                raise ReductionError(
                    "resume: the study is another one; repeat its settings, or give another output:\n  "
                    + "\n  ".join(wrong)
                )
        for name, value in {**facts, "settings": self._settings.model_dump(mode="json")}.items():
            self.set(name, json.loads(json.dumps(value)))

    def add(self, key: str, part: int, found: Mapping[str, Any]) -> float:
        """Keep what a part of a point came to, and give its value."""
        self.set(f"runs:{key}", {**self.runs(key), str(part): found})
        return float(found[self._value])

    def runs(self, key: str) -> dict[str, dict[str, Any]]:
        """What the parts of a point came to."""
        found: dict[str, dict[str, Any]] = self._known.get(f"runs:{key}", {})
        return found

    def all_runs(self) -> dict[str, dict[str, dict[str, Any]]]:
        """What the parts of all points came to, by key and part."""
        return {name.removeprefix("runs:"): value for name, value in self._known.items() if name.startswith("runs:")}

    def by_part(self, key: str) -> dict[int, float]:
        """The values of a point, by part."""
        return {int(part): run[self._value] for part, run in self.runs(key).items()}

    def values(self, point: Point) -> list[float]:
        """The objectives of a point, from its first part."""
        run = self.runs(point.key)[str(self._settings.seeds[0])]
        return [run[name] if name in run else float(getattr(point.cost, name)) for name in self._settings.objectives]

    def costs(self, point: Point) -> tuple[float, ...]:
        """The other objectives of a point that was valued, less is better."""
        others = [name for name in self._settings.objectives if name != self._value]
        run: dict[str, Any] = next(iter(self.runs(point.key).values()), {})
        return losses({name: run[name] if name in run else getattr(point.cost, name) for name in others}, others)

    def early_losses(self, point: Point, value: float) -> tuple[float, ...]:
        """A value and what a point costs, less is better, without the latency, which is measured in a trial only."""
        known = [name for name in self._settings.objectives if name in COSTS]
        costs = {name: getattr(point.cost, name) for name in known}
        return losses({self._value: value, **costs}, [self._value, *known])
