"""Transforms that put layers in place of others: formulas on ViT-B/16, company with other transforms, ties, DDP, refusals."""

from __future__ import annotations

import copy
import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers.marks import slow_but
from helpers.two_processes import Together
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mlpreduce
from mlpreduce import ReductionError
from mlpreduce.budget import Cost, measure
from mlpreduce.edits import Assign, Replace, Scale, Share, Slice
from mlpreduce.layers import (
    BlockDiagonalLinear,
    ChannelCovariance,
    LoraLinear,
    LowRankLinear,
    ScaleShift,
    TokenConvolution,
    adapters,
)
from mlpreduce.testing import tiny_vit

Steps = list[tuple[str, dict[str, Any]]]


def base(**kwargs: Any) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model("vit_base_patch16_224", **kwargs)


@functools.cache
def plain_cost() -> Cost:
    """That of ViT-B/16 as it is."""
    return measure(base()).cost


def cost_of(steps: Steps, **kwargs: Any) -> Cost:
    """The measured cost of ViT-B/16 after some steps, each of which must cost what its plan says."""
    model = base(**kwargs)
    found = plain_cost()
    for name, config in steps:
        planned = mlpreduce.plan(model, name, **config).costs()[1]
        mlpreduce.apply(model, name, **config)
        found = measure(model).cost
        assert found == planned
    return found


def reduced(steps: Steps) -> nn.Module:
    model = tiny_vit().eval()
    for name, config in steps:
        mlpreduce.apply(model, name, **config)
    return model


