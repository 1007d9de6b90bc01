"""Hidden widths by what they cost in loss: the narrowest of each MLP that the model hardly notices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mlpreduce.budget.solve import Slot
from mlpreduce.calibration import (
    Answers,
    Samples,
    Taps,
    all_reduce,
    in_all,
    objective_of,
    quiet_copy,
    running,
    telling,
)
from mlpreduce.calibration import Loss as LossFunction
from mlpreduce.criteria import Choice, as_order, choose
from mlpreduce.errors import ReductionError, check_number, check_whole, naming
from mlpreduce.graph import MLP, Inputs, find_mlps, first_units, refuse_wrapped
from mlpreduce.words.values import Config
from mlpreduce.words.waiting import steps

__all__ = ["Loss"]


@dataclass(frozen=True)
class Loss:
    """Widths by binary search on the loss, from the last MLP to the first, each beside those that were narrowed before it.

    Attributes:
        limit: by how much the mean loss of the calibration data may grow with one MLP, in the unit of the loss.
        round_to: widths are multiples of this, and of the groups of a grouped convolution.
        halvings: of the range of widths, for each MLP; None: until the narrowest is found.
        cumulative: whether MLPs that were narrowed stay so while the others are searched, so that the loss grows by no more
            than the limit for each; False: each by itself, while all others are whole.

    Example:
        >>> import torch
        >>> from mlpreduce.testing import tiny_vit
        >>> images = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        >>> widths = Loss(limit=1e-3).widths(tiny_vit(), [images])
        >>> list(widths), all(1 <= width <= 128 for width in widths.values())
        (['blocks.0.mlp', 'blocks.1.mlp', 'blocks.2.mlp', 'blocks.3.mlp'], True)

    Source:
        The width search of the successor of DGMR, arXiv 2603.08100, written from a description of its released code: from the
        last block to the first, cumulative, 6 halvings, limit 5e-3.
    """

    limit: float = 5e-3
    round_to: int = 1
    halvings: int | None = 6
    cumulative: bool = True

    def widths(
        self,
        model: nn.Module,
        data: Any,
        *,
        criterion: str | Config = "entropy_taylor",
        loss: LossFunction | None = None,
        seed: int = 0,
        example_inputs: Inputs | None = None,
    ) -> dict[str, int]:
        """The width of each unique MLP, to be given as `widths=` to `shallow` with the same criterion.

        Units are taken away by multiplying with zero, which equals slicing where no norm lies on the hidden axis. The loss is
        the criterion's own if it has one, as that of `entropy_taylor`, which needs no labels; else that of `plan`. The
        examples are kept in memory; `halvings` passes are made for each MLP, at most log2(hidden features), and one more.

        Args:
            model: the model; it is not changed.
            data: calibration data, as of `plan`.
            criterion: which units go first.
            loss: as of `plan`.
            seed: of criteria that draw random numbers.
            example_inputs: what the model is called with, as for `find_mlps`.

        Raises:
            ReductionError: as `plan` with that criterion; the limit is negative, or a step is wider than an MLP.
        """
        call = f"budget.Loss(limit={self.limit!r}, round_to={self.round_to!r})"
        if self.halvings is not None:
            check_whole(f"{call}: halvings", self.halvings)
        refuse_wrapped(model, call)
        check_number(f"{call}: limit", self.limit)
        check_whole(f"{call}: round_to", self.round_to)
        choice = choose(criterion)
        mlps = find_mlps(model, example_inputs)
        if not mlps:
            raise ReductionError(f"{call}: found no MLP")
        with naming(call):
            slots = [(mlp, Slot.of(mlp, self.round_to, float)) for mlp in mlps if mlp.owner == mlp.name]
            kept = _Kept(model, mlps, choice, data, loss)
            answers = Answers(model, mlps, kept.batches, loss)
            with running(kept.device, gradients=False):
                before = kept.loss({})
                narrowed: dict[str, list[int]] = {}
                orders = {mlp.name: as_order(answers.of(mlp, choice, seed)) for mlp, _ in slots}
                found = {}
                with steps("budget.Loss: widths", len(slots)) as advance:
                    for mlp, slot in reversed(slots):
                        order = orders[mlp.name]
                        found[mlp.name] = self._narrowest(mlp, slot, order, before, kept, narrowed)
                        if self.cumulative:
                            narrowed[mlp.name] = first_units(mlp, order, found[mlp.name])
                            before = kept.loss(narrowed)
                        advance(1)
                return {mlp.name: found[mlp.name] for mlp, _ in slots}

    def _narrowest(
        self, mlp: MLP, slot: Slot, order: list[int], before: float, kept: _Kept, narrowed: Mapping[str, list[int]]
    ) -> int:
        """The least number of steps at which the loss is within the limit, if it only grows as units go."""
        low, high, left = 1, math.ceil(slot.hidden / slot.step), self.halvings
        while low < high and left != 0:
            middle = (low + high) // 2
            units = first_units(mlp, order, middle * slot.step)
            if kept.loss({**narrowed, mlp.name: units}) - before <= self.limit:
                high = middle
            else:
                low = middle + 1
            left = None if left is None else left - 1
        return min(high * slot.step, slot.hidden)


class _Kept:
    """Calibration data in memory, and the mean loss of the model with some units alone."""

    def __init__(self, model: nn.Module, mlps: list[MLP], choice: Choice, data: Any, loss: LossFunction | None) -> None:
        own = choice.criterion.objective is not None
        samples = Samples(data, model, labels=not own, compared=own)
        self._like = samples.like
        self.device, self._choice, self._function = samples.device, choice, loss
        self.batches: list[Any] = []
        problem: Exception | None = None
        with running(samples.device, gradients=False), samples.shown("budget.Loss: data"):
            try:
                self.batches += samples.chunks()
            except Exception as error:  # whatever the data raises: the other processes are told
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
        with in_all():
            for batch, labels in self.batches:
                masks = {key: gate.to(self._like) for key, gate in gates.items()}
                with telling(batch), self._taps.multiplying(masks), torch.no_grad():
                    mean = objective_of(self._choice, self._tree, batch, labels, self._function)()
                total += torch.tensor([mean.double().item() * len(batch), len(batch)], dtype=torch.float64)
        total = all_reduce(total)
        found = float(total[0] / total[1])
        if not math.isfinite(found):
            raise ReductionError(f"the mean loss of the data is {found}; look at the model or the data")
        return found
