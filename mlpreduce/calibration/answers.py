"""What criteria say of the hidden units of a model's MLPs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import nn

from mlpreduce.calibration.correlations import measure_correlations
from mlpreduce.calibration.learn import measure_gates
from mlpreduce.calibration.measure import Loss, Measured, measure_scores
from mlpreduce.calibration.moments import measure_moments
from mlpreduce.calibration.similarity import measure_similarity
from mlpreduce.calibration.sums import UnitSums
from mlpreduce.calibration.units import measure_units
from mlpreduce.calibration.watching import Watcher
from mlpreduce.criteria import Choice, HiddenUnits, Moments, Ranking, choose, derived_seed
from mlpreduce.errors import ReductionError
from mlpreduce.graph import MLP, module_at
from mlpreduce.layers import merged

__all__ = ["Answers"]

Value = TypeVar("Value")


class Answers:
    """Scores or orders by any criterion. Data is read for each criterion, for all MLPs together.

    Args:
        model: the model; it is not changed.
        mlps: its MLPs, all uses.
        data: calibration data, if there is any.
        loss: of what the model gives and labels; by default the cross entropy.
        refitted: whether what is chosen is refitted, so that the bias of fc2 takes up the means of what goes.
        watcher: looks on when the model runs over the data.
    """

    def __init__(
        self,
        model: nn.Module,
        mlps: Sequence[MLP],
        data: Any = None,
        loss: Loss | None = None,
        *,
        refitted: bool = False,
        watcher: Watcher | None = None,
    ) -> None:
        self._model, self._mlps, self._data, self._loss = model, mlps, data, loss
        self._refitted, self._watcher = refitted, watcher
        self._measured: dict[tuple[str, int], Measured] = {}
        self._sums: dict[tuple[bool, bool], dict[str, UnitSums]] = {}  # by whether of pairs, and of a loss
        self._of_moments: dict[tuple[str, str], torch.Tensor | Ranking] = {}  # by criterion and owner
        self._moments: dict[str, torch.Tensor] | None = None
        self._correlations: dict[tuple[str, str], torch.Tensor] = {}
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

    def of(self, mlp: MLP, choice: Choice, seed: int = 0, wanted: int | None = None) -> torch.Tensor | Ranking:
        """Scores of the units of an MLP, or their order, (hidden units,), or both: see `mlpreduce.criteria`.

        Raises:
            ReductionError: the criterion needs weights or data and there are none, or gives what is neither.
        """
        criterion = choice.criterion
        if criterion.needs in ("moments", "pairs"):
            asked = str(choice), mlp.owner
            if asked not in self._of_moments:
                self._of_moments[asked] = _checked(choice, mlp, choice.values(self._moments_of(mlp, choice, seed)))
            return self._of_moments[asked]
        if criterion.of_data:
            if (key := (str(choice), seed)) not in self._measured:
                self._measured[key] = self._measure(choice, seed)
            return self._measured[key].scores[mlp.owner]
        return _checked(choice, mlp, choice.values(self._units(mlp, seed, wanted)))

    def _units(self, mlp: MLP, seed: int = 0, wanted: int | None = None) -> HiddenUnits:
        return HiddenUnits(mlp, self._plain, derived_seed(seed, mlp.owner), wanted)

    def _moments_of(self, mlp: MLP, choice: Choice, seed: int) -> Moments:
        """What a criterion of moments or pairs looks at; the data is read once for all MLPs, or for as many as memory holds."""
        kind = choice.criterion.needs == "pairs", choice.needs_loss
        if mlp.owner not in self._sums.get(kind, {}):
            self._used |= {"data", "loss"} if choice.needs_loss else {"data"}
            self._sums.pop(kind, None)  # or there would be twice as much
            first = mlp.owner if kind[0] else ""
            self._sums[kind], found = measure_units(
                self._model, self._mlps, self._data, choice, self._loss, first=first, watcher=self._watcher
            )
            self._measured[str(choice), seed] = found if kind[0] else replace(found, sums=self._sums[kind])
        sums, units = self._sums[kind].get(mlp.owner), self._units(mlp, seed)
        if sums is None:
            raise ReductionError(f"{mlp.leaf('fc2').call} is no linear layer or 1 x 1 convolution; exclude {mlp.name}")
        wanted = None if sums.wanted is None else sums.wanted / sums.examples
        return Moments(
            units,
            units.weights("fc2.weight").double().T.to(sums.total.device),
            sums.rows.sum(0),
            sums.total.sum(0),
            sums.squares.sum(0),
            sums.pairs,
            wanted,
            folded=self._refitted and sums.biased,
        )

    def pairs(self, mlp: MLP, choice: Choice) -> Moments:
        """The moments that a criterion of pairs looks at: what fc2 of an MLP is given.

        Raises:
            ReductionError: as `of`.
        """
        return self._moments_of(mlp, choice, 0)

    def shares(self, mlp: MLP, *, read: bool) -> torch.Tensor | None:
        """The part of each hidden unit in the output energy of its MLP, of the use where it is largest, (hidden units,).

        The energy is the variance where the bias of fc2 takes up means, else the mean square.

        Args:
            mlp: the MLP.
            read: whether the data is read where no criterion has looked at it.

        Returns:
            None where it is not known: without data, or where fc2 does not project.
        """
        if self._data is None:
            return None
        known = [measured.sums for measured in self._measured.values() if measured.sums]
        if not known and not read:
            return None
        if not known:
            self._used.add("data")
            sums, measured = measure_units(
                self._model, self._mlps, self._data, choose("energy"), what="guard", watcher=self._watcher
            )
            self._measured["energy", 0] = replace(measured, sums=sums)
            known = [sums]
        if (one := known[0].get(mlp.owner)) is None:
            return None
        norms = self._units(mlp).weights("fc2.weight").double().square().sum(1)
        return one.shares(norms.to(one.total.device), centred=self._refitted and one.biased).cpu()

    def similarity(self) -> dict[tuple[str, str], float]:
        """Linear CKA of what MLPs give on the data, for each pair of names: see `measure_similarity`."""
        self._used.add("data")
        pairs, self._measured["similarity", 0] = measure_similarity(self._model, self._mlps, self._data)
        return pairs

    def relate(self, pairs: Sequence[tuple[MLP, MLP]]) -> None:
        """Measure how units of MLPs go together, for all pairs in one reading of the data."""
        self._used.add("data")
        found, self._measured["correlations", 0] = measure_correlations(self._model, self._mlps, pairs, self._data)
        self._correlations |= found

    def correlations(self, one: MLP, other: MLP) -> torch.Tensor:
        """Of what fc2 is given in two MLPs that were related, (hidden units of the one, of the other)."""
        if (one.name, other.name) not in self._correlations:
            self.relate([(one, other)])
        return self._correlations[one.name, other.name]

    def read_by(self, what: str, look: Callable[[Any], tuple[Value, Measured]]) -> Value:
        """What something else makes of the data, which is then looked at."""
        self._used.add("data")
        found, self._measured[what, 0] = look(self._data)
        return found

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
        return measure_scores(self._model, self._mlps, choice, self._data, self._loss, seed, self._watcher)


def _checked(choice: Choice, mlp: MLP, answer: torch.Tensor | Ranking) -> torch.Tensor | Ranking:
    """What a criterion gave, if it is of all units and finite.

    Raises:
        ReductionError: it is not.
    """
    size = mlp.hidden_features
    for values in (answer.order, answer.scores) if isinstance(answer, Ranking) else (answer,):
        if tuple(values.shape) != (size,) or not values.isfinite().all():
            raise ReductionError(
                f"criterion {choice} gave {tuple(values.shape)} values for the {size} hidden units of {mlp.name}, or "
                f"some that are not finite; are its weights?"
            )
        if not values.is_floating_point() and sorted(values.tolist()) != list(range(size)):
            raise ReductionError(
                f"criterion {choice} gave whole numbers for {mlp.name} that are no order of its {size} hidden units; "
                f"give each unit once, or scores in floating point"
            )
    return answer


def _with_values(value: Any, path: str) -> torch.Tensor:
    if value.is_meta:
        raise ReductionError(f"needs the values of {path}, but the model is on the meta device; give it weights first")
    return cast(torch.Tensor, value)
