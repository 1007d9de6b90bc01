"""Hidden widths by what they cost in loss: the narrowest of each MLP that the model hardly notices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mlpreduce.calibration import Answers, Samples, Taps, all_reduce, objective_of, quiet_copy, running, telling
from mlpreduce.calibration import Loss as LossFunction
from mlpreduce.criteria import Choice, as_order, choose
from mlpreduce.errors import ReductionError
from mlpreduce.graph import MLP, find_mlps, first_units, refuse_wrapped

__all__ = ["Loss"]


@dataclass(frozen=True)
class Loss:
    """Widths by binary search on the loss, each MLP by itself while the others are whole.

    Attributes:
        limit: by how much the mean loss of the calibration data may grow for one MLP, in the unit of the loss.
        round_to: widths are multiples of this, and of the groups of a grouped convolution.

    Example:
        >>> import torch
        >>> from mlpreduce.testing import tiny_vit
        >>> images = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        >>> widths = Loss(limit=1e-3).widths(tiny_vit(), [images])
        >>> list(widths), all(1 <= width <= 128 for width in widths.values())
        (['blocks.0.mlp', 'blocks.1.mlp', 'blocks.2.mlp', 'blocks.3.mlp'], True)

    Source:
        The width search of the successor of DGMR, arXiv 2603.08100 (limit 1e-2), written from a description of it.
    """

    limit: float = 1e-2
    round_to: int = 1

    def widths(
        self,
        model: nn.Module,
        data: Any,
        *,
        criterion: str | Mapping[str, Any] = "entropy_taylor",
        loss: LossFunction | None = None,
        seed: int = 0,
    ) -> dict[str, int]:
        """The width of each unique MLP, to be given as `widths=` to `shallow` with the same criterion.

        Units are taken away by multiplying with zero, which equals slicing where no norm lies on the hidden axis. The loss is
        the criterion's own if it has one, as that of `entropy_taylor`, which needs no labels; else that of `plan`. The
        examples are kept in memory; about log2(hidden features) passes are made for each MLP.

        Args:
            model: the model; it is not changed.
            data: calibration data, as of `plan`.
            criterion: which units go first.
            loss: as of `plan`.
            seed: of the criterion `random`.

        Raises:
            ReductionError: as `plan` with that criterion; the limit is negative, or a step is wider than an MLP.
        """
        call = f"budget.Loss(limit={self.limit!r}, round_to={self.round_to!r})"
        refuse_wrapped(model, call)
        if not 0 <= self.limit < math.inf or self.round_to < 1:
            raise ReductionError(f"{call}: limit must be a number from 0, round_to a whole number from 1")
        choice = choose(criterion)
        mlps = find_mlps(model)
        owners = [mlp for mlp in mlps if mlp.owner == mlp.name]
        wide = [mlp for mlp in owners if math.lcm(self.round_to, mlp.groups) > mlp.hidden_features]
        if wide or not mlps:
            fact = f"{wide[0].name} has {wide[0].hidden_features} hidden units" if wide else "found no MLP"
            raise ReductionError(f"{call}: {fact}; a smaller round_to would help" if wide else f"{call}: {fact}")
        try:
            kept = _Kept(model, mlps, choice, data, loss)
            answers = Answers(model, mlps, kept.batches, loss)
            with running(kept.device, gradients=False):
                whole = kept.loss({})
                orders = {
                    mlp.name: as_order(answers.of(mlp, choice, seed + number)) for number, mlp in enumerate(owners)
                }
                return {mlp.name: self._narrowest(mlp, orders[mlp.name], whole, kept) for mlp in owners}
        except ReductionError as error:
            raise ReductionError(f"{call}: {error}") from error

    def _narrowest(self, mlp: MLP, order: list[int], whole: float, kept: _Kept) -> int:
        """The least number of steps at which the loss is within the limit, if it only grows as units go."""
        step = math.lcm(self.round_to, mlp.groups)
        low, high = 1, math.ceil(mlp.hidden_features / step)
        while low < high:
            middle = (low + high) // 2
            units = first_units(mlp, order, middle * step)
            if kept.loss({mlp.name: units}) - whole <= self.limit:
                high = middle
            else:
                low = middle + 1
        return min(high * step, mlp.hidden_features)


class _Kept:
    """Calibration data in memory, and the mean loss of the model with some units alone."""

    def __init__(self, model: nn.Module, mlps: list[MLP], choice: Choice, data: Any, loss: LossFunction | None) -> None:
        samples = Samples(data, model, labels=choice.criterion.objective is None)
        self.device, self._choice, self._function = samples.device, choice, loss
        self.batches: list[Any] = []
        problem = None
        with running(samples.device, gradients=False):
            try:
                self.batches += samples.chunks()
            except ReductionError as error:
                problem = error
            samples.finish({}, problem)
            self._tree = quiet_copy(model)
        self._taps = Taps(self._tree, mlps, ("fc2",))

    def loss(self, units: Mapping[str, list[int]]) -> float:
        """The mean over all examples and processes with these units of some MLPs alone."""
        gates = {}
        for owner, some in units.items():
            gate = torch.zeros(1, self._taps.hidden[owner], device=self.device)
            gate[0, some] = 1
            gates[owner, "fc2"] = gate
        total = torch.zeros(2, dtype=torch.float64)
        for images, labels in self.batches:
            masks = {key: gate.to(images) for key, gate in gates.items()}
            with telling(images), self._taps.multiplying(masks), torch.no_grad():
                mean = objective_of(self._choice, self._tree, images, labels, self._function)()
            total += torch.tensor([mean.double().item() * len(images), len(images)], dtype=torch.float64)
        total = all_reduce(total)
        found = float(total[0] / total[1])
        if not math.isfinite(found):
            raise ReductionError(f"the mean loss of the data is {found}; look at the model or the data")
        return found
