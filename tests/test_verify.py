"""verify sees through what holds a reduced model, counts its MLPs, and ends in words."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

import mlpreduce
from mlpreduce import ReductionError, verify
from mlpreduce.testing import tiny_vit


class Plain(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x)


class Forwarding(Plain):
    """As adapter libraries do: what it does not have comes from the inside."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


class Detector(Plain):
    """A parent with weights of its own that takes more than images, so that it cannot be traced without inputs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.head = nn.Linear(5, 2)

    def forward(self, x: dict[str, torch.Tensor]) -> Any:
        return self.head(self.inner(x["image"]))


WRAPPERS = [Plain, Forwarding, Detector, torch.compile, nn.DataParallel]


def reduced() -> nn.Module:
    return mlpreduce.apply(tiny_vit(), "grouped")


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_model_is_checked(wrap: Any) -> None:
    wrapped = wrap(reduced())
    report = verify(wrapped)
    assert report.ok, report
    assert (report.mlps, report.unique_mlps, report.ties) == (4, 2, 4)
    assert report.params == sum(parameter.numel() for parameter in wrapped.parameters())


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_broken_tie_is_seen_through_wrappers(wrap: Any) -> None:
    model = reduced()
    model.blocks[1].mlp.fc1 = copy.deepcopy(model.blocks[1].mlp.fc1)
    report = verify(wrap(Plain(model)))
    assert "inner.blocks.1.mlp.fc1 is no longer tied to " in str(report)
    assert len(report.problems) == 1


def test_wrappers_inside_of_the_model_do_not_count() -> None:
    model = reduced()
    for block in model.blocks:
        block.mlp = torch.compile(block.mlp)
    assert verify(model).ok
    model.blocks[1].mlp._orig_mod.fc1 = copy.deepcopy(model.blocks[1].mlp._orig_mod.fc1)
    assert "blocks.1.mlp.fc1 is no longer tied to blocks.0.mlp.fc1" in str(verify(model))


def test_a_leaf_that_is_gone_is_a_broken_tie_and_a_block_that_is_gone_is_none() -> None:
    model = reduced()
    model.blocks[0].mlp, model.blocks[1].mlp = nn.Identity(), nn.Identity()
    assert "blocks.1.mlp.fc1 is no longer tied to blocks.0.mlp.fc1" in str(verify(model))
    pruned = reduced()
    pruned.prune_intermediate_layers([1], prune_head=False)
    report = verify(pruned)
    assert report.ok
    assert report.mlps == 2


class Encoder(nn.Module):
    """PyTorch's encoder, whose MLPs are found with inputs alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(48, 32), nn.Linear(32, 5)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.encoder(self.embed(nn.functional.unfold(x, 4, stride=4).transpose(1, 2))).mean(1))


def test_mlps_are_counted_that_are_found_with_inputs_alone() -> None:
    inputs = torch.randn(2, 3, 16, 16)
    model = mlpreduce.apply(Encoder(), "grouped", example_inputs=inputs)
    by_graph, by_history = verify(model, example_inputs=inputs), verify(model)
    assert (by_graph.mlps, by_graph.unique_mlps) == (4, 2)
    assert by_history == by_graph
    assert verify(Encoder(), example_inputs=inputs).mlps == 4
    assert verify(mlpreduce.untie(model)).unique_mlps == 4


def test_dropped_mlps_are_not_counted() -> None:
    inputs = torch.randn(2, 3, 16, 16)
    model = mlpreduce.apply(Encoder(), "shallow", include="encoder.layers.0*", example_inputs=inputs)
    assert verify(model).mlps == 4  # those that were left out too
    vit = mlpreduce.apply(tiny_vit(), "drop", mlps=["blocks.1.mlp"])
    assert verify(vit).mlps == 3
    assert verify(Detector(vit)).mlps == 3


def test_inputs_that_the_model_does_not_take_are_refused() -> None:
    with pytest.raises(ReductionError, match=r"a run on example inputs raised .*give a batch that the model takes"):
        verify(reduced(), example_inputs=torch.zeros(2, 5))


