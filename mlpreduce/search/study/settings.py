"""What a study is: plain data, kept with it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mlpreduce.errors import ReductionError
from mlpreduce.words.complaints import complaint

__all__ = ["REFERENCES", "StudySettings", "changes", "make_settings"]

Count = Annotated[int, Field(ge=1)]

# What a study is compared with: trained beside it, outside of its trials and budgets. A recipe's own variants of these
# names go before.
REFERENCES: dict[str, tuple[dict[str, Any], ...]] = {
    "baseline": (),
    "grouped": ({"transform": "grouped", "group": 2, "remainder": "own"},),
    "shallow": ({"transform": "shallow", "ratio": 0.5},),
}
# may be others when a study goes on: how much is trained, and where
_FREE = ("trials", "seeds", "workers", "trial_workers", "cpus", "gpus")


class StudySettings(BaseModel):
    """The settings of a study."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    trials: Count = 40  # that ended complete or pruned
    objectives: tuple[str, ...] = ("top1", "params")
    budgets: tuple[str, ...] = ()  # "params<=0.7"
    sampler: Literal["auto", "tpe", "nsga2", "gp", "random", "grid"] = "auto"
    pruner: Literal["asha", "median", "none"] = "asha"
    reduction: Annotated[int, Field(ge=2)] = 3  # of asha: one of so many goes on at each rung
    first_rung: Annotated[int, Field(ge=0)] = 0  # epochs before it first decides; 0 = a ninth of all, 1.5 x the warm-up
    seed: Annotated[int, Field(ge=0)] = 0  # of the sampler
    seeds: tuple[int, ...] = (42, 123)  # of the training: the first for all trials, the others for the front
    references: tuple[str, ...] = ("baseline", "grouped", "shallow")
    inherit: Literal["none", "baseline", "nearest"] = "none"  # weights that a trial starts from: docs/search.md
    screen: Annotated[int, Field(ge=0)] = 0  # images on which trained weights are tried after the edit; 0 = none
    supernet: Annotated[int, Field(ge=0)] = 0  # epochs of a supernet that says which points to train; 0 = none
    supernet_points: Count = 1000  # that it estimates
    workers: Annotated[int, Field(ge=0)] = 2  # trials at a time; 0 = one, in this process, without Ray
    trial_workers: Count = 1  # processes that train one trial together (DDP)
    cpus: Annotated[float, Field(gt=0)] = 1.0  # that Ray reserves for each process of a trial
    gpus: Annotated[float, Field(ge=0)] = 0.0  # likewise; a part of one, such as 0.25, is possible

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
        f"{key}: was {old[key]!r}, is {new[key]!r}" for key in new if key not in _FREE and old[key] != new[key]
    ]
