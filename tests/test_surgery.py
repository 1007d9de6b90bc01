"""Edits on models: values, ties, buffers, all or nothing, memory."""

from __future__ import annotations

import copy
import gc
import math
import os
import signal
from contextlib import ExitStack
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

import mlpreduce
from mlpreduce import Plan, ReductionError
from mlpreduce.budget.profiling import LiveMemory
from mlpreduce.edits import Assign, Axis, Scale, Share, Slice
from mlpreduce.surgery import slicing
from mlpreduce.testing import tiny_vit

BAD = [
    ("groupped", {}, r"unknown transform 'groupped'; did you mean 'grouped'\?"),
    ("grouped", {"size": 2}, r"grouped\(size=2\): unknown argument 'size'; known: group, keep, pattern"),
    ("grouped", {"patern": "cycle"}, r"unknown argument 'patern'; did you mean 'pattern'\?"),
    ("grouped", {"group": 5}, r"grouped\(group=5\): 12 MLPs do not split.*one of 2, 3, 4, 6, 12, or remainder=.own."),
    ("grouped", {"group": 0}, r"group is 0.*must be one of 2, 3, 4, 6, 12"),
    ("grouped", {"group": -2}, r"group is -2"),
    ("grouped", {"group": 2.0}, r"group is 2.0"),
    ("grouped", {"group": True}, r"group is True"),
    ("grouped", {"group": 1}, r"grouped\(group=1\): nothing would change on 12 MLPs"),
    ("grouped", {"pattern": [[0, 1], [1, 2]]}, r"pattern has row 1 twice"),
    ("grouped", {"pattern": [[0, 12]]}, r"pattern has row 12; rows in scope are 0 to 11"),
    ("grouped", {"pattern": [[-1, 0]]}, r"pattern has row -1"),
    ("grouped", {"pattern": [0, 1]}, r"must be lists of row numbers"),
    ("grouped", {"pattern": [[0, 1], []]}, r"must be lists of row numbers"),
    ("grouped", {"pattern": None}, r"pattern is None"),
    ("grouped", {"include": []}, r"include=\[\]; it must be a glob"),
    ("shallow", {"exclude": 5}, r"exclude=5; it must be a glob"),
    ("shallow", {"widths": 5.0}, r"widths is 5.0; it must have one width"),
    ("shallow", {"criterion": "random", "seed": None}, r"seed is None; it must be a whole number"),
    ("shallow", {"criterion": ["l2"]}, r"criterion is \['l2'\]"),
    ("grouped", {"pattern": "cycles"}, r"pattern is 'cycles'; did you mean 'cycle'\?"),
    ("grouped", {"scale": math.nan}, r"scale of fc1.weight is nan; it must be a positive number"),
    ("grouped", {"scale": 0}, r"scale of fc1.weight is 0"),
    ("grouped", {"scale": "sqrt"}, r"scale is 'sqrt'; did you mean 'inv_sqrt'\?"),
    ("grouped", {"scale": {"fc3.weight": 1.0}}, r"scale has 'fc3.weight'; did you mean"),
    ("grouped", {"keep": "best"}, r"keep is 'best'"),
    ("grouped", {"remainder": "drop", "group": 5}, r"remainder is 'drop'"),
    ("shallow", {"ratio": 0}, r"shallow\(ratio=0\): ratio is 0; .*above 0 and at most 1"),
    ("shallow", {"ratio": -1}, r"ratio is -1"),
    ("shallow", {"ratio": 1.5}, r"ratio is 1.5"),
    ("shallow", {"ratio": math.nan}, r"ratio is nan"),
    ("shallow", {"ratio": 1.0}, r"nothing would change on 12 MLPs"),
    ("shallow", {"ratio": 0.001}, r"ratio 0.001 keeps none of the 128 .*; the smallest ratio here is 0.0078"),
    ("shallow", {"ratio": 0.5, "width": 8}, r"2 sizes are given \(ratio, width\); give one of"),
    ("shallow", {"width": 0}, r"blocks.0.mlp would keep 0 of 128"),
    ("shallow", {"width": 129}, r"would keep 129 of 128 hidden units; it must be 1 to 128"),
    ("shallow", {"width": 8.0}, r"width 8.0 is not a whole number"),
    ("shallow", {"widths": [8, 8]}, r"one width for each of 12 MLPs"),
    ("shallow", {"widths": {"blocks.12.mlp": 8}}, r"which is no MLP to slice; did you mean"),
    ("shallow", {"criterion": "l3"}, r"unknown criterion 'l3'; did you mean 'l2'\?"),
    ("shallow", {"round_to": 0}, r"round_to is 0"),
    ("thin", {"mlp_ratio": 2.0}, r"thin acts when a model is built"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "config", "message"), BAD)
