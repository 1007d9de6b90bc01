"""The `[launch]` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from mlpreduce.errors import ReductionError
from mlpreduce.words.marks import Free

__all__ = ["LaunchSettings"]


class LaunchSettings(BaseModel):
    """The `[launch]` section: on how many processes, and what happens when one is lost."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workers: Free[Annotated[int, Field(ge=0)]] = 2  # processes that train together; 0 = in this process, without Ray
    min_workers: Free[Annotated[int, Field(ge=0)]] = (
        0  # go on with as few, where nodes are lost; 0 = wait for `workers`
    )
    threads: Free[Annotated[int, Field(ge=0)]] = 1  # CPU threads of torch per worker; 0 = torch's own choice
    cpus_per_worker: Free[Annotated[int, Field(ge=1)]] = 1  # CPUs that Ray reserves for each worker
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: GPUs where there is one for each worker
    max_failures: Free[Annotated[int, Field(ge=0)]] = 2  # lost workers after which training is given up
    controller_failures: Free[Annotated[int, Field(ge=0)]] = 2  # failed starts of the worker group before giving up
    collective_timeout_s: Free[Annotated[int, Field(ge=1)]] = 600  # seconds that Ray Train waits for a worker that lags

    @property
    def world(self) -> int:
        """Processes that share a batch; 1 where training runs in this process."""
        return max(1, self.workers)

    @property
    def fewest(self) -> int:
        """Workers without which training does not go on."""
        return self.min_workers or self.workers

    def check(self) -> None:
        """Whether the keys fit each other.

        Raises:
            ReductionError: they do not.

        Example:
            >>> LaunchSettings(workers=2, min_workers=3).check()
            Traceback (most recent call last):
            mlpreduce.errors.ReductionError: launch.min_workers=3: more than launch.workers=2; use 0 (not elastic) to 2
        """
        if self.min_workers > self.workers:
            raise ReductionError(
                f"launch.min_workers={self.min_workers}: more than launch.workers={self.workers}; use 0 (not elastic)"
                + (f" to {self.workers}" if self.workers else ", or more workers: with 0 there is no group")
            )