def moved(model: nn.Module) -> nn.Module:
    """The model after what trains in it has moved."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max()) < 1e-5


# --- formulas on ViT-B/16: d features, h hidden units, 12 blocks, 197 tokens --------------------------------------------------

D, H, BLOCKS, TOKENS = 768, 3072, 12, 197
DENSE = 2 * D * H


def test_scheme() -> None:
    """METHODS 5.2: 2 d h / g + h + d parameters and 2 N d h / g MACs a block."""
    plain = plain_cost()
    wide = cost_of([("block_diagonal", {"groups": 4})], mlp_ratio=8)
    same = cost_of([("block_diagonal", {"groups": 2})])
    assert (round(wide.params / 1e6, 2), round(same.params / 1e6, 2)) == (58.29, 58.26)
    assert round(same.macs_linear / 1e9, 2) == 11.27
    assert same.params == plain.params - BLOCKS * DENSE // 2
    assert same.macs_linear == plain.macs_linear - BLOCKS * TOKENS * DENSE // 2
    assert wide.mlp_params == BLOCKS * (2 * D * 2 * H // 4 + 2 * H + D)
    halved = cost_of([("shallow", {"ratio": 0.5})])
    assert same.macs_linear == halved.macs_linear
    assert same.params - halved.params == 12 * 1536


@pytest.mark.parametrize("rank", [64, 307, 614])
def test_low_rank(rank: int) -> None:
    plain, thin = plain_cost(), cost_of([("low_rank", {"rank": rank})])
    assert thin.params == plain.params + BLOCKS * (2 * rank * (D + H) - DENSE)
    assert thin.macs_linear == plain.macs_linear + BLOCKS * TOKENS * (2 * rank * (D + H) - DENSE)
    assert (thin.params < plain.params) == (rank < 614.4)


def test_the_highest_rank_for_a_target() -> None:
    plain = plain_cost()
    for target in (0.9, 0.673, 0.5, 60_000_000):
        most = target * plain.params if target < 1 else target
        found = cost_of([("low_rank", {"target_params": target})]).params
        assert most - BLOCKS * 2 * (D + H) < found <= most


@pytest.mark.parametrize(("band", "entries"), [(0, 18_432), (1, 55_248), (4, 165_408), (16, 601_728)])
def test_svft(band: int, entries: int) -> None:
    model = mlpreduce.apply(base(), "svft", pattern="banded" if band else "plain", band=band)
    names = adapters(model)
    held = dict(model.named_parameters())
    assert sum(held[name].numel() for name in names) == entries + 24  # and a gate for each layer


def test_ssf() -> None:
    """METHODS 5.3: 0.206 M at all sites, 0.092 M at those of MLPs."""
    for sites, count in (("all", 205_824), ("mlp", 92_160)):
        model = mlpreduce.apply(base(), "ssf", sites=sites)
        held = dict(model.named_parameters())
        assert sum(held[name].numel() for name in adapters(model)) == count
        cost = measure(model).cost
        assert cost.params == plain_cost().params + count
        assert cost.macs_linear == plain_cost().macs_linear


def test_what_uses_of_a_tied_mlp_have_of_their_own() -> None:
    tied = cost_of([("grouped", {"group": 2})])
    scaled = cost_of([("grouped", {"group": 2, "per_use": "ssf"})])
    lora = cost_of([("grouped", {"group": 2, "per_use": {"name": "lora", "rank": 8}})])
    assert scaled.params - tied.params == BLOCKS * 2 * (H + D)
    assert lora.params - tied.params == BLOCKS * 2 * 8 * (H + D)
    assert lora.macs_linear - tied.macs_linear == BLOCKS * TOKENS * 2 * 8 * (H + D)
    seen = cost_of([("grouped", {"group": 2, "per_use": "conv"})])
    assert seen.params - tied.params == BLOCKS * 9 * D
    assert seen.macs_linear - tied.macs_linear == BLOCKS * (TOKENS - 1) * 9 * D
    assert scaled.unique_mlps == lora.unique_mlps == tied.unique_mlps == 6


def test_an_mlp_that_is_dropped_saves_all_of_it() -> None:
    plain, left = plain_cost(), cost_of([("drop", {"mlps": ["blocks.3.mlp", "blocks.7.mlp"]})])
    assert plain.params - left.params == 2 * (DENSE + H + D)
    assert plain.macs_linear - left.macs_linear == 2 * TOKENS * DENSE


# --- in company ---------------------------------------------------------------------------------------------------------------

SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "blocks": ("block_diagonal", {"groups": 2, "align": "all", "cca": "covariance"}),
    "shuffled": ("block_diagonal", {"shuffle": True, "init": "new"}),
    "low rank": ("low_rank", {}),
    "svft": ("svft", {"init": "normal"}),
    "lora": ("lora", {}),
    "ssf": ("ssf", {"init": "released", "sites": "all"}),
    "gate": ("block_gate", {}),
    "drop": ("drop", {"mlps": ["blocks.1.mlp"]}),
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped": ("grouped", {"remainder": "own"}),
    "mean": ("grouped", {"keep": "mean", "scale": "none", "share": "block", "remainder": "own"}),
    "shallow": ("shallow", {"criterion": "l2"}),
}
REFUSED = {
    ("shuffled", "shallow"): "of which no hidden units can be taken out; merge the model first",
    ("svft", "shallow"): "of which no hidden units can be taken out; merge the model first",
    ("svft", "grouped"): "which no factor scales; use scale='none'",
    ("svft", "mean"): "the mean of factors is no mean of weights",
    ("low rank", "mean"): "the mean of factors is no mean of weights",
    ("blocks", "mean"): "blocks of unlike features have none",
}


@pytest.mark.parametrize("first", slow_but([True, False], True))
@pytest.mark.parametrize(("system", "other"), list(itertools.product(SYSTEMS, OTHERS)))
def test_in_company(system: str, other: str, first: bool, tmp_path: Path) -> None:
    steps = [SYSTEMS[system], OTHERS[other]] if first else [OTHERS[other], SYSTEMS[system]]
    if first and (system, other) in REFUSED:
        model = reduced(steps[:1])
        before = copy.deepcopy(model)
        with pytest.raises(ReductionError) as error:
            mlpreduce.apply(model, steps[1][0], **steps[1][1])
        assert REFUSED[system, other] in str(error.value)
        assert all(map(torch.equal, model.state_dict().values(), before.state_dict().values()))
        return
    model = moved(reduced(steps))
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    output = model(images)
    assert mlpreduce.verify(model).ok
    assert torch.equal(copy.deepcopy(model)(images), output)
    mlpreduce.save(model, tmp_path / "reduced")
    assert torch.equal(mlpreduce.load(tmp_path / "reduced").eval()(images), output)
    if other != "shallow":
        loose = mlpreduce.untie(copy.deepcopy(model))
        assert mlpreduce.verify(loose).ties == 0
        assert torch.equal(loose(images), output)
        mlpreduce.save(loose, tmp_path / "loose")
        assert torch.equal(mlpreduce.load(tmp_path / "loose").eval()(images), output)
    plain = mlpreduce.merge(copy.deepcopy(model))
    assert near(plain(images), output)
    if system != "drop":
        architecture = tiny_vit()
        assert list(plain.state_dict()) == list(architecture.state_dict())
        assert [type(m) for m in plain.modules()] == [type(m) for m in architecture.modules()]
        width = 64 if other == "shallow" else 128
        assert {mlp.hidden_features for mlp in mlpreduce.find_mlps(plain)} == {width}
    mlpreduce.save(plain, tmp_path / "plain")
    assert torch.equal(mlpreduce.load(tmp_path / "plain").eval()(images), plain(images))


def test_layers_around_layers() -> None:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    model = moved(
        reduced(
            [
                ("grouped", {"group": 2, "per_use": "lora"}),
                ("low_rank", {"rank": 8}),
                ("ssf", {}),
                ("shallow", {"ratio": 0.5}),
                ("block_gate", {}),
            ]
        )
    )
    layer = model.get_submodule("blocks.1.mlp.fc1")
    assert isinstance(layer, ScaleShift)
    assert isinstance(layer.base, LoraLinear)
    assert isinstance(layer.base.base, LowRankLinear)
    assert layer.base.base is model.get_submodule("blocks.0.mlp.fc1.base.base")
    assert layer.base is not model.get_submodule("blocks.0.mlp.fc1.base")
    mlp = mlpreduce.find_mlps(model)[1]
    assert (mlp.name, mlp.owner, mlp.hidden_features) == ("blocks.1.mlp", "blocks.0.mlp", 64)
    assert mlp.params(owned=False) == 4 * (32 + 64) * 2 + 2 * (32 + 64) + 1  # lora, ssf, gate
    plain = mlpreduce.merge(copy.deepcopy(model))
    assert near(plain(images), model(images))
    assert [made.transform for made in mlpreduce.history(plain) if made.of(Slice)] == ["shallow"]
    assert not any(made.of(Share, Replace) for made in mlpreduce.history(plain))


def test_the_branch_of_scheme_runs_in_training_alone_and_merges_away() -> None:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    model = reduced([("block_diagonal", {"cca": "covariance"})])
    branch = model.get_submodule("blocks.0.mlp")
    assert isinstance(branch, ChannelCovariance)
    evaluated = model(images)
    trained = model.train()(images)
    assert not near(trained, evaluated)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ChannelCovariance):
                module.mix.copy_(torch.tensor([60.0, -60.0]))
    assert near(model(images), evaluated)
    assert mlpreduce.merge(model).eval().blocks[0].mlp is branch.base
    assert near(model(images), evaluated)


def test_a_convolution_before_each_use_stays_when_the_rest_is_merged(tmp_path: Path) -> None:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    model = moved(reduced([("grouped", {"per_use": "conv"}), ("lora", {"rank": 2}), ("shallow", {"ratio": 0.5})]))
    assert [mlp.name for mlp in mlpreduce.find_mlps(model)] == [f"blocks.{i}.mlp" for i in range(4)]
    plain = mlpreduce.merge(copy.deepcopy(model))
    assert near(plain(images), model(images))
    assert isinstance(plain.get_submodule("blocks.1.mlp"), TokenConvolution)
    assert type(plain.get_submodule("blocks.1.mlp.base.fc1")) is nn.Linear
    mlpreduce.save(plain, tmp_path)
    assert torch.equal(mlpreduce.load(tmp_path).eval()(images), plain(images))


def test_gates_that_shut_say_which_mlps_go() -> None:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    model = reduced([("block_gate", {})])
    with pytest.raises(ReductionError, match="all of 4 gates are larger, the least 1"):
        mlpreduce.apply(model, "drop")
    with torch.no_grad():
        for number, gate in enumerate((1.4, -0.3, 0.7, 0.02)):
            model.get_submodule(f"blocks.{number}.mlp.fc2").gate.fill_(gate)  # type: ignore[union-attr]
    output = model(images)
    left = mlpreduce.apply(copy.deepcopy(model), "drop", gate=0.0)
    assert near(left(images), output)
    assert [mlp.name for mlp in mlpreduce.find_mlps(left)] == ["blocks.0.mlp", "blocks.2.mlp", "blocks.3.mlp"]
    assert [row.hidden for row in mlpreduce.plan(model, "drop", gate=0.05).rows] == [128, 0, 128, 0]
    assert near(mlpreduce.merge(left)(images), output)


def test_the_best_order_of_units_keeps_most_and_changes_nothing_by_itself() -> None:
    model = tiny_vit().eval()
    kept = {}
    for align in ("none", "hidden", "all"):
        made = mlpreduce.apply(copy.deepcopy(model), "block_diagonal", groups=4, align=align)
        kept[align] = sum(p.square().sum().item() for n, p in made.named_parameters() if ".mlp." in n and "weight" in n)
    assert kept["none"] < kept["hidden"] < kept["all"]
    made = mlpreduce.plan(model, "block_diagonal", groups=4)
    assert "4 blocks keep" in made.notes[0]


def test_units_go_from_every_block_alike() -> None:
    model = reduced([("block_diagonal", {"groups": 4}), ("shallow", {"ratio": 0.5, "criterion": "l2"})])
    layer = model.get_submodule("blocks.0.mlp.fc2")
    assert isinstance(layer, BlockDiagonalLinear)
    assert layer.weight.shape == (32, 16)
    mlpreduce.apply(model, "shallow", width=30)
    assert [mlp.hidden_features for mlp in mlpreduce.find_mlps(model)] == [28] * 4


def test_factors_by_the_data_are_nearer_on_it() -> None:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(64, 3, 16, 16, generator=generator) * torch.linspace(0.1, 3, 16)
    model = tiny_vit().eval()
    wanted = model(images)
    errors = {}
    for init in ("weights", "data"):
        made = mlpreduce.apply(copy.deepcopy(model), "low_rank", rank=4, init=init, data=[images])
        errors[init] = float((made(images) - wanted).norm().detach())
    assert errors["data"] < 0.9 * errors["weights"]


def test_only_adapters_train_if_the_rest_is_frozen() -> None:
    model = reduced(
        [("svft", {"layers": "fc1", "init": "normal"}), ("lora", {"layers": "fc2"}), ("ssf", {"sites": "all"})]
    )
    names = adapters(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names or name.startswith("head."))
    model(torch.randn(2, 3, 16, 16)).square().sum().backward()
    got = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert got == {*names, "head.weight", "head.bias"}


# --- in two processes ---------------------------------------------------------------------------------------------------------

TRAINED: dict[str, Steps] = {
    "own per use": [("grouped", {"per_use": "lora"}), ("ssf", {"init": "released"})],
    "blocks": [("block_diagonal", {"cca": "covariance"}), ("block_gate", {})],
    "few that train": [("low_rank", {"layers": "fc1"}), ("svft", {"layers": "fc2", "init": "normal"})],
    "dropped": [("drop", {"mlps": ["blocks.1.mlp"]})],
}


def _gradients(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor | None]:
    model(images).square().mean().backward()
    return {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()}


def _batch() -> torch.Tensor:
    return torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def _trains(rank: int, folder: str) -> None:
    for name, steps in TRAINED.items():
        model = DistributedDataParallel(moved(reduced(steps)).double().train())
        torch.save(_gradients(model, _batch().chunk(2)[rank]), f"{folder}/{name}{rank}.pt")


@pytest.mark.processes
def test_gradients_in_two_processes(together: Together, tmp_path: Path) -> None:
    together(_trains, str(tmp_path))
    for name, steps in TRAINED.items():
        expected = _gradients(moved(reduced(steps)).double().train(), _batch())
        for rank in range(2):
            found = torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True)
            assert found.keys() == expected.keys()
            for key, gradient in expected.items():
                assert (gradient is None) == (found[key] is None)
                if gradient is not None:
                    torch.testing.assert_close(found[key], gradient, rtol=0, atol=1e-12)


# --- what is refused ----------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[Steps, str]] = {
    "groups": ([("block_diagonal", {"groups": 3})], "groups=3 do not divide 32 inputs and 128 outputs"),
    "one group": ([("block_diagonal", {"groups": 1})], "groups"),
    "align": ([("block_diagonal", {"align": "units"})], "align"),
    "branch": ([("block_diagonal", {"cca": "full"})], "cca"),
    "layers": ([("low_rank", {"layers": ["fc3"]})], "give 'fc1', 'fc2', or both"),
    "two sizes": ([("low_rank", {"rank": 2, "energy": 0.5})], "rank and energy both say the size"),
    "rank": ([("low_rank", {"rank": 33})], "rank is at most 32"),
    "no rank": ([("low_rank", {"ratio": 0.01})], "leaves blocks.0.mlp.fc1 no rank; a rank of 1 is 0.0391 of it"),
    "target": ([("low_rank", {"target_params": 0.1})], "with projections of low rank"),
    "energy of none": ([("low_rank", {"energy": 0.5, "init": "new"})], "init='new' has none"),
    "no data": ([("low_rank", {"init": "data"})], "data"),
    "twice": ([("low_rank", {}), ("svft", {})], "blocks.0.mlp.fc1 is a LowRankLinear"),
    "gates twice": ([("block_gate", {}), ("block_gate", {})], "has a gate already"),
    "pattern": ([("svft", {"pattern": "full"})], "pattern"),
    "lora rank": ([("lora", {"rank": 0})], "rank"),
    "sites": ([("ssf", {"sites": "norms"})], "sites"),
    "no gates": ([("drop", {})], "the MLPs have no gates"),
    "no such MLP": ([("drop", {"mlps": ["blocks.9.mlp"]})], "mlps has 'blocks.9.mlp'"),
    "all": ([("drop", {"mlps": [f"blocks.{i}.mlp" for i in range(4)]})], "none of 4 MLPs would be left"),
    "per use": ([("grouped", {"per_use": "bias"})], "per_use"),
    "option per use": ([("grouped", {"per_use": {"name": "ssf", "rank": 2}})], "has no option 'rank'"),
    "of attention": (
        [("grouped", {"per_use": "lora", "share": "attention"})],
        "share='attention' leaves each block its own",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(case: str) -> None:
    steps, message = BAD[case]
    model = reduced(steps[:-1])
    before = copy.deepcopy(model)
    with pytest.raises(ReductionError) as error:
        mlpreduce.apply(model, steps[-1][0], **steps[-1][1])
    assert message in str(error.value)
    assert list(model.state_dict()) == list(before.state_dict())
    assert all(map(torch.equal, model.state_dict().values(), before.state_dict().values()))


def test_a_scale_and_shift_is_met_where_a_weight_is_read() -> None:
    """BEiT reads qkv's weight itself, and does not call the layer."""
    model = timm.create_model("beit_base_patch16_224", depth=2, embed_dim=32, num_heads=2, img_size=32).eval()
    images = torch.randn(2, 3, 32, 32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    before = model(images)
    mlpreduce.apply(model, "ssf", sites="all")
    assert torch.equal(model(images), before)
    scale = model.blocks[0].attn.qkv.scale
    scale.data.mul_(1.5)
    scaled = model(images)
    assert float((scaled - before).detach().abs().max()) > 1e-3
    scaled.sum().backward()
    assert scale.grad is not None
    assert float((mlpreduce.merge(model)(images) - scaled).detach().abs().max()) < 1e-5


def test_layers_of_an_encoder_that_reads_their_weights_are_refused() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    inputs = torch.randn(2, 5, 32)
    for transform in ("block_diagonal", "low_rank", "ssf"):
        with pytest.raises(ReductionError, match="TransformerEncoderLayer, which reads the weights"):
            mlpreduce.apply(encoder, transform, example_inputs=inputs)
    mlpreduce.apply(encoder, "shallow", example_inputs=inputs)
    with torch.no_grad():
        assert encoder(inputs).shape == inputs.shape


# --- what once went wrong -----------------------------------------------------------------------------------------------------


def test_weights_that_are_read_and_norms_on_channels_are_scaled() -> None:
    with torch.device("meta"):
        xcit = timm.create_model("xcit_nano_12_p16_224").eval()
        convnext = timm.create_model("convnext_atto").eval()
    mlpreduce.apply(xcit, "ssf", sites="all")
    xcit(torch.zeros(1, 3, 224, 224, device="meta"))
    mlpreduce.apply(convnext, "ssf", sites="all")
    convnext(torch.zeros(1, 3, 224, 224, device="meta"))


def test_layers_that_make_something_of_their_weights_are_left_out() -> None:
    settings: dict[str, Any] = {"img_size": 64, "depth": 1, "embed_dim": 48, "num_classes": 5}
    model = timm.create_model("vit_tiny_r_s16_p8_224", **settings).eval()
    mlpreduce.apply(model, "ssf", sites="all", init="released")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.head.weight.normal_()
        for name, parameter in model.named_parameters():
            if name.endswith(".scale"):
                parameter.mul_(1.3)
    output = model(images)
    assert near(mlpreduce.merge(copy.deepcopy(model))(images), output)


def test_a_merged_model_with_a_convolution_left_can_be_loaded(tmp_path: Path) -> None:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    model = moved(reduced([("lora", {}), ("grouped", {"per_use": "conv"}), ("shallow", {})]))
    mlpreduce.merge(model)
    mlpreduce.save(model, tmp_path)
    assert torch.equal(mlpreduce.load(tmp_path).eval()(images), model(images))


def test_a_lack_of_memory_for_layers_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlpreduce.surgery import operation

    model = tiny_vit()
    before, make = copy.deepcopy(model), operation.make_layer

    def scarce(name: str, module: nn.Module, *others: Any) -> nn.Module:
        if not next(module.parameters()).is_meta:
            raise torch.OutOfMemoryError("out of memory")
        return make(name, module, *others)

    monkeypatch.setattr(operation, "make_layer", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        mlpreduce.apply(model, "grouped", per_use="lora")
    assert model.blocks[0].mlp.fc1 is not model.blocks[1].mlp.fc1
    assert all(map(torch.equal, model.state_dict().values(), before.state_dict().values()))


def test_merge_after_partners_of_a_tie_are_dropped_and_of_frozen_models() -> None:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    gone = ["blocks.1.mlp", "blocks.3.mlp"]
    model = moved(reduced([("grouped", {"scale": "none"}), ("drop", {"mlps": gone}), ("lora", {})]))
    output = model(images)
    assert near(mlpreduce.merge(model)(images), output)
    assert not any(made.of(Share) for made in mlpreduce.history(model))
    frozen = tiny_vit().requires_grad_(False)
    mlpreduce.merge(mlpreduce.apply(frozen, "low_rank"))
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    graph = mlpreduce.apply(mlpreduce.to_graph(tiny_vit()), "lora")
    assert not mlpreduce.history(copy.deepcopy(mlpreduce.merge(graph)))


def test_training_on_rows_and_columns_of_tokens() -> None:
    small: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), "num_classes": 5, "conv_mlp": False}
    model = timm.create_model("convnext_atto", **small)
    mlpreduce.apply(model, "block_diagonal", cca="covariance", groups=4)
    assert model.train()(torch.randn(2, 3, 64, 64)).isfinite().all()


