"""What a search ends with: the types of `study.json`. What another version has written besides is kept as it is."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from mlpreduce.records.record import SCHEMA, Document

__all__ = ["Limit", "Objective", "PointRun", "StudyDocument", "StudyPoint", "Volume"]


class Objective(Document):
    """What is sought: its name, "maximize" or "minimize", and the unit."""

    name: str
    direction: str = ""
    unit: str = ""


class Limit(Document):
    """A budget: as it was asked for, the cost that it bounds, and the most of that."""

    text: str
    cost: str
    limit: int | float


class PointRun(Document):
    """What one part of a point came to: a training with a seed, or a score after a repair.

    Attributes:
        seed: of the training, or which repair it is.
        epochs: that were trained.
        top1: of the best epoch, percent.
        final_top1: of the last.
        score: the higher the better.
        latency: ms.
        final: whether it is the repair that counts.
    """

    seed: int
    epochs: int = 0
    top1: float | None = None
    final_top1: float | None = None
    score: float | None = None
    latency: float | None = None
    final: bool = False

    def value(self, name: str) -> float | None:
        """An objective that is measured in a run; None where it was not."""
        found: float | None = getattr(self, name, None)
        return found


class StudyPoint(Document):
    """A point of a study.

    Attributes:
        name: as it is shown.
        kind: "reference", or "trial" for what the sampler chose.
        number: of the trial.
        key: equal for points that would be trained to the same weights.
        params: what was sampled.
        steps: the reduction.
        settings: keys of the recipe that differ, with their values.
        cost: of the reduced model, by name.
        pattern: which MLP each block uses, and how wide it is; names, owners and widths.
        values: of the objectives, means over runs.
        feasible: whether it keeps the budgets.
        front: whether it is of the Pareto front.
        state: "complete", "pruned" or "failed".
        message: why.
        runs: what its parts came to.
        drawn: how it was chosen where a supernet estimated it.
        estimate: what that was.
    """

    name: str
    kind: Literal["reference", "trial"]
    number: int | None = None
    key: str = ""
    params: dict[str, Any] = Field(default_factory=dict)
    steps: tuple[dict[str, Any], ...] = ()
    settings: dict[str, Any] = Field(default_factory=dict)
    cost: dict[str, int | float]
    pattern: dict[str, list[Any]] = Field(default_factory=dict)
    values: dict[str, int | float] = Field(default_factory=dict)
    feasible: bool = True
    front: bool = False
    state: str = "complete"
    message: str = ""
    runs: tuple[PointRun, ...] = ()
    drawn: str = ""
    estimate: dict[str, float] = Field(default_factory=dict)


class Volume(Document):
    """The hypervolume of a front, and the values that it goes up to."""

    value: float
    reference: dict[str, int | float]


class StudyDocument(Document):
    """A study: its settings, all points with costs, values and runs, and what can be said of them.

    Attributes:
        version: of the schema.
        study: its name.
        space: that of its search space.
        recipe: that of its recipe, or of the model.
        objectives: what is sought, the first first.
        budgets: what points must keep.
        settings: as they were resolved, JSON values.
        counts: how many trials ended how.
        environment: where it ran.
        seconds: that it took.
        points: references, then trials.
        hypervolume: None without a baseline.
        importance: of each sampled parameter, by objective.
        supernet: how well that ranks, if there is one.
        verdicts: sentences.
    """

    version: int = Field(SCHEMA, alias="schema")
    study: str
    space: str
    recipe: str
    objectives: tuple[Objective, ...] = Field(min_length=1)
    budgets: tuple[Limit, ...] = ()
    settings: dict[str, Any] = Field(default_factory=dict)
    counts: dict[str, int] = Field(default_factory=dict)
    environment: dict[str, Any] = Field(default_factory=dict)
    seconds: float = 0.0
    points: tuple[StudyPoint, ...]
    hypervolume: Volume | None = None
    importance: dict[str, dict[str, float]] = Field(default_factory=dict)
    supernet: dict[str, Any] | None = None
    verdicts: tuple[str, ...] = ()
