"""Repair in order of execution: each fc2 is fitted on what the model gives it after all repairs before it, and judged at once.

With z_d the stream after an MLP in the whole model, and z_r the same in the reduced model as repaired so far, the fit brings
z_r nearer to z_d: it makes up for its own units and for what earlier MLPs left. Each token counts by what the model's outputs
hang on it (see `importance`), and where a norm on the stream follows the addition, by 1 over the variance of z_d, by which that
norm divides.

Where it is known by which values each MLP by itself best gives what it gave, a second fit changes those as little as it can.
Where little goes, what earlier MLPs left is mostly noise, and that one is better. The outputs decide which of both counts.

A fit stays only if what the model gives on examples held out is no further from the whole model's by more than chance, by
cosine and in how alike examples are (centred kernel alignment; see `nearness.is_further`). That is asked before the next MLP
is fitted, of the whole model whose first blocks, up to this one, are those of the reduced model: where the blocks behind it
were reduced and not yet repaired, their errors would hide what a repair is worth. At the end all repairs are judged together
against none.

Source: the asymmetric target of GPTAQ (arXiv 2504.02692), here for the weights that structured pruning leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import fx, nn

from mlpreduce.calibration import CHUNK, Batch, Samples, all_reduce, in_all, telling
from mlpreduce.calibration.batches import chunked
from mlpreduce.calibration.samples import together
from mlpreduce.calibration.sums import live_rows
from mlpreduce.errors import ReductionError
from mlpreduce.graph import MLP
from mlpreduce.repair.fit import Fit, add_rows, check_halves, empty_fit, solved
from mlpreduce.repair.judging import Nearness, gathered, is_further, nearness
from mlpreduce.repair.outputs import output_of
from mlpreduce.repair.streams import Cut, Place, graph_from, stopping_at
from mlpreduce.repair.uses import Model, Use, blocks_of, uses_of
from mlpreduce.repair.whole import Pick, Whole
from mlpreduce.words.waiting import steps

__all__ = ["InTurn", "repair_in_turn"]

_HELD = 8  # one in so many examples is held out
_FEWEST = 16  # examples, below which all are fitted and judged by


@dataclass
class InTurn:
    """What a repair in turn has come to.

    Attributes:
        values: new tensors by path.
        before: how near what the reduced model gives is to what the whole one gives, without repair: cosine and alignment.
        after: the same with the repairs that stay.
        fitted: how many layers were fitted.
        left: those that stay as they were, since the whole would be no nearer.
        unfollowed: MLPs whose stream could not be followed.
        cut: whether runs began at the block that was fitted.
        held: examples by which it was judged.
        weighed: whether positions counted by what the outputs hang on them, where that was wanted.
    """

    values: dict[str, torch.Tensor] = field(default_factory=dict)
    before: Nearness = (1.0, 1.0)
    after: Nearness = (1.0, 1.0)
    fitted: int = 0
    left: list[str] = field(default_factory=list)
    unfollowed: list[str] = field(default_factory=list)
    cut: bool = True
    held: int = 0
    weighed: bool = True


def repair_in_turn(
    before: Model,
    after: Model,
    every: Sequence[MLP],
    samples: Samples,
    kind: str,
    whole: Whole,
    alone: Mapping[str, torch.Tensor],
) -> InTurn:
    """Fit fc2 of MLPs one after the other.

    Args:
        before: the whole model, with the MLPs that are repaired.
        after: the reduced one, whose parameters may be exchanged, with the same MLPs there.
        every: all MLPs of the model, whose blocks say where it can be cut.
        samples: the calibration data.
        kind: `least_squares`, or `bias`, which fits the bias alone.
        whole: what was noted of the whole model when it ran over the data for something else.
        alone: values of fc2, by tensor path, with which each MLP by itself best gives what it gave, as far as they are known.

    Raises:
        ReductionError: as `repaired`.
    """
    dense, reduced = before[0], after[0]
    chunks = _read(samples, kind)
    picks, out = _split(chunks)
    batches = [chunks[number][which] for number, which in picks]
    whole = whole.look(dense, chunks, samples)
    held = [*_chunked(chunks[number][which] for number, which in out)]
    some: list[Batch | None] = [*batches[:1], None]
    first = next(batch for batch in together(some[0]) if batch is not None)[:2]
    first = first.placed(samples.device, samples.dtype)
    with telling(first), in_all():
        blocks, stages = blocks_of(dense, every, first)
        uses = uses_of(before, after, blocks, first)
        if any(
            joint.followed and joint.at for some in uses.values() for use in some for joint in (use.dense, use.reduced)
        ):
            blocks, stages = [], []  # a norm that several blocks share would be called less often
            uses = uses_of(before, after, blocks, first)
        known = whole.outputs(out) or [output_of(batch.run(dense), batch) for batch in held]
        parts = [output_of(batch.run(reduced), batch) for batch in held]
    wanted, unrepaired = gathered(known), gathered(parts)
    found = InTurn(before=nearness(wanted, unrepaired), cut=bool(blocks), held=len(wanted))
    found.unfollowed = [use.name for some in uses.values() for use in some if not use.dense.followed]
    order = sorted(uses, key=lambda path: max(use.block for use in uses[path]))
    starts = [min(use.block for use in uses[path]) for path in order]
    every_use = [use for path in order for use in uses[path]]
    again, fitting, judging = (Cut(tree, blocks, stages) for tree in (dense, reduced, reduced))
    weights: dict[str, list[torch.Tensor]] = {}
    if kind == "least_squares":
        positions = whole.weights([use.name for use in every_use], picks, batches)
        found.weighed, weights = positions is not None, positions or {}
    beyond = Cut(dense, blocks, stages, known=judging)

    def given(end: int, use: Use) -> torch.Tensor:
        """What the whole model gives with the blocks before `end`, whose last has this use, from the reduced one.

        A graph begins at the stream behind it; what is no graph and has no blocks is judged with what follows reduced.
        """
        outputs = []
        beyond.begin_at(end)
        with in_all():
            for index, batch in enumerate(held):
                if isinstance(dense, fx.GraphModule) and use.dense.followed:
                    streams: list[torch.Tensor] = []
                    with stopping_at(reduced, [use.reduced.told_by(streams.append)]) as run:
                        run(batch)
                    outputs.append(output_of(graph_from(dense, use.dense, streams[0], batch), batch))
                    continue
                with judging.at(index, end), stopping_at(reduced, judging.last(end)) as run:
                    last = run(batch)
                with beyond.at(index):
                    outputs.append(output_of(batch.run(dense) if blocks else last, batch))
        return gathered(outputs)

    with steps(f"repair {kind}", len(order)) as advance:
        for number, path in enumerate(order):
            end = max(use.block for use in uses[path]) + 1
            for cut in (again, fitting, judging):
                cut.begin(min(starts[number:]))
            fit = replace(empty_fit(reduced, path), factor=uses[path][0].dense.factor)
            with in_all():
                for index, batch in enumerate(batches):
                    with telling(batch):
                        streams = whole.streams(dense, again, index, picks[index], batch, uses[path], end)
                        places, taken = _places(uses[path])
                        with fitting.at(index, end), stopping_at(reduced, [*places, *fitting.last(end)]) as run:
                            run(batch)
                        for use, stream in zip(uses[path], streams, strict=True):
                            weight = weights[use.name][index] if use.name in weights else None
                            _add(fit, use, batch, stream, taken[use.name], weight, samples.rank)
            fit = replace(
                fit, square=all_reduce(fit.square), cross=all_reduce(fit.cross), wanted=all_reduce(fit.wanted)
            )
            check_halves(fit, samples.count)
            begins = [None, *([alone] if f"{path}.weight" in alone else [])]
            fits = [solved(fit, bias_alone=kind == "bias", start=start)[0] for start in begins]
            found.fitted += 1
            if any(fits):
                use = max(uses[path], key=lambda use: use.block)
                without = given(end, use)
                tried = [(values, _tried(reduced, values, partial(given, end, use))) for values in fits if values]
                new, within = max(tried, key=lambda one: nearness(wanted, one[1])[0])
                if is_further(wanted, without, within):
                    found.left.append(path)
                else:
                    found.values |= new
                    _exchanged(reduced, new)
                judging.end(starts[number])  # else it has not run
            whole.done(uses[path])
            again.end(end)
            fitting.end(starts[number])
            advance(1)
    with in_all():
        outputs = [output_of(batch.run(reduced), batch) for batch in held]
    repaired = gathered(outputs)
    if is_further(wanted, unrepaired, repaired):
        found.left, found.values, repaired = order, {}, unrepaired
    found.after = nearness(wanted, repaired)
    return found


def _read(samples: Samples, kind: str) -> list[Batch]:
    """All of the data."""
    chunks: list[Batch] = []
    problem: Exception | None = None
    with samples.shown(f"repair {kind}: data"):
        try:
            chunks += [batch for batch, _ in samples.chunks()]
        except Exception as error:  # whatever the data raises: the other processes are told
            problem = error
        samples.finish({}, problem)
    return chunks


def _split(chunks: Sequence[Batch]) -> tuple[list[Pick], list[Pick]]:
    """Examples of each batch to fit on, and those held out; where there are few, all are both."""
    few = sum(map(len, chunks)) < _FEWEST
    picks, held, start = [], [], 0
    for number, batch in enumerate(chunks):
        out = torch.arange(start, start + len(batch)) % _HELD == _HELD - 1
        picks.append((number, ~out | few))
        held.append((number, out | few))
        start += len(batch)
    return [pick for pick in picks if pick[1].any()], [pick for pick in held if pick[1].any()]


def _chunked(batches: Iterable[Batch]) -> Iterator[Batch]:
    return (batch for batch, _ in chunked(((batch, None) for batch in batches), CHUNK, CHUNK - 1))


def _places(uses: Sequence[Use]) -> tuple[list[Place], dict[str, dict[str, torch.Tensor]]]:
    """Places where the reduced model has what each fc2 is given, and the stream behind it; and where those will be, by use."""
    taken: dict[str, dict[str, torch.Tensor]] = {use.name: {} for use in uses}
    places: list[Place] = []
    for use in uses:
        keep = taken[use.name].__setitem__
        places.append((use.reduced.leaf, use.reduced.call, False, partial(keep, "inputs")))
        places.append(use.reduced.told_by(partial(keep, "stream")))
    return places, taken


def _add(
    fit: Fit,
    use: Use,
    batch: Batch,
    wanted: torch.Tensor,
    taken: Mapping[str, torch.Tensor],
    weight: torch.Tensor | None,
    rank: int,
) -> None:
    """Add what a batch says of a use: the stream of the whole model, what the reduced one has, and weights of positions."""

    def rows(value: torch.Tensor) -> torch.Tensor:
        value = value.movedim(use.dim, -1)
        if len(value) % len(batch):
            raise ReductionError(
                f"{use.name} does not have the examples along its first dimension, so that a repair cannot judge by half "
                f"of them; exclude it"
            )
        return value.reshape(len(batch), -1, value.shape[-1])

    shape = list(taken["inputs"].shape)
    shape[use.dim] = -1
    inputs = rows(taken["inputs"])
    stream, wanted = (rows(use.dense.laid_out(value, shape)) for value in (taken["stream"], wanted))
    if use.weighed:
        by_norm = wanted.double().var(-1, correction=0).reciprocal()
        weight = by_norm if weight is None else weight * by_norm
    missing = wanted - stream
    for half in range(2):
        pick = slice((half + rank) % 2, None, 2)  # so that one example in each process is enough
        if len(inputs[pick]):
            mask = None if batch.mask is None else batch.mask[pick]
            counts = None if weight is None else live_rows(weight[pick][..., None], mask)[:, 0]
            add_rows(fit, half, live_rows(inputs[pick], mask), live_rows(missing[pick], mask), weight=counts)


def _tried(tree: nn.Module, values: dict[str, torch.Tensor], look: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What something gives with values in place of those of a model."""
    old = _exchanged(tree, values)
    try:
        return look()
    finally:
        _exchanged(tree, old)


def _exchanged(tree: nn.Module, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Put values into parameters of a model that are its own; what was there."""
    old: dict[str, torch.Tensor] = {}
    for path, value in values.items():
        module = tree.get_submodule(path.rpartition(".")[0])
        name = path.rpartition(".")[2]
        old[path] = module.get_parameter(name)
        module._parameters[name] = nn.Parameter(value.detach(), requires_grad=False)
    return old
