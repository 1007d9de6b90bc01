"""What criteria say of the hidden units of a model's MLPs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from mlpreduce.calibration.learn import measure_gates
from mlpreduce.calibration.measure import Loss, Measured, measure_scores
from mlpreduce.calibration.moments import measure_moments
from mlpreduce.calibration.similarity import measure_similarity
from mlpreduce.criteria import Choice, HiddenUnits, derived_seed
from mlpreduce.errors import ReductionError
from mlpreduce.graph import MLP, module_at
from mlpreduce.layers import merged

__all__ = ["Answers"]


class Answers:
    """Scores or orders by any criterion. Data is read for each criterion, for all MLPs together.

    Args:
        model: the model; it is not changed.
        mlps: its MLPs, all uses.
        data: calibration data, if there is any.
        loss: of what the model gives and labels; by default the cross entropy.
    """

    def __init__(self, model: nn.Module, mlps: Sequence[MLP], data: Any = None, loss: Loss | None = None) -> None:
        self._model, self._mlps, self._data, self._loss = model, mlps, data, loss
        self._measured: dict[tuple[str, int], Measured] = {}
        self._moments: dict[str, torch.Tensor] | None = None
        self._used: set[str] = set()

    @property
    def data(self) -> dict[str, Any] | None:
        """Number and fingerprint of the examples that were looked at, if any were."""
        known = next(iter(self._measured.values()), None)
        return None if known is None else {"samples": known.samples, "fingerprint": known.fingerprint}

    @property
    def unused(self) -> list[str]:
        """Which of `data` and `loss` were given, and no criterion has looked at."""
        given = {"data": self._data, "loss": self._loss}
        return [name for name, value in given.items() if value is not None and name not in self._used]

    def tensor(self, path: str) -> torch.Tensor:
        """The values of a parameter or buffer.

        Raises:
            ReductionError: the model is on the meta device and has no values.
        """
        parent, _, name = path.rpartition(".")
        return _with_values(getattr(module_at(self._model, parent), name), path)

    def _plain(self, path: str) -> torch.Tensor:
        """The same of the plain layer that a layer of this library stands for."""
        parent, _, name = path.rpartition(".")
        module = module_at(self._model, parent)
        held = None if module is None else next(module.parameters(), None)
        if module is not None and held is not None and not held.is_meta:
            module = merged(module)
        return _with_values(held if module is None else getattr(module, name, held), path)

    def of(self, mlp: MLP, choice: Choice, seed: int = 0, wanted: int | None = None) -> torch.Tensor:
        """Scores of the units of an MLP, or their order, (hidden units,): see `mlpreduce.criteria`.

        Raises:
            ReductionError: the criterion needs weights or data and there are none, or gives what is neither.
        """
        criterion = choice.criterion
        if criterion.of_data:
            if (key := (str(choice), seed)) not in self._measured:
                self._measured[key] = self._measure(choice, seed)
            return self._measured[key].scores[mlp.owner]
        units = HiddenUnits(mlp, self._plain, derived_seed(seed, mlp.owner), wanted)
        answer = choice.values(units)
        if tuple(answer.shape) != (len(units),) or not answer.isfinite().all():
            raise ReductionError(
                f"criterion {choice} gave {tuple(answer.shape)} values for the {len(units)} hidden units of {mlp.name}, or "
                f"some that are not finite; are its weights?"
            )
        if not answer.is_floating_point() and sorted(answer.tolist()) != list(range(len(units))):
            raise ReductionError(
                f"criterion {choice} gave whole numbers for {mlp.name} that are no order of its {len(units)} hidden units; "
                f"give each unit once, or scores in floating point"
            )
        return answer

    def similarity(self) -> dict[tuple[str, str], float]:
        """Linear CKA of what MLPs give on the data, for each pair of names: see `measure_similarity`."""
        self._used.add("data")
        pairs, self._measured["similarity", 0] = measure_similarity(self._model, self._mlps, self._data)
        return pairs

    def moments(self) -> dict[str, torch.Tensor]:
        """What the layers of all MLPs are given on the data, by path: see `measure_moments`."""
        if self._moments is None:
            self._used.add("data")
            self._moments, self._measured["moments", 0] = measure_moments(self._model, self._mlps, self._data)
        return self._moments

    def _measure(self, choice: Choice, seed: int) -> Measured:
        self._used |= {"data"} if choice.criterion.objective or choice.criterion.needs == "images" else {"data", "loss"}
        if choice.criterion.needs == "gates":
            return measure_gates(self._model, self._mlps, choice, self._data, self._loss)
        return measure_scores(self._model, self._mlps, choice, self._data, self._loss, seed)


def _with_values(value: Any, path: str) -> torch.Tensor:
    if value.is_meta:
        raise ReductionError(f"needs the values of {path}, but the model is on the meta device; give it weights first")
    return cast(torch.Tensor, value)
