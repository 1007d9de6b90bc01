"""Moments of hidden units on calibration data: of each, of all pairs, and of what the loss wants of the MLP's outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mlpreduce.calibration.measure import Loss, Measured, objective_of, running, telling
from mlpreduce.calibration.quiet import quiet_copy
from mlpreduce.calibration.samples import Samples
from mlpreduce.calibration.taps import Taps
from mlpreduce.criteria import Choice
from mlpreduce.errors import ReductionError
from mlpreduce.graph import MLP, module_at, projection

__all__ = ["UnitSums", "measure_units"]


@dataclass
class UnitSums:
    """Sums over all positions, examples and uses of what fc2 of one MLP is given, of each half of the examples, in float64.

    Attributes:
        rows: how many positions, (2,).
        total: sums of a, (2, hidden units).
        squares: sums of a^2, (2, hidden units).
        pairs: sums of a a^T, (2, hidden units, hidden units); None where they were not asked for.
        wanted: sums of g g^T over both halves, (outputs, outputs), g the gradient of an example's loss by what fc2 gives at a
            position; None where it was not asked for.
        biased: whether fc2 has a bias.
        examples: how many.
    """

    rows: torch.Tensor
    total: torch.Tensor
    squares: torch.Tensor
    pairs: torch.Tensor | None
    wanted: torch.Tensor | None
    biased: bool
    examples: int = 0
    tensors: tuple[str, ...] = field(default=("rows", "total", "squares", "pairs", "wanted"), repr=False)

    def add(self, half: int, hidden: torch.Tensor) -> None:
        """Add what fc2 was given, (examples, positions, hidden units). Products are of its type, sums float64."""
        rows = hidden.flatten(0, 1)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        self.rows[half] += len(rows)
        self.total[half] += rows.sum(0, dtype=torch.float64)
        if self.pairs is None:
            self.squares[half] += rows.square().sum(0, dtype=torch.float64)
        else:
            self.pairs[half] += rows.T @ rows
            self.squares[half] = self.pairs[half].diagonal()


def measure_units(
    model: nn.Module, mlps: Sequence[MLP], data: Any, choice: Choice, loss: Loss | None = None
) -> tuple[dict[str, UnitSums], Measured]:
    """Moments of the hidden units of each unique MLP in one pass over the data.

    Args:
        model: the model; it is not changed.
        mlps: its MLPs, all uses of each.
        data: an iterable of batches of images, or of (images, labels) where the criterion needs a loss.
        choice: the criterion that asks, which says whether it looks at pairs and at a loss.
        loss: as of `measure_scores`.

    Returns:
        Sums by owner, and which data was read, without scores.

    Raises:
        ReductionError: as `measure_scores`.
    """
    pairs, slopes = choice.criterion.needs == "pairs", choice.needs_loss
    samples = Samples(data, model, labels=slopes)
    problem: Exception | None = None
    with running(samples.device, gradients=slopes), samples.shown(f"criterion {choice.criterion.name}"):
        tree = quiet_copy(model)
        taps = Taps(tree, mlps, ("fc2",))
        sums = {mlp.owner: _empty(mlp, tree, pairs=pairs, slopes=slopes) for mlp in mlps if mlp.owner == mlp.name}
        try:
            for number, (images, labels) in enumerate(samples.chunks()):
                with telling(images):
                    if number == 0:
                        taps.check_examples(tree, images)
                    with taps.recording(len(images)) as kept, _probing(tree, mlps if slopes else ()) as probes:
                        if slopes:
                            total = objective_of(choice, tree, images, labels, loss)() * len(images)
                        else:
                            tree(images)
                for owner, calls in kept.items():
                    for half in range(2):
                        for hidden in calls:
                            if len(some := hidden.detach()[(half + samples.rank) % 2 :: 2]):
                                sums[owner].add(half, some)
                if slopes:
                    _add_slopes(sums, probes, total)
        except Exception as error:  # whatever the data raises, or the model: the other processes are told
            problem = error
        every = samples.finish(
            {
                f"{owner} {name}": value
                for owner, one in sums.items()
                for name in one.tensors
                if (value := getattr(one, name)) is not None
            },
            problem,
        )
    for owner, one in sums.items():
        for name in one.tensors:
            if getattr(one, name) is not None:
                setattr(one, name, every[f"{owner} {name}"])
        one.examples = samples.count
        if not one.squares.isfinite().all() or (one.wanted is not None and not one.wanted.isfinite().all()):
            raise ReductionError(
                f"what fc2 of {owner} is given, or the gradient of the loss there, is not finite; look at the weights and the "
                f"data"
            )
    return sums, Measured({}, samples.count, samples.fingerprint)


def _empty(mlp: MLP, tree: nn.Module, *, pairs: bool, slopes: bool) -> UnitSums:
    layer = projection(module_at(tree, mlp.leaf("fc2").call))
    if layer is None:
        raise ReductionError(f"{mlp.leaf('fc2').call} is no linear layer or 1 x 1 convolution; exclude {mlp.name}")
    like = next((p for p in tree.parameters() if p.is_floating_point()), torch.empty(0))
    zeros = like.new_zeros(2, mlp.hidden_features, dtype=torch.float64)
    products = zeros.new_zeros(2, mlp.hidden_features, mlp.hidden_features) if pairs else None
    wanted = zeros.new_zeros(layer.out_features, layer.out_features) if slopes else None
    biased = any(name.rpartition(".")[2] == "bias" for name, _ in layer.outputs)
    return UnitSums(zeros.new_zeros(2), zeros.clone(), zeros.clone(), products, wanted, biased)


@contextmanager
def _probing(tree: nn.Module, mlps: Sequence[MLP]) -> Iterator[list[tuple[str, int, torch.Tensor]]]:
    """Within, zeros that want gradients are added to what each fc2 gives: by owner, with the dimension of its features."""
    probes: list[tuple[str, int, torch.Tensor]] = []
    leaves: dict[int, tuple[nn.Module, str]] = {}
    for mlp in mlps:
        module = module_at(tree, mlp.leaf("fc2").call)
        assert module is not None
        leaves.setdefault(id(module), (module, mlp.owner))
    handles = []
    for module, owner in leaves.values():
        layer = projection(module)
        assert layer is not None

        def after(module: nn.Module, args: Any, output: Any, owner: str = owner, dim: int = layer.features) -> Any:
            probe = torch.zeros_like(output, requires_grad=True)
            probes.append((owner, dim, probe))
            return output + probe

        handles.append(module.register_forward_hook(after))
    try:
        yield probes
    finally:
        for handle in handles:
            handle.remove()


def _add_slopes(sums: dict[str, UnitSums], probes: list[tuple[str, int, torch.Tensor]], total: torch.Tensor) -> None:
    slopes = torch.autograd.grad(total, [probe for *_, probe in probes], materialize_grads=True)
    for (owner, dim, _), slope in zip(probes, slopes, strict=True):
        rows = slope.movedim(dim, -1).flatten(0, -2)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        wanted = sums[owner].wanted
        assert wanted is not None
        wanted += rows.T @ rows
