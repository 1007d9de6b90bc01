"""What reduces a model while it trains: masks that move, gates, lottery tickets, and carrying an optimizer over."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn

import mlpreduce
from mlpreduce import ReductionError
from mlpreduce.during import GateL1, LotteryTicket, PruneAndGrow, reduce_in_training
from mlpreduce.during.moving import moved_mask
from mlpreduce.testing import tiny_vit
from mlpreduce.train import create_ema


def plain() -> nn.Module:
    return tiny_vit().double()


def tied() -> nn.Module:
    return mlpreduce.apply(plain(), "grouped", group=2, scale="none")


def gated() -> nn.Module:
    torch.manual_seed(1)
    kwargs = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", mlp_layer=timm.layers.SwiGLU, **kwargs).double()


def packed() -> nn.Module:
    torch.manual_seed(1)
    kwargs = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", mlp_layer=timm.layers.GluMlp, **kwargs).double()


def convolutions() -> nn.Module:
    torch.manual_seed(1)
    kwargs = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "conv_mlp": True, "num_classes": 5}
    return timm.create_model("convnext_atto", **kwargs).double()


KINDS: list[Callable[[], nn.Module]] = [plain, tied, gated, packed, convolutions]


def images(model: nn.Module, count: int = 4, seed: int = 3) -> torch.Tensor:
    size = 32 if hasattr(model, "stages") else 16
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, updates: int, after: Callable[[], None] | None = None
) -> None:
    for number in range(updates):
        loss = nn.functional.cross_entropy(model(images(model, seed=number)), torch.arange(4) % 5)
        loss.backward()
        optimizer.step()
        if after is not None:
            after()
        optimizer.zero_grad()


# --- masks that move ----------------------------------------------------------------------------------------------------------


def test_a_move_keeps_the_count_and_drops_the_weakest() -> None:
    generator = torch.Generator().manual_seed(0)
    for rate in (0.0, 0.1, 0.5, 1.0):
        active = torch.rand(50, generator=generator) < 0.4
        weights, slopes = torch.rand(50, generator=generator), torch.rand(50, generator=generator)
        moved = moved_mask(active, weights, slopes, rate)
        assert moved.sum() == active.sum()
        count = math.ceil(rate * int(active.sum()))
        weakest = set(torch.where(active, weights, torch.inf).argsort()[:count].tolist())
        assert set((active & ~moved).nonzero().flatten().tolist()) <= weakest
        off = active.clone()
        off[list(weakest)] = False
        best = set(torch.where(off, -torch.inf, slopes).argsort(descending=True)[:count].tolist())
        assert set(moved.nonzero().flatten().tolist()) == set(off.nonzero().flatten().tolist()) | best


@pytest.mark.parametrize("site", ["fc2", "both"])
@pytest.mark.parametrize("make", KINDS)
def test_a_masked_model_is_the_sliced_one(make: Callable[[], nn.Module], site: str) -> None:
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    masks = PruneAndGrow(model, 0.5, interval=2, total_updates=8, site=site, seed=1)
    counts = {name: len(units) for name, units in masks.active.items()}
    start = {name: set(units) for name, units in masks.active.items()}
    ema = create_ema(model, 0.5)
    for _ in range(4):
        train(model, optimizer, 2, masks.step)
        ema.update(model)
        masks.apply_to(ema)
        assert {name: len(units) for name, units in masks.active.items()} == counts
        for mlp in mlpreduce.find_mlps(model):
            if mlp.owner == mlp.name:
                gone = sorted(set(range(mlp.hidden_features)) - set(masks.active[mlp.name]))
                for other in (model, ema.module):
                    fc2 = other.get_submodule(mlp.leaf("fc2").path).weight
                    assert not fc2[:, gone].any()  # neither momentum nor weight decay brings them back
    if site == "fc2":
        assert any(set(units) != start[name] for name, units in masks.active.items())
    batch = images(model)
    model.eval()
    ema.module.eval()
    before, averaged = model(batch).detach(), ema.module(batch).detach()
    assert masks.finalize(ema) is model
    torch.testing.assert_close(model(batch), before, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ema.module(batch), averaged, rtol=1e-12, atol=1e-12)
    assert mlpreduce.history(model)[-1].transform == "prune_and_grow"
    with pytest.raises(ReductionError, match=r"finalize\(\) has sliced the model"):
        masks.step()


def test_grown_units_come_back_with_their_weights_and_the_rate_is_a_cosine() -> None:
    model = plain()
    before = copy.deepcopy(model)
    masks = PruneAndGrow(model, 0.5, interval=1, total_updates=10, drop=(0.5, 0.1))
    assert masks.rate(0) == 0.5
    assert masks.rate(4) == pytest.approx(0.3)
    assert masks.rate(8) == masks.rate(10) == pytest.approx(0.1)
    start = {name: set(units) for name, units in masks.active.items()}
    train(model, torch.optim.SGD(model.parameters(), lr=0.0), 1, masks.step)
    grown = {name: sorted(set(units) - start[name]) for name, units in masks.active.items()}
    assert sum(map(len, grown.values())) == masks.moved > 0
    for name, units in grown.items():
        ours, theirs = model.get_submodule(name), before.get_submodule(name)
        assert torch.equal(ours.fc2.weight[:, units], theirs.fc2.weight[:, units])
        assert torch.equal(ours.fc1.weight[units], theirs.fc1.weight[units])


def test_masks_go_on_from_their_state_to_the_same_bits(tmp_path: Any) -> None:
    def run(stop: int | None) -> nn.Module:
        model = plain()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        masks = PruneAndGrow(model, 0.5, interval=2, total_updates=12, seed=4)
        train(model, optimizer, stop or 6, masks.step)
        if stop:
            stored = io.BytesIO()
            torch.save([model.state_dict(), optimizer.state_dict(), masks.state_dict()], stored)
            stored.seek(0)
            kept = torch.load(stored, weights_only=True)
            model = plain()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            masks = PruneAndGrow(model, 0.5, interval=2, total_updates=12, seed=9)
            model.load_state_dict(kept[0])
            optimizer.load_state_dict(kept[1])
            masks.load_state_dict(kept[2])
        train(model, optimizer, 6 if stop is None else 12 - stop, masks.step)
        return masks.finalize()

    whole, resumed = run(None), run(6)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_masks_refuse() -> None:
    with pytest.raises(ReductionError, match="density"):
        PruneAndGrow(plain(), 0.0, interval=1, total_updates=2)
    masks = PruneAndGrow(plain(), 0.5, interval=1, total_updates=2)
    with pytest.raises(ReductionError, match="has no gradient at update 1"):
        masks.step()
    with pytest.raises(ReductionError, match="a norm over the hidden units"):
        PruneAndGrow(tiny_vit(scale_mlp_norm=True), 0.5, interval=1, total_updates=2)


# --- gates --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "uniform"])
@pytest.mark.parametrize("make", KINDS)
def test_gates_fold_exactly(make: Callable[[], nn.Module], scope: str) -> None:
    model = make().eval()
    batch = images(model)
    untouched = model(batch).detach()
    names, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    gates = GateL1(model, 0.5)
    assert torch.equal(model(batch), untouched)  # a gate of 1 is nothing
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for gate in gates.gates.values():
            gate.copy_(torch.rand(gate.shape, generator=generator, dtype=gate.dtype) + 0.1)
            gate[:3] = 0
    ema = create_ema(model, 0.5)
    before = model(batch).detach()
    other = GateL1.fold(gates, ema) if scope == "uniform" else None
    if other is not None:
        torch.testing.assert_close(model(batch), before, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ema.module.eval()(batch), before, rtol=1e-12, atol=1e-12)
        assert list(model.state_dict()) == names
        assert [type(module) for module in model.modules()] == kinds
        return
    sizes = {name: gate.detach().clone() for name, gate in gates.gates.items()}
    total = sum(len(gate) for gate in sizes.values())
    zero = sum(int((gate == 0).sum()) for gate in sizes.values())
    gates.finalize(quantile=(zero + 0.5) / total, scope=scope, ema=ema)
    torch.testing.assert_close(model(batch), before, rtol=1e-12, atol=1e-12)  # those with a gate of 0 gave nothing
    torch.testing.assert_close(ema.module.eval()(batch), before, rtol=1e-12, atol=1e-12)
    assert list(model.state_dict()) == names
    widths = {mlp.name: mlp.hidden_features for mlp in mlpreduce.find_mlps(model) if mlp.owner == mlp.name}
    assert widths == {name: len(gate) - 3 for name, gate in sizes.items()}


def test_the_penalty_is_the_sign_and_zero_at_zero() -> None:
    model = plain()
    gates = GateL1(model, 0.25)
    values = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64)
    with torch.no_grad():
        gates.gates["blocks.0.mlp"][:3] = values
    nn.functional.cross_entropy(model(images(model)), torch.arange(4)).backward()
    before = {name: gate.grad.clone() for name, gate in gates.gates.items()}
    gates.after_backward()
    added = gates.gates["blocks.0.mlp"].grad - before["blocks.0.mlp"]
    torch.testing.assert_close(added[:3], torch.tensor([-0.25, 0.0, 0.25], dtype=torch.float64), rtol=0, atol=1e-12)
    groups = gates.parameter_groups(lr=1e-3, weight_decay=0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert groups[-1]["weight_decay"] == 0
    assert {id(p) for p in groups[-1]["params"]} == {id(gate) for gate in gates.gates.values()}
    with pytest.raises(ReductionError, match="the model has gates already"):
        GateL1(model)


# --- tickets ------------------------------------------------------------------------------------------------------------------


def test_one_round_of_the_first_units_is_shallow() -> None:
    model, initial = plain(), plain()
    ticket = LotteryTicket(model, fraction=0.5, criterion="first")
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), 2)
    ticket.next_round()
    mlpreduce.apply(initial, "shallow", ratio=0.5)
    for (name, ours), theirs in zip(model.named_parameters(), initial.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("make", [plain, tied, gated, convolutions])
def test_tickets_are_nested_and_rewound(make: Callable[[], nn.Module]) -> None:
    model = make()
    start = copy.deepcopy(model)
    ticket = LotteryTicket(model, fraction=0.2, criterion="l1")
    sizes = {mlp.name: mlp.hidden_features for mlp in mlpreduce.find_mlps(model) if mlp.owner == mlp.name}
    before = {name: list(range(size)) for name, size in sizes.items()}
    for number in (1, 2, 3):
        train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), 1)
        made = ticket.next_round()
        kept = {edit.mlp: [before[edit.mlp][unit] for unit in edit.units] for edit in made.of(mlpreduce.edits.Slice)}
        for name, units in kept.items():
            assert set(units) <= set(before[name])
            assert len(units) == max(1, math.floor(sizes[name] * 0.8**number + 1e-9))
            path = (
                f"{name}.fc2"
                if not hasattr(model, "stages")
                else next(m.leaf("fc2").path for m in mlpreduce.find_mlps(model) if m.name == name)
            )
            ours, theirs = model.get_submodule(path).weight, start.get_submodule(path).weight
            assert torch.equal(ours, theirs[:, units])
        before |= kept


def test_controls_of_a_ticket() -> None:
    model = plain()
    ticket = LotteryTicket(model, fraction=0.5, criterion="random", rewind="random", build=plain, seed=3)
    ticket.next_round()
    assert model.blocks[0].mlp.fc1.out_features == 64
    with pytest.raises(ReductionError, match="fraction is 1"):
        LotteryTicket(plain(), fraction=1.0)


# --- in the middle of training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [plain, tied, gated])
def test_a_step_of_the_reduced_model_is_that_of_the_kept_units(make: Callable[[], nn.Module]) -> None:
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    train(model, optimizer, 2)
    scheduler.step()
    ema = create_ema(model, 0.9)
    dense, moments = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    reduce_in_training(model, "shallow", optimizer, ema, ratio=0.5, criterion="l2")
    units = {edit.mlp: list(edit.units) for edit in mlpreduce.history(model)[-1].of(mlpreduce.edits.Slice)}
    other = torch.optim.AdamW(dense.parameters(), lr=1e-2, weight_decay=0.1)
    other.load_state_dict(moments)
    with torch.no_grad():
        for name, kept in units.items():
            fc2 = dense.get_submodule(name).fc2.weight
            fc2[:, [u for u in range(fc2.shape[1]) if u not in kept]] = 0
    train(model, optimizer, 1)
    train(dense, other, 1)
    assert scheduler.optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"] == 5e-3
    for name, kept in units.items():
        ours, theirs = model.get_submodule(name), dense.get_submodule(name)
        torch.testing.assert_close(ours.fc2.weight, theirs.fc2.weight[:, kept], rtol=1e-10, atol=1e-12)
        assert ema.module.get_submodule(name).fc2.weight.shape == ours.fc2.weight.shape
    torch.testing.assert_close(model.head.weight, dense.head.weight, rtol=1e-10, atol=1e-12)
    assert mlpreduce.verify(model, optimizer).ok


def test_tying_in_training_keeps_the_moments_of_what_stays() -> None:
    model = plain()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, 2)
    kept = optimizer.state[model.blocks[0].mlp.fc1.weight]["exp_avg"].clone()
    count = len(optimizer.param_groups[0]["params"])
    reduce_in_training(model, "grouped", optimizer, group=2, scale="none")
    assert torch.equal(optimizer.state[model.blocks[1].mlp.fc1.weight]["exp_avg"], kept)
    assert len(optimizer.param_groups[0]["params"]) == count - 8
    train(model, optimizer, 1)
    assert mlpreduce.verify(model, optimizer).ok


def test_what_cannot_be_carried_is_refused_before_anything_changes(
    unchanged: Callable[[nn.Module], Callable[[], None]],
) -> None:
    model = plain()
    factored = timm.optim.create_optimizer_v2(model, "adafactor", lr=1e-2)
    train(model, factored, 1)
    check = unchanged(model)
    with pytest.raises(ReductionError, match="which cannot be sliced as the parameter"):
        reduce_in_training(model, "shallow", factored)
    foreign = torch.optim.SGD(plain().parameters(), lr=0.1)
    with pytest.raises(ReductionError, match=r"are none of the model's"):
        reduce_in_training(model, "shallow", foreign)
    with pytest.raises(ReductionError, match="ema is no average of this model"):
        reduce_in_training(model, "shallow", torch.optim.SGD(model.parameters(), lr=0.1), tiny_vit(depth=2).double())
    check()


# --- what must not go wrong quietly -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["model first", "made first", "masks first"])
def test_masks_are_loaded_in_any_order(order: str) -> None:
    def made(model: nn.Module, seed: int) -> PruneAndGrow:
        return PruneAndGrow(model, 0.5, interval=2, total_updates=12, seed=seed)

    first = plain()
    masks = made(first, 4)
    train(first, torch.optim.AdamW(first.parameters(), lr=1e-2), 6, masks.step)
    weights, state = copy.deepcopy(first.state_dict()), masks.state_dict()
    model = plain()
    if order == "model first":
        model.load_state_dict(weights)
    again = made(model, 9)
    if order == "masks first":
        again.load_state_dict(state)
    if order != "model first":
        model.load_state_dict(weights)
    if order != "masks first":
        again.load_state_dict(state)
    assert again.active == masks.active
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name])


def test_masks_that_cannot_work_are_refused() -> None:
    with pytest.raises(ReductionError, match=r"interval=9 is more than 0\.8 of total_updates=10"):
        PruneAndGrow(plain(), 0.5, interval=9, total_updates=10)
    with pytest.raises(ReductionError, match="density is None"):
        PruneAndGrow(plain(), None, interval=1, total_updates=10)  # type: ignore[arg-type]
    model = plain()
    masks = PruneAndGrow(model, 0.5, interval=2, total_updates=10)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    masks.step()
    with pytest.raises(
        ReductionError, match=r"all gradients of blocks\.0\.mlp are 0 at update 2, and units grow by them"
    ):
        masks.step()
    state = masks.state_dict()
    for damage in ({"masks": None}, {"updates": "x"}, {"settings": {**state["settings"], "interval": 3}}):
        with pytest.raises(ReductionError, match=r"damaged|was written with interval=3, and this has interval=2"):
            masks.load_state_dict({**state, **damage})
    second = PruneAndGrow(model, 0.5, interval=2, total_updates=10)
    masks.finalize()
    with pytest.raises(ReductionError, match="something else has reduced the model"):
        second.finalize()


@pytest.mark.parametrize("wrong", ["itself", "other", "wrapped", "no model"])
def test_a_wrong_average_changes_nothing(wrong: str, unchanged: Callable[[nn.Module], Callable[[], None]]) -> None:
    model = plain()
    ema = {"itself": model, "other": tiny_vit(depth=3).double(), "wrapped": nn.DataParallel(model), "no model": 3}[
        wrong
    ]
    message = {
        "itself": "is the model itself",
        "other": "is no average of this model",
        "wrapped": "is the model itself",
    }
    masks = PruneAndGrow(model, 0.5, interval=1, total_updates=2)
    check = unchanged(model)
    for call in (masks.finalize, masks.apply_to):
        with pytest.raises(ReductionError, match=message.get(wrong, "ema is a int")):
            call(ema)
    check()
    masks.finalize()
    gated_model = plain()
    gates = GateL1(gated_model)
    gates.gates["blocks.0.mlp"].data[0] = 0.5
    other = {"itself": gated_model, "wrapped": nn.DataParallel(gated_model)}.get(wrong, ema)
    for finish in (gates.fold, lambda ema: gates.finalize(ema=ema)):
        with pytest.raises(ReductionError, match=message.get(wrong, "ema is a int")):
            finish(other)
        assert len(gates.gates) == 4
    with pytest.raises(ReductionError, match=r"blocks\.0\.mlp\.fc2 has no gate|is no average"):
        gates.finalize(ema=plain())
    gates.finalize()


def test_gates_that_never_moved_are_refused() -> None:
    model = plain()
    optimizer = torch.optim.AdamW(model.parameters())  # before the gates
    gates = GateL1(model)
    train(model, optimizer, 2, gates.after_backward)
    with pytest.raises(ReductionError, match=r"every gate is 1 as at first.*make the optimizer after GateL1"):
        gates.finalize(0.3)
    with pytest.raises(ReductionError, match=r"blocks\.0\.mlp\.fc2 is parametrized: fold that into its weight first"):
        mlpreduce.apply(model, "shallow")
    for wrong in ("x", math.nan, math.inf):
        with pytest.raises(ReductionError, match="scale is"):
            gates.after_backward(wrong)  # type: ignore[arg-type]
        with pytest.raises(ReductionError, match="coefficient is"):
            GateL1(plain(), wrong)  # type: ignore[arg-type]
    gates.fold()


def test_a_fraction_of_a_hundred_units_is_what_it_says() -> None:
    for scope in ("uniform", "global"):
        model = tiny_vit(embed_dim=20, mlp_ratio=5.0, num_heads=2)
        gates = GateL1(model)
        with torch.no_grad():
            for gate in gates.gates.values():
                gate.copy_(torch.linspace(0.1, 1, 100))
        assert gates.finalize(0.29, scope=scope).blocks[0].mlp.fc1.out_features == 71


def test_tickets_refuse_what_they_cannot_use(unchanged: Callable[[nn.Module], Callable[[], None]]) -> None:
    with pytest.raises(ReductionError, match="wrapped in DataParallel"):
        LotteryTicket(nn.DataParallel(plain()))
    model = plain()
    builds = {
        "head.weight has shape": lambda: tiny_vit(num_classes=3).double(),
        "gives a str": lambda: "x",
        "gives the model itself": lambda: model,
        "cannot be reduced alike": lambda: tiny_vit(mlp_ratio=2.0).double(),
    }
    for message, build in builds.items():
        ticket = LotteryTicket(model, 0.2, rewind="random", build=build)  # type: ignore[arg-type]
        check = unchanged(model)
        with pytest.raises(ReductionError, match=message):
            ticket.next_round()
        check()
        assert ticket.rounds == 0
    ticket = LotteryTicket(model, 0.2)
    state = ticket.state_dict()
    with pytest.raises(ReductionError, match=r"was written with fraction=0\.2, and this has fraction=0\.5"):
        LotteryTicket(plain(), 0.5).load_state_dict(state)
    with pytest.raises(ReductionError, match="damaged"):
        ticket.load_state_dict({**state, "plans": None})


@pytest.mark.parametrize("keep", ["first", "last"])
@pytest.mark.parametrize("decay", [None, 0.5])
def test_a_carried_optimizer_is_like_one_made_anew(keep: str, decay: float | None) -> None:
    def made(model: nn.Module) -> torch.optim.Optimizer:
        return timm.optim.create_optimizer_v2(model, "adamw", lr=1e-2, weight_decay=0.05, layer_decay=decay)

    model = plain()
    optimizer = made(model)
    train(model, optimizer, 2)
    kept = optimizer.state[model.blocks[0 if keep == "first" else 1].mlp.fc1.weight]["exp_avg"].clone()
    config = {"group": 2, "keep": keep, "scale": "none"}
    reduce_in_training(model, "grouped", optimizer, **config)
    assert torch.equal(optimizer.state[model.blocks[0].mlp.fc1.weight]["exp_avg"], kept)
    anew = mlpreduce.apply(plain(), "grouped", **config)
    anew.load_state_dict(model.state_dict())
    other = made(anew)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    names = {id(p): name for each in (model, anew) for name, p in each.named_parameters()}
    for ours, theirs in zip(optimizer.param_groups, other.param_groups, strict=True):
        assert [names[id(p)] for p in ours["params"]] == [names[id(p)] for p in theirs["params"]]
        assert ours.get("lr_scale") == theirs.get("lr_scale")
    train(model, optimizer, 1)
    train(anew, other, 1)
    for one, two in zip(model.parameters(), anew.parameters(), strict=True):
        assert torch.equal(one, two)


def test_lookahead_and_several_optimizers_are_carried() -> None:
    model = plain()
    optimizer = timm.optim.create_optimizer_v2(model, "lookahead_momentum", lr=1e-2)
    train(model, optimizer, 7)
    reduce_in_training(model, "shallow", optimizer, ratio=0.5)
    inner = optimizer._base_optimizer
    assert {id(p) for p in inner.state} == {id(p) for p in model.parameters()}
    assert all(value.shape == p.shape for p, held in inner.state.items() for value in held.values())
    train(model, optimizer, 7)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    both = [torch.optim.SGD(matrices, lr=0.1, momentum=0.9), torch.optim.AdamW(others)]
    for each in both:
        train(model, each, 1)
    reduce_in_training(model, "shallow", both, ratio=0.5)
    held = {id(p) for each in both for group in each.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    for wrong in (None, 3, [None]):
        with pytest.raises(ReductionError, match=r"optimizer is a .*; give an optimizer, or a list of them"):
            reduce_in_training(model, "shallow", wrong)  # type: ignore[arg-type]


def test_an_optimizer_of_the_other_half_of_a_tie_gets_what_stays() -> None:
    model = plain()
    optimizer = torch.optim.AdamW(model.blocks[1].parameters())
    train(model, optimizer, 1)
    reduce_in_training(model, "grouped", optimizer, group=2, scale="none")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.blocks[1].parameters()}
