"""Repair: fc2 and its bias refitted in closed form, so that a reduced MLP best gives what it gave before, on calibration data.

With x what an MLP is given in the unreduced model, y what its fc2 gives there, a(x) what fc2 is given in the reduced one, W and
b its weights as they stay, the new ones are W + D and b + d with the least

    sum |y - (W + D) a(x) - (b + d)|^2 + ridge * |D|^2

over all tokens, images and, of an MLP that is tied, uses. Every MLP is fitted for inputs of the unreduced model, so one pass
over the data serves all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from mlpreduce.calibration import Samples, quiet_copy, running, telling
from mlpreduce.edits import Assign, Plan, Scale, Share, Slice
from mlpreduce.errors import ReductionError, did_you_mean
from mlpreduce.graph import MLP, module_at, projection
from mlpreduce.surgery import carry_out

__all__ = ["REPAIRS", "repaired"]

REPAIRS = ("none", "least_squares")
_RIDGE = 1e-4  # of the mean square of what fc2 is given

Model = tuple[nn.Module, Sequence[MLP]]  # with its MLPs that are repaired, all uses


@dataclass(frozen=True)
class _Fit:
    """The sums of one fc2 that is refitted, in float64. Its inputs have a 1 beside them, for the bias.

    Attributes:
        layer: fc2 of the reduced model.
        path: where it lies.
        square: of the inputs with themselves, (inputs + 1, inputs + 1).
        cross: of what is missing at its outputs with the inputs, (outputs, inputs + 1).
        wanted: of the outputs that are wanted, their squares, and the squares of what is missing, (3, outputs).
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
    if kind not in REPAIRS:
        raise ReductionError(f"repair is {kind!r}{did_you_mean(str(kind), REPAIRS)}")
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
    problem = None
    with running(samples.device, gradients=False):
        before, after = quiet_copy(model), _reduced(model, made)
        fits = _fits(after, moved)
        try:
            for images, _ in samples.chunks():
                with telling(images):
                    _add((before, uses), (after, moved), fits, images)
        except ReductionError as error:
            problem = error
        every = {f"{fit.path} {k}": getattr(fit, k) for fit in fits.values() for k in ("square", "cross", "wanted")}
        sums = samples.finish(every, problem)
    edits, differences = list(made.edits), []
    for fit in fits.values():
        square, cross, wanted = (sums[f"{fit.path} {key}"] for key in ("square", "cross", "wanted"))
        fit = replace(fit, square=square, cross=cross, wanted=wanted)
        values, was, now = _solved(fit)
        edits = [e for e in edits if not (isinstance(e, Assign | Scale) and e.tensor in values)]
        edits += [Assign(path, value) for path, value in values.items()]
        differences.append((was, now))
    was, now = (sum(shares) / len(shares) for shares in zip(*differences, strict=True))
    note = (
        f"repair={kind!r}, {samples.count:,} examples: what {len(fits)} MLPs give differed from before by {was:.2%} of its "
        f"variance on average, and now does by {now:.2%}"
    )
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
        path = mlp.leaf("fc2").path
        module = module_at(tree, path)
        layer = projection(module)
        if module is None or layer is None:
            raise ReductionError(f"repair: {path} is no linear layer or 1 x 1 convolution; exclude it")
        weight = module.get_parameter("weight")
        inputs, outputs = weight.shape[layer.inputs] + 1, weight.shape[layer.outputs]
        zeros = weight.new_zeros(inputs, inputs, dtype=torch.float64)
        sums = zeros.new_zeros(outputs, inputs), zeros.new_zeros(3, outputs)
        fits.setdefault(id(module), _Fit(module, path, zeros, *sums))
    return fits


def _add(before: Model, after: Model, fits: Mapping[int, _Fit], images: torch.Tensor) -> None:
    """Run both models on a few images, the reduced MLPs on inputs of the unreduced ones, and add to the sums."""
    given: dict[str, torch.Tensor] = {}  # what fc1 is given, and what fc2 gives, at each place

    def note_input(place: str, module: nn.Module, args: Any) -> None:
        given[place] = args[0]

    def note_output(place: str, module: nn.Module, args: Any, output: Any) -> None:
        given[place] = output

    def replace_input(place: str, module: nn.Module, args: Any) -> Any:
        return (given.pop(place), *args[1:])

    def add_output(place: str, module: nn.Module, args: Any, output: Any) -> None:
        _add_rows(fits[id(module)], args[0], given.pop(place), output)

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
            module = module_at(tree, leaf.path)
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


def _add_rows(fit: _Fit, inputs: torch.Tensor, wanted: torch.Tensor, output: torch.Tensor) -> None:
    """Add the sums of one call."""
    layer = projection(fit.layer)
    assert layer is not None
    rows = [t.movedim(layer.features, -1).flatten(0, -2).double() for t in (inputs, wanted, output)]
    given = torch.cat([rows[0], rows[0].new_ones(len(rows[0]), 1)], 1)
    missing = rows[1] - rows[2]
    fit.square.addmm_(given.T, given)
    fit.cross.addmm_(missing.T, given)
    fit.wanted.add_(torch.stack([rows[1].sum(0), rows[1].square().sum(0), missing.square().sum(0)]))


def _solved(fit: _Fit) -> tuple[dict[str, torch.Tensor], float, float]:
    """New values by tensor path, and what was missing and is, as a share of the variance of what is wanted."""
    layer, weight = projection(fit.layer), fit.layer.get_parameter("weight")
    assert layer is not None
    bias, count = fit.layer._parameters.get("bias"), fit.square[-1, -1]
    square, cross = fit.square[:-1, :-1], fit.cross[:, :-1]
    if bias is not None:  # it takes the means, and has no ridge
        means, rest = fit.square[-1, :-1] / count, fit.cross[:, -1] / count
        square = square - count * torch.outer(means, means)
        cross = cross - count * torch.outer(rest, means)
    noise = torch.finfo(square.dtype).eps * len(square) * fit.square.diagonal()[:-1].max()  # of the means' subtraction
    ridge = _RIDGE * square.diagonal().mean() + noise
    if not square.isfinite().all() or not cross.isfinite().all():
        raise ReductionError(f"repair: what {fit.path} is given is not finite; look at the model or the data")
    change = torch.zeros_like(cross)
    if ridge > 0:
        square = square + ridge * torch.eye(len(square), dtype=square.dtype, device=square.device)
        change = torch.cholesky_solve(cross.T, torch.linalg.cholesky(square)).T
    whole = torch.cat([change, change.new_zeros(len(change), 1)], 1)
    if bias is not None:
        whole[:, -1] = rest - change @ means
    gone = 2 * (whole * fit.cross).sum() - ((whole @ fit.square) * whole).sum()
    total, squares, missing = fit.wanted[0], fit.wanted[1].sum(), fit.wanted[2].sum()
    variance = (squares - total.square().sum() / count).clamp(min=torch.finfo(torch.float64).tiny)
    new = weight.double() + (change if layer.outputs == 0 else change.T).reshape(weight.shape)
    values = {f"{fit.path}.weight": new.to(weight.dtype)}
    if bias is not None:
        values[f"{fit.path}.bias"] = (bias.double() + whole[:, -1]).to(bias.dtype)
    return values, float(missing / variance), float((missing - gone) / variance)
