"""What the whole model does at each fc2 over all calibration data, noted in one run over it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from mlpreduce.calibration import Batch, Samples, in_all, telling
from mlpreduce.calibration.memory import allowed
from mlpreduce.calibration.probing import Probe, probing
from mlpreduce.calibration.samples import together
from mlpreduce.calibration.watching import Watcher
from mlpreduce.errors import ReductionError
from mlpreduce.graph import MLP, module_at, projection
from mlpreduce.repair.importance import position_weights, squared_slopes
from mlpreduce.repair.outputs import output_of
from mlpreduce.repair.streams import Cut, Joint, Joints, stopping_at, telling_of
from mlpreduce.repair.uses import Use

__all__ = ["Pick", "Whole"]

Pick = tuple[int, torch.Tensor]  # number of a batch of the data, and which of its examples
_PART = 0.5  # of the memory that may be taken, since what else looks at the same run takes some
_SEED = 0


@dataclass
class _Call:
    """One call of an fc2.

    Attributes:
        joint: where it joins the stream.
        dim: of features in what it gives.
        streams: those of each batch, as long as they fit.
        squares: squared gradients at its positions, (examples, positions), for each batch.
    """

    joint: Joint
    dim: int
    streams: list[torch.Tensor] | None = field(default_factory=list)
    squares: list[torch.Tensor] = field(default_factory=list)


class Whole(Watcher):
    """Streams behind MLPs, and how much what the model gives hangs on each position there.

    It looks on while the model runs over all data for somebody else, or runs it.

    Args:
        mlps: those that may be repaired, all uses; none if nothing is to be noted.
    """

    def __init__(self, mlps: Sequence[MLP] = ()) -> None:
        self._mlps = mlps
        self._calls: dict[str, _Call] = {}  # by name of the MLP
        self._left = 0.0  # bytes
        self._sloping = bool(mlps)  # whether the model has a derivative
        self._generator = torch.Generator().manual_seed(_SEED)
        self._outputs: list[torch.Tensor] = []  # what the model gave for each batch
        self._seen = ""  # fingerprint of the inputs, once all were run

    @contextmanager
    def over(self, tree: nn.Module, batch: Batch) -> Iterator[None]:
        """Within, the model as it is runs once on a batch; each batch of the data has its turn."""
        if self._seen or not self._mlps:
            yield
            return
        if not self._calls:
            self._find(tree, batch[:2])
        with ExitStack() as stack:
            stack.enter_context(
                telling_of(tree, [c.joint.told_by(partial(self._keep, c)) for c in self._calls.values()])
            )
            probes = stack.enter_context(self._probing(tree)) if self._sloping else []
            note = partial(self._note, batch, probes)
            stack.callback(tree.register_forward_hook(lambda module, args, given: note(given)).remove)
            yield

    def end(self, samples: Samples) -> None:
        """All processes have read all of the data."""
        self._seen = samples.of_inputs

    def look(self, tree: nn.Module, batches: Sequence[Batch], samples: Samples) -> Whole:
        """Run the model over the data, unless that was seen: what has seen it."""
        if self._seen == samples.of_inputs or not self._mlps:
            return self
        other = Whole(self._mlps)
        with in_all():
            for batch in batches:
                with telling(batch), other.over(tree, batch):
                    batch.run(tree)
        other.end(samples)
        return other

    def weights(
        self, names: Sequence[str], picks: Sequence[Pick], batches: Sequence[Batch]
    ) -> dict[str, list[torch.Tensor]] | None:
        """Weights of the positions of some examples of each batch, (examples, positions), by name of the MLP.

        Args:
            names: of the MLPs.
            picks: which examples.
            batches: the examples.

        Returns:
            None where the model has no derivative, in any process.
        """
        if not all(together(self._sloping)):
            return None
        squares = [[self._calls[name].squares[number][which] for number, which in picks] for name in names]
        found = position_weights(squares, [batch.mask for batch in batches])
        return dict(zip(names, found, strict=True))

    def outputs(self, picks: Sequence[Pick]) -> list[torch.Tensor]:
        """What the model gave for some examples of each batch, (examples, values); none if it was not seen."""
        return [self._outputs[number][which] for number, which in picks if self._outputs]

    def streams(
        self, tree: nn.Module, cut: Cut, index: int, pick: Pick, batch: Batch, uses: Sequence[Use], until: int
    ) -> list[torch.Tensor]:
        """Those behind these uses for some examples of a batch; the model runs for what was not kept.

        Args:
            tree: the whole model.
            cut: leaves out blocks of it whose outputs are known.
            index: number of the examples among those that are asked for.
            pick: which they are.
            batch: the examples.
            uses: the uses.
            until: blocks before this one are known then.
        """
        kept = [self._kept(use, pick) for use in uses]
        if all(stream is not None for stream in kept):
            return [stream for stream in kept if stream is not None]
        found: dict[str, torch.Tensor] = {}
        places = [use.dense.told_by(partial(found.__setitem__, use.name)) for use in uses]
        with cut.at(index, until), stopping_at(tree, [*places, *cut.last(until)]) as run:
            run(batch)
        return [found[use.name] for use in uses]

    def done(self, uses: Sequence[Use]) -> None:
        """Nothing is asked of these uses again."""
        for use in uses:
            self._calls.pop(use.name, None)

    def _find(self, tree: nn.Module, batch: Batch) -> None:
        """Look where MLPs join the stream, and whether the model has a derivative, by a few examples."""
        calls: dict[int, int] = {}
        with torch.no_grad():
            joints = Joints(tree, [mlp.block for mlp in self._mlps], batch)
            for mlp in self._mlps:
                path = mlp.leaf("fc2").call
                module = module_at(tree, path)
                layer = projection(module)
                if layer is None:
                    continue
                call = calls[id(module)] = calls.get(id(module), -1) + 1
                with suppress(ReductionError):  # it is not called
                    joint = joints.find(path, call, mlp.block, layer.features)
                    self._calls[mlp.name] = _Call(joint, layer.features)
        try:
            with self._probing(tree) as probes:
                given = output_of(batch.run(tree), batch)
                self._sloping = squared_slopes(given, self._places(probes), torch.Generator()) is not None
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # such as a forward that goes through numpy
            self._sloping = False
        device = next(tree.parameters()).device
        self._left = _PART * allowed(device, None)

    @contextmanager
    def _probing(self, tree: nn.Module) -> Iterator[list[Probe]]:
        paths = [call.joint.leaf for call in self._calls.values()]
        with torch.enable_grad(), probing(tree, paths) as probes:
            yield probes

    def _places(self, probes: Sequence[Probe]) -> list[tuple[torch.Tensor, int]]:
        known = {(path, call): probe for path, call, probe in probes}
        return [(known[one.joint.leaf, one.joint.call], one.dim) for one in self._calls.values()]

    def _note(self, batch: Batch, probes: Sequence[Probe], given: Any) -> None:
        """Note what the model has just given, and squared gradients of it."""
        output = output_of(given, batch)
        self._outputs.append(output.detach())
        found = squared_slopes(output, self._places(probes), self._generator) if self._sloping else None
        if found is None:
            self._sloping = False
        for call, square in zip(self._calls.values(), found or (), strict=False):
            call.squares.append(square)

    def _keep(self, call: _Call, value: torch.Tensor) -> None:
        self._left -= value.nbytes
        if self._left < 0:
            for one in self._calls.values():
                one.streams = None
        if call.streams is not None:
            call.streams.append(value.detach().clone())  # models may add to it in place

    def _kept(self, use: Use, pick: Pick) -> torch.Tensor | None:
        """The stream of some examples of a batch, if it was kept from the place where it is wanted."""
        call, (number, which) = self._calls.get(use.name), pick
        if call is None or call.streams is None or number >= len(call.streams):
            return None
        if (call.joint.place, call.joint.at, call.joint.output) != (use.dense.place, use.dense.at, use.dense.output):
            return None
        stream = call.streams[number]
        if len(stream) % len(which):
            return None
        some: torch.Tensor = stream.unflatten(0, (len(which), -1))[which]
        return some.flatten(0, 1)