def test_bad_calls(name: str, config: dict, message: str, unchanged) -> None:
    model = tiny_vit(depth=12)
    check = unchanged(model)
    with pytest.raises(ReductionError, match=message):
        mlpreduce.apply(model, name, **config)
    check()


def test_unlike_mlps_do_not_group(unchanged) -> None:
    model = tiny_vit()
    mlpreduce.apply(model, "shallow", widths={"blocks.1.mlp": 64, "blocks.3.mlp": 64})
    check = unchanged(model)
    with pytest.raises(
        ReductionError, match=r"blocks.0.mlp \(plain 32-128-32 in blocks\) with blocks.1.mlp \(plain 32-64-32"
    ):
        mlpreduce.apply(model, "grouped", pattern=[[0, 1]])
    check()


def test_grouping_twice_does_not_scale_twice(vit: nn.Module, unchanged) -> None:
    mlpreduce.apply(vit, "grouped")
    check = unchanged(vit)
    with pytest.raises(
        ReductionError, match=r"blocks.0.mlp, blocks.1.mlp are tied already, and nothing is scaled twice"
    ):
        mlpreduce.apply(vit, "grouped", group=4)
    with pytest.raises(
        ReductionError, match=r"the owner blocks.0.mlp; the plan was made for .* or already carried out"
    ):
        mlpreduce.apply(vit, mlpreduce.history(vit)[0])
    check()


def test_slicing_twice_by_the_same_plan_is_refused(vit: nn.Module, unchanged) -> None:
    made = mlpreduce.plan(vit, "shallow")
    mlpreduce.apply(vit, made)
    check = unchanged(vit)
    with pytest.raises(
        ReductionError,
        match=r"the plan was made for 128, 8,352 and blocks.0.mlp: it is of another model, or already carried out",
    ):
        mlpreduce.apply(vit, made)
    check()


def test_wrapped_models_are_refused(vit: nn.Module, images: torch.Tensor) -> None:
    with pytest.raises(ReductionError, match=r"wrapped in DataParallel.*reduce model.module"):
        mlpreduce.apply(nn.DataParallel(vit), "grouped")
    with pytest.raises(ReductionError, match=r"OptimizedModule"):
        mlpreduce.apply(torch.compile(vit), "grouped")
    vit.blocks[1].compile()
    with pytest.raises(ReductionError, match=r"blocks.1 is compiled; reduce the model, then compile it"):
        mlpreduce.apply(vit, "grouped")
    with pytest.raises(ReductionError, match=r"needs a torch.nn.Module, got str"):
        mlpreduce.apply("vit", "grouped")


