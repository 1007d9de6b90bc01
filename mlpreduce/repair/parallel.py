"""Repair of every MLP by itself: fc2 is refitted so that the MLP best gives what it gave, for inputs of the whole model.

With x what an MLP is given in the unreduced model, y what its fc2 gives there, a(x) what fc2 is given in the reduced one, W and
b its weights as they stay, the new ones are W + D and b + d with the least

    sum |y - (W + D) a(x) - (b + d)|^2 + ridge * |D|^2

over all tokens, images and, of an MLP that is tied, uses. One pass over the data serves all MLPs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from mlpreduce.calibration import Batch, Samples, telling
from mlpreduce.calibration.sums import live_rows
from mlpreduce.graph import MLP, module_at, projection_of
from mlpreduce.repair.fit import Fit, add_rows, check_halves, empty_fit, solved
from mlpreduce.repair.uses import Model

__all__ = ["Alone", "repair_alone"]


@dataclass
class Alone:
    """What fits of single MLPs come to.

    Attributes:
        values: new tensors by path.
        differences: by path of fc2, how far what its uses give is from what they gave, as a share of its variance: without a
            fit, and with one, on the half of the examples by which it was not fitted.
        left: fits that would be no closer.
    """

    values: dict[str, torch.Tensor] = field(default_factory=dict)
    differences: dict[str, tuple[float, float]] = field(default_factory=dict)
    left: int = 0

    def __str__(self) -> str:
        was, now = (sum(shares) / len(shares) for shares in zip(*self.differences.values(), strict=True))
        text = (
            f"what {len(self.differences)} MLPs give differed from before by {was:.2%} of its variance on average, and does by "
            f"{now:.2%} after a fit on the half of the examples by which it is not judged"
        )
        if self.left:
            text += f"; {self.left} of them would be no closer and stay as they are, for which more data would help"
        return text


def repair_alone(before: Model, after: Model, samples: Samples) -> Alone:
    """Fit the fc2 of every MLP by itself.

    Args:
        before: the whole model.
        after: the reduced one.
        samples: the calibration data.

    Raises:
        ReductionError: as `repaired`.
    """
    problem: Exception | None = None
    fits = _fits(after[0], after[1])
    with samples.shown("repair parallel"):
        try:
            for batch, _ in samples.chunks():
                for half in range(2):
                    # so that one example in each process is enough
                    if len(range((half + samples.rank) % 2, len(batch), 2)):
                        some = batch[(half + samples.rank) % 2 :: 2]
                        with telling(some):
                            _add(before, after, fits, half, some)
        except Exception as error:  # whatever the data raises, or the model: the other processes are told
            problem = error
        every = {f"{fit.path} {k}": getattr(fit, k) for fit in fits.values() for k in ("square", "cross", "wanted")}
        sums = samples.finish(every, problem)
    found = Alone()
    for fit in {id(fit): fit for fit in fits.values()}.values():
        square, cross, wanted = (sums[f"{fit.path} {key}"] for key in ("square", "cross", "wanted"))
        fit = replace(fit, square=square, cross=cross, wanted=wanted)
        check_halves(fit, samples.count)
        values, was, now = solved(fit)
        found.left += not values and was > 1e-9  # else there is nothing to repair
        found.values |= values
        found.differences[fit.path] = was, now
    return found


def _fits(tree: nn.Module, uses: Sequence[MLP]) -> dict[int, Fit]:
    """One fit for each fc2 of the reduced model, by the ids of the layers that are called: it, or layers around it."""
    fits: dict[int, Fit] = {}
    calls: dict[int, Fit] = {}
    for mlp in uses:
        leaf = mlp.leaf("fc2")
        fit = empty_fit(tree, leaf.path)
        calls[id(module_at(tree, leaf.call))] = fits.setdefault(id(fit.layer), fit)
    return calls


def _add(before: Model, after: Model, fits: Mapping[int, Fit], half: int, batch: Batch) -> None:
    """Run both models on a few examples, the reduced MLPs on inputs of the unreduced ones, and add to the sums."""
    given: dict[str, torch.Tensor] = {}  # what fc1 is given, and what fc2 gives, at each place

    def note_input(place: str, module: nn.Module, args: Any) -> None:
        given[place] = args[0]

    def note_output(place: str, module: nn.Module, args: Any, output: Any) -> None:
        given[place] = output

    def replace_input(place: str, module: nn.Module, args: Any) -> Any:
        return (given.pop(place), *args[1:])

    def add_output(place: str, module: nn.Module, args: Any, output: Any) -> None:
        layer = projection_of(module)
        inputs, wanted, found = (
            live_rows(t.movedim(layer.features, -1), batch.mask) for t in (args[0], given.pop(place), output)
        )
        add_rows(fits[id(module)], half, inputs, wanted - found, wanted=wanted)

    with ExitStack() as stack:
        _hook(stack, before, "fc1", note_input)
        _hook(stack, before, "fc2", note_output)
        batch.run(before[0])
    with ExitStack() as stack:
        _hook(stack, after, "fc1", replace_input)
        _hook(stack, after, "fc2", add_output)
        batch.run(after[0])


def _hook(stack: ExitStack, model: Model, role: str, hook: Callable[..., Any]) -> None:
    """Hang a hook on all leaves of a role, which is told the place of each call: a tied leaf is called from several."""
    tree, uses = model
    places: dict[int, list[str]] = {}
    leaves: dict[int, nn.Module] = {}
    for mlp in uses:
        for number, leaf in enumerate(leaf for leaf in mlp.leaves if leaf.role == role):
            module = module_at(tree, leaf.call)
            if module is not None:
                leaves[id(module)] = module
                places.setdefault(id(module), []).append(f"{mlp.name} {role} {number}")

    def called(order: Iterator[str]) -> Callable[..., Any]:
        return lambda *given: hook(next(order), *given)

    for key, module in leaves.items():
        told = called(iter(places[key]))
        if hook.__name__.endswith("input"):
            stack.callback(module.register_forward_pre_hook(told).remove)
        else:
            stack.callback(module.register_forward_hook(told).remove)