def test_tensors_that_functional_call_left_are_reported() -> None:
    model = reduced().eval()
    doubled = {name: parameter.detach() * 2 for name, parameter in model.named_parameters()}
    torch.func.functional_call(model, doubled, (torch.zeros(1, 3, 16, 16),))
    report = verify(model)
    assert (report.mlps, report.unique_mlps, report.ties) == (4, 2, 4)
    (problem,) = report.problems
    assert problem.startswith("blocks.0.mlp.fc1.weight (and 7 others) is a plain tensor in the place of a Parameter")
    assert "tie_weights=False" in problem
    for call in (mlpreduce.find_mlps, mlpreduce.merge, lambda model: mlpreduce.save(model, "never")):
        with pytest.raises(ReductionError, match=r"blocks.0.mlp.fc1.weight is a plain tensor"):
            call(model)


def test_a_model_that_is_hidden_is_asked_for() -> None:
    class Hiding(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.kept = [inner]

        def __getattr__(self, name: str) -> Any:
            return getattr(self.kept[0], name) if name == "mlpreduce_history" else super().__getattr__(name)

    with pytest.raises(ReductionError, match="passes on the history of a model that is not among its modules"):
        verify(Hiding(reduced()))


def test_what_cannot_be_read_is_a_refusal() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise KeyError("odd")

    with pytest.raises(ReductionError, match=r"KeyError"):
        verify(Odd())
    with pytest.raises(ReductionError, match=r"needs a torch.nn.Module, got int"):
        verify(3)  # type: ignore[arg-type]
    with pytest.raises(ReductionError, match=r"ema is a int; give a module"):
        verify(reduced(), ema=3)


@pytest.mark.parametrize("wrap", [Plain, Forwarding, Detector])
def test_the_ema_of_a_wrapped_model_is_checked(wrap: Any) -> None:
    model = wrap(reduced())
    ema = ModelEmaV3(model)
    assert verify(model, ema=ema).ok
    assert verify(model, torch.optim.AdamW(model.parameters()), ema).ok
    inner = ema.module.inner
    inner.blocks[1].mlp.fc1 = copy.deepcopy(inner.blocks[1].mlp.fc1)
    assert "in the EMA inner.blocks.1.mlp.fc1 is not tied to inner.blocks.0.mlp.fc1" in str(verify(model, ema=ema))
    early = wrap(tiny_vit())
    ema = ModelEmaV3(early)
    mlpreduce.apply(early.inner, "grouped")
    assert "in the EMA inner.blocks.1.mlp.fc1 is not tied" in str(verify(early, ema=ema))


def test_a_wrapper_has_no_history_of_its_own() -> None:
    wrapped = Forwarding(reduced())
    assert len(mlpreduce.history(wrapped)) == 1  # it passes it on
    with pytest.raises(ReductionError, match=r"inner was reduced on its own"):
        mlpreduce.apply(wrapped, "shallow")
    assert len(mlpreduce.history(wrapped)) == 1


def test_counts_have_their_own_words() -> None:
    model = reduced()
    parameters = list(model.parameters())
    names = [name for name, _ in model.named_parameters()]
    one = verify(model, optimizer=torch.optim.SGD(parameters[1:], 0.1))
    assert one.problems == (f"the optimizer does not update 1 parameter ({names[0]}); build it after apply",)
    two = verify(model, optimizer=torch.optim.SGD(parameters[2:], 0.1))
    assert two.problems == (f"the optimizer does not update 2 parameters (such as {names[0]}); build it after apply",)
    foreign = verify(model, optimizer=torch.optim.SGD([*parameters, torch.zeros(1)], 0.1))
    assert foreign.problems == ("the optimizer holds 1 tensor that is not the model's; build it after apply",)
    optimizer = torch.optim.SGD(parameters, 0.1)
    optimizer.param_groups[0]["params"] += parameters[:1] * 2 + [torch.zeros(1)] * 2
    assert verify(model, optimizer=optimizer).problems == (
        "the optimizer holds 2 tensors that are not the model's; build it after apply",
        f"the optimizer updates 1 parameter ({names[0]}) more than once a step",
    )
