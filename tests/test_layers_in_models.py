"""Layers in models: beside each other, on models unlike a plain ViT, frozen, under what PyTorch does with models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import mlpreduce
from mlpreduce import ReductionError
from mlpreduce.edits import Share
from mlpreduce.layers import BlockDiagonalLinear, adapters, gates
from mlpreduce.testing import tiny_vit
from mlpreduce.transforms.parts import Parts


def test_a_correction_around_blocks_is_sliced_with_them() -> None:
    """Its own factor sees all hidden units, and not those of a block."""
    images = torch.randn(2, 3, 16, 16)
    for rank in (4, 3):
        model = tiny_vit().eval()
        mlpreduce.apply(model, "lora", rank=rank)
        mlpreduce.apply(model, "block_diagonal", groups=2)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        mlpreduce.apply(model, "shallow", ratio=0.5, criterion="l2")
        assert model.blocks[0].mlp.fc2.down.shape == (rank, 64)
        output = model(images).detach()
        assert float((mlpreduce.merge(model)(images) - output).detach().abs().max()) < 1e-5 * float(output.abs().max())


@pytest.mark.parametrize("criterion", ["gram_schmidt", "l2", "nvit"])
def test_units_of_blocks_are_chosen_as_those_of_the_dense_weights(criterion: str) -> None:
    model = mlpreduce.apply(tiny_vit(), "lora", rank=2)
    mlpreduce.apply(model, "block_diagonal", groups=2)
    torch.nn.init.normal_(model.blocks[0].mlp.fc1.up)
    plain = mlpreduce.merge(copy.deepcopy(model))
    data = [(torch.randn(4, 3, 16, 16), torch.arange(4) % 5)]
    chosen = []
    for each in (model, plain):
        parts = Parts(each, found := mlpreduce.find_mlps(each), data=data)
        chosen.append(parts.order(found[0], criterion))
    assert chosen[0] == chosen[1]


def test_an_mlp_that_adds_its_own_input_is_not_dropped() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.fc2(self.act(self.fc1(x)))

    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model = nn.Sequential(Residual(), Residual()).to(dtype)
        inputs = torch.randn(2, 5, 8, dtype=dtype)
        before, name = model(inputs), mlpreduce.find_mlps(model, inputs)[1].name
        with pytest.raises(ReductionError, match="adds its input to what it computes"):
            mlpreduce.apply(model, "drop", mlps=[name], example_inputs=inputs)
        assert torch.equal(model(inputs), before)


def test_a_convolution_before_uses_wants_the_images_it_was_made_for() -> None:
    model = tiny_vit(dynamic_img_size=True).eval()
    mlpreduce.apply(model, "grouped", group=2, scale="none", per_use="conv")
    model(torch.randn(1, 3, 16, 16))
    for size in (32, 12):
        with pytest.raises(ReductionError, match=r"tokens, but made for \d and a grid of 4 x 4"):
            model(torch.randn(1, 3, size, size))
    channels_first = nn.Sequential(*(_OfImages() for _ in range(2)))
    with pytest.raises(ReductionError, match="does not say which of that is a grid"):
        mlpreduce.apply(
            channels_first, "grouped", group=2, scale="none", per_use="conv", example_inputs=torch.zeros(1, 8, 8, 8)
        )


class _OfImages(nn.Module):
    """A block whose MLP is of 1 x 1 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.BatchNorm2d(8), nn.Sequential(nn.Conv2d(8, 16, 1), nn.GELU(), nn.Conv2d(16, 8, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


def test_a_model_with_a_weight_that_is_no_parameter_runs_on_meta() -> None:
    model = tiny_vit()
    with pytest.warns(FutureWarning, match="weight_norm"):
        model.head = nn.utils.weight_norm(nn.Linear(32, 5))
    mlpreduce.apply(model, "lora")
    assert model(torch.randn(1, 3, 16, 16)).shape == (1, 5)


def test_the_factors_of_svft_are_parameters_that_do_not_train() -> None:
    model = tiny_vit()
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    made = mlpreduce.plan(model, "svft")
    before, after = made.costs()
    mlpreduce.apply(model, made)
    stored = sum(tensor.numel() for tensor in model.state_dict().values() if tensor.is_floating_point())
    assert after.params == sum(parameter.numel() for parameter in model.parameters()) == stored > before.params
    frozen = {name.rpartition(".")[2] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"left", "values", "right"}
    mlpreduce.merge(model)
    assert trains == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("transform", ["low_rank", "block_diagonal", "svft", "lora", "ssf"])
def test_weights_that_are_frozen_and_biases_that_train_stay_so(transform: str) -> None:
    model = tiny_vit()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    mlpreduce.apply(model, transform)
    added = {name for name, p in model.named_parameters() if p.requires_grad and not name.endswith("bias")}
    assert added == set(adapters(model))
    mlpreduce.merge(model)
    assert trains == {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def test_what_is_added_to_a_frozen_model_trains() -> None:
    for transform, config in (("block_gate", {}), ("grouped", {"scale": "none", "per_use": "conv"})):
        model = tiny_vit().requires_grad_(False)
        mlpreduce.apply(model, transform, **config)
        added = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert added == set(gates(model) if transform == "block_gate" else adapters(model)) != set()


def test_units_are_put_in_order_for_fc2_alone() -> None:
    """Where its weights are blocks but for an order of units, nothing is lost."""
    model, images = tiny_vit().eval(), torch.randn(2, 3, 16, 16)
    order = torch.randperm(128)
    for block in model.blocks:
        dense = torch.block_diag(torch.randn(16, 64), torch.randn(16, 64))
        block.mlp.fc2.weight.data.copy_(0.1 * dense[:, order])
    before = model(images)
    mlpreduce.apply(model, "block_diagonal", groups=2, layers="fc2")
    assert type(model.blocks[0].mlp.fc1) is nn.Linear
    assert float((model(images) - before).detach().abs().max()) < 1e-5
    for config in (
        {"layers": "fc2", "align": "all"},
        {"shuffle": True, "align": "all"},
        {"shuffle": "no"},
        {"seed": 1.5},
    ):
        with pytest.raises(ReductionError):
            mlpreduce.apply(tiny_vit(), "block_diagonal", groups=2, **config)


def test_blocks_under_tracing_vmap_and_without_examples() -> None:
    layer = BlockDiagonalLinear(8, 12, 2)
    x = torch.randn(3, 5, 8)
    with pytest.warns(FutureWarning, match="trace"):
        assert torch.equal(torch.jit.trace(layer, x)(x), layer(x))
    with torch.no_grad():
        assert torch.allclose(torch.vmap(layer)(x), layer(x))
    assert layer(x[:0]).shape == (0, 5, 12)


def test_what_untie_makes_within_inference_mode_can_train() -> None:
    model = mlpreduce.apply(tiny_vit(), "grouped", group=2)
    with torch.inference_mode():
        mlpreduce.merge(model)
    model(torch.randn(1, 3, 16, 16)).sum().backward()


def test_a_seed_is_checked_where_nothing_is_drawn() -> None:
    with pytest.raises(ReductionError, match="seed is nan"):
        mlpreduce.apply(tiny_vit(), "ssf", seed=float("nan"))
    assert len(mlpreduce.plan(tiny_vit(), "grouped", per_use=None).of(Share)) > 0


def test_a_graph_that_is_tied_keeps_its_ties_in_the_state_dict() -> None:
    graph = mlpreduce.to_graph(tiny_vit().eval())
    mlpreduce.apply(graph, "grouped", group=2, scale="none")
    for each in (graph, copy.deepcopy(graph)):
        assert mlpreduce.verify(each).ok
        state = each.state_dict()
        assert state["blocks.1.mlp.fc1.weight"].numel() == 0
        each.load_state_dict(state)
        unlike = {**state, "blocks.1.mlp.fc1.weight": state["blocks.0.mlp.fc1.weight"] + 1}
        with pytest.raises(ReductionError, match="differ, but they are tied"):
            each.load_state_dict(unlike)
    mlpreduce.untie(graph)
    assert graph.state_dict()["blocks.1.mlp.fc1.weight"].numel() > 0
