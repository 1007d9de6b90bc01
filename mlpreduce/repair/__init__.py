"""Repair: fc2 and its bias refitted in closed form, so that a reduced MLP best gives what it gave before, on calibration data.

With x what an MLP is given in the unreduced model, y what its fc2 gives there, a(x) what fc2 is given in the reduced one, W and
b its weights as they stay, the new ones are W + D and b + d with the least

    sum |y - (W + D) a(x) - (b + d)|^2 + ridge * |D|^2

over all tokens, images and, of an MLP that is tied, uses. Every MLP is fitted for inputs of the unreduced model, so one pass
over the data serves all. The ridge is the one that does best when each half of the examples is judged by a fit on the other; an
MLP that no fit would bring closer there stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from mlpreduce.calibration import Samples, quiet_copy, running, telling
from mlpreduce.edits import Assign, Plan, Scale, Share, Slice
from mlpreduce.errors import ReductionError, check_one_of
from mlpreduce.graph import MLP, module_at, projection
from mlpreduce.repair.fit import Fit, add_rows, empty_fit, solved
from mlpreduce.repair.sequential import repair_in_turn
from mlpreduce.surgery import carry_out

__all__ = ["REPAIRS", "repaired"]

REPAIRS = ("none", "bias", "parallel", "least_squares")
_FAR = 0.9  # cosine of what the models give, below which the plan warns
Model = tuple[nn.Module, Sequence[MLP]]  # with its MLPs that are repaired, all uses


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
    if kind != "parallel":
        return _in_turn(model, mlps, made, (uses, moved), samples, kind)
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
    every_value: dict[str, torch.Tensor] = {}
    differences, kept = [], 0
    for fit in fits.values():
        square, cross, wanted = (sums[f"{fit.path} {key}"] for key in ("square", "cross", "wanted"))
        fit = replace(fit, square=square, cross=cross, wanted=wanted)
        if not square[:, -1, -1].all():  # rows of each half
            raise ReductionError(
                f"repair fits one half of the examples and judges by the other, and one is empty, with "
                f"{samples.count} in all; give at least 2, better hundreds"
            )
        values, was, now = solved(fit)
        kept += not values and was > 1e-9  # else there is nothing to repair
        every_value |= values
        differences.append((was, now))
    was, now = (sum(shares) / len(shares) for shares in zip(*differences, strict=True))
    note = (
        f"repair={kind!r}, {samples.count:,} examples: what {len(fits)} MLPs give differed from before by {was:.2%} of its "
        f"variance on average, and does by {now:.2%} after a fit on the half of the examples by which it is not judged"
    )
    if kept:
        note += f"; {kept} of them would be no closer and stay as they are, for which more data would help"
    facts = {"samples": samples.count, "fingerprint": samples.fingerprint}
    return replace(_with(made, every_value), notes=(*made.notes, note), data=facts)


def _with(made: Plan, values: Mapping[str, torch.Tensor]) -> Plan:
    """The plan with new values of tensors."""
    edits = [edit for edit in made.edits if not (isinstance(edit, Assign | Scale) and edit.tensor in values)]
    return replace(made, edits=(*edits, *(Assign(path, value) for path, value in values.items())))


def _in_turn(
    model: nn.Module,
    mlps: Sequence[MLP],
    made: Plan,
    uses: tuple[Sequence[MLP], Sequence[MLP]],
    samples: Samples,
    kind: str,
) -> Plan:
    """The plan with values of a repair in order of execution, and what it came to."""
    with running(samples.device, gradients=False):
        before, after = quiet_copy(model), _reduced(model, made)
        found = repair_in_turn((before, uses[0]), (after, uses[1]), mlps, samples, bias_alone=kind == "bias")
        samples.finish({}, None)
    note = (
        f"repair={kind!r}, {samples.count:,} examples: what the model gives for {found.held:,} of them that no fit saw is as "
        f"near to the whole model's as cosine {found.after[0]:.3f} and alignment {found.after[1]:.3f} say, without repair "
        f"{found.before[0]:.3f} and {found.before[1]:.3f}"
    )
    if found.left:
        note += f"; {len(found.left)} of {found.fitted} MLPs stay unrepaired, as the whole would be further off"
    if found.unfollowed:
        note += f"; of {len(found.unfollowed)} MLPs no stream can be followed, and their own outputs are fitted"
    if not found.cut:
        note += "; the model cannot be cut at its blocks, so each fit ran all of it"
    notes = [*made.notes, note]
    if found.after[0] < _FAR:
        notes.append(
            f"the reduced model is far from the whole one (cosine {found.after[0]:.3f}); keep more units, give more data, or "
            f"train it"
        )
    facts = {
        "samples": samples.count,
        "fingerprint": samples.fingerprint,
        "held": found.held,
        "cosine": list(found.after),
        "cosine_before": list(found.before),
    }
    return replace(_with(made, found.values), notes=tuple(notes), data=facts)


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


def _fits(tree: nn.Module, uses: Sequence[MLP]) -> dict[int, Fit]:
    """One fit for each fc2 of the reduced model, by the id of the layer."""
    fits: dict[int, Fit] = {}
    for mlp in uses:
        fit = empty_fit(tree, mlp.leaf("fc2").call)
        fits.setdefault(id(fit.layer), fit)
    return fits


def _add(before: Model, after: Model, fits: Mapping[int, Fit], half: int, images: torch.Tensor) -> None:
    """Run both models on a few images, the reduced MLPs on inputs of the unreduced ones, and add to the sums."""
    given: dict[str, torch.Tensor] = {}  # what fc1 is given, and what fc2 gives, at each place

    def note_input(place: str, module: nn.Module, args: Any) -> None:
        given[place] = args[0]

    def note_output(place: str, module: nn.Module, args: Any, output: Any) -> None:
        given[place] = output

    def replace_input(place: str, module: nn.Module, args: Any) -> Any:
        return (given.pop(place), *args[1:])

    def add_output(place: str, module: nn.Module, args: Any, output: Any) -> None:
        layer = projection(module)
        assert layer is not None
        rows = [t.movedim(layer.features, -1).flatten(0, -2).double() for t in (args[0], given.pop(place), output)]
        add_rows(fits[id(module)], half, rows[0], rows[1], rows[1] - rows[2])

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
