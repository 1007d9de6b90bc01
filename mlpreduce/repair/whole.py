"""The stream of the whole model at the places where MLPs join it, for each batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from mlpreduce.calibration import Batch
from mlpreduce.repair.streams import Cut, Place, stopping_at
from mlpreduce.repair.uses import Use

__all__ = ["Whole"]


class Whole:
    """Streams that are kept from a run that somebody else makes, as long as they fit, or run for again from block to block.

    Args:
        tree: the whole model.
        cut: leaves out blocks of it whose outputs are known.
        uses: calls of MLPs.
        most: bytes that may be kept.
    """

    def __init__(self, tree: nn.Module, cut: Cut, uses: Sequence[Use], most: float) -> None:
        self._tree, self._cut, self._left = tree, cut, most
        self._kept: dict[str, list[torch.Tensor]] = {use.name: [] for use in uses}
        self._uses = uses

    def places(self) -> list[Place]:
        """What has to be told of a run over all batches, so that the streams are kept."""
        return [use.dense.told_by(self._keep(use.name)) for use in self._uses]

    def forget(self) -> None:
        """Run for streams again."""
        self._kept.clear()

    def streams(self, index: int, batch: Batch, uses: Sequence[Use], until: int) -> list[torch.Tensor]:
        """Those behind these uses for a batch; blocks before `until` are known then."""
        if all(use.name in self._kept for use in uses):
            return [self._kept[use.name][index] for use in uses]
        found: dict[str, torch.Tensor] = {}
        places = [use.dense.told_by(partial(found.__setitem__, use.name)) for use in uses]
        with self._cut.at(index, until), stopping_at(self._tree, [*places, *self._cut.last(until)]) as run:
            run(batch)
        return [found[use.name] for use in uses]

    def done(self, uses: Sequence[Use]) -> None:
        """Nothing is asked of these uses again."""
        for use in uses:
            self._kept.pop(use.name, None)

    def _keep(self, name: str) -> Callable[[torch.Tensor], None]:
        def keep(value: torch.Tensor) -> None:
            self._left -= value.nbytes
            if self._left < 0:
                self._kept.clear()
            if name in self._kept:
                self._kept[name].append(value.detach().clone())  # models may add to it in place

        return keep
