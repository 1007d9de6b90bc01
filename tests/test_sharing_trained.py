"""Sharing trained MLPs: units matched by what they do, what is kept, corrections that start at what is missing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mlpreduce
from mlpreduce import ReductionError
from mlpreduce.graph import find_mlps
from mlpreduce.layers import LoraLinear
from mlpreduce.repair import refitted
from mlpreduce.testing import tiny_vit
from mlpreduce.transforms.merging import merge_of
from mlpreduce.transforms.parts import Parts


def images(count: int = 48, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def vit() -> nn.Module:
    model = tiny_vit().double().eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.15)
            nn.init.normal_(module.bias, std=0.1)
    return model


def reduced(model: nn.Module, **config: Any) -> nn.Module:
    config = {"group": 2, "scale": "none", "data": [images()]} | config
    return mlpreduce.apply(copy.deepcopy(model), "grouped", **config)


def error(model: nn.Module, other: nn.Module, seed: int = 5) -> float:
    wanted = model(images(seed=seed))
    return float(((other(images(seed=seed)) - wanted).square().sum() / wanted.square().sum()).detach())


def hidden(model: nn.Module, data: torch.Tensor) -> list[torch.Tensor]:
    kept: list[torch.Tensor] = []
    layers = [model.get_submodule(mlp.leaf("fc2").path) for mlp in find_mlps(model)]
    handles = [layer.register_forward_pre_hook(lambda m, args: kept.append(args[0].flatten(0, 1))) for layer in layers]
    model(data)
    for handle in handles:
        handle.remove()
    return kept


def test_correlations_are_those_of_all_positions(vit: nn.Module) -> None:
    mlps = find_mlps(vit)
    nn.init.zeros_(vit.get_submodule("blocks.1.mlp.fc1").weight[3])  # type: ignore[index, union-attr, arg-type, operator]
    parts = Parts(vit, mlps, data=[images(20), images(28, seed=2)])
    one, other, *_ = hidden(vit, torch.cat([images(20), images(28, seed=2)]))
    wanted = torch.corrcoef(torch.cat([one, other], 1).T)[:128, 128:].detach()
    wanted[:, 3] = 0  # it never changes
    found = parts.correlations(mlps[0], mlps[1])
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


def test_units_that_do_the_same_meet(vit: nn.Module) -> None:
    """With block 1 a copy of block 0 whose units lie in another order, and weights of another scale that does the same."""
    first, second = (vit.get_submodule(f"blocks.{number}.mlp") for number in range(2))
    order = torch.randperm(128, generator=torch.Generator().manual_seed(3))
    for block in vit.blocks:  # type: ignore[union-attr]
        nn.init.zeros_(block.attn.proj.weight)  # type: ignore[union-attr, arg-type]
        nn.init.zeros_(block.attn.proj.bias)  # type: ignore[union-attr, arg-type]
    with torch.no_grad():
        first.fc2.weight.mul_(1e-3)  # type: ignore[union-attr, operator]
        first.fc2.bias.mul_(1e-3)  # type: ignore[union-attr, operator]
        second.fc1.weight.copy_(first.fc1.weight[order])  # type: ignore[union-attr, operator, index]
        second.fc1.bias.copy_(first.fc1.bias[order])  # type: ignore[union-attr, operator, index]
        second.fc2.weight.copy_(first.fc2.weight[:, order])  # type: ignore[union-attr, operator, index]
        second.fc2.bias.copy_(first.fc2.bias)  # type: ignore[union-attr, operator, arg-type]
    mlps = find_mlps(vit)
    merge = merge_of(Parts(vit, mlps, data=[images()]), mlps[:2], "align_activations")
    assert merge.orders[1] is not None
    assert torch.equal(merge.orders[1], order.argsort())
    torch.testing.assert_close(merge.values["blocks.0.mlp.fc1.weight"], first.fc1.weight.detach())  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("repair", ["none", "parallel"])
def test_what_moves_the_model_least_is_kept(vit: nn.Module, repair: str) -> None:
    """By hand: each group alone, with each choice and its refit."""
    config: dict[str, Any] = {"scale": "none", "data": [images()], "repair": repair}
    keeps = ("first", "last", "mean", "align_mean", "align_activations")
    wanted = vit(images()).detach()
    best = []
    moved: dict[str, list[float]] = {keep: [] for keep in keeps}
    for rows in ([[0, 1], [2], [3]], [[0], [1], [2, 3]]):
        for keep in keeps:
            alone = mlpreduce.apply(copy.deepcopy(vit), "grouped", pattern=rows, keep=keep, **config)
            moved[keep].append(1 - float(torch.cosine_similarity(alone(images()).detach(), wanted).mean()))
        best.append(min(keeps, key=lambda keep: moved[keep][-1]))
    made = mlpreduce.plan(vit, "grouped", group=2, keep="auto", **config)
    (note,) = [note for note in made.notes if "auto" in note]
    for keep in keeps:
        assert f"{keep} {sum(moved[keep]) / 2:.3g}" in note
    for keep in set(best):
        assert f"{keep} for {best.count(keep)}" in note
    found = mlpreduce.apply(copy.deepcopy(vit), made)
    for number, keep in enumerate(best):
        plain = mlpreduce.apply(copy.deepcopy(vit), "grouped", group=2, keep=keep, **config)
        path = f"blocks.{2 * number}.mlp.fc2.weight"
        torch.testing.assert_close(plain.get_parameter(path), found.get_parameter(path))


def test_a_refit_that_does_harm_says_nothing_against_what_is_kept(
    vit: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The repair in turn would leave it out; the one that is not judged would not."""
    refits = Parts.refits

    def harmful(self: Parts, edits: Any) -> dict[str, torch.Tensor]:
        return {path: torch.randn_like(value) for path, value in refits(self, edits).items()}

    monkeypatch.setattr(Parts, "refits", harmful)
    notes = {}
    for repair in ("none", "parallel", "least_squares"):
        made = mlpreduce.plan(vit, "grouped", group=2, keep="auto", scale="none", data=[images()], repair=repair)
        (notes[repair],) = [note for note in made.notes if "auto" in note]
    told = {repair: note.partition("average by: ")[2] for repair, note in notes.items()}
    assert told["least_squares"] == told["none"] != told["parallel"]
    assert notes["least_squares"].partition(" of 2 groups")[0] == notes["none"].partition(" of 2 groups")[0]


