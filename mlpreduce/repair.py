"""Repair: fc2 and its bias refitted in closed form, so that a reduced MLP best gives what it gave before, on calibration data.

With x what an MLP is given in the unreduced model, y what its fc2 gives there, a(x) what fc2 is given in the reduced one, W and
b its weights as they stay, the new ones are W + D and b + d with the least

    sum |y - (W + D) a(x) - (b + d)|^2 + ridge * |D|^2

over all tokens, images and, of an MLP that is tied, uses. Every MLP is fitted for inputs of the unreduced model, so one pass
over the data serves all. The ridge is the one that does best when each half of the examples is judged by a fit on the other; an
MLP that no fit would bring closer there stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from mlpreduce.calibration import Samples, quiet_copy, running, telling
from mlpreduce.edits import Assign, Plan, Scale, Share, Slice
from mlpreduce.errors import ReductionError, check_one_of
from mlpreduce.graph import MLP, module_at, projection
from mlpreduce.surgery import carry_out

__all__ = ["REPAIRS", "repaired"]

REPAIRS = ("none", "least_squares")
_RIDGES = (1e-4, 1e-2, 1.0, math.inf)  # of the mean square of what fc2 is given; the last refits the bias alone

Model = tuple[nn.Module, Sequence[MLP]]  # with its MLPs that are repaired, all uses


@dataclass(frozen=True)
class _Fit:
    """The sums of one fc2 that is refitted, in float64, of each half of the examples. Inputs have a 1 beside them for the bias.

    Attributes:
        layer: fc2 of the reduced model.
        path: where it lies.
        square: of the inputs with themselves, (2, inputs + 1, inputs + 1).
        cross: of what is missing at its outputs with the inputs, (2, outputs, inputs + 1).
        wanted: of the outputs that are wanted, their squares, and the squares of what is missing, (2, 3, outputs).
    """

    layer: nn.Module
    path: str
    square: torch.Tensor
    cross: torch.Tensor
    wanted: torch.Tensor


def repaired(model: nn.Module, mlps: Sequence[MLP], made: Plan, data: Any) -> Plan:
    """The plan with new values of fc2 of every MLP that it changes.

    Args:
        model: the unreduced model; it is not changed.
        mlps: its MLPs.
        made: a plan for it.
        data: an iterable of batches of images.

    Raises:
        ReductionError: unknown repair, the data is missing, empty or not finite, or an MLP cannot be refitted.
    """
    kind = made.config["repair"]
    check_one_of("repair", kind, REPAIRS)
    samples = Samples(data, model, labels=False)
    changed = {edit.mlp for edit in made.of(Slice)}
    tied = {path for share in made.of(Share) for path in (share.source, share.target)}
    uses = [mlp for mlp in mlps if mlp.owner in changed or mlp.leaf("fc2").path in tied]
    fused = [mlp.name for mlp in uses if "fused" in mlp.kind]
    if fused:
        raise ReductionError(
            f"repair={kind!r}: {fused[0]} shares a layer with attention, which would change too; exclude it"
        )
    places = {share.target: share.source for share in made.of(Share)}  # a graph knows a tied leaf by one path only
    moved = [
        replace(m, leaves=tuple(replace(one, path=places.get(one.path, one.path)) for one in m.leaves)) for m in uses
    ]
    problem: Exception | None = None
    with running(samples.device, gradients=False), samples.shown(f"repair {kind}"):
        before, after = quiet_copy(model), _reduced(model, made)
        fits = _fits(after, moved)
        try:
            for images, _ in samples.chunks():
                for half in range(2):
                    if len(
                        some := images[(half + samples.rank) % 2 :: 2]
                    ):  # so that one image in each process is enough
                        with telling(some):
                            _add((before, uses), (after, moved), fits, half, some)
        except Exception as error:  # whatever the data raises, or the model: the other processes are told
            problem = error
        every = {f"{fit.path} {k}": getattr(fit, k) for fit in fits.values() for k in ("square", "cross", "wanted")}
        sums = samples.finish(every, problem)
    edits, differences, kept = list(made.edits), [], 0
    for fit in fits.values():
        square, cross, wanted = (sums[f"{fit.path} {key}"] for key in ("square", "cross", "wanted"))
        fit = replace(fit, square=square, cross=cross, wanted=wanted)
        if not square[:, -1, -1].all():  # rows of each half
            raise ReductionError(
                f"repair fits one half of the examples and judges by the other, and one is empty, with "
                f"{samples.count} in all; give at least 2, better hundreds"
            )
        values, was, now = _solved(fit)
        kept += not values and was > 1e-9  # else there is nothing to repair
        edits = [e for e in edits if not (isinstance(e, Assign | Scale) and e.tensor in values)]
        edits += [Assign(path, value) for path, value in values.items()]
        differences.append((was, now))
    was, now = (sum(shares) / len(shares) for shares in zip(*differences, strict=True))
    note = (
        f"repair={kind!r}, {samples.count:,} examples: what {len(fits)} MLPs give differed from before by {was:.2%} of its "
        f"variance on average, and does by {now:.2%} after a fit on the half of the examples by which it is not judged"
    )
    if kept:
        note += f"; {kept} of them would be no closer and stay as they are, for which more data would help"
    facts = {"samples": samples.count, "fingerprint": samples.fingerprint}
    return replace(made, edits=tuple(edits), notes=(*made.notes, note), data=facts)


def _reduced(model: nn.Module, made: Plan) -> nn.Module:
    """A copy of the model after the plan; tensors that the plan writes into are its own."""
    tree = quiet_copy(model)
    if isinstance(tree, fx.GraphModule):  # its code lies in its class, and would change for the model too
        tree = fx.GraphModule(tree, tree.graph, class_name=type(model).__name__)
    for edit in made.of(Assign, Scale):
        path, _, name = edit.tensor.rpartition(".")
        module = module_at(tree, path)
        assert module is not None
        value = getattr(module, name).detach().clone()
        setattr(module, name, nn.Parameter(value, requires_grad=False) if name in module._parameters else value)
    carry_out(tree, made)
    return tree


def _fits(tree: nn.Module, uses: Sequence[MLP]) -> dict[int, _Fit]:
    """One fit for each fc2 of the reduced model, by the id of the layer."""
    fits: dict[int, _Fit] = {}
    for mlp in uses:
        path = mlp.leaf("fc2").call
        module = module_at(tree, path)
        layer = projection(module)
        if module is None or layer is None or not layer.dense:
            raise ReductionError(f"repair: {path} is no linear layer or 1 x 1 convolution; exclude it")
        weight = module.get_parameter("weight")
        inputs, outputs = layer.in_features + 1, layer.out_features
        zeros = weight.new_zeros(2, inputs, inputs, dtype=torch.float64)
        sums = zeros.new_zeros(2, outputs, inputs), zeros.new_zeros(2, 3, outputs)
        fits.setdefault(id(module), _Fit(module, path, zeros, *sums))
    return fits


def _add(before: Model, after: Model, fits: Mapping[int, _Fit], half: int, images: torch.Tensor) -> None:
    """Run both models on a few images, the reduced MLPs on inputs of the unreduced ones, and add to the sums."""
    given: dict[str, torch.Tensor] = {}  # what fc1 is given, and what fc2 gives, at each place

    def note_input(place: str, module: nn.Module, args: Any) -> None:
        given[place] = args[0]

    def note_output(place: str, module: nn.Module, args: Any, output: Any) -> None:
        given[place] = output

    def replace_input(place: str, module: nn.Module, args: Any) -> Any:
        return (given.pop(place), *args[1:])

    def add_output(place: str, module: nn.Module, args: Any, output: Any) -> None:
        _add_rows(fits[id(module)], half, args[0], given.pop(place), output)

    with ExitStack() as stack:
        _hook(stack, before, "fc1", note_input)
        _hook(stack, before, "fc2", note_output)
        before[0](images)
    with ExitStack() as stack:
        _hook(stack, after, "fc1", replace_input)
        _hook(stack, after, "fc2", add_output)
        after[0](images)


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


def _add_rows(fit: _Fit, half: int, inputs: torch.Tensor, wanted: torch.Tensor, output: torch.Tensor) -> None:
    """Add the sums of one call."""
    layer = projection(fit.layer)
    assert layer is not None
    rows = [t.movedim(layer.features, -1).flatten(0, -2).double() for t in (inputs, wanted, output)]
    given = torch.cat([rows[0], rows[0].new_ones(len(rows[0]), 1)], 1)
    missing = rows[1] - rows[2]
    fit.square[half].addmm_(given.T, given)
    fit.cross[half].addmm_(missing.T, given)
    fit.wanted[half].add_(torch.stack([rows[1].sum(0), rows[1].square().sum(0), missing.square().sum(0)]))


def _solved(fit: _Fit) -> tuple[dict[str, torch.Tensor], float, float]:
    """New values by tensor path, and what was missing and is, as a share of the variance of what is wanted.

    There are no new values where no fit on one half of the examples does better on the other than what there is.
    """
    layer, weight, bias = projection(fit.layer), fit.layer.get_parameter("weight"), fit.layer._parameters.get("bias")
    assert layer is not None
    if not fit.square.isfinite().all() or not fit.cross.isfinite().all():
        raise ReductionError(f"repair: what {fit.path} is given is not finite; look at the model or the data")
    halves = list(zip(fit.square, fit.cross, strict=True))
    square, cross, wanted = fit.square.sum(0), fit.cross.sum(0), fit.wanted.sum(0)
    gains = [
        sum(_gain(_change(*here, ridge, bias is not None), *there) for here, there in (halves, halves[::-1]))
        for ridge in _RIDGES
    ]
    total, squares, missing = wanted[0], wanted[1].sum(), wanted[2].sum()
    variance = (squares - total.square().sum() / square[-1, -1]).clamp(min=torch.finfo(torch.float64).tiny)
    was, gain = float(missing / variance), max(gains)
    if gain <= 0:
        return {}, was, was
    change = _change(square, cross, _RIDGES[gains.index(gain)], bias is not None)
    new = weight.double() + (change[:, :-1] if layer.outputs[0] == ("weight", 0) else change[:, :-1].T).reshape(
        weight.shape
    )
    values = {f"{fit.path}.weight": new.to(weight.dtype)}
    if bias is not None:
        values[f"{fit.path}.bias"] = (bias.double() + change[:, -1]).to(bias.dtype)
    return values, was, float((missing - gain) / variance)


def _change(square: torch.Tensor, cross: torch.Tensor, strength: float, biased: bool) -> torch.Tensor:
    """What is added to weight and bias, (outputs, inputs + 1), by sums as of `_Fit` and a ridge of that strength."""
    count = square[-1, -1]
    inner, outer = square[:-1, :-1], cross[:, :-1]
    means, rest = square[-1, :-1] / count, cross[:, -1] / count
    if biased:  # the bias takes the means, and has no ridge
        inner = inner - count * torch.outer(means, means)
        outer = outer - count * torch.outer(rest, means)
    change = cross.new_zeros(cross.shape)
    noise = torch.finfo(inner.dtype).eps * len(inner) * square.diagonal()[:-1].max()  # of the means' subtraction
    ridge = strength * inner.diagonal().mean() + noise
    if 0 < ridge < math.inf:
        inner = inner + ridge * torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
        change[:, :-1] = torch.cholesky_solve(outer.T, torch.linalg.cholesky(inner)).T
    if biased:
        change[:, -1] = rest - change[:, :-1] @ means
    return change


def _gain(change: torch.Tensor, square: torch.Tensor, cross: torch.Tensor) -> float:
    """By how much a change brings what is missing down, in sums of squares over the examples of `square` and `cross`."""
    return float(2 * (change * cross).sum() - ((change @ square) * change).sum())
