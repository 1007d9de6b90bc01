"""Where what an MLP gives enters the residual stream, found by changing it and looking on; and runs that begin at a block.

An MLP's output y enters a stream r as z = r + g y, g a factor of each feature, as of layer scale, or 1. z is what the first
norm that runs after fc2 is given: the norm of the next block, the last norm of the model, the norm after the addition of BERT,
or a norm between fc2 and the addition, where r is 0 and z is y itself. A change of y tells which of it is so, and what g is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from mlpreduce.calibration import Batch
from mlpreduce.errors import ReductionError
from mlpreduce.graph import module_at

__all__ = ["Cut", "Joint", "Joints", "Place", "graph_from", "stopping_at", "telling_of"]

# A module's path, which of its calls, whether its output counts or its input, and what is told the tensor.
Place = tuple[str, int, bool, Callable[[torch.Tensor], Any]]

_ONE = 1e-4  # by which a factor may differ from 1 by rounding
_CHANGE = 2.0**14  # standard deviations of y: what layer scale leaves of it, 1e-6 at first, must not be rounding
_NEAR = 1e-3  # by which a change of z may differ from a factor times a change of y, of its size


@dataclass(frozen=True)
class Joint:
    """Where the output of an fc2 is part of a stream.

    Attributes:
        leaf: path of fc2.
        call: which call of it, counted from 0: a tied one has several.
        place: path of the norm or block whose input or output is the stream; fc2 itself where none was found.
        at: which call of that.
        output: whether it is its output.
        factor: g, (features,) in float64.
        order: dimensions of the stream in the order of the output, as after a transposition; none for fc2 itself.
    """

    leaf: str
    call: int
    place: str
    at: int
    output: bool
    factor: torch.Tensor
    order: tuple[int, ...]

    @property
    def followed(self) -> bool:
        """Whether there is a stream."""
        return self.place != self.leaf

    def laid_out(self, stream: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """The stream with the shape of what fc2 gives, which may have its positions in one dimension."""
        return stream.permute(self.order).reshape(shape) if self.order else stream

    def told_by(self, told: Callable[[torch.Tensor], Any]) -> Place:
        """The place of the stream, for `stopping_at`."""
        return self.place, self.at, self.output, told


class _Stop(Exception):
    """All that was wanted of a run is there."""


@contextmanager
def telling_of(tree: nn.Module, wanted: Sequence[Place]) -> Iterator[None]:
    """Within, one run of a model tells what passes these places."""
    handles = []
    places: dict[tuple[str, bool], list[tuple[int, Callable[[torch.Tensor], Any]]]] = {}
    for path, call, output, told in wanted:
        places.setdefault((path, output), []).append((call, told))
    counts = dict.fromkeys(places, 0)

    def passed(key: tuple[str, bool], value: Any) -> None:
        number = counts[key]
        counts[key] += 1
        for call, told in places[key]:
            if call == number:
                told(value[0] if isinstance(value, tuple) else value)

    for key in places:
        module = tree.get_submodule(key[0])

        def after(module: nn.Module, args: Any, output: Any, key: tuple[str, bool] = key) -> None:
            passed(key, output)

        def before(module: nn.Module, args: Any, key: tuple[str, bool] = key) -> None:
            passed(key, args[0])

        handles.append(module.register_forward_hook(after) if key[1] else module.register_forward_pre_hook(before))

    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def stopping_at(tree: nn.Module, wanted: Sequence[Place]) -> Iterator[Any]:
    """Within, call `run(batch)` once to run a model until all of these places were passed.

    It returns what the model gives if it comes to its end.
    """
    left = len(wanted)

    def counted(told: Callable[[torch.Tensor], Any], value: torch.Tensor) -> None:
        nonlocal left
        told(value)
        left -= 1
        if not left:
            raise _Stop

    def run(batch: Batch) -> Any:
        with suppress(_Stop):
            return batch.run(tree)

    with telling_of(tree, [(path, call, output, partial(counted, told)) for path, call, output, told in wanted]):
        yield run


class Joints:
    """Finds where outputs of fc2 enter a stream, by what a model gives for a few examples as it is, and changed.

    Args:
        tree: the model, which runs without gradients.
        blocks: paths of the blocks around its MLPs.
        batch: a few examples.
    """

    def __init__(self, tree: nn.Module, blocks: Sequence[str], batch: Batch) -> None:
        self._tree, self._batch = tree, batch
        self._norms = [path for path, module in tree.named_modules() if path and _is_norm(module)]
        known = () if isinstance(tree, fx.GraphModule) else dict.fromkeys(blocks)
        self._blocks = [path for path in known if path and module_at(tree, path) is not None]
        self._plain: dict[tuple[str, int], torch.Tensor] = {}
        with self._told(self._blocks, lambda key, value: self._plain.__setitem__(key, value.clone())):
            batch.run(tree)

    def find(self, leaf: str, call: int, block: str, dim: int) -> Joint:
        """Where the output of an fc2 enters a stream: at the first place behind it that a change of it changes.

        Args:
            leaf: path of fc2.
            call: which call of it.
            block: path of the block around it.
            dim: the dimension of features in what it gives.

        Raises:
            ReductionError: there is no such call.
        """
        fc2 = self._tree.get_submodule(leaf)
        changes: list[torch.Tensor] = []
        found: list[Joint] = []
        calls = 0

        def disturb(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
            nonlocal calls
            calls += 1
            if calls - 1 != call:
                return None
            noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
            changes.append(noise * output.std().clamp(min=1e-6) * _CHANGE)
            return output + changes[0]

        def look(key: tuple[str, int], value: torch.Tensor) -> None:
            plain = self._plain.get(key)
            if not changes or plain is None or value.shape != plain.shape or value.numel() != changes[0].numel():
                return
            change = value - plain
            if not change.any():
                return
            by = changes[0].double().movedim(dim, -1).flatten(0, -2)
            for order in _orders(value):
                moved = change.permute(order).reshape(changes[0].shape).double().movedim(dim, -1).flatten(0, -2)
                factor = (moved * by).sum(0) / by.square().sum(0)
                if (moved - factor * by).norm() <= _NEAR * moved.norm():
                    ones = torch.ones_like(factor)
                    factor = ones if torch.allclose(factor, ones, rtol=0, atol=_ONE) else factor
                    found.append(Joint(leaf, call, *key, key[0] in self._blocks, factor, order))
                    break
            raise _Stop

        with ExitStack() as stack:
            stack.callback(fc2.register_forward_hook(disturb).remove)
            stack.enter_context(self._told([block] if block in self._blocks else [], look))
            stack.enter_context(suppress(_Stop))
            self._batch.run(self._tree)
        if not changes:
            raise ReductionError(f"{leaf} is not called {call + 1} times when the model runs; exclude its MLP")
        ones = torch.ones(changes[0].shape[dim], dtype=torch.float64, device=changes[0].device)
        return found[0] if found else Joint(leaf, call, leaf, call, True, ones, ())

    @contextmanager
    def _told(self, blocks: Sequence[str], told: Callable[[tuple[str, int], torch.Tensor], Any]) -> Iterator[None]:
        """Within, call `told` with each input of a norm and each output of these blocks, by path and number of the call."""
        counts: dict[str, int] = {}

        def note(path: str, value: Any) -> None:
            value = value[0] if isinstance(value, tuple) and value else value
            counts[path] = counts.get(path, -1) + 1
            if isinstance(value, torch.Tensor):
                told((path, counts[path]), value)

        with ExitStack() as stack:
            for path in self._norms:
                if path not in blocks:
                    norm = self._tree.get_submodule(path)
                    given = norm.register_forward_pre_hook(
                        lambda m, args, path=path: note(path, args[0] if args else None)
                    )
                    stack.callback(given.remove)
            for path in blocks:
                whole = self._tree.get_submodule(path)
                stack.callback(whole.register_forward_hook(lambda m, args, out, path=path: note(path, out)).remove)
            yield


def _orders(value: torch.Tensor) -> Iterator[tuple[int, ...]]:
    """Orders of its dimensions in which the examples stay first; the one that they have comes first."""
    return ((0, *order) for order in itertools.permutations(range(1, value.dim())))


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and any(True for _ in module.parameters(recurse=False))


class Cut:
    """Runs of a model over the same batches that leave out blocks at its start whose outputs are known.

    Args:
        tree: the model.
        blocks: paths of its blocks, in order of execution, each called once in a run; none where it cannot be cut.
        stages: the stage of each. A block that is left out gives what the last of its stage that is left out gave.
        known: another's, whose blocks are left out here; what they give comes from there.
    """

    def __init__(self, tree: nn.Module, blocks: Sequence[str], stages: Sequence[str], known: Cut | None = None) -> None:
        self._tree, self._blocks, self._stages = tree, list(blocks), list(stages)
        # outputs by batch and number of the block
        self._known: dict[int, dict[int, Any]] = {} if known is None else known._known
        self._valid = self._start = 0

    @property
    def start(self) -> int:
        """The first block that runs."""
        return self._start

    def begin(self, most: int) -> None:
        """Leave out what is known, and no more than so many blocks."""
        self.begin_at(min(self._valid, most))
        last = {stage: number for number, stage in enumerate(self._stages[: self._start])}
        for outputs in self._known.values():
            for number in list(outputs):
                if number not in last.values():
                    del outputs[number]

    def begin_at(self, start: int) -> None:
        """Leave out so many blocks."""
        self._start = start if self._blocks else 0

    def last(self, until: int) -> list[Place]:
        """The place that a run must pass so that what blocks before `until` give is known."""
        return [(self._blocks[until - 1], 0, True, _ignore)] if self._blocks else []

    def end(self, valid: int) -> None:
        """Note that what was given by so many blocks from the start on stays as it is."""
        self._valid = valid if self._blocks else 0

    @contextmanager
    def at(self, batch: int, until: int = 0) -> Iterator[None]:
        """Within, the model runs on a batch; what blocks before `until` give is remembered."""
        known = self._known.setdefault(batch, {})
        last = {stage: number for number, stage in enumerate(self._stages[: self._start])}
        with ExitStack() as stack:
            for number, path in enumerate(self._blocks):
                module = self._tree.get_submodule(path)
                if number < self._start:
                    given = known[last[self._stages[number]]]
                    own = vars(module).get("forward")
                    vars(module)["forward"] = lambda *args, given=given, **kwargs: given
                    stack.callback(_put_back, module, own)
                elif number < until:
                    stack.callback(
                        module.register_forward_hook(
                            lambda m, args, output, number=number: known.__setitem__(number, output)
                        ).remove
                    )
            yield


def _ignore(value: torch.Tensor) -> None:
    """What is remembered elsewhere."""


def graph_from(tree: fx.GraphModule, joint: Joint, stream: torch.Tensor, batch: Batch) -> Any:
    """What a graph gives for examples with another stream at a joint."""
    calls = [node for node in tree.graph.nodes if node.op == "call_module" and node.target == joint.place]
    place = calls[joint.at] if joint.output else calls[joint.at].args[0]

    class Replaced(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            return stream if n is place else super().run_node(n)

    return batch.run_by(Replaced(tree))


def _put_back(module: nn.Module, forward: Any) -> None:
    if forward is None:
        del vars(module)["forward"]
    else:
        vars(module)["forward"] = forward
