"""Latency of a model by the hidden widths of its MLPs: measured at a few widths, monotone, interpolated between."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mlpreduce.budget.solve import Slot
from mlpreduce.errors import ReductionError, check_number, check_whole
from mlpreduce.files import replacing
from mlpreduce.graph import (
    MLP,
    Inputs,
    call_with,
    find_mlps,
    first_units,
    map_tensors,
    refuse_wrapped,
    slice_edit,
    structural_copy,
    tensors_in,
)
from mlpreduce.graph import example_inputs as inputs_of
from mlpreduce.surgery.slicing import slice_all
from mlpreduce.words.waiting import steps

__all__ = ["LatencyTable", "Variants", "sliced_copy", "timed"]

_VERSION = 1


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds that a model takes for a batch, by hidden widths.

    Attributes:
        base: milliseconds of all but the MLPs of the table at their narrowest.
        groups: MLPs that are alike, by owner; each of a group takes equally long.
        widths: of each group, ascending; the last is the full width.
        milliseconds: of one MLP of each group, at each of its widths, above `base`.
        conditions: batch size, device, type and threads.

    Source:
        The look-up table of NViT (arXiv 2110.04869), over the MLP's width alone.
    """

    base: float
    groups: tuple[tuple[str, ...], ...]
    widths: tuple[tuple[int, ...], ...]
    milliseconds: tuple[tuple[float, ...], ...]
    conditions: dict[str, Any]

    @classmethod
    def measure(
        cls,
        model: nn.Module,
        *,
        example_inputs: Inputs | None = None,
        batch_size: int = 8,
        points: int = 9,
        repeats: int = 15,
        round_to: int = 1,
    ) -> LatencyTable:
        """Time a model with its MLPs at a few widths, group by group, the others full.

        Each width is timed between two runs of the whole model, in turns, so that a machine that changes its speed changes
        no ratio; the medians are made monotone by isotonic regression. The model is not changed, and timed in eval mode.

        Args:
            model: the model, where it is to be timed.
            example_inputs: what it is called with; by default zeros of the size it says it takes.
            batch_size: images of a timed batch, if there are no example inputs.
            points: widths of each group that are timed, evenly spaced, at least 2.
            repeats: turns.
            round_to: widths are multiples of this.

        Raises:
            ReductionError: the model has no MLP, is on the meta device, or an argument is out of range.
        """
        call = f"LatencyTable.measure({type(model).__name__})"
        refuse_wrapped(model, call)
        check_whole(f"{call}: batch_size", batch_size)
        check_whole(f"{call}: repeats", repeats)
        mlps = find_mlps(model, example_inputs)
        batch = inputs_of(model, batch_size) if example_inputs is None else example_inputs
        first = tensors_in(batch)[0]
        if first.is_meta or next(model.parameters()).is_meta:
            raise ReductionError(f"{call}: a model on the meta device cannot be timed; move it to a device")
        variants = Variants(model, mlps, call, points, round_to)
        return variants.table(timed(variants.models, batch, first.device, repeats), batch)

    def of(self, owner: str, width: int) -> float:
        """Milliseconds of one MLP above `base`, in all its uses; narrower than the table, those of its narrowest width.

        Raises:
            ReductionError: the table has no such MLP, or not so wide.
        """
        for group, widths, milliseconds in zip(self.groups, self.widths, self.milliseconds, strict=True):
            if owner in group:
                if width > widths[-1]:
                    raise ReductionError(
                        f"{owner} with {width} hidden units is wider than the latency table, which ends at {widths[-1]}; it is "
                        f"of another model: measure one of this"
                    )
                return float(np.interp(width, widths, milliseconds))
        raise ReductionError(f"the latency table has no {owner}; it is of another model: measure one of this")

    def predict(self, widths: Mapping[str, int], *, whole: float | None = None) -> float:
        """Milliseconds of a batch with these widths.

        Args:
            widths: hidden units by owner; those that are not given are full.
            whole: milliseconds that the whole model takes now, if the machine's speed has changed since the table was
                measured; what is predicted changes in proportion.

        Raises:
            ReductionError: an MLP or a width that the table does not have, or `whole` is no positive number.
        """
        full = {owner: row[-1] for group, row in zip(self.groups, self.widths, strict=True) for owner in group}
        unknown = [owner for owner in widths if owner not in full]
        if unknown:
            raise ReductionError(f"the latency table has no {unknown[0]}; it is of another model: measure one of this")
        taken = self.base + sum(self.of(owner, widths.get(owner, size)) for owner, size in full.items())
        if whole is None:
            return taken
        check_number("whole", whole, above=True)
        return taken / self.predict({}) * whole

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all."""
        place = Path(path)
        with replacing(place.parent, place.name) as (draft,):
            draft.write_text(json.dumps({"version": _VERSION, **vars(self)}, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read what `save` wrote.

        Raises:
            ReductionError: no such file, or no latency table.
        """
        call = f"LatencyTable.load({str(path)!r})"
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
            if document.pop("version") != _VERSION:
                raise ReductionError(f"{call}: another version of the table; measure it again")
            tables = {key: tuple(map(tuple, document[key])) for key in ("groups", "widths", "milliseconds")}
            return cls(base=float(document["base"]), conditions=dict(document["conditions"]), **tables)
        except OSError as error:
            raise ReductionError(
                f"{call}: {error.strerror}; write one with LatencyTable.measure(model).save(path)"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ReductionError):
                raise
            raise ReductionError(f"{call}: no latency table ({type(error).__name__}: {error})") from error


