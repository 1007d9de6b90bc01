"""Layers that stand in for a Linear: identities in float64, counts, and what they refuse."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from mlpreduce.errors import ReductionError
from mlpreduce.layers import (
    BlockDiagonalLinear,
    ChannelCovariance,
    LoraLinear,
    LowRankLinear,
    ScaleShift,
    SvftLinear,
    TokenConvolution,
    block_orders,
    make_layer,
)


def dense(inputs: int = 12, outputs: int = 20, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=bias, dtype=torch.float64)


def tokens(inputs: int = 12, seed: int = 1) -> torch.Tensor:
    return torch.randn(3, 5, inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_same(found: torch.Tensor, wanted: torch.Tensor, within: float = 1e-10) -> None:
    assert found.shape == wanted.shape
    assert float((found - wanted).detach().abs().max()) <= within


def trained(layer: nn.Module) -> nn.Module:
    """The layer after its parameters have moved."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.3 * noise.to(parameter.dtype))
    return layer


def order(size: int, seed: int = 3) -> torch.Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


MERGEABLE: dict[str, Callable[[bool], nn.Module]] = {
    "block diagonal": lambda bias: BlockDiagonalLinear.from_linear(dense(bias=bias), 4),
    "block diagonal, orders": lambda bias: BlockDiagonalLinear.from_linear(
        dense(bias=bias), 2, inputs_order=order(12), outputs_order=order(20)
    ),
    "block diagonal, shuffle": lambda bias: BlockDiagonalLinear(
        12, 20, 4, bias, inputs_order=torch.arange(12).reshape(4, 3).T.flatten(), dtype=torch.float64
    ),
    "low rank": lambda bias: LowRankLinear.from_linear(dense(bias=bias), 5),
    "low rank, new": lambda bias: LowRankLinear(12, 20, 3, bias, dtype=torch.float64),
    "lora": lambda bias: LoraLinear(dense(bias=bias), 3, alpha=6.0),
    "svft plain": lambda bias: SvftLinear.from_linear(dense(bias=bias)),
    "svft banded": lambda bias: SvftLinear.from_linear(dense(bias=bias), "banded", band=2),
    "svft random": lambda bias: SvftLinear.from_linear(dense(bias=bias), "random", band=2),
    "svft top_k": lambda bias: SvftLinear.from_linear(dense(bias=bias), "top_k", band=2),
    "svft, narrow": lambda bias: SvftLinear.from_linear(dense(20, 12, bias=bias), "top_k", rank=None),
    "svft, rank": lambda bias: SvftLinear.from_linear(dense(bias=bias), "banded", rank=6),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", MERGEABLE)
def test_merged_is_a_linear_that_gives_the_same(kind: str, bias: bool) -> None:
    layer = trained(MERGEABLE[kind](bias))
    plain = layer.merged()  # type: ignore[operator]
    assert type(plain) is nn.Linear
    assert (plain.bias is not None) == bias
    x = tokens(plain.in_features)
    assert_same(plain(x), layer(x))
    assert_same(plain(x[0, 0]), layer(x[0, 0]))  # one token alone
    assert plain.weight.dtype == torch.float64


@pytest.mark.parametrize("kind", MERGEABLE)
def test_survives_a_copy_and_a_state_dict(kind: str) -> None:
    layer = trained(MERGEABLE[kind](True))
    x = tokens(layer.merged().in_features)  # type: ignore[operator]
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    other = MERGEABLE[kind](True)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


# --- block diagonal -----------------------------------------------------------------------------------------------------------


def test_block_diagonal_is_the_dense_layer_with_zeros_outside_of_the_blocks() -> None:
    layer = dense()
    made = BlockDiagonalLinear.from_linear(layer, 4)
    masked = copy.deepcopy(layer)
    with torch.no_grad():
        mask = torch.block_diag(*[torch.ones(5, 3, dtype=torch.float64)] * 4)
        masked.weight.mul_(mask)
    assert_same(made(tokens()), masked(tokens()), 3e-15)
    assert torch.equal(made.merged().weight, masked.weight)


def test_one_block_is_the_dense_layer() -> None:
    layer = dense()
    assert_same(BlockDiagonalLinear.from_linear(layer, 1)(tokens()), layer(tokens()), 3e-15)


def test_orders_move_what_the_blocks_keep() -> None:
    layer, inputs, outputs = dense(), order(12), order(20, 5)
    made = BlockDiagonalLinear.from_linear(layer, 4, inputs_order=inputs, outputs_order=outputs)
    kept = made.merged().weight
    assert torch.equal(kept[kept != 0], layer.weight[kept != 0])
    for group in range(4):
        rows, columns = outputs[5 * group : 5 * group + 5], inputs[3 * group : 3 * group + 3]
        assert bool((kept[rows][:, columns] != 0).all())
    assert int((kept != 0).sum()) == 12 * 20 // 4


def hidden_blocks(groups: int, seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor]:
    """An MLP that is block diagonal, with its features in another order; and a little noise."""
    torch.manual_seed(seed)
    inputs, hidden, outputs = order(8, 1), order(24, 2), order(12, 4)
    up = torch.block_diag(*torch.randn(groups, 24 // groups, 8 // groups)) + 1e-3 * torch.randn(24, 8)
    gate = torch.block_diag(*torch.randn(groups, 24 // groups, 8 // groups))
    down = torch.block_diag(*torch.randn(groups, 12 // groups, 24 // groups))
    return [up[hidden][:, inputs], gate[hidden][:, inputs]], down[outputs][:, hidden]


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("features", [True, False])
def test_orders_keep_more_than_the_features_as_they_are(groups: int, features: bool) -> None:
    for seed in range(3):
        expand, contract = hidden_blocks(groups, seed)
        found = block_orders(expand, contract, groups, features=features)
        assert found.kept > found.kept_before + 0.1
        for name, size in (("inputs", 8), ("hidden", 24), ("outputs", 12)):
            assert sorted(getattr(found, name).tolist()) == list(range(size))
        if not features:
            assert found.inputs.tolist() == list(range(8))
            assert found.outputs.tolist() == list(range(12))
        kept, whole = 0.0, 0.0
        for weight, rows, columns in (
            *((weight, found.hidden, found.inputs) for weight in expand),
            (contract, found.outputs, found.hidden),
        ):
            moved = weight[rows][:, columns].double()
            blocks = [torch.ones(len(rows) // groups, len(columns) // groups, dtype=torch.float64)] * groups
            kept += float((moved * torch.block_diag(*blocks)).square().sum())
            whole += float(moved.square().sum())
        assert found.kept == pytest.approx(kept / whole)


def test_orders_of_blocks_that_the_features_have_keep_all() -> None:
    torch.manual_seed(0)
    up, down = torch.block_diag(*torch.randn(2, 6, 4)), torch.block_diag(*torch.randn(2, 4, 6))
    mixed = order(12)
    found = block_orders([up[mixed]], down[:, mixed], 2)
    assert found.kept == pytest.approx(1)
    first = BlockDiagonalLinear.from_linear(linear(up[mixed]), 2, inputs_order=found.inputs, outputs_order=found.hidden)
    second = BlockDiagonalLinear.from_linear(
        linear(down[:, mixed]), 2, inputs_order=found.hidden, outputs_order=found.outputs
    )
    x = torch.randn(5, 8)
    assert_same(second(first(x).relu()), (x @ up.T).relu() @ down.T, 1e-5)


def linear(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(*reversed(weight.shape), bias=False)  # type: ignore[misc]
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def test_the_counts_of_scheme_on_vit_base() -> None:
    """METHODS 5.2: 2dh/g + h + d parameters a block; 58.29 M and 58.26 M for ViT-B."""
    outside = 86_567_656 - 12 * (2 * 768 * 3072 + 3072 + 768)
    for expansion, groups, millions in ((8, 4, 58.29), (4, 2, 58.26)):
        hidden = 768 * expansion
        with torch.device("meta"):
            mlp = [BlockDiagonalLinear(768, hidden, groups), BlockDiagonalLinear(hidden, 768, groups)]
        count = sum(parameter.numel() for layer in mlp for parameter in layer.parameters())
        assert count == 2 * 768 * hidden // groups + hidden + 768
        assert round((outside + 12 * count) / 1e6, 2) == millions


def test_under_autocast_it_gives_what_a_linear_gives() -> None:
    layer = nn.Linear(12, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for made in (
            BlockDiagonalLinear.from_linear(layer, 4),
            LowRankLinear.from_linear(layer, 4),
            SvftLinear.from_linear(layer),
        ):
            assert made(torch.randn(2, 3, 12)).dtype == layer(torch.randn(2, 3, 12)).dtype == torch.bfloat16


# --- channel covariance -------------------------------------------------------------------------------------------------------


def branch(variant: str = "covariance") -> tuple[nn.Module, ChannelCovariance]:
    torch.manual_seed(0)
    base = nn.Sequential(dense(12, 24), nn.GELU(), dense(24, 12))
    return base, ChannelCovariance(base, 24, variant)


def test_channel_covariance_is_its_formula() -> None:
    base, made = branch()
    x = tokens()
    alpha, rest = made.mix.softmax(0)
    wanted = []
    for image in x:
        columns = image.T
        attention = torch.softmax(columns @ columns.T / 24**0.5, dim=1)
        assert_same(attention.sum(1), torch.ones(12, dtype=torch.float64))
        wanted.append(alpha * base(image) + rest * (attention @ columns).T)
    assert_same(made(x), torch.stack(wanted))
    assert made.alpha == pytest.approx(float(alpha.detach()))


def test_as_released_the_second_factor_is_a_reshape() -> None:
    base, made = branch("as_released")
    x = tokens()
    columns = x.transpose(1, 2)
    attention = torch.softmax(columns / 24**0.5 @ columns.reshape(3, 5, 12), dim=-1)
    alpha, rest = made.mix.softmax(0)
    assert_same(made(x), alpha * base(x) + rest * (attention @ columns).transpose(1, 2))
    _, other = branch()
    other.load_state_dict(made.state_dict())
    assert float((other(x) - made(x)).detach().abs().max()) > 1e-3


def test_evaluation_drops_the_branch_and_agrees_with_training_where_alpha_is_one() -> None:
    base, made = branch()
    x = tokens()
    assert torch.equal(made.eval()(x), base(x))
    with torch.no_grad():
        made.mix.copy_(torch.tensor([3.0, -9.0]))
    assert torch.equal(made(x), base(x))  # whatever the mix is
    assert made.merged() is base
    with torch.no_grad():
        made.mix.copy_(torch.tensor([800.0, 0.0]))
    assert_same(made.train()(x), made.eval()(x))


# --- low rank -----------------------------------------------------------------------------------------------------------------


def test_full_rank_is_the_dense_layer_and_fewer_the_nearest() -> None:
    layer = dense()
    assert_same(LowRankLinear.from_linear(layer, 12)(tokens()), layer(tokens()))
    values = torch.linalg.svdvals(layer.weight.detach())
    for rank in (1, 4, 11):
        made = LowRankLinear.from_linear(layer, rank)
        error = (made.merged().weight - layer.weight).detach().square().sum().sqrt()
        assert float(error) == pytest.approx(float(values[rank:].square().sum().sqrt()), rel=1e-10)
        assert made.kept == pytest.approx(float(values[:rank].square().sum() / values.square().sum()))
        assert sum(p.numel() for p in made.parameters()) == rank * (12 + 20) + 20


def test_the_rank_that_keeps_an_energy_is_the_least_that_does() -> None:
    layer = dense()
    for energy in (0.3, 0.8, 0.99, 1.0):
        made = LowRankLinear.from_linear(layer, energy=energy)
        rank = len(made.down)
        assert made.kept >= energy - 1e-9
        assert rank == 1 or LowRankLinear.from_linear(layer, rank - 1).kept < energy
    exact = LowRankLinear.from_linear(layer, 5)
    assert len(LowRankLinear.from_linear(layer, energy=exact.kept).down) == 5


def test_moments_make_it_the_nearest_on_those_inputs() -> None:
    layer, x = dense(), tokens().flatten(0, 1)[:, :] * torch.logspace(-2, 1, 12, dtype=torch.float64)
    x = torch.cat([x, x.roll(1, 0) * 0.5])
    plain, aware = LowRankLinear.from_linear(layer, 3), LowRankLinear.from_linear(layer, 3, moments=x.T @ x)
    errors = [float((made(x) - layer(x)).detach().square().sum()) for made in (plain, aware)]
    assert errors[1] < 0.9 * errors[0]
    best = torch.linalg.svdvals((x @ layer.weight.T).detach())[3:].square().sum()
    assert errors[1] == pytest.approx(float(best), rel=1e-3)
    silent = torch.zeros(12, 12, dtype=torch.float64)
    silent[0, 0] = 1.0
    assert bool(LowRankLinear.from_linear(layer, 3, moments=silent).down.isfinite().all())


def test_the_bias_takes_up_the_means_where_they_are_known() -> None:
    layer, x = dense(), tokens().flatten(0, 1) + torch.arange(12)
    beside = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    made = LowRankLinear.from_linear(layer, 3, moments=beside.T @ beside)
    error = float((made(x) - layer(x)).detach().square().sum())
    y = (x @ layer.weight.T).detach()
    assert error == pytest.approx(float(torch.linalg.svdvals(y - y.mean(0))[3:].square().sum()), rel=1e-3)
    without = LowRankLinear.from_linear(layer, 3, moments=x.T @ x)
    assert error < 0.95 * float((without(x) - layer(x)).detach().square().sum())
    bare = nn.Linear(12, 8, bias=False).double()
    one, other = (LowRankLinear.from_linear(bare, 3, moments=m) for m in (beside.T @ beside, x.T @ x))
    torch.testing.assert_close(one.merged().weight, other.merged().weight)  # nothing takes the means there


def test_a_new_low_rank_layer_starts_as_strong_as_a_linear() -> None:
    torch.manual_seed(0)
    made, plain = LowRankLinear(256, 512, 64), nn.Linear(256, 512)
    assert float((made.merged().weight.std() / plain.weight.std()).detach()) == pytest.approx(1, abs=0.05)


# --- adapters -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("band", "count"), [(0, 18_432), (1, 55_248), (4, 165_408), (16, 601_728)])
def test_the_counts_of_svft_on_vit_base(band: int, count: int) -> None:
    """METHODS 5.4: n(2k + 1) - k(k + 1) entries a layer, 24 layers, gates not counted."""
    number = torch.arange(768)
    assert 24 * int(((number[:, None] - number).abs() <= band).sum()) == count
    small = SvftLinear.from_linear(dense(24, 30), "banded", band=min(band, 4))
    k = min(band, 4)
    assert len(small.entries) == 24 * (2 * k + 1) - k * (k + 1)


@pytest.mark.parametrize("pattern", ["plain", "banded", "random", "top_k"])
def test_svft_changes_nothing_at_zero_trains_entries_alone_and_has_each_once(pattern: str) -> None:
    layer = dense()
    made = SvftLinear.from_linear(layer, pattern, band=2, init="zeros")
    assert_same(made(tokens()), layer(tokens()))
    assert len({*zip(made.rows.tolist(), made.columns.tolist(), strict=True)}) == len(made.entries)
    assert len(made.entries) == (12 if pattern == "plain" else 12 * 5 - 2 * 3)
    with torch.no_grad():
        made.entries.fill_(0.1)
    made(tokens()).square().sum().backward()
    got = {name for name, parameter in made.named_parameters() if parameter.grad is not None}
    assert got == {"entries", "gate", "bias"}
    assert {name for name, parameter in made.named_parameters() if not parameter.requires_grad} == {
        "left",
        "values",
        "right",
    }


def test_svft_takes_the_largest_signed_entries_and_moves_the_weight_a_little() -> None:
    layer = dense(12, 12)
    made = SvftLinear.from_linear(layer, "top_k", band=1, init="zeros")
    left, _, right = torch.linalg.svd(layer.weight.detach())
    alike = left.T @ right.T
    least = alike.flatten().sort().values[-len(made.entries)]
    assert bool((alike[made.rows, made.columns] >= least - 1e-12).all())
    wide = dense(12, 20)
    tall = SvftLinear.from_linear(wide, "top_k", band=1)
    right = torch.linalg.svd(wide.weight.detach(), full_matrices=False)[2]
    least = right.flatten().sort().values[-len(tall.entries)]
    assert bool((right[tall.rows, tall.columns] >= least - 1e-12).all())
    change = SvftLinear.from_linear(dense(64, 256), "banded", band=4).merged().weight - dense(64, 256).weight
    assert float(change.detach().square().sum()) == pytest.approx(
        0.5, rel=0.3
    )  # entries of variance 2 / count, halved by the gate


def test_lora_is_the_base_at_first_and_bases_may_be_tied() -> None:
    layer = dense()
    first, second = LoraLinear(layer, 2), LoraLinear(layer, 2)
    assert torch.equal(first(tokens()), layer(tokens()))
    trained(second.requires_grad_(True))
    assert first.base is second.base
    assert float((first(tokens()) - second(tokens())).detach().abs().max()) > 1e-3
    assert first.merged().weight is not layer.weight


@pytest.mark.parametrize("bias", [True, False])
def test_a_scale_and_shift_is_merged_into_what_it_is_around(bias: bool) -> None:
    norm = trained(nn.LayerNorm(20, eps=1e-3, bias=bias, dtype=torch.float64))
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    convolution = nn.Conv2d(3, 20, 4, stride=2, padding=1, bias=bias, dtype=torch.float64)
    lora = trained(LoraLinear(dense(bias=bias), 2))
    bases: list[tuple[nn.Module, torch.Tensor]] = [
        (dense(bias=bias), tokens()),
        (norm, tokens(20)),
        (convolution, images),
        (lora, tokens()),
    ]
    for base, given in bases:
        made = ScaleShift(base)
        assert torch.equal(made(given), base(given))
        trained(made)
        assert (made.shift is None) is not bias
        plain = made.merged()
        assert type(plain) in (nn.Linear, nn.LayerNorm, nn.Conv2d)
        assert_same(plain(given), made(given), 1e-13)
        assert float((plain(given) - base(given)).detach().abs().max()) > 1e-3


def test_a_convolution_over_tokens_is_that_over_the_image_and_leaves_others_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    made = TokenConvolution(nn.Linear(6, 4, dtype=torch.float64), 6, kernel=3, grid=(3, 4, 4))
    x = torch.randn(2, 4 * 4 + 3, 6, dtype=torch.float64, generator=generator)
    assert torch.equal(made(x), made.base(x))
    trained(made)
    image = x[:, 3:].transpose(1, 2).reshape(2, 6, 4, 4)
    weight = made.convolution.weight
    seen = nn.functional.conv2d(image, weight, padding=1, groups=6).flatten(2).transpose(1, 2)
    assert_same(made(x)[:, 3:], made.base(x[:, 3:] + seen), 1e-13)
    assert torch.equal(made(x)[:, :3], made.base(x)[:, :3])
    with pytest.raises(ReductionError, match="given 18 tokens, but made for 3 and a grid of 4 x 4"):
        made(x[:, :-1])
    rows = x[:, 3:].reshape(2, 4, 4, 6)
    alike = TokenConvolution(made.base, 6)
    alike.load_state_dict(made.state_dict())
    assert_same(alike(rows).flatten(1, 2), made(x)[:, 3:], 1e-13)


# --- what is refused ----------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "groups": (lambda: BlockDiagonalLinear(12, 20, 3), "groups must divide both widths; it may be a divisor of 4"),
    "no groups": (lambda: BlockDiagonalLinear(12, 20, 0), "groups"),
    "order": (lambda: BlockDiagonalLinear(4, 4, 2, inputs_order=torch.tensor([0, 1, 1, 2])), "from 0 to 3 once"),
    "widths": (
        lambda: block_orders([torch.ones(6, 4)], torch.ones(4, 6), 4),
        "4 groups do not divide the widths 4, 6, 4",
    ),
    "groups of nothing": (lambda: block_orders([torch.ones(6, 4)], torch.ones(4, 6), 0), "block_orders: groups is 0"),
    "no weights": (lambda: block_orders([], torch.ones(4, 6), 2), "weights are [] and (4, 6)"),
    "another MLP": (lambda: block_orders([torch.ones(8, 4)], torch.ones(4, 6), 2), "weights are [(8, 4)] and (4, 6)"),
    "NaN": (lambda: LowRankLinear.from_linear(linear(torch.full((4, 4), torch.nan)), 2), "not finite"),
    "meta": (lambda: SvftLinear.from_linear(nn.Linear(4, 4, device="meta")), "on the meta device"),
    "no moments": (lambda: LowRankLinear.from_linear(dense(), 2, moments=-torch.eye(12)), "negative eigenvalue"),
    "no energy": (lambda: block_orders([torch.zeros(4, 4)], torch.zeros(4, 4), 2), "all zero"),
    "no linear": (lambda: BlockDiagonalLinear.from_linear(nn.ReLU(), 2), "ReLU is no torch.nn.Linear"),  # type: ignore[arg-type]
    "rank": (lambda: LowRankLinear(12, 20, 13), "rank is at most 12"),
    "neither": (lambda: LowRankLinear.from_linear(dense()), "give one of rank and energy"),
    "both": (lambda: LowRankLinear.from_linear(dense(), 2, energy=0.5), "give one of rank and energy"),
    "energy": (lambda: LowRankLinear.from_linear(dense(), energy=1.5), "energy is 1.5"),
    "moments": (lambda: LowRankLinear.from_linear(dense(), 2, moments=torch.eye(3)), "finite ones of 12 inputs"),
    "pattern": (lambda: SvftLinear.from_linear(dense(), "diagonal"), "pattern"),
    "band": (lambda: SvftLinear.from_linear(dense(), "banded", band=12), "rank is 12 and band 12"),
    "top_k of a rank": (lambda: SvftLinear.from_linear(dense(), "top_k", rank=5), "needs the full rank"),
    "lora rank": (lambda: LoraLinear(dense(), 13), "rank is 13; it is at most 12"),
    "scale of others": (lambda: ScaleShift(nn.GELU()), "GELU is no Linear"),
    "scale of groups": (lambda: ScaleShift(nn.GroupNorm(2, 4)), "GroupNorm is no Linear"),
    "entries": (lambda: SvftLinear(12, 20, 145), "rank is 12 and entries 145"),
    "unknown layer": (lambda: make_layer("low_rang", dense(), {}), "did you mean 'low_rank'?"),
    "unknown option": (lambda: make_layer("low_rank", dense(), {"ranks": 2}), "low_rank"),
    "even": (lambda: TokenConvolution(dense(), 12, kernel=4), "it must be odd"),
    "variant": (lambda: ChannelCovariance(nn.Linear(2, 2), 2, "released"), "variant"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(ReductionError) as error:
        call()
    assert message in str(error.value)


def test_blocks_are_the_same_with_and_without_gradients() -> None:
    for made in (
        BlockDiagonalLinear.from_linear(dense(), 4),
        BlockDiagonalLinear(12, 20, 2, outputs_order=order(20)).double(),
    ):
        with torch.no_grad():
            quiet = made(tokens())
        assert_same(quiet, made(tokens()), 1e-13)