def test_where_none_share_nothing_is_chosen(vit: nn.Module) -> None:
    alone = [[number] for number in range(4)]
    with pytest.raises(ReductionError, match="nothing would change"):
        mlpreduce.plan(vit, "grouped", pattern=alone, keep="auto", scale="none", data=[images()])


def test_what_is_lost_is_that_of_the_outputs(vit: nn.Module) -> None:
    """The error of a trial without a refit, computed by hand for `first`."""
    mlps = find_mlps(vit)
    edits = list(mlpreduce.plan(vit, "grouped", group=2, scale="none").edits)
    found = refitted(vit, mlps, edits, [images()])[0].differences
    kept: list[torch.Tensor] = []
    handles = [
        vit.get_submodule(mlp.name).register_forward_pre_hook(lambda m, args: kept.append(args[0].detach()))
        for mlp in mlps
    ]
    vit(images())
    for handle in handles:
        handle.remove()
    wanted = torch.cat([vit.get_submodule(mlps[n].name)(kept[n]).flatten(0, 1) for n in range(2)])
    given = torch.cat([vit.get_submodule(mlps[0].name)(kept[n]).flatten(0, 1) for n in range(2)])
    lost = (wanted - given).square().sum() / (wanted - wanted.mean(0)).square().sum()
    assert found["blocks.0.mlp.fc2"][0] == pytest.approx(float(lost.detach()), rel=1e-6)
    assert found["blocks.0.mlp.fc2"][1] < found["blocks.0.mlp.fc2"][0]


@pytest.mark.parametrize("keep", ["first", "last", "mean", "align_mean", "align_activations"])
def test_corrections_of_full_rank_give_back_what_was_there(vit: nn.Module, keep: str) -> None:
    for mlp in find_mlps(vit):  # biases are shared, and have no correction
        nn.init.zeros_(vit.get_submodule(mlp.leaf("fc1").path).bias)  # type: ignore[arg-type]
        nn.init.zeros_(vit.get_submodule(mlp.leaf("fc2").path).bias)  # type: ignore[arg-type]
    made = reduced(vit, keep=keep, per_use={"name": "lora", "init": "residual", "rank": 32})
    assert error(vit, made) < 1e-12
    plain = reduced(vit, keep=keep, per_use={"name": "lora", "rank": 32})
    assert error(vit, plain) > 1e-3


def test_a_correction_is_the_nearest_on_what_the_layer_is_given(vit: nn.Module) -> None:
    made = reduced(vit, keep="first", per_use={"name": "lora", "init": "residual", "rank": 5})
    layer = made.get_submodule("blocks.1.mlp.fc1")
    assert isinstance(layer, LoraLinear)
    rows: list[torch.Tensor] = []
    handle = vit.get_submodule("blocks.1.mlp.fc1").register_forward_pre_hook(
        lambda m, args: rows.append(args[0].detach().flatten(0, 1))
    )
    vit(images())
    handle.remove()
    (x,) = rows
    off = vit.get_submodule("blocks.1.mlp.fc1").weight - vit.get_submodule("blocks.0.mlp.fc1").weight  # type: ignore[operator]
    gone = (x @ (off - layer.up @ layer.down).T).square().sum()
    best = torch.linalg.svdvals((x @ off.T).detach())[5:].square().sum()
    assert float(gone.detach()) == pytest.approx(float(best), rel=1e-3)
    own = made.get_submodule("blocks.0.mlp.fc1")
    assert isinstance(own, LoraLinear)
    assert not own.up.any()  # nothing is missing there, and it can still train
    assert own.down.any()


