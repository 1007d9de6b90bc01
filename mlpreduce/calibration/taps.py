"""Taps at the hidden units of a model: what fc2 is given, and factors by which units are multiplied, one per example."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mlpreduce.calibration.batches import Batch
from mlpreduce.errors import ReductionError
from mlpreduce.graph import MLP, Leaf, module_at, projection

__all__ = ["Taps"]

Gates = dict[tuple[str, str], torch.Tensor]


@dataclass(frozen=True)
class _Tap:
    """Where the hidden units of an MLP pass: at the output of fc1, or the input of fc2, or a part of either."""

    owner: str
    site: str
    leaf: nn.Module
    dim: int  # of features
    offsets: tuple[int, ...]
    hidden: int


class Taps:
    """Hooks on a copy of a model, at each unique MLP.

    Args:
        tree: the copy.
        mlps: its MLPs, all uses.
        sites: leaves to tap: `fc1`, `fc2`.
    """

    def __init__(self, tree: nn.Module, mlps: Sequence[MLP], sites: Sequence[str]) -> None:
        self._taps: dict[int, _Tap] = {}
        self.hidden = {mlp.owner: mlp.hidden_features for mlp in mlps}
        for mlp in mlps:
            for leaf in mlp.leaves:
                if leaf.role in sites:
                    module = module_at(tree, leaf.call)
                    if module is not None and (tap := _tap(mlp, leaf, module)) is not None:
                        self._taps.setdefault(id(module), tap)

    def places(self) -> list[tuple[str, str]]:
        """(owner, site) of all."""
        return list(dict.fromkeys((tap.owner, tap.site) for tap in self._taps.values()))

    def gates(self, examples: int, like: torch.Tensor) -> Gates:
        """Ones, (examples, hidden units) for each key, that want gradients."""
        return {
            key: torch.ones(examples, self.hidden[key[0]], device=like.device, dtype=like.dtype, requires_grad=True)
            for key in self.places()
        }

    @contextmanager
    def multiplying(self, gates: Gates) -> Iterator[None]:
        """Within, units are multiplied by gates (examples, hidden units), or (1, hidden units) for all alike.

        Those of MLPs without a gate stay as they are.
        """
        handles = []
        for tap in self._taps.values():
            if (gate := gates.get((tap.owner, tap.site))) is None:
                continue

            def after(module: nn.Module, args: Any, output: Any, tap: _Tap = tap, gate: torch.Tensor = gate) -> Any:
                return output * _factors(tap, gate, output)

            def before(module: nn.Module, args: Any, tap: _Tap = tap, gate: torch.Tensor = gate) -> Any:
                return (args[0] * _factors(tap, gate, args[0]), *args[1:])

            handles.append(
                tap.leaf.register_forward_hook(after)
                if tap.site == "fc1"
                else tap.leaf.register_forward_pre_hook(before)
            )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def recording(self, examples: int) -> Iterator[dict[str, list[torch.Tensor]]]:
        """Within, what fc2 is given is kept, (examples, positions, hidden units) for each call, by owner."""
        kept: dict[str, list[torch.Tensor]] = {owner: [] for owner in self.hidden}
        handles = []
        for tap in self._taps.values():
            if tap.site == "fc2":

                def before(module: nn.Module, args: Any, tap: _Tap = tap) -> None:
                    kept[tap.owner].append(_hidden(tap, args[0], examples))

                handles.append(tap.leaf.register_forward_pre_hook(before))
        try:
            yield kept
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def check_examples(self, tree: nn.Module, batch: Batch) -> None:
        """Whether every MLP has the examples along the first dimension, one after the other: a spoilt one spoils no other.

        Raises:
            ReductionError: an MLP has not.
        """
        first, spoilt = batch[:1], batch[:1].spoilt()
        with self.recording(2) as pairs:
            Batch.joined([first, spoilt]).run(tree)
        with self.recording(1) as alone:
            first.run(tree)
        for owner, calls in pairs.items():
            if not all(call.isfinite().all() for call in alone[owner]):
                raise ReductionError(
                    f"what {owner} makes of the first example is not finite; look at the weights and the data"
                )
            if not all(_apart(*both, batch.floats) for both in zip(calls, alone[owner], strict=True)):
                raise ReductionError(
                    f"{owner} does not have the examples one after the other along its first dimension, so that what a unit "
                    f"does cannot be told by example; use a criterion of the weights"
                )


def _apart(pair: torch.Tensor, alone: torch.Tensor, floats: bool) -> bool:
    """Whether the first of a pair is as alone, whatever the second is."""
    if floats:
        return bool(pair[0].isfinite().all()) and not bool(pair[1].isfinite().all())
    return torch.allclose(pair[:1], alone, rtol=1e-2, atol=1e-3 * float(alone.abs().max()))


def _tap(mlp: MLP, leaf: Leaf, module: nn.Module) -> _Tap | None:
    layer = projection(module)
    if layer is None:
        return None
    along = layer.outputs if leaf.role == "fc1" else layer.inputs
    axes = [(f"{leaf.call}.{name}", dim) for name, dim, *_ in along]
    offsets = [axis.offsets for axis in mlp.axes if (axis.tensor, axis.dim) in axes]
    return _Tap(mlp.owner, leaf.role, module, layer.features, offsets[0], mlp.hidden_features) if offsets else None


def _spread(tap: _Tap, value: torch.Tensor, examples: int) -> int:
    """Rows of the first dimension for each example."""
    if len(value) % examples:
        raise ReductionError(
            f"{tap.owner} is given {tuple(value.shape)} for {examples} images, which are not along its first dimension; use "
            f"a criterion of the weights"
        )
    return len(value) // examples


def _factors(tap: _Tap, gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Gates in a shape that multiplies `value`; what is no hidden unit there is multiplied by 1."""
    dim = tap.dim % value.dim()
    size = value.shape[dim]
    if len(tap.offsets) * tap.hidden == size:
        factors = gate if len(tap.offsets) == 1 else torch.cat([gate] * len(tap.offsets), 1)
    else:
        factors = gate.new_ones(len(gate), size)
        for offset in tap.offsets:
            factors = torch.cat([factors[:, :offset], gate, factors[:, offset + tap.hidden :]], 1)
    if len(gate) > 1 and (rows := _spread(tap, value, len(gate))) > 1:
        factors = factors.repeat_interleave(rows, 0)
    return factors.reshape(len(factors), *[1] * (dim - 1), size, *[1] * (value.dim() - dim - 1))


def _hidden(tap: _Tap, value: torch.Tensor, examples: int) -> torch.Tensor:
    _spread(tap, value, examples)
    units = value.movedim(tap.dim, -1).narrow(-1, tap.offsets[0], tap.hidden)
    return units.reshape(examples, -1, tap.hidden)