def test_ddp_is_refused(tmp_path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(tiny_vit())
        with pytest.raises(ReductionError, match=r"wrapped in DistributedDataParallel"):
            mlpreduce.apply(wrapped, "grouped")
    finally:
        torch.distributed.destroy_process_group()


def test_meta_device() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", img_size=32)
    for config in ({"criterion": "l2"}, {"criterion": "l2", "ratio": 0.25}):
        with pytest.raises(
            ReductionError, match=r"needs the values of blocks.0.mlp.fc1.weight, but the model is on the meta"
        ):
            mlpreduce.apply(model, "shallow", **config)
    with pytest.raises(ReductionError, match="meta device"):
        mlpreduce.apply(model, "grouped", keep="mean")
    mlpreduce.apply(mlpreduce.apply(model, "grouped"), "shallow", criterion="random")
    assert all(p.is_meta for p in model.parameters())
    real = tiny_vit(img_size=32, patch_size=16, embed_dim=192, depth=12, num_heads=3, num_classes=1000)
    mlpreduce.apply(mlpreduce.apply(real, "grouped"), "shallow", criterion="random")
    assert {n: p.shape for n, p in real.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


@pytest.mark.parametrize("position", range(4))
def test_all_or_nothing(position: int, unchanged) -> None:
    """A plan with one bad edit anywhere changes nothing."""
    vit = tiny_vit()
    good = [
        mlpreduce.plan(vit, "shallow").edits[0],
        Share("blocks.2.mlp.fc1", "blocks.3.mlp.fc1"),
        Scale("blocks.2.mlp.fc1.weight", 0.5),
    ]
    axis = Axis("blocks.1.mlp.fc1.weight", 0, 128)
    bad = [
        (Share("blocks.0.mlp.fc1", "blocks.9.mlp.fc1"), "no module 'blocks.9.mlp.fc1'"),
        (Share("blocks.0.mlp", "blocks.1.mlp"), "blocks.0.mlp has children"),
        (Share("blocks.0.mlp.fc1", "blocks.0.mlp.fc2"), "differ"),
        (Scale("blocks.2.mlp.fc9.weight", 2.0), "no tensor 'blocks.2.mlp.fc9.weight'"),
        (Scale("blocks.3.mlp.fc1.weight", 2.0), "weight has two Scale edits"),  # shared with that of block 2
        (Assign("blocks.2.mlp.fc1.weight", torch.zeros(3)), r"has shape \(128, 32\), its new values have \(3,\)"),
        (Slice("blocks.1.mlp", 128, (5, 128), (axis,)), "would keep units"),
        (Slice("blocks.1.mlp", 128, (5, 5, 6), (axis,)), "would keep a unit twice"),
        (Slice("blocks.1.mlp", 128, range(4), (axis, axis)), "sliced twice"),
        (Slice("blocks.1.mlp", 64, range(4), (Axis(axis.tensor, 0, 64),)), "made for 64"),
    ]
    for edit, message in bad:
        check = unchanged(vit)
        edits = [*good[:position], edit, *good[position:]]
        with pytest.raises(ReductionError, match=message):
            mlpreduce.apply(vit, Plan("by_hand", {}, tuple(edits)))
        check()
        assert mlpreduce.history(vit) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_scale_is_rounded_once(dtype: torch.dtype) -> None:
    vit = tiny_vit().to(dtype)
    expected = [vit.blocks[0].mlp.fc1.weight * 0.707, vit.blocks[2].mlp.fc2.weight * 0.707]
    mlpreduce.apply(vit, "grouped", scale="paper")
    assert torch.equal(vit.blocks[0].mlp.fc1.weight, expected[0])
    assert torch.equal(vit.blocks[2].mlp.fc2.weight, expected[1])


def test_units_in_any_order_and_all_of_them(vit: nn.Module, images: torch.Tensor) -> None:
    before = vit(images)
    (edit,) = (e for e in mlpreduce.plan(vit, "shallow").edits if e.mlp == "blocks.1.mlp")
    mlpreduce.apply(vit, Plan("by_hand", {}, (replace(edit, units=tuple(reversed(range(128)))),)))
    torch.testing.assert_close(vit(images), before)


@pytest.mark.parametrize(
    "special", [nn.Linear.share_memory, lambda fc: fc.to(torch.float8_e5m2), lambda fc: fc.weight.register_hook(print)]
)
def test_what_is_more_than_values_comes_back_itself(special, monkeypatch: pytest.MonkeyPatch) -> None:
    vit = tiny_vit()
    special(vit.blocks[0].mlp.fc1)
    made = mlpreduce.plan(vit, "shallow", include="blocks.0.*")
    weight = id(vit.blocks[0].mlp.fc1.weight)
    broken = replace(made, edits=(*made.edits, mlpreduce.plan(vit, "shallow", include="blocks.1.*").edits[0]), rows=())
    cut, calls = slicing._cut, []

    def failing(old, axes, edit):
        calls.append(edit.mlp)
        if edit.mlp == "blocks.1.mlp" and len(calls) > 6:
            raise MemoryError("injected")
        return cut(old, axes, edit)

    monkeypatch.setattr(slicing, "_cut", failing)
    with pytest.raises(MemoryError):
        mlpreduce.apply(vit, broken)
    assert id(vit.blocks[0].mlp.fc1.weight) == weight
    assert vit.blocks[0].mlp.fc1.out_features == 128


def test_unchanged_sees_a_change(vit: nn.Module, unchanged) -> None:
    check = unchanged(vit)
    with torch.no_grad():
        vit.blocks[3].mlp.fc2.bias[0] += 1
    with pytest.raises(AssertionError):
        check()


def test_an_interrupt_waits(vit: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny_vit()
    mlpreduce.apply(whole, "shallow")
    cut = slicing._set_sizes

    def interrupt_then_cut(leaf: nn.Module) -> None:
        if not next(leaf.parameters()).is_meta:
            os.kill(os.getpid(), signal.SIGINT)
        cut(leaf)

    monkeypatch.setattr(slicing, "_set_sizes", interrupt_then_cut)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            mlpreduce.apply(vit, "shallow")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert {n: p.shape for n, p in vit.named_parameters()} == {n: p.shape for n, p in whole.named_parameters()}


def test_tied_parameters_are_not_untied_silently(vit: nn.Module, unchanged) -> None:
    vit.blocks[1].mlp.fc1.weight = vit.blocks[0].mlp.fc1.weight
    check = unchanged(vit)
    with pytest.raises(
        ReductionError, match=r"blocks.0.mlp.fc1.weight is one Parameter in 2 modules, and slicing or tying would untie"
    ):
        mlpreduce.apply(vit, "shallow")
    check()


def test_batch_norm_statistics_stay_per_block(images: torch.Tensor) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.bn, self.fc2 = nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12), nn.Conv2d(12, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.fc2(torch.relu(self.bn(self.fc1(x))))

    model = nn.Sequential(Normed(), Normed(), Normed(), Normed())
    model(images)  # in train mode: each block gets its own statistics
    model.eval()
    mlpreduce.apply(model, "grouped", scale="none")
    assert model[1].fc1 is model[0].fc1
    assert model[1].bn is not model[0].bn
    made = mlpreduce.plan(model, "shallow", ratio=0.5)
    masked = copy.deepcopy(model)
    mlpreduce.apply(model, made)
    assert [block.bn.num_features for block in model] == [6] * 4
    assert [tuple(block.bn.running_mean.shape) for block in model] == [(6,)] * 4
    with torch.no_grad():
        for block in masked[::2]:
            block.fc2.weight[:, 6:] = 0
        torch.testing.assert_close(model(images), masked(images), atol=1e-6, rtol=1e-5)


def test_requires_grad_dtype_and_hooks_stay(vit: nn.Module, images: torch.Tensor) -> None:
    vit = vit.to(torch.bfloat16)
    vit.blocks[0].mlp.fc1.weight.requires_grad_(False)
    calls = []
    vit.blocks[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    mlpreduce.apply(vit, "shallow")
    assert calls == []
    assert not vit.blocks[0].mlp.fc1.weight.requires_grad
    assert vit.blocks[0].mlp.fc2.weight.requires_grad
    assert vit(images.bfloat16()).dtype == torch.bfloat16
    assert calls == [1]


@pytest.mark.slow
def test_memory_of_apply_on_vit_large() -> None:
    """Beyond what the model holds, applying takes no more than its largest sliced tensor: here less than one new MLP."""
    for name, config in (("shallow", {"ratio": 0.5}), ("shallow", {"ratio": 0.75}), ("grouped", {"group": 2})):
        model = timm.create_model("vit_large_patch16_224")
        largest = int(4 * (2 * 1024 + 1) * 4096 * config.get("ratio", 1))
        with LiveMemory(model) as memory:
            before = memory.live
            mlpreduce.apply(model, name, **config)
        assert before >= 4 * 304_000_000
        assert memory.peak - before <= largest
        del model


def test_optimizer_made_too_early_is_seen(vit: nn.Module) -> None:
    early = torch.optim.AdamW(vit.parameters())
    mlpreduce.apply(vit, "shallow")
    report = mlpreduce.verify(vit, early)
    assert not report.ok
    assert "the optimizer does not update 12 parameters" in str(report)
    assert "holds 12 tensors that are not the model's" in str(report)
    assert mlpreduce.verify(vit, torch.optim.AdamW(vit.parameters())).ok


def test_verify_sees_a_broken_tie_and_accepts_an_ema(vit: nn.Module) -> None:
    from timm.utils import ModelEmaV2, ModelEmaV3

    mlpreduce.apply(vit, "grouped")
    assert mlpreduce.verify(vit, ema=ModelEmaV3(vit)).ok
    assert mlpreduce.verify(vit, ema=ModelEmaV2(vit)).ok
    assert mlpreduce.verify(vit, ema=ModelEmaV3(vit, exclude_buffers=True)).ok
    vit.blocks[1] = copy.deepcopy(vit.blocks[1])
    assert "blocks.1.mlp.fc1 is no longer tied to blocks.0.mlp.fc1" in str(mlpreduce.verify(vit))


def test_untie_is_exact_and_independent(vit: nn.Module, images: torch.Tensor) -> None:
    plain = sum(p.numel() for p in vit.parameters())
    mlpreduce.apply(vit, "grouped", group=4)
    before = vit(images)
    assert mlpreduce.untie(vit) is vit
    assert torch.equal(vit(images), before)
    assert sum(p.numel() for p in vit.parameters()) == plain
    assert mlpreduce.history(vit)[0].of(Share) == []
    with torch.no_grad():
        vit.blocks[1].mlp.fc1.weight.zero_()
    assert vit.blocks[0].mlp.fc1.weight.abs().sum() > 0
    with pytest.raises(ReductionError, match="no tie made by mlpreduce"):
        mlpreduce.untie(tiny_vit())


def test_share_follows_aliases() -> None:
    """A leaf registered under two names is replaced under both, or the alias would keep the old one alive."""
    vit = tiny_vit()
    vit.shortcut = vit.blocks[1].mlp.fc1
    mlpreduce.apply(vit, "grouped")
    assert vit.shortcut is vit.blocks[0].mlp.fc1


def test_a_tied_parameter_is_not_scaled_twice(vit: nn.Module, unchanged) -> None:
    vit.blocks[2].mlp.fc1.weight = vit.blocks[0].mlp.fc1.weight
    check = unchanged(vit)
    with pytest.raises(ReductionError, match=r"blocks.0.mlp.fc1.weight is one Parameter in 2 modules"):
        mlpreduce.apply(vit, "grouped")
    check()


def test_tensors_that_cannot_change_in_place(unchanged) -> None:
    with torch.inference_mode():
        vit = tiny_vit()
    check = unchanged(vit)
    with pytest.raises(ReductionError, match=r"cannot be changed in place: it was made in torch.inference_mode"):
        mlpreduce.apply(vit, "grouped")
    check()
    mlpreduce.apply(vit, "shallow")
    assert not vit.blocks[0].mlp.fc1.weight.is_inference()


def test_hooks_on_what_would_go_are_not_lost(vit: nn.Module, unchanged) -> None:
    handle = vit.blocks[1].mlp.fc1.register_forward_hook(lambda *_: None)
    check = unchanged(vit)
    with pytest.raises(ReductionError, match=r"blocks.1.mlp.fc1 has hooks, which would go with it"):
        mlpreduce.apply(vit, "grouped")
    check()
    handle.remove()
    mlpreduce.apply(vit, "grouped")


def test_frozen_and_trained_do_not_share(vit: nn.Module) -> None:
    vit.blocks[0].mlp.fc2.weight.requires_grad_(False)
    with pytest.raises(ReductionError, match=r"blocks.0.mlp.fc2 and blocks.1.mlp.fc2 differ"):
        mlpreduce.apply(vit, "grouped")


def test_a_default_device_of_meta_changes_nothing(images: torch.Tensor) -> None:
    a, b = tiny_vit().eval(), tiny_vit().eval()
    with torch.device("meta"):
        mlpreduce.apply(a, "shallow", criterion="random")
    mlpreduce.apply(b, "shallow", criterion="random")
    assert torch.equal(a(images), b(images))


def test_what_a_user_holds_is_not_kept_twice() -> None:
    model = tiny_vit()
    held = model.blocks[0].mlp.fc1.weight  # (128, 32): stays whole, so its parts are not needed
    made = mlpreduce.plan(model, "shallow", width=37, include=["blocks.0.mlp"])
    with ExitStack() as undo:
        slicing.slice_all(model, [edit for edit in made.edits if isinstance(edit, Slice)], undo)
        shapes = [tuple(found.shape) for found in gc.get_objects() if type(found) is torch.Tensor]
        assert (128 - 37, 32) not in shapes
        assert (32, 128 - 37) in shapes  # of fc2, which nobody holds
    assert model.blocks[0].mlp.fc1.weight is held