def test_a_convolution_knows_its_grid() -> None:
    model = tiny_vit(img_size=(20, 16), class_token=False, global_pool="avg")
    convolution = mlpreduce.apply(model, "grouped", per_use="conv").get_submodule("blocks.0.mlp.convolution")
    nn.init.ones_(convolution.weight)  # type: ignore[arg-type]
    tokens = torch.zeros(1, 20, 32)
    tokens[0, 0] = 1
    assert convolution(tokens)[0, :, 0].reshape(5, 4).nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    with pytest.raises(ReductionError, match="or drops some of them"):
        mlpreduce.apply(tiny_vit(patch_drop_rate=0.5), "grouped", per_use="conv")


@pytest.mark.parametrize("adapter", ["lora", "ssf"])
def test_criteria_and_repair_see_what_adapters_make_of_a_layer(adapter: str) -> None:
    data = [torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(3))]
    model = moved(moved(moved(reduced([(adapter, {})]))))
    merged = mlpreduce.merge(copy.deepcopy(model))
    for criterion in ("l2", "gram_schmidt", "activation"):
        ours, plain = (mlpreduce.plan(m, "shallow", criterion=criterion, data=data).of(Slice) for m in (model, merged))
        assert [edit.units for edit in ours] == [edit.units for edit in plain]


