"""Refusals that name what is in the way, names checked where they are registered, seeds and TOML of whatever was given."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing._internal.two_tensor import TwoTensor

import mlpreduce
from mlpreduce import ReductionError
from mlpreduce.criteria import list_criteria, register_criterion
from mlpreduce.search.export import as_toml
from mlpreduce.testing import tiny_vit
from mlpreduce.transforms.steps import seeded

# --- what hides MLPs


class Adapter(nn.Module):
    """As peft puts around a layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> Any:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class Narrow(nn.Linear):
    """As float8 layers do: an nn.Linear that computes in another type."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x.to(torch.float16).to(x.dtype), self.weight, self.bias)


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def narrow(layer: nn.Linear) -> nn.Module:
    return Narrow(layer.in_features, layer.out_features)


def hooked(layer: nn.Linear) -> None:
    own = layer.forward
    layer.forward = lambda x: own(x)  # type: ignore[method-assign]


ALTERED: dict[str, tuple[Callable[[nn.Linear], Any], str]] = {
    "pruned weight": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), r'prune.remove\(layer, "weight"\)'),
    "pruned bias": (lambda layer: prune.random_unstructured(layer, "bias", 0.5), r'prune.remove\(layer, "bias"\)'),
    "structured": (
        lambda layer: prune.ln_structured(layer, "weight", 0.5, n=2, dim=0),
        r'prune.remove\(layer, "weight"\)',
    ),
    "old weight norm": (torch.nn.utils.weight_norm, r"torch.nn.utils.remove_weight_norm\(layer\)"),
    "old spectral norm": (torch.nn.utils.spectral_norm, r"torch.nn.utils.remove_spectral_norm\(layer\)"),
    "weight norm": (parametrizations.weight_norm, r'parametrize.remove_parametrizations\(layer, "weight"\)'),
    "spectral norm": (parametrizations.spectral_norm, r'parametrize.remove_parametrizations\(layer, "weight"\)'),
    "parametrization": (
        lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
        r'parametrize.remove_parametrizations\(layer, "weight"\)',
    ),
    "adapter": (Adapter, r"is an adapter around a layer \(Adapter of .*\): fold it in first"),
    "float8": (narrow, r"computes in a way of its own \(Narrow of .*\): put an nn.Linear in its place"),
    "forward": (hooked, r"has a custom forward on the instance"),
}


def altered(kind: str, name: str = "fc1", blocks: tuple[int, ...] = (0, 1, 2, 3)) -> nn.Module:
    model, alter = tiny_vit(), ALTERED[kind][0]
    for number in blocks:
        mlp = model.blocks[number].mlp
        after = alter(getattr(mlp, name))
        if isinstance(after, nn.Module):
            setattr(mlp, name, after)
    return model


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["fc1", "fc2"])
@pytest.mark.parametrize("kind", ALTERED)
def test_the_layer_in_the_way_is_named(kind: str, name: str) -> None:
    with pytest.raises(
        ReductionError, match=rf"found no MLP .*; 4 are hidden: blocks.0.mlp.{name} .*{ALTERED[kind][1]}"
    ):
        mlpreduce.plan(altered(kind, name), "shallow")


REMEDIES: dict[str, Callable[[nn.Linear], Any]] = {
    "pruned weight": lambda layer: prune.remove(layer, "weight"),
    "pruned bias": lambda layer: prune.remove(layer, "bias"),
    "old weight norm": torch.nn.utils.remove_weight_norm,
    "old spectral norm": torch.nn.utils.remove_spectral_norm,
    "weight norm": lambda layer: parametrize.remove_parametrizations(layer, "weight"),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", REMEDIES)
def test_the_call_that_is_named_works(kind: str) -> None:
    model = altered(kind)
    for block in model.blocks:
        REMEDIES[kind](block.mlp.fc1)
    assert len(mlpreduce.apply(model, "shallow").mlpreduce_history[0].rows) == 4


def test_an_mlp_that_is_hidden_among_others_is_noted() -> None:
    text = str(mlpreduce.plan(altered("pruned weight", "fc2", (1, 2)), "shallow"))
    assert "note: blocks.1.mlp, and 1 more cannot be reduced: blocks.1.mlp.fc2 is pruned by a mask" in text
    assert "cannot be reduced" not in str(mlpreduce.plan(tiny_vit(), "shallow"))


def test_what_is_altered_elsewhere_is_not_in_the_way() -> None:
    model = tiny_vit()
    for block in model.blocks:
        prune.l1_unstructured(block.attn.qkv, "weight", 0.5)
    assert "cannot be reduced" not in str(mlpreduce.plan(model, "shallow"))
    for block in model.blocks:
        block.mlp = nn.Linear(32, 32)
        prune.l1_unstructured(block.mlp, "weight", 0.5)
    with pytest.raises(ReductionError, match="found no MLP") as refused:
        mlpreduce.plan(model, "shallow")
    assert "hidden:" not in str(refused.value)


def test_a_quantised_layer_is_named() -> None:
    class Linear(nn.Module):
        """Of torch.ao.nn.quantized.dynamic: no parameters, and widths."""

        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features, self.packed = layer.in_features, layer.out_features, layer.weight.data

        def forward(self, x: torch.Tensor) -> Any:
            return x.new_empty((*x.shape[:-1], self.out_features))

    Linear.__module__ = "torch.ao.nn.quantized.dynamic.modules.linear"
    model = tiny_vit()
    for block in model.blocks:
        block.mlp.fc1 = Linear(block.mlp.fc1)
    with pytest.raises(ReductionError, match=r"fc1 is quantised .*\(Linear of torch\): reduce the model first"):
        mlpreduce.plan(model, "shallow")


def test_a_weight_of_another_kind_is_refused() -> None:
    """As torchao's, a tensor subclass that is no plain tensor inside."""
    model = tiny_vit()
    weight = model.blocks[1].mlp.fc1.weight.detach()
    model.blocks[1].mlp.fc1.weight = nn.Parameter(TwoTensor(weight, weight.clone()))
    with pytest.raises(
        ReductionError, match=r"blocks.1.mlp.fc1.weight is a TwoTensor; reduce the model, then quantise"
    ):
        mlpreduce.plan(model, "shallow")


