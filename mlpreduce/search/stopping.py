"""Which trials are ended early, where there are several objectives and Optuna's pruners do not apply.

Source: asynchronous successive halving (Li et al., arXiv 1810.05934), for several objectives by the number of trials that
dominate one (Schmucker et al., arXiv 2106.12639). Here the other objectives are costs and known exactly; only top-1 changes
from rung to rung, so a small model is never ended for being less accurate than a large one.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlpreduce.search.front import dominates

__all__ = ["Halving"]


class Halving:
    """Decides at rungs which trials go on.

    Args:
        rungs: epochs after which it decides.
        reduction: one of so many goes on.
    """

    def __init__(self, rungs: Sequence[int], reduction: int) -> None:
        self.rungs, self._reduction = tuple(rungs), reduction
        self._losses: dict[int, dict[str, tuple[float, ...]]] = {rung: {} for rung in self.rungs}

    def add(self, key: str, epoch: int, losses: Sequence[float]) -> None:
        """Remember what a trial reached at a rung."""
        if epoch in self._losses:
            self._losses[epoch][key] = tuple(losses)

    def stops(self, key: str, epoch: int) -> bool:
        """Whether a trial ends at this epoch, among those that have reached it so far.

        Example:
            >>> halving = Halving([3, 9], reduction=3)
            >>> for number, loss in enumerate((0.5, 0.4, 0.3, 0.6)):
            ...     halving.add(str(number), 3, (loss, 100))
            >>> [halving.stops(str(number), 3) for number in range(4)]
            [True, True, False, True]
        """
        reached = self._losses.get(epoch, {})
        if key not in reached or len(reached) < self._reduction:
            return False
        above = {name: sum(dominates(other, mine) for other in reached.values()) for name, mine in reached.items()}
        better = sum(count < above[key] for count in above.values())
        return above[key] > 0 and better >= max(1, len(reached) // self._reduction)
