"""What a study is: plain data, kept with it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mlpreduce.errors import ReductionError
from mlpreduce.words.complaints import complaint
from mlpreduce.words.marks import Free, Mark, marked

__all__ = ["REFERENCES", "StudySettings", "changes", "make_settings"]

Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]

# What a study is compared with: trained beside it, outside of its trials and budgets. A recipe's own variants of these
# names go before.
REFERENCES: dict[str, tuple[dict[str, Any], ...]] = {
    "baseline": (),
    "grouped": ({"transform": "grouped", "group": 2, "remainder": "own"},),
    "shallow": ({"transform": "shallow", "ratio": 0.5},),
}


class StudySettings(BaseModel):
    """The settings of a study; flags of the command have their names and descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="its name in the storage (default: SPACE-RECIPE)")
    trials: Free[Count] = Field(40, description="points that are trained to their end, or ended early")
    objectives: tuple[str, ...] = Field(("top1", "params"), description="top1 and costs, with commas")
    budgets: tuple[str, ...] = Field(
        (), description='such as "params<=0.7" (of the baseline) or "macs<=9e9"; may be repeated (default: none)'
    )
    sampler: Literal["auto", "tpe", "nsga2", "gp", "random", "grid"] = Field(
        "auto", description="auto (TPE), tpe, nsga2, gp, random or grid"
    )
    pruner: Literal["asha", "median", "none"] = Field("asha", description="asha, median (one objective only) or none")
    reduction: Annotated[int, Field(ge=2)] = Field(3, description="of asha: one of so many goes on at each rung")
    first_rung: NonNegative = Field(
        0, description="epochs before asha first decides (default: a ninth of all, at least 1.5 x the warm-up)"
    )
    seed: NonNegative = Field(0, description="of the sampler")
    seeds: Free[tuple[int, ...]] = Field(
        (42, 123),
        description="of the training: the first for all trials, the others for the front (default: the recipe's)",
    )
    references: tuple[str, ...] = Field(
        ("baseline", "grouped", "shallow"), description='what to compare with; also "baseline,grouped(group=4)"'
    )
    inherit: Literal["none", "baseline", "nearest"] = Field(
        "none", description="weights a trial starts from: none, baseline, or nearest (of all trials)"
    )
    screen: NonNegative = Field(0, description="images on which trained weights are tried before a trial trains")
    supernet: NonNegative = Field(
        0, description="epochs in which sub-models are trained together before, to begin with those that look best"
    )
    supernet_points: Count = Field(1000, description="that a supernet estimates")
    workers: Free[NonNegative] = Field(2, description="trials at a time; 0 is one, in this process, without Ray")
    trial_workers: Free[Count] = Field(1, description="processes that train one trial together (DDP)")
    cpus: Free[Annotated[float, Field(gt=0)]] = Field(1.0, description="that Ray reserves for each process of a trial")
    gpus: Free[Annotated[float, Field(ge=0)]] = Field(0.0, description="likewise; parts of one are possible, as 0.25")

    def rungs(self, epochs: int, warmup_epochs: int = 0) -> tuple[int, ...]:
        """Epochs after which asha decides.

        Example:
            >>> StudySettings(name="any").rungs(90), StudySettings(name="any").rungs(24, warmup_epochs=4)
            ((10, 30), (6, 18))
        """
        after = math.ceil(1.5 * warmup_epochs)  # what a warm-up reaches tells little
        rung, found = self.first_rung or max(1, round(epochs / self.reduction**2), after), []
        while rung < epochs:
            found.append(rung)
            rung *= self.reduction
        return tuple(found)


def make_settings(call: str, given: Mapping[str, Any]) -> StudySettings:
    """The settings of a study.

    Raises:
        ReductionError: a key or a value that there is not.
    """
    try:
        return StudySettings.model_validate(dict(given))
    except ValidationError as error:
        wrong = [complaint(item, "", StudySettings.model_fields) for item in error.errors()]
        raise ReductionError(f"{call}: " + "\n".join(wrong)) from error


def changes(before: StudySettings, now: StudySettings) -> Iterable[str]:
    """Settings by which a study would become another one.

    Example:
        >>> one = StudySettings(name="any")
        >>> list(changes(one, one.model_copy(update={"trials": 80, "sampler": "gp"})))
        ["sampler: was 'auto', is 'gp'"]
    """
    old, new = before.model_dump(), now.model_dump()
    first = [f"seeds: the first was {before.seeds[0]}, is {now.seeds[0]}"] if before.seeds[0] != now.seeds[0] else []
    return first + [
        f"{key}: was {old[key]!r}, is {new[key]!r}"
        for key in new
        if key not in marked(StudySettings, Mark.FREE) and old[key] != new[key]
    ]
