"""The contract that every transform keeps, as a function that third parties can run on their own transforms."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import mlpreduce
from mlpreduce.budget import measure
from mlpreduce.edits import Assign, Plan, Replace, Scale, Share, Slice
from mlpreduce.errors import ReductionError
from mlpreduce.graph import is_leaf
from mlpreduce.layers import ChannelCovariance, merges, wraps
from mlpreduce.reduction.outcomes import planned
from mlpreduce.surgery.ties import full_state, moved_by
from mlpreduce.transforms import get_transform
from mlpreduce.words.values import Config

__all__ = ["check_transform", "tiny_vit"]


def tiny_vit(**kwargs: Any) -> nn.Module:
    """A timm ViT of four blocks, width 32, for 16 x 16 images; seeded, without touching the global random state."""
    import timm

    settings = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = timm.create_model("vit_tiny_patch16_224", **settings | kwargs)
    model.mlpreduce_build = {"name": "vit_tiny_patch16_224", "kwargs": settings | kwargs}  # type: ignore[assignment]
    return model


def check_transform(
    name: str,
    make: Callable[[], nn.Module] = tiny_vit,
    inputs: torch.Tensor | None = None,
    *,
    data: Any = None,
    **config: Any,
) -> Plan:
    """Check one transform with one config on one model, and return its plan.

    Args:
        name: the transform.
        make: builds the model, with equal weights at each call.
        inputs: a batch of images; by default of the tiny ViT's size.
        data: calibration data, if the config asks for it; read several times.
        **config: keyword parameters of the transform.

    Raises:
        AssertionError: the contract is broken; the message says where.
    """
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) if inputs is None else inputs
    before, model = make().eval(), make().eval()
    state = torch.random.get_rng_state()
    made = mlpreduce.plan(model, name, data=data, **config)
    _same_tensors(before, model, "plan")
    expected, _ = planned(model, measure(model), made)
    returned = mlpreduce.apply(model, name, data=data, **config)
    _must(torch.equal(state, torch.random.get_rng_state()), "plan and apply consume no random numbers")
    _must(returned is model and type(model) is type(before), "apply returns the same object, of the same class")
    _must(mlpreduce.history(model) == [made], "apply does what plan says, each time the same")
    _must(measure(model).cost == expected, f"cost is as planned: {measure(model).cost} and {expected}")
    _must(mlpreduce.verify(model).ok, f"verify finds no problem: {mlpreduce.verify(model)}")
    _untouched(before, model, made)

    with torch.no_grad():
        output = model(images)
    _must(bool(output.isfinite().all()), "the output is finite")
    if get_transform(name).preserves == "exact" or (get_transform(name).preserves == "at_init" and not config):
        _near(before, images, output, "the unreduced model, as the transform declares,")
    with tempfile.TemporaryDirectory() as directory:
        made.save(f"{directory}/made.json")
        again = mlpreduce.apply(make().eval(), Plan.load(f"{directory}/made.json"))
        _same_output(again, images, output, "the plan read back from its files")
    _same_output(copy.deepcopy(model), images, output, "a deep copy")
    _must(mlpreduce.history(copy.deepcopy(model)) == [made], "a deep copy has the history")
    graph = mlpreduce.to_graph(model)
    _same_output(graph, images, output, "to_graph")
    training = sum(module.mix.numel() for module in model.modules() if isinstance(module, ChannelCovariance))
    _must(_count(graph) == _count(model) - training, "the graph has the parameters of the model, and no dead ones")
    flat = mlpreduce.to_graph(make().eval())
    if all(is_leaf(before.get_submodule(edit.module)) for edit in made.of(Replace)):
        _same_output(
            mlpreduce.apply(flat, name, data=data, **config), images, output, "the transform applied to a GraphModule"
        )
        _must(_count(flat) == _count(model), "a GraphModule comes back with as many parameters")
    else:  # whole MLPs are replaced, of which a graph has no module
        _refused(flat, name, {"data": data, **config})
    plain = mlpreduce.merge(copy.deepcopy(model))
    _near(plain, images, output, "the merged model")
    if all(merges(edit.layer) for edit in made.of(Replace)):
        classes = {path: type(module) for path, module in before.named_modules()}
        _must(
            list(plain.state_dict()) == list(before.state_dict())
            and {path: type(module) for path, module in plain.named_modules()} == classes,
            "a merged model has the names and classes of the architecture",
        )
    with tempfile.TemporaryDirectory() as directory:
        mlpreduce.save(model, directory)
        _same_output(mlpreduce.load(directory).eval(), images, output, "a saved model")
        mlpreduce.save(plain, directory)
        _near(mlpreduce.load(directory).eval(), images, output, "a merged and saved model")
    if made.of(Share):
        _same_output(mlpreduce.untie(copy.deepcopy(model)), images, output, "untie")
        _refused(copy.deepcopy(model), name, {"data": data, **config})
    model.train()(images).sum().backward()
    idle = [path for path, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]
    _must(not idle, f"every parameter gets a gradient, not {idle[:3]}")
    return made


def _must(condition: bool, statement: str) -> None:
    if not condition:
        raise AssertionError(f"broken: {statement}")


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _same_output(model: nn.Module, images: torch.Tensor, output: torch.Tensor, what: str) -> None:
    with torch.no_grad():
        other = model(images)
    gap = (other - output).abs().max().item()
    _must(torch.equal(other, output), f"{what} gives the same output, bit for bit (largest difference {gap:.3g})")


def _near(model: nn.Module, images: torch.Tensor, output: torch.Tensor, what: str) -> None:
    with torch.no_grad():
        gap = ((model(images) - output).abs().max() / output.abs().max()).item()
    _must(gap < 1e-5, f"{what} gives the same output to 1e-5 of the largest (difference {gap:.3g})")


def _same_tensors(model: nn.Module, other: nn.Module, call: str) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    _must(list(ours) == list(theirs), f"{call} leaves the state dict's names")
    for name, tensor in ours.items():
        _must(torch.equal(tensor, theirs[name]), f"{call} leaves {name} as it was")


def _untouched(before: nn.Module, model: nn.Module, made: Plan) -> None:
    """What no edit names is bit-identical."""
    named = {axis.tensor for edit in made.of(Slice) for axis in edit.axes}
    named |= {edit.tensor for edit in made.of(Assign, Scale)}
    shares = {share.target: share.source for share in made.of(Share)}
    gone = tuple(f"{edit.module}." for edit in made.of(Replace) if not wraps(edit.layer))
    state = full_state(model)
    for name, tensor in before.state_dict().items():
        if name in named or name.rpartition(".")[0] in shares or name.startswith(gone):
            continue
        for edit in made.of(Replace):
            name = moved_by(edit, name)
        if name in state:
            _must(torch.equal(tensor, state[name]), f"{name}, which no edit names, is bit-identical")


def _refused(model: nn.Module, name: str, config: Config) -> None:
    before = copy.deepcopy(model)
    try:
        mlpreduce.apply(model, name, **config)
    except ReductionError:
        _same_tensors(before, model, "a refused apply")
        return
    raise AssertionError(f"broken: {name} applied to what it has tied already is refused")