# --- names

BAD_NAMES = [5, [1], "", "with space", None, "a-b", "a.b", "1st", ("a",), {}]


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_names_are_checked_where_they_are_registered(name: Any) -> None:
    before = mlpreduce.list_transforms(), list_criteria()
    message = r"\(.*\): a name is letters, digits and _, such as"
    with pytest.raises(ReductionError, match=f"register{message}"):
        mlpreduce.register(name)(lambda parts: [])
    with pytest.raises(ReductionError, match=f"register_criterion{message}"):
        register_criterion(name)(lambda units: units.weights())
    with pytest.raises(ReductionError, match=f"register_model{message}"):
        mlpreduce.register_model(name, "vit_tiny_patch16_224", [("grouped", {})])
    assert (mlpreduce.list_transforms(), list_criteria()) == before


@pytest.mark.parametrize("architecture", [5, [1], None, ""])
def test_an_architecture_that_is_no_name(architecture: Any) -> None:
    with pytest.raises(ReductionError, match="timm has no architecture"):
        mlpreduce.register_model("unused_for_test", architecture, [("grouped", {})])


# --- seeds


@pytest.mark.parametrize("criterion", ["random", {"name": "random"}])
def test_a_criterion_that_draws_follows_the_seed_of_the_run(criterion: Any) -> None:
    step = {"transform": "shallow", "criterion": criterion}
    assert seeded(step, 42) == {**step, "seed": 42}
    assert seeded({**step, "seed": 1}, 42) == {**step, "seed": 1}
    orders = [mlpreduce.apply(tiny_vit(), **seeded(step, seed)).mlpreduce_history[0].edits for seed in (1, 2)]
    assert orders[0] != orders[1]


@pytest.mark.parametrize("criterion", ["l2", {"name": "taylor", "site": "fc1"}, {"name": "unknown"}, 3, None])
def test_a_criterion_that_draws_nothing_gets_no_seed(criterion: Any) -> None:
    step = {"transform": "shallow", "criterion": criterion}
    assert seeded(step, 42) == step


def test_a_criterion_of_ones_own_and_one_inside_of_another_option(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlpreduce import criteria

    monkeypatch.setattr(criteria.registry, "_CRITERIA", dict(criteria.registry._CRITERIA))
    register_criterion("drawn_for_test", needs="nothing", draws=True)(lambda units: torch.arange(len(units)))
    register_criterion("plain_for_test", needs="nothing")(lambda units: torch.arange(len(units)))
    for name, drawn in (("drawn_for_test", True), ("plain_for_test", False)):
        for option in ({"criterion": name}, {"rank": {"by": [{"criterion": {"name": name}}]}}):
            assert ("seed" in seeded({"transform": "shallow", **option}, 3)) == drawn


# --- TOML


@pytest.mark.parametrize(
    "document",
    [
        {"root": "/data/\U0001f600"},
        {"v": float("inf"), "w": -float("inf")},
        {"s": "a\x7fb\n\t\"'\\"},
        {"k y": {"a.b": 1, "": "x", "ü": [True, 1.5e-300]}},
        {"steps": [{"transform": "grouped", "pattern": [[0, 1], [2]], "criterion": {"name": "taylor"}}], "empty": []},
    ],
    ids=str,
)
def test_what_is_written_as_toml_reads_back(document: dict[str, Any]) -> None:
    assert tomllib.loads(as_toml(document)) == document


def test_what_toml_lacks() -> None:
    assert tomllib.loads(as_toml({"a": None, "t": {"x": None, "s": [{"y": None, "z": 1}]}})) == {"t": {"s": [{"z": 1}]}}
    with pytest.raises(ReductionError, match=r"\[1, None\] holds None, which TOML lacks"):
        as_toml({"a": [1, None]})
    with pytest.raises(ReductionError, match=r"this is no TOML: .*object"):
        as_toml({"a": object()})
    with pytest.raises(ReductionError, match=r"this is no TOML: .*key '1'"):
        as_toml({"a": {1: 2}})
