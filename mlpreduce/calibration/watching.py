"""Looking on while a model runs over calibration data for something else, so that the data is read once for both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from mlpreduce.calibration.batches import Batch
from mlpreduce.calibration.samples import Samples

__all__ = ["Watcher"]


class Watcher:
    """Is told of each batch while a model runs over all calibration data. This class does nothing with it."""

    @contextmanager
    def over(self, tree: nn.Module, batch: Batch) -> Iterator[None]:
        """Within, the model as it is runs once on a batch; each batch of the data has its turn."""
        yield

    def end(self, samples: Samples) -> None:
        """All processes have read all of the data."""