def test_a_repair_gives_a_layer_around_another_what_it_was_given() -> None:
    data = [torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(3))]
    model = moved(moved(reduced([("lora", {"layers": "fc1"})])))
    fitted = []
    for each in (model, mlpreduce.merge(copy.deepcopy(model))):
        made = mlpreduce.plan(each, "shallow", repair="least_squares", data=data)
        fitted.append({edit.tensor: edit.value for edit in made.of(Assign)})
    assert fitted[0].keys() == fitted[1].keys() != set()
    for name, value in fitted[0].items():
        torch.testing.assert_close(value, fitted[1][name], rtol=1e-3, atol=1e-4)


def test_during_training_layers_around_others_are_refused() -> None:
    from mlpreduce.during import GateL1, reduce_in_training

    for steps in ([("lora", {})], [("low_rank", {})], [("block_diagonal", {"include": "blocks.2.mlp"})]):
        model = reduced(steps)
        names = list(model.state_dict())
        with pytest.raises(ReductionError, match="merge the model first"):
            GateL1(model)
        assert list(model.state_dict()) == names
    model = tiny_vit()
    with pytest.raises(ReductionError, match="of which the optimizer knows nothing"):
        reduce_in_training(model, "lora", torch.optim.AdamW(model.parameters()))


def test_a_measured_scale_of_factors_is_that_of_the_merged_model() -> None:
    model = moved(reduced([("low_rank", {})]))
    merged = mlpreduce.merge(copy.deepcopy(model))
    found = []
    for each in (model, merged):
        made = mlpreduce.plan(each, "grouped", scale="match_forward")
        found.append({edit.factor for edit in made.of(Scale)})
    assert sorted(found[0]) == pytest.approx(sorted(found[1]), rel=1e-3)


