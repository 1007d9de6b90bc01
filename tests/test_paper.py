"""The published figures of arXiv 2512.01059 on ViT-B/16, and the two equations read literally."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from helpers.marks import slow_but

import mlpreduce


@pytest.fixture(scope="module")
def baseline() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_base_patch16_224")


def fresh(baseline: torch.nn.Module) -> torch.nn.Module:
    model = timm.create_model("vit_base_patch16_224")
    model.load_state_dict(baseline.state_dict())
    with torch.no_grad():
        for block in model.blocks:  # zero at initialisation, so that scaling it would not show
            block.mlp.fc1.bias.normal_(generator=torch.Generator().manual_seed(3))
    return model


def figures(model: torch.nn.Module) -> tuple:
    profile = mlpreduce.profile(model)
    macs = (profile.macs_linear, profile.macs, profile.macs_with_attention)
    return profile.params, profile.mlp_params, profile.unique_mlps, *(f"{count / 1e9:.3f}" for count in macs)


def test_baseline(baseline: torch.nn.Module) -> None:
    assert figures(baseline) == (86_567_656, 56_669_184, 12, "16.849", "16.867", "17.583")


INV_SQRT = ("inv_sqrt", 1 / math.sqrt(2))


@pytest.mark.parametrize("named", slow_but([("paper", 0.707), INV_SQRT], INV_SQRT))
def test_grouped(baseline: torch.nn.Module, named: tuple[str, float]) -> None:
    scale, factor = named
    model, original = fresh(baseline), fresh(baseline)
    assert mlpreduce.apply(model, "grouped", group=2, scale=scale) is model
    assert type(model).__name__ == "VisionTransformer"
    assert figures(model) == (58_233_064, 28_334_592, 6, "16.849", "16.867", "17.583")
    with torch.no_grad():
        assert model.forward_features(torch.zeros(1, 3, 224, 224)).shape == (1, 197, 768)
    for i in range(0, 12, 2):
        even = original.blocks[i].mlp
        for block in (model.blocks[i], model.blocks[i + 1]):
            for name in ("fc1.weight", "fc1.bias", "fc2.weight"):
                assert torch.equal(block.mlp.get_parameter(name), factor * even.get_parameter(name))
            assert torch.equal(block.mlp.fc2.bias, even.fc2.bias)
    for name, tensor in original.state_dict().items():
        if ".mlp." not in name:
            assert torch.equal(tensor, model.state_dict()[name])


def test_default_scale_is_exact() -> None:
    edits = mlpreduce.plan(timm.create_model("vit_tiny_patch16_224"), "grouped", group=3).edits
    assert {edit.factor for edit in edits if hasattr(edit, "factor")} == {1 / math.sqrt(3)}


def test_shallow(baseline: torch.nn.Module) -> None:
    model, original = fresh(baseline), fresh(baseline)
    mlpreduce.apply(model, "shallow", ratio=0.5)
    assert figures(model) == (58_237_672, 28_339_200, 12, "11.271", "11.290", "12.005")
    for ours, theirs in zip(model.blocks, original.blocks, strict=True):
        assert torch.equal(ours.mlp.fc1.weight, theirs.mlp.fc1.weight[:1536])
        assert torch.equal(ours.mlp.fc1.bias, theirs.mlp.fc1.bias[:1536])
        assert torch.equal(ours.mlp.fc2.weight, theirs.mlp.fc2.weight[:, :1536])
        assert torch.equal(ours.mlp.fc2.bias, theirs.mlp.fc2.bias)
        assert (ours.mlp.fc1.out_features, ours.mlp.fc2.in_features) == (1536, 1536)
        assert ours.mlp.fc2.weight.untyped_storage().nbytes() == 4 * 1536 * 768


def test_thin() -> None:
    torch.manual_seed(42)
    model = mlpreduce.create_model("vit_base_patch16_224", "thin", mlp_ratio=2.0)
    torch.manual_seed(42)
    theirs = timm.create_model("vit_base_patch16_224", mlp_ratio=2.0)
    assert figures(model) == (58_237_672, 28_339_200, 12, "11.271", "11.290", "12.005")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("group", [2, 3, 4])
def test_vit_large_by_formula(group: int) -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_large_patch16_224")
    d, h, before = 1024, 4096, sum(p.numel() for p in model.parameters())
    mlpreduce.apply(model, "grouped", group=group)
    assert sum(p.numel() for p in model.parameters()) == before - (24 - 24 // group) * (2 * d * h + h + d)
    mlpreduce.apply(model, "shallow")
    assert sum(p.numel() for p in model.parameters()) == before - (24 - 24 // group) * (2 * d * h + h + d) - (
        24 // group
    ) * (h // 2) * (2 * d + 1)
