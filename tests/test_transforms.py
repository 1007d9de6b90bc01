"""The contract, over every registered transform and criterion, and the mathematics of each against a plain reading."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from helpers.marks import slow_after_the_first

import mlpreduce
from mlpreduce import ReductionError
from mlpreduce.criteria import register_criterion
from mlpreduce.edits import Scale, Share, Slice
from mlpreduce.testing import check_transform, tiny_vit
from mlpreduce.transforms import is_construction, register

# one row or more for every transform that acts on a built model
SETTINGS = [
    ("grouped", {}),
    ("grouped", {"group": 4, "scale": "paper", "keep": "last"}),
    ("grouped", {"group": 2, "pattern": "cycle", "scale": 0.5}),
    ("grouped", {"group": 3, "pattern": "cycle_reverse", "remainder": "own", "scale": "none"}),
    ("grouped", {"group": 3, "remainder": "own"}),
    ("grouped", {"group": "all"}),
    ("grouped", {"share": "attention", "group": "all", "keep": "last"}),
    ("grouped", {"share": "block", "keep": "mean", "pattern": "cycle"}),
    ("grouped", {"pattern": "sandwich"}),
    ("grouped", {"pattern": "similarity", "scale": "none"}),
    ("grouped", {"pattern": "cost", "scale": "none"}),
    ("grouped", {"group": 3, "remainder": "merge"}),
    ("grouped", {"pattern": [[0, 3], [1, 2]], "scale": {"fc1.weight": 0.5}}),
    ("grouped", {"keep": "mean", "scale": "none"}),
    ("grouped", {"keep": "align_mean", "scale": "none"}),
    ("shallow", {}),
    ("shallow", {"ratio": 0.3, "round_to": 8}),
    ("shallow", {"width": 40, "criterion": "last"}),
    ("shallow", {"widths": [8, 128, 24, 1], "criterion": "l2"}),
    ("shallow", {"widths": {"blocks.2.mlp": 5}, "criterion": "random", "seed": 3}),
    ("shallow", {"criterion": "l1", "target_params": 0.7, "scope": "global"}),
    ("shallow", {"criterion": {"name": "gram_schmidt", "source": "fc1+fc2"}, "target_macs": 0.7}),
    ("shallow", {"criterion": "taylor", "scope": "per_stage", "ratio": 0.25, "round_to": 8}),
    ("shallow", {"criterion": {"name": "nvit", "site": "both"}, "scope": "global", "target_params": 0.6}),
    ("shallow", {"criterion": "fisher", "repair": "least_squares"}),
    ("shallow", {"criterion": "activation", "min_score": 0.0445}),
    ("shallow", {"criterion": "hessian_diag"}),
    ("shallow", {"criterion": "energy", "repair": "least_squares"}),
    ("shallow", {"criterion": "reconstruction", "scope": "global"}),
    (
        "shallow",
        {"criterion": {"name": "reconstruction", "metric": "loss"}, "target_params": 0.6, "scope": "per_stage"},
    ),
    ("shallow", {"criterion": {"name": "activation", "statistic": "frequency"}}),
    ("shallow", {"criterion": "entropy_taylor"}),
    ("shallow", {"criterion": {"name": "gate", "epochs": 2}}),
    ("grouped", {"keep": "mean", "scale": "none", "repair": "least_squares"}),
    ("grouped", {"per_use": "ssf"}),
    ("grouped", {"per_use": {"name": "lora", "rank": 2}, "keep": "mean", "scale": "none", "repair": "least_squares"}),
    ("grouped", {"per_use": "norm", "share": "block"}),
    ("grouped", {"per_use": {"name": "conv", "kernel": 5}, "scale": "none"}),
    ("block_diagonal", {}),
    ("block_diagonal", {"groups": 2, "align": "all"}),
    ("block_diagonal", {"groups": 2, "align": "none", "init": "new", "shuffle": True}),
    ("block_diagonal", {"layers": "fc2", "cca": "covariance"}),
    ("block_diagonal", {"cca": "as_released"}),
    ("low_rank", {}),
    ("low_rank", {"rank": 6, "layers": "fc1", "init": "new"}),
    ("low_rank", {"energy": 0.8}),
    ("low_rank", {"target_params": 0.8, "init": "data"}),
    ("svft", {}),
    ("svft", {"pattern": "banded", "band": 2, "rank": 20, "init": "normal"}),
    ("svft", {"pattern": "random", "layers": "fc2"}),
    ("svft", {"pattern": "top_k", "init": "normal"}),
    ("lora", {}),
    ("lora", {"rank": 2, "alpha": 8, "layers": ["fc2"]}),
    ("ssf", {}),
    ("ssf", {"sites": "all", "init": "released"}),
    ("block_gate", {}),
    ("drop", {"mlps": ["blocks.1.mlp", "blocks.2.mlp"]}),
]


def test_every_transform_has_a_row() -> None:
    built = {name for name in mlpreduce.list_transforms() if not is_construction(name)}
    assert built == {name for name, _ in SETTINGS}


def test_every_criterion_has_a_row() -> None:
    used = [config.get("criterion", "first") for name, config in SETTINGS if name == "shallow"]
    assert {c["name"] if isinstance(c, dict) else c for c in used} == set(mlpreduce.list_criteria())


def kind_of(name: str, config: dict) -> tuple[str, ...]:
    """The transform, and the criterion, pattern and repair that it names."""
    criterion = config.get("criterion")
    named = criterion["name"] if isinstance(criterion, dict) else criterion
    return name, str(named), str(config.get("pattern")), str(config.get("repair"))


@pytest.mark.parametrize(("name", "config"), slow_after_the_first(SETTINGS, kind_of))
def test_contract(name: str, config: dict) -> None:
    generator = torch.Generator().manual_seed(4)
    data = [(torch.randn(n, 3, 16, 16, generator=generator), torch.arange(n) % 5) for n in (5, 20)]
    check_transform(name, data=data, **config)


def test_contract_sees_a_broken_transform() -> None:
    from mlpreduce.transforms.registry import _TRANSFORMS

    calls = []

    @register("broken_for_test")
    def broken(parts, *, ratio=0.5):
        calls.append(1)  # another result each time
        yield parts.slice(parts[0], range(len(calls)))

    try:
        with pytest.raises(AssertionError, match="broken"):
            check_transform("broken_for_test")
        with pytest.raises(ReductionError, match="a plan has finite numbers only"):
            mlpreduce.plan(tiny_vit(), "broken_for_test", ratio=float("nan"))
    finally:
        del _TRANSFORMS["broken_for_test"]


@pytest.mark.parametrize("group", [2, 4])
def test_grouped_without_scale_is_copying_the_first(group: int, images: torch.Tensor) -> None:
    model, copied = tiny_vit().eval(), tiny_vit().eval()
    mlpreduce.apply(model, "grouped", group=group, scale="none")
    for i, block in enumerate(copied.blocks):
        block.mlp.load_state_dict(copied.blocks[i - i % group].mlp.state_dict())
    assert torch.equal(model(images), copied(images))
    model(images).sum().backward()
    copied(images).sum().backward()
    summed = sum(block.mlp.fc1.weight.grad for block in copied.blocks[:group])
    torch.testing.assert_close(model.blocks[0].mlp.fc1.weight.grad, summed)


@pytest.mark.parametrize("factor", ["inv_sqrt", "paper", 0.3])
def test_grouped_scales_three_tensors(factor: str | float) -> None:
    model, original = tiny_vit(), tiny_vit()
    torch.nn.init.normal_(model.blocks[0].mlp.fc1.bias)
    original.load_state_dict(model.state_dict())
    mlpreduce.apply(model, "grouped", group=4, scale=factor)
    value = {"inv_sqrt": 1 / math.sqrt(4), "paper": 0.707}.get(factor, factor)
    ours, theirs = model.blocks[3].mlp, original.blocks[0].mlp
    for name in ("fc1.weight", "fc1.bias", "fc2.weight"):
        assert torch.equal(ours.get_parameter(name), value * theirs.get_parameter(name))
    assert torch.equal(ours.fc2.bias, theirs.fc2.bias)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"group": 2}, [0, 0, 1, 1, 2, 2]),
        ({"group": 3}, [0, 0, 0, 1, 1, 1]),
        ({"group": 4, "remainder": "own"}, [0, 0, 0, 0, 1, 1]),
        ({"group": 4, "remainder": "merge"}, [0, 0, 0, 0, 0, 0]),
        ({"group": 2, "pattern": "cycle"}, [0, 1, 2, 0, 1, 2]),
        ({"group": 2, "pattern": "cycle_reverse"}, [0, 1, 2, 2, 1, 0]),
        ({"group": 3, "pattern": "cycle_reverse"}, [0, 1, 0, 1, 1, 0]),
        ({"pattern": [[5, 0], [2, 4]]}, [0, 1, 2, 3, 2, 0]),
    ],
)
def test_patterns(config: dict, expected: list[int]) -> None:
    rows = mlpreduce.plan(tiny_vit(depth=6), "grouped", **config).rows
    owners = list(dict.fromkeys(row.owner for row in rows))
    assert [owners.index(row.owner) for row in rows] == expected


def test_align_mean_undoes_a_permutation(images: torch.Tensor) -> None:
    model = tiny_vit().eval()
    first, second = model.blocks[0].mlp, model.blocks[1].mlp
    order = torch.randperm(128)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        second.fc1.weight.copy_(first.fc1.weight[order])
        second.fc1.bias.copy_(first.fc1.bias[order])
        second.fc2.weight.copy_(first.fc2.weight[:, order])
    before = model(images)
    mlpreduce.apply(model, "grouped", pattern=[[0, 1]], keep="align_mean", scale="none")
    torch.testing.assert_close(model(images), before, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("keep", ["first", "last", "mean", "align_mean"])
def test_match_forward_keeps_the_energy_of_the_branch(keep: str) -> None:
    model = tiny_vit(proj_drop_rate=0.5)  # in training mode, as it is built
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight.mul_(3)  # unlike the others
        for block in model.blocks:
            block.mlp.fc1.bias.normal_(std=0.1)
    inputs = torch.randn(8192, 32, generator=torch.Generator().manual_seed(5))

    def energy(mlp: torch.nn.Module) -> float:
        hidden = torch.nn.functional.gelu(inputs @ mlp.fc1.weight.T + mlp.fc1.bias)
        return (hidden @ mlp.fc2.weight.T + mlp.fc2.bias).square().mean().item()

    with torch.no_grad():
        before = [(energy(model.blocks[i].mlp) + energy(model.blocks[i + 1].mlp)) / 2 for i in (0, 2)]
        state = torch.get_rng_state()
        mlpreduce.apply(model, "grouped", group=2, scale="match_forward", keep=keep)
        assert torch.equal(torch.get_rng_state(), state)
        assert model.training
        after = [energy(model.blocks[i].mlp) for i in (0, 2)]
    assert after == pytest.approx(before, rel=0.1)  # on other noise


def test_match_forward_is_one_for_equal_and_root_two_for_the_mean_of_independent_mlps() -> None:
    model = tiny_vit()
    model.blocks[1].mlp.load_state_dict(model.blocks[0].mlp.state_dict())
    (equal,) = {
        e.factor
        for e in mlpreduce.plan(model, "grouped", pattern=[[0, 1]], scale="match_forward").edits
        if isinstance(e, Scale)
    }
    assert equal == pytest.approx(1, abs=1e-5)
    wide = tiny_vit(embed_dim=128)
    made = mlpreduce.plan(wide, "grouped", group=2, scale="match_forward", keep="mean")
    factors = [edit.factor for edit in made.edits if isinstance(edit, Scale)]
    assert len(factors) == 6
    assert factors == pytest.approx([math.sqrt(2)] * 6, rel=0.03)


def test_match_forward_does_not_ask_for_the_default_device() -> None:
    plans = []
    for place in ("cpu", "meta"):
        model = tiny_vit()
        with torch.device(place):
            plans.append(mlpreduce.plan(model, "grouped", scale="match_forward", keep="mean"))
    assert plans[0].to_json() == plans[1].to_json()


def test_match_forward_refuses_what_it_cannot_measure() -> None:
    model = timm.create_model("pvt_v2_b0")
    with pytest.raises(ReductionError, match=r"stages\.0\.blocks\.0\.mlp \(MlpWithDepthwiseConv\) cannot be measured"):
        mlpreduce.apply(model, "grouped", group=2, scale="match_forward")
    with torch.device("meta"), pytest.raises(ReductionError, match="meta device"):
        mlpreduce.plan(tiny_vit(), "grouped", scale="match_forward")
    traced = torch.fx.symbolic_trace(tiny_vit())
    with pytest.raises(ReductionError, match=r"blocks\.0\.mlp is part of a torch\.fx graph"):
        mlpreduce.apply(traced, "grouped", scale="match_forward")
    dead = tiny_vit()
    torch.nn.init.zeros_(dead.blocks[0].mlp.fc2.weight)
    with pytest.raises(ReductionError, match=r"no factor from 0\.00098 to 1e\+03 gives blocks.0.mlp the energy"):
        mlpreduce.plan(dead, "grouped", scale="match_forward")


@pytest.mark.parametrize("criterion", ["first", "last", "random", "l2"])
def test_shallow_equals_masking(criterion: str, images: torch.Tensor) -> None:
    model, masked = tiny_vit().double().eval(), tiny_vit().double().eval()
    made = mlpreduce.plan(model, "shallow", ratio=0.4, criterion=criterion)
    mlpreduce.apply(model, made)
    for block, edit in zip(masked.blocks, made.of(Slice), strict=True):
        gone = [unit for unit in range(128) if unit not in edit.units]
        with torch.no_grad():
            block.mlp.fc2.weight[:, gone] = 0
    torch.testing.assert_close(model(images.double()), masked(images.double()), atol=1e-12, rtol=1e-12)


def test_l2_keeps_the_largest() -> None:
    model = tiny_vit()
    mlp = model.blocks[1].mlp
    norms = mlp.fc1.weight.pow(2).sum(1) + mlp.fc1.bias.pow(2) + mlp.fc2.weight.pow(2).sum(0)
    edit = mlpreduce.plan(model, "shallow", width=10, criterion="l2").of(Slice)[1]
    assert sorted(edit.units) == sorted(norms.topk(10).indices.tolist())


def test_random_is_seeded_and_differs_by_block() -> None:
    units = [e.units for e in mlpreduce.plan(tiny_vit(), "shallow", width=9, criterion="random").of(Slice)]
    again = [e.units for e in mlpreduce.plan(tiny_vit(), "shallow", width=9, criterion="random").of(Slice)]
    other = [e.units for e in mlpreduce.plan(tiny_vit(), "shallow", width=9, criterion="random", seed=1).of(Slice)]
    assert units == again
    assert len(set(units)) == 4
    assert units != other


def test_slice_after_share_equals_share_after_slice(images: torch.Tensor) -> None:
    a, b = tiny_vit().eval(), tiny_vit().eval()
    mlpreduce.apply(mlpreduce.apply(a, "grouped"), "shallow", ratio=0.25)
    mlpreduce.apply(mlpreduce.apply(b, "shallow", ratio=0.25), "grouped")
    assert torch.equal(a(images), b(images))
    assert a.blocks[1].mlp.fc1.weight.shape == (32, 32)
    assert sum(p.numel() for p in a.parameters()) == sum(p.numel() for p in b.parameters())


def test_include_and_exclude() -> None:
    made = mlpreduce.plan(tiny_vit(), "shallow", include="blocks.[123].*", exclude=["blocks.2.mlp"])
    assert [row.mlp for row in made.rows] == ["blocks.1.mlp", "blocks.3.mlp"]
    assert made.left_out == {"blocks.0.mlp": "not in include", "blocks.2.mlp": "in exclude"}
    with pytest.raises(ReductionError, match=r"include='block' matches none of 4 MLPs"):
        mlpreduce.plan(tiny_vit(), "shallow", include="block")


def test_slicing_part_of_a_tie_is_refused() -> None:
    model = mlpreduce.apply(tiny_vit(), "grouped")
    with pytest.raises(ReductionError, match=r"blocks.0.mlp is tied to blocks.1.mlp, which is not in scope"):
        mlpreduce.plan(model, "shallow", include="blocks.0.mlp")


def test_thin_is_timm_at_the_same_seed() -> None:
    import timm

    torch.manual_seed(7)
    ours = mlpreduce.create_model("vit_tiny_patch16_224", "thin", mlp_ratio=2.0, depth=2)
    torch.manual_seed(7)
    theirs = timm.create_model("vit_tiny_patch16_224", mlp_ratio=2.0, depth=2)
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert mlpreduce.history(ours)[0].transform == "thin"


def test_thin_refusals() -> None:
    with pytest.raises(
        ReductionError, match=r"thin\(mlp_ratio=2.0\): thin acts when a model is built.*create_model.*shallow"
    ):
        mlpreduce.apply(tiny_vit(), "thin", mlp_ratio=2.0)
    with pytest.raises(ReductionError, match=r"found no MLP in ResNet"):
        mlpreduce.create_model("resnet18", "thin")
    with pytest.raises(ReductionError, match="pretrained weights do not fit"):
        mlpreduce.create_model("vit_tiny_patch16_224", "thin", pretrained=True)
    for ratio in (0, -1, math.nan, True, "2"):
        with pytest.raises(ReductionError, match="mlp_ratio is"):
            mlpreduce.create_model("vit_tiny_patch16_224", "thin", mlp_ratio=ratio)
    with pytest.raises(ReductionError, match=r"timm cannot build twins_svt_small with .*slice it with shallow"):
        mlpreduce.create_model("twins_svt_small", "thin")


def test_a_third_party_transform_and_criterion() -> None:
    from mlpreduce import criteria, transforms

    @register("tie_ends_for_test", scope="chains")
    def tie_ends(parts, *, strength=1.0):
        first, final = parts.chains[0][0], parts.chains[0][-1]
        for a, b in zip(first.leaves, final.leaves, strict=True):
            yield Share(a.path, b.path)

    @register_criterion("odd_first_for_test", needs="nothing")
    def odd_first(units):
        return torch.tensor([*range(1, len(units), 2), *range(0, len(units), 2)])

    try:
        check_transform("tie_ends_for_test")
        assert mlpreduce.plan(tiny_vit(), "shallow", criterion="odd_first_for_test").of(Slice)[0].units[:3] == (1, 3, 5)
        with pytest.raises(ReductionError, match="a transform of this name already"):
            register("tie_ends_for_test")(tie_ends)
        with pytest.raises(ReductionError, match="parameter 'data' is reserved"):
            register("reserved_for_test")(lambda parts, *, data=None: ())
    finally:
        del transforms.registry._TRANSFORMS["tie_ends_for_test"]
        del criteria.registry._CRITERIA["odd_first_for_test"]
