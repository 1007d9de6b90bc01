"""The proof that a reduction is right, on real weights: against references that do not use the library's surgery."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import mlpreduce
from mlpreduce.coverage.entries import build
from mlpreduce.edits import Plan, Share, Slice
from mlpreduce.graph import Inputs, call_with, example_inputs, find_mlps, map_tensors

__all__ = ["Proof", "prove", "sliced_against_masked", "tied_is_copied"]

TOLERANCE = 1e-5  # of the largest output
LARGE = 400  # pixels; models for larger images are built for smaller ones where the architecture allows it


@dataclass(frozen=True)
class Proof:
    """What was measured on one architecture with random weights.

    Attributes:
        architecture: its name in timm.
        sliced: largest difference between sliced and masked, as a part of the largest output.
        effect: largest difference that masking makes, by the same measure; it must be far larger.
        grouped: whether tied equals copied, bit for bit; None if nothing can be tied.
        trains: whether every parameter that got a gradient still does.
        saved: whether the saved and loaded model gives the same output, bit for bit.
        failure: what does not hold; empty if all does.
    """

    architecture: str
    sliced: float = 0.0
    effect: float = 0.0
    grouped: bool | None = None
    trains: bool = False
    saved: bool = False
    failure: str = ""


def prove(architecture: str) -> Proof:
    """Slice, group, check gradients, save and load an architecture on the CPU. Nothing is raised."""
    try:
        proof = _prove(architecture)
    except Exception as error:  # one architecture must not end the table; it is reported as failed
        return Proof(architecture, failure=f"{type(error).__name__}: {error}")
    wrong = [
        f"sliced differs from masked by {proof.sliced:.1e}" if not proof.sliced <= TOLERANCE else "",
        f"masking changes too little ({proof.effect:.1e}) to tell" if not proof.effect > 20 * proof.sliced else "",
        "tied differs from copied" if proof.grouped is False else "",
        "a parameter lost its gradient" if not proof.trains else "",
        "the loaded model differs" if not proof.saved else "",
    ]
    return Proof(**vars(proof) | {"failure": "; ".join(filter(None, wrong))})


def _prove(architecture: str) -> Proof:
    model, kwargs = _real(architecture)
    generator = torch.Generator().manual_seed(1)
    inputs = map_tensors(example_inputs(model, 2), lambda x: torch.randn(x.shape, generator=generator))
    gap, effect = _sliced_exactly(model, inputs)
    reduced = copy.deepcopy(model)
    grouped = None
    if _can_tie(reduced):
        grouped = tied_is_copied(model, inputs)
        mlpreduce.apply(reduced, "grouped", remainder="own")
    mlpreduce.apply(reduced, "shallow", ratio=0.5)
    return Proof(
        architecture,
        sliced=gap,
        effect=effect,
        grouped=grouped,
        trains=_idle(reduced, inputs) <= _idle(model, inputs),
        saved=_comes_back(reduced, inputs, {"name": architecture, "kwargs": kwargs}),
    )


def _can_tie(model: nn.Module) -> bool:
    """Whether a plan can be made; where not, the table says why."""
    try:
        mlpreduce.plan(model, "grouped", remainder="own")
    except mlpreduce.ReductionError:
        return False
    return True


def _sliced_exactly(model: nn.Module, inputs: Inputs) -> tuple[float, float]:
    """`sliced_against_masked` in float64, where the model runs in it.

    With random weights some models multiply rounding errors: Visformer has 5e-5 of its output in float32 with one thread,
    2e-6 with two, and 0 in float64.
    """
    exact = map_tensors(inputs, lambda x: x.double() if x.is_floating_point() else x)
    try:
        return sliced_against_masked(copy.deepcopy(model).double(), exact)
    except RuntimeError:  # it makes tensors of its own in float32
        return sliced_against_masked(model, inputs)


def sliced_against_masked(model: nn.Module, inputs: Inputs) -> tuple[float, float]:
    """Slice half of the hidden units, chosen at random, and compare with a model in which the others have no weight.

    Returns:
        The largest difference of the outputs, and the largest that masking makes, both as a part of the largest output.
    """
    made = mlpreduce.plan(model, "shallow", ratio=0.5, criterion="random", seed=1, example_inputs=inputs)
    sliced = mlpreduce.apply(copy.deepcopy(model), made, example_inputs=inputs)
    expected = _output(_masked(model, sliced, made, inputs), inputs)
    return _gap(_output(sliced, inputs), expected), _gap(_output(model, inputs), expected)


def tied_is_copied(model: nn.Module, inputs: Inputs) -> bool:
    """Whether tying without scaling equals, bit for bit, giving equal values to what is tied.

    Raises:
        ReductionError: nothing can be tied.
    """
    made = mlpreduce.plan(model, "grouped", remainder="own", scale="none", example_inputs=inputs)
    tied = mlpreduce.apply(copy.deepcopy(model), made, example_inputs=inputs)
    return torch.equal(_output(tied, inputs), _output(_copied(model, made), inputs))


def _real(architecture: str) -> tuple[nn.Module, dict[str, Any]]:
    """The architecture with random weights in which no branch is silent: timm starts some at zero."""
    kwargs: dict[str, Any] = {}
    size = build(architecture).pretrained_cfg["input_size"][-1]  # type: ignore[index]
    if size > LARGE:
        try:
            kwargs = {"img_size": 256}
            build(architecture, **kwargs)
        except (TypeError, ValueError, AssertionError, RuntimeError):
            kwargs = {}
    model = build(architecture, device="cpu", **kwargs)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.squeeze().dim() <= 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif parameter.std() == 0:
                parameter.normal_(0, 0.02, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("running_mean"):
                buffer.normal_(0, 0.1, generator=generator)
    return model, kwargs


def _output(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """The output, or the first of several."""
    with torch.no_grad():
        result = call_with(model, inputs)
    first: torch.Tensor = result if isinstance(result, torch.Tensor) else result[0]
    return first


def _gap(output: torch.Tensor, expected: torch.Tensor) -> float:
    return float((output - expected).abs().max() / expected.abs().max())


def _masked(model: nn.Module, sliced: nn.Module, made: Plan, inputs: Inputs) -> nn.Module:
    """The whole model, in which the units that go have no weight in what contracts them.

    Where units see each other inside the MLP, those that go are also hidden from the others there.
    """
    masked = copy.deepcopy(model)
    slices: dict[str, Slice] = {edit.mlp: edit for edit in made.of(Slice)}
    for mlp in find_mlps(model, inputs):
        edit = slices.get(mlp.name)
        if edit is None:
            continue
        gone = sorted(set(range(edit.hidden)) - set(edit.units))
        for leaf in mlp.leaves:
            module = masked.get_submodule(leaf.path)
            axis = next((axis for axis in mlp.axes if axis.tensor == f"{leaf.path}.weight"), None)
            if axis is None:
                continue
            if leaf.role == "fc2":
                weight = module.get_parameter("weight").detach().movedim(axis.dim, 0)
                weight[[axis.offsets[0] + unit for unit in gone]] = 0
            elif leaf.role == "conv" and mlp.groups > 1:
                module.register_forward_pre_hook(lambda module, args, gone=gone: _without(args[0], gone))
            elif leaf.role == "norm" and not isinstance(module, nn.modules.batchnorm._BatchNorm):
                narrow = copy.deepcopy(sliced.get_submodule(leaf.path))
                kept = list(axis.positions(edit.hidden, edit.units))
                module.register_forward_hook(
                    lambda module, args, output, narrow=narrow, kept=kept: _among(args[0], kept, narrow)
                )
    return masked


def _without(x: torch.Tensor, gone: list[int]) -> torch.Tensor:
    return x.index_fill(1, torch.tensor(gone), 0)


def _among(x: torch.Tensor, kept: list[int], norm: nn.Module) -> torch.Tensor:
    """A norm over the kept channels alone; the others stay as they are, and have no weight later."""
    size = norm.get_parameter("weight").numel()
    dim = next(d for d in (x.dim() - 1, 1) if x.shape[d] > size or x.shape[d] == len(kept))
    index = torch.tensor(kept)
    return x.index_copy(dim, index, norm(x.index_select(dim, index)))


def _copied(model: nn.Module, made: Plan) -> nn.Module:
    """The whole model, in which what would be tied has equal values instead."""
    copied = copy.deepcopy(model)
    for share in made.of(Share):
        copied.get_submodule(share.target).load_state_dict(copied.get_submodule(share.source).state_dict())
    return copied


def _idle(model: nn.Module, inputs: Any) -> set[str]:
    """Parameters without a gradient after a backward pass."""
    model.zero_grad(set_to_none=True)
    call_with(model, inputs).square().mean().backward()
    idle = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    model.zero_grad(set_to_none=True)
    return idle


def _comes_back(model: nn.Module, inputs: Any, made: dict[str, Any]) -> bool:
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        mlpreduce.save(model, directory, build=made)
        return torch.equal(_output(mlpreduce.load(directory).eval(), inputs), _output(model, inputs))
