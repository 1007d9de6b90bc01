"""Counts against formulas and hand counts; measured figures exist and are consistent."""

from __future__ import annotations

import pytest
import timm
import torch
from helpers.marks import slow_but
from torch import nn

import mlpreduce
from mlpreduce import ReductionError
from mlpreduce.budget import measure
from mlpreduce.budget.profiling import LiveMemory
from mlpreduce.testing import tiny_vit


def test_macs_by_formula() -> None:
    n, d, h, blocks = 17, 32, 128, 4  # 16 patches and the class token
    linear = 16 * 3 * 4 * 4 * d + blocks * (3 * n * d * d + n * d * d + 2 * n * d * h) + 5 * d
    norms = 5 * ((2 * blocks + 1) * n * d)
    profile = mlpreduce.profile(tiny_vit())
    assert profile.macs_linear == linear
    assert profile.macs == linear + norms
    assert profile.macs_with_attention == linear + norms + blocks * 2 * n * n * d
    assert (profile.throughput, profile.latency, profile.peak_memory_mib) == (None, None, None)


def test_macs_of_pruned_tokens(vit: nn.Module) -> None:
    d, h, tokens = 32, 128, (17, 17, 9, 5)
    linear = 16 * 3 * 4 * 4 * d + sum(4 * n * d * d + 2 * n * d * h for n in tokens) + 5 * d
    profile = mlpreduce.profile(vit, tokens_per_block=tokens)
    assert profile.macs_linear == linear
    assert profile.macs == linear + 5 * d * (sum(2 * n for n in tokens) + tokens[-1])
    assert profile.macs_with_attention == profile.macs + sum(2 * n * n * d for n in tokens)
    assert mlpreduce.profile(vit, tokens_per_block=[17] * 4) == mlpreduce.profile(vit)
    tied = mlpreduce.apply(vit, "grouped")
    assert mlpreduce.profile(tied, tokens_per_block=tokens).macs == profile.macs
    for wrong in ([17] * 3, [17, 17, 17, 0], [17, 17, 17, 2.5]):
        with pytest.raises(ReductionError, match=r"whole number above 0 for each of 4 blocks, blocks\.0 to blocks\.3"):
            mlpreduce.profile(vit, tokens_per_block=wrong)
    with pytest.raises(ReductionError, match="give a list with a number for each block"):
        mlpreduce.profile(vit, tokens_per_block=5)
    with pytest.raises(ReductionError, match="leave out tokens_per_block"):
        mlpreduce.profile(vit, measure_speed=True, tokens_per_block=tokens)
    swin = timm.create_model("swin_tiny_patch4_window7_224")
    with pytest.raises(ReductionError, match=r"layers\.0\.blocks\.0 is not given tokens"):
        mlpreduce.profile(swin, tokens_per_block=[49] * 12)


def test_deit_with_tokens_pruned_as_by_dynamicvit() -> None:
    with torch.device("meta"):
        deit = timm.create_model("deit_small_patch16_224")
    tokens = [1 + int(196 * 0.7 ** (block // 3)) for block in range(12)]
    assert mlpreduce.profile(deit).macs_with_attention / 1e9 == pytest.approx(4.6, abs=0.05)  # published, and below
    assert mlpreduce.profile(deit, tokens_per_block=tokens).macs_with_attention / 1e9 == pytest.approx(2.9, abs=0.05)


def test_tying_changes_no_macs_and_slicing_does(vit: nn.Module) -> None:
    before = mlpreduce.profile(vit)
    tied = mlpreduce.profile(mlpreduce.apply(vit, "grouped"))
    assert (before.macs, before.macs_with_attention) == (tied.macs, tied.macs_with_attention)
    assert tied.unique_mlps == 2
    assert mlpreduce.profile(mlpreduce.apply(vit, "shallow")).macs_linear == before.macs_linear - 4 * 17 * 64 * 64


@pytest.mark.parametrize(
    "name",
    slow_but(
        ["swin_tiny_patch4_window7_224", "eva02_base_patch14_224", "cait_xxs24_224"], "swin_tiny_patch4_window7_224"
    ),
)
def test_cost_before_equals_cost_after(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    for transform, config in (("grouped", {"group": 2}), ("shallow", {"ratio": 0.3})):
        made = mlpreduce.plan(model, transform, **config)
        expected = measure(model).after(made)
        mlpreduce.apply(model, made)
        assert measure(model).cost == expected


def test_measured(vit: nn.Module) -> None:
    vit.train()
    profile = mlpreduce.profile(vit, measure_speed=True, batch_size=4, repeats=2)
    weights = sum(p.numel() for p in vit.parameters()) * 4 / 2**20
    assert profile.throughput > 0
    assert profile.latency > 0
    assert weights < profile.peak_memory_mib < weights + 4
    assert vit.training
    assert "images/s (batch 4, cpu, float32" in str(profile)


def test_input_size_must_be_known() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.fc2(self.fc1(x).relu())

    with pytest.raises(ReductionError, match="Own does not say what image size it takes; give example inputs, such as"):
        mlpreduce.profile(Own())
    assert mlpreduce.profile(Own(), torch.zeros(3, 7, 4)).macs_linear == 7 * 2 * 32
    with pytest.raises(ReductionError, match="a run on example inputs raised RuntimeError"):
        mlpreduce.profile(Own(), torch.zeros(1, 7, 5))
    with torch.device("meta"), pytest.raises(ReductionError, match="cannot be timed"):
        mlpreduce.profile(timm.create_model("vit_tiny_patch16_224"), measure_speed=True)
    assert "MACs are not counted: Own does not say" in str(mlpreduce.plan(Own(), "shallow"))


def test_live_memory() -> None:
    with LiveMemory() as memory:
        a = torch.zeros(1000)
        b = torch.zeros(500)
        c = a[:10]  # a view holds nothing of its own
        assert memory.live == 6000
        del b
        assert (memory.live, memory.peak) == (4000, 6000)
        del a
        assert memory.live == 4000
        del c
        assert memory.live == 0


def test_what_a_model_keeps_for_evaluation_is_not_left_behind() -> None:
    """LeViT keeps attention biases in evaluation; those made while it is timed would hide what is loaded later."""
    kwargs = {"embed_dim": (16, 16, 16), "depth": (1, 1, 1), "num_heads": (2, 2, 2), "key_dim": 4}
    model = timm.create_model("levit_128s", num_classes=3, **kwargs).eval()
    images = torch.zeros(1, 3, 224, 224)
    mlpreduce.profile(model, images, measure_speed=True, repeats=1)
    assert not model.training
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    other = timm.create_model("levit_128s", num_classes=3, **kwargs).eval()
    other.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(model(images)[0], other(images)[0])