class Variants:
    """The models that a table is measured by, the whole one first, and what their times say.

    Attributes:
        models: to be timed.
    """

    def __init__(self, model: nn.Module, mlps: Sequence[MLP], call: str, points: int, round_to: int = 1) -> None:
        check_whole(f"{call}: points", points, least=2)
        check_whole(f"{call}: round_to", round_to)
        if not mlps:
            raise ReductionError(f"{call}: found no MLP")
        self._groups = _groups(mlps)
        self._grids = [_grid(group[0], points, round_to) for group in self._groups]
        self.models = [sliced_copy(model, mlps, {})]
        for group, grid in zip(self._groups, self._grids, strict=True):
            self.models += [sliced_copy(model, mlps, {m.name: width for m in group}) for width in grid[:-1]]

    def table(self, found: Sequence[float], batch: Inputs) -> LatencyTable:
        """The table, from the milliseconds of each model for a batch."""
        full, *rest = found
        rows = []
        for group, grid in zip(self._groups, self._grids, strict=True):
            times, rest = [*rest[: len(grid) - 1], full], rest[len(grid) - 1 :]
            rows.append([float(t) / len(group) for t in _monotone(times)])
        first = tensors_in(batch)[0]
        is_gpu = first.device.type == "cuda"
        return LatencyTable(
            base=full - sum((row[-1] - row[0]) * len(group) for row, group in zip(rows, self._groups, strict=True)),
            groups=tuple(tuple(mlp.owner for mlp in group) for group in self._groups),
            widths=tuple(self._grids),
            milliseconds=tuple(tuple(t - row[0] for t in row) for row in rows),
            conditions={
                "batch_size": len(first),
                "device": torch.cuda.get_device_name(first.device) if is_gpu else first.device.type,
                "dtype": str(first.dtype).removeprefix("torch."),
                "threads": torch.get_num_threads(),
            },
        )


def _groups(mlps: Sequence[MLP]) -> list[list[MLP]]:
    """Unique MLPs that are alike: same chain, and as many uses."""
    uses: dict[str, int] = {}
    for mlp in mlps:
        uses[mlp.owner] = uses.get(mlp.owner, 0) + 1
    groups: dict[Any, list[MLP]] = {}
    for mlp in mlps:
        if mlp.owner == mlp.name:
            groups.setdefault((mlp.chain, uses[mlp.owner]), []).append(mlp)
    return list(groups.values())


def _grid(mlp: MLP, points: int, round_to: int) -> tuple[int, ...]:
    """Evenly spaced widths, from the narrowest to the full one.

    Multiplications are faster at multiples of 8, which few widths are unless `round_to` makes them, so the grid has none.
    """
    slot = Slot.of(mlp, round_to, float)
    spaced = [slot.rounded(int(width)) for width in np.linspace(slot.step, slot.hidden, points)[:-1]]
    typical = {w - slot.step if w % 8 == 0 and slot.step % 8 and w > slot.step else w for w in spaced}
    return tuple(sorted(typical | {slot.hidden}))


def sliced_copy(model: nn.Module, mlps: Sequence[MLP], widths: Mapping[str, int]) -> nn.Module:
    """A copy in evaluation mode with other widths, by owner, to be timed; all else is in the model's own memory."""
    tree = structural_copy(model).eval()
    edits = []
    for mlp in mlps:
        if mlp.name in widths and widths[mlp.name] < mlp.hidden_features:
            units = first_units(mlp, range(mlp.hidden_features), widths[mlp.name])
            edits.append(slice_edit(mlp, [use for use in mlps if use.owner == mlp.owner], units))
    slice_all(tree, edits, ExitStack())
    return tree


def timed(models: Sequence[nn.Module], batch: Inputs, device: torch.device, repeats: int) -> list[float]:
    """Milliseconds of each; the first turn is not counted.

    The first model runs before and after each of the others, and what one takes is the median of its ratios to the mean of
    those two, times the first's median: a machine that changes its speed changes no ratio.
    """
    batch = map_tensors(batch, lambda tensor: tensor.detach())

    def run(model: nn.Module) -> float:
        start = time.perf_counter()
        call_with(model, batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) * 1e3

    first, *others = models
    firsts: list[float] = []
    found: list[list[float]] = [[] for _ in others]
    with torch.inference_mode(), steps("latency", repeats + 1) as advance:
        for turn in range(repeats + 1):
            before = run(first)
            for model, ratios in zip(others, found, strict=True):
                taken, after = run(model), run(first)
                if turn:
                    ratios.append(2 * taken / (before + after))
                    firsts.append(after)
                before = after
            if not others:
                firsts.append(before)
            advance(1)
    whole = statistics.median(firsts)
    return [whole, *(whole * statistics.median(ratios) for ratios in found)]


def _monotone(times: Sequence[float]) -> np.ndarray:
    """The nearest values that never fall, by least squares."""
    from scipy import optimize

    return np.asarray(optimize.isotonic_regression(np.asarray(times)).x)