def test_units_of_a_tied_mlp_with_a_norm_are_put_in_order_once() -> None:
    small: dict[str, Any] = {"img_size": 28, "embed_dim": 48, "depth": 4, "num_heads": 2, "num_classes": 5}
    model = timm.create_model("eva02_tiny_patch14_224", scale_mlp=True, **small).eval()
    mlpreduce.apply(model, "grouped", scale="none")
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    made = mlpreduce.plan(model, "block_diagonal", groups=2)
    assert mlpreduce.plan(model, "block_diagonal", groups=2).to_json() == made.to_json()
    assert mlpreduce.apply(model, made)(images).isfinite().all()


def test_a_norm_after_the_mlp_has_no_gate() -> None:
    with torch.device("meta"):
        model = timm.create_model("swinv2_tiny_window8_256")
    with pytest.raises(ReductionError, match="a norm lies between"):
        mlpreduce.apply(model, "block_gate")


WRONG: dict[str, tuple[Steps, str]] = {
    "part of a tie": (
        [("grouped", {}), ("low_rank", {"exclude": "blocks.0.mlp"})],
        "is not in scope; include all or none",
    ),
    "means in other orders": (
        [("block_diagonal", {"align": "all"}), ("grouped", {"keep": "mean", "scale": "none"})],
        "blocks of unlike features have none",
    ),
    "units of adapters": ([("lora", {}), ("grouped", {"keep": "align_mean", "scale": "none"})], "knows its units"),
    "seed": ([("low_rank", {"init": "new", "seed": "x"})], "seed is 'x'"),
    "layers of none": ([("lora", {"layers": 5})], "give 'fc1', 'fc2', or both"),
    "names of none": ([("drop", {"mlps": 5})], "mlps is 5"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused_too(case: str) -> None:
    steps, message = WRONG[case]
    model = reduced(steps[:-1])
    with pytest.raises(ReductionError) as error:
        mlpreduce.apply(model, steps[-1][0], **steps[-1][1])
    assert message in str(error.value)


def test_on_meta_the_same_is_refused() -> None:
    for config in ({"pattern": "foo"}, {"init": "foo"}, {"pattern": "banded", "band": 999}, {"rank": "a"}):
        with pytest.raises(ReductionError):
            mlpreduce.plan(base(depth=1), "svft", **config)
    with pytest.raises(ReductionError, match="or never had any"):
        mlpreduce.plan(base(depth=1), "low_rank").save("never.json")


def test_one_place_is_not_replaced_twice() -> None:
    model = tiny_vit()
    model.blocks[1].mlp = model.blocks[0].mlp
    with pytest.raises(ReductionError, match="are one place"):
        mlpreduce.apply(model, "ssf")
    for transform in ("block_gate", "ssf"):
        made = mlpreduce.plan(tiny_vit(), transform)
        with pytest.raises(ReductionError, match="or already carried out"):
            mlpreduce.apply(mlpreduce.apply(tiny_vit(), made), made)
