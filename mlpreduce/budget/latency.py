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
from mlpreduce.errors import ReductionError, check_whole, optional
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
from mlpreduce.slicing import slice_all

__all__ = ["LatencyTable", "sliced_copy", "timed"]

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

        The widths are timed in turns, so that what else the machine does falls on all alike, and the medians are made
        monotone by isotonic regression. The model is not changed, and timed in eval mode.

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
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("points", points, 2),
            ("repeats", repeats, 1),
            ("round_to", round_to, 1),
        ):
            check_whole(f"{call}: {name}", value, least=least)
        optional("scipy.optimize", "LatencyTable.measure")  # before minutes are spent
        mlps = find_mlps(model, example_inputs)
        if not mlps:
            raise ReductionError(f"{call}: found no MLP")
        batch = inputs_of(model, batch_size) if example_inputs is None else example_inputs
        first = tensors_in(batch)[0]
        if first.is_meta or next(model.parameters()).is_meta:
            raise ReductionError(f"{call}: a model on the meta device cannot be timed; move it to a device")
        groups = _groups(mlps)
        grids = [_grid(group[0], points, round_to) for group in groups]
        variants: list[tuple[int, int]] = [(-1, 0)]
        variants += [(g, width) for g, grid in enumerate(grids) for width in grid[:-1]]
        models = [
            sliced_copy(model, mlps, {m.name: width for m in groups[g]} if g >= 0 else {}) for g, width in variants
        ]
        found = timed(models, batch, first.device, repeats)
        full = found[0]
        rows = []
        for g, group in enumerate(groups):
            times = [seconds for (which, _), seconds in zip(variants, found, strict=True) if which == g] + [full]
            rows.append([float(t) / len(group) for t in _monotone(times)])
        base = full - sum((row[-1] - row[0]) * len(group) for row, group in zip(rows, groups, strict=True))
        return cls(
            base=base,
            groups=tuple(tuple(mlp.owner for mlp in group) for group in groups),
            widths=tuple(grids),
            milliseconds=tuple(tuple(t - row[0] for t in row) for row in rows),
            conditions={
                "batch_size": len(first),
                "device": torch.cuda.get_device_name(first.device)
                if first.device.type == "cuda"
                else first.device.type,
                "dtype": str(first.dtype).removeprefix("torch."),
                "threads": torch.get_num_threads(),
            },
        )

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

    def predict(self, widths: Mapping[str, int]) -> float:
        """Milliseconds of a batch with these widths, by owner; those that are not given are full."""
        full = {owner: row[-1] for group, row in zip(self.groups, self.widths, strict=True) for owner in group}
        unknown = [owner for owner in widths if owner not in full]
        if unknown:
            raise ReductionError(f"the latency table has no {unknown[0]}; it is of another model: measure one of this")
        return self.base + sum(self.of(owner, widths.get(owner, size)) for owner, size in full.items())

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps({"version": _VERSION, **vars(self)}, indent=1), encoding="utf-8")

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
    """Evenly spaced widths, from the narrowest to the full one."""
    slot = Slot.of(mlp, round_to, float)
    spaced = np.linspace(slot.step, slot.hidden, points)
    return tuple(sorted({slot.rounded(int(width)) for width in spaced} | {slot.hidden}))


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
    """The median milliseconds of each, in turns, the first of which is not counted."""
    batch = map_tensors(batch, lambda tensor: tensor.detach())
    taken: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for turn in range(repeats + 1):
            for index in range(len(models))[:: 1 if turn % 2 else -1]:
                start = time.perf_counter()
                call_with(models[index], batch)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if turn:
                    taken[index].append((time.perf_counter() - start) * 1e3)
    return [statistics.median(times) for times in taken]


def _monotone(times: Sequence[float]) -> np.ndarray:
    """The nearest values that never fall, by least squares."""
    optimize = optional("scipy.optimize", "LatencyTable.measure")
    return np.asarray(optimize.isotonic_regression(np.asarray(times)).x)