@pytest.mark.parametrize("repair", ["parallel", "least_squares", "bias"])
def test_corrections_are_repaired_on_top(vit: nn.Module, repair: str, tmp_path: Path) -> None:
    per_use = {"name": "lora", "init": "residual", "rank": 8}
    plain = reduced(vit, keep="mean", per_use=per_use)
    made = reduced(vit, keep="mean", per_use=per_use, repair=repair)
    if repair != "bias":
        assert error(vit, made) < error(vit, plain)
    one, other = made.get_submodule("blocks.0.mlp.fc2"), made.get_submodule("blocks.1.mlp.fc2")
    assert one is not other
    assert one.base is other.base
    mlpreduce.save(made, tmp_path)
    back = mlpreduce.load(tmp_path, model=tiny_vit().double()).eval()
    torch.testing.assert_close(back(images()), made(images()))


def test_the_fit_on_top_is_least_squares_with_the_corrections_there(vit: nn.Module) -> None:
    per_use = {"name": "lora", "init": "residual", "rank": 8}
    config = {"group": 2, "scale": "none", "keep": "first", "per_use": per_use, "data": [images(200)]}
    errors = []
    for repair in ("none", "parallel"):
        edits = mlpreduce.plan(vit, "grouped", repair=repair, **config).edits
        errors.append(refitted(vit, find_mlps(vit), edits, [images(200)])[0].differences["blocks.0.mlp.fc2"])
    assert errors[1][0] < errors[0][0]
    assert errors[1][0] == pytest.approx(errors[0][1], rel=0.1)  # what a fit on half of it came to on the other half


def test_the_rank_is_the_highest_within_the_parameters(vit: nn.Module) -> None:
    whole = sum(parameter.numel() for parameter in vit.parameters())
    for target in (0.75, int(0.8 * whole)):
        most = target if target > 1 else int(target * whole)
        made = reduced(vit, per_use={"name": "lora", "target_params": target})
        count = sum(parameter.numel() for parameter in made.parameters())
        layer = made.get_submodule("blocks.0.mlp.fc1")
        assert isinstance(layer, LoraLinear)
        assert count <= most < count + 8 * (32 + 128)  # one rank more, of 8 layers
    highest = reduced(vit, per_use={"name": "lora", "target_params": 10**6})
    assert len(highest.get_submodule("blocks.0.mlp.fc1").down) == 32


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"keep": "auto", "data": None}, "needs calibration data"),
        ({"keep": "align_activations", "data": None}, "needs calibration data"),
        ({"keep": "auto", "scale": "inv_sqrt"}, "use it with scale='none' and share='mlp'"),
        ({"keep": "auto", "share": "block"}, "use it with scale='none' and share='mlp'"),
        ({"per_use": {"name": "lora", "init": "residual"}, "data": None}, "needs calibration data"),
        ({"per_use": {"name": "lora", "init": "residul"}}, "did you mean 'residual'"),
        ({"per_use": {"name": "lora", "rank": 2, "target_params": 0.8}}, "both say the size"),
        ({"per_use": {"name": "lora", "target_params": 0.01}}, "more for each rank"),
        ({"per_use": {"name": "lora", "target_params": 0}}, "target_params is 0"),
        ({"per_use": {"name": "lora", "target_params": 0.8}, "share": "block"}, "counts shared MLPs alone"),
        ({"keep": "auto", "per_use": {"name": "lora", "init": "residul"}}, "did you mean 'residual'"),
        ({"per_use": {"name": "ssf", "init": "residual"}}, "has no option 'init'"),
    ],
)
def test_what_cannot_be_is_refused(vit: nn.Module, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ReductionError) as caught:
        reduced(vit, **config)
    assert message in str(caught.value)


@pytest.mark.parametrize("keep", ["first", "auto"])
@pytest.mark.parametrize("size", ["rank", "target_params"])
def test_corrections_of_what_is_no_linear_are_refused(vit: nn.Module, keep: str, size: str) -> None:
    mlpreduce.apply(vit, "low_rank", ratio=0.5)
    with pytest.raises(ReductionError, match="is a LowRankLinear, and no Linear"):
        reduced(vit, keep=keep, per_use={"name": "lora", size: 1})


@pytest.mark.parametrize(
    "options",
    [{"keep": "auto"}, {"keep": "align_activations"}, {"per_use": {"name": "lora", "rank": 2, "init": "residual"}}],
)
def test_a_step_of_a_recipe_is_given_data_and_costs_the_same_without(vit: nn.Module, options: dict[str, Any]) -> None:
    from mlpreduce.transforms.steps import needs_data, without_data

    step = {"transform": "grouped", "group": 2, "scale": "none", **options}
    assert needs_data(step)
    assert not needs_data({"transform": "grouped", "group": 2, "per_use": {"name": "lora", "rank": 2}})
    plain = without_data(step)
    assert not needs_data(plain)
    config = {key: value for key, value in plain.items() if key != "transform"}
    counts = [sum(p.numel() for p in reduced(vit, **some).parameters()) for some in (options, config)]
    assert counts[0] == counts[1]
