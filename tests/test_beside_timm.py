"""Models of transformers and torchvision, and users' own: found without names, reduced exactly, or refused with the reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
import transformers
from torch import nn

import mlpreduce
from mlpreduce import ReductionError, find_mlps
from mlpreduce.coverage.proofs import sliced_against_masked, tied_is_copied
from mlpreduce.graph import call_with, example_inputs, map_tensors

COMMON: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
NARROW = COMMON | {"intermediate_size": 64}

# name, configuration class, its settings, model class, kind, MLPs, name of the first
TRANSFORMERS = [
    ("vit", "ViTConfig", NARROW | {"image_size": 32}, "ViTForImageClassification", "plain", 4, "vit.layers.0.mlp"),
    ("dinov2", "Dinov2Config", COMMON | {"image_size": 28}, "Dinov2Model", "plain", 4, "encoder.layer.0.mlp"),
    ("dinov2 swiglu", "Dinov2Config", COMMON | {"image_size": 28, "use_swiglu_ffn": True}, "Dinov2Model", "gated", 4,
     "encoder.layer.0.mlp"),
    ("dinov3", "DINOv3ViTConfig", NARROW | {"image_size": 32, "use_gated_mlp": True}, "DINOv3ViTModel", "gated", 4,
     "model.layer.0.mlp"),
    ("deit", "DeiTConfig", NARROW | {"image_size": 32}, "DeiTModel", "plain", 4, "layers.0.mlp"),
    ("clip", "CLIPVisionConfig", NARROW | {"image_size": 32}, "CLIPVisionModel", "plain", 4, "encoder.layers.0.mlp"),
    ("siglip", "SiglipVisionConfig", NARROW | {"image_size": 32}, "SiglipVisionModel", "plain", 5,
     "encoder.layers.0.mlp"),
    ("swin", "SwinConfig", {"image_size": 56, "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 2]}, "SwinModel",
     "plain", 4, "encoder.layers.0.blocks.0.mlp"),
    ("bert", "BertConfig", NARROW | {"vocab_size": 100}, "BertModel", "plain", 4, "encoder.layer.0"),
    ("gpt2", "GPT2Config", {"n_embd": 32, "n_layer": 4, "n_head": 2, "vocab_size": 100}, "GPT2Model", "plain", 4,
     "h.0.mlp"),
    ("llama", "LlamaConfig", NARROW | {"vocab_size": 100}, "LlamaModel", "gated", 4, "layers.0.mlp"),
]  # fmt: skip


def from_config(config: str, settings: dict[str, Any], model: str) -> nn.Module:
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**settings)).double().eval()


def random_like(inputs: Any) -> Any:
    generator = torch.Generator().manual_seed(1)

    def fill(x: torch.Tensor) -> torch.Tensor:
        if x.is_floating_point():
            return torch.randn(x.shape, generator=generator, dtype=x.dtype)
        return torch.randint(0, 100, x.shape, generator=generator)

    return map_tensors(inputs, fill)


@pytest.mark.parametrize(
    ("config", "settings", "model", "kind", "count", "first"),
    [row[1:] for row in TRANSFORMERS],
    ids=[row[0] for row in TRANSFORMERS],
)
def test_transformers(config: str, settings: dict, model: str, kind: str, count: int, first: str) -> None:
    original = from_config(config, settings, model)
    mlps = find_mlps(original)
    assert (len(mlps), {mlp.kind for mlp in mlps}, mlps[0].name) == (count, {kind}, first)
    inputs = random_like(example_inputs(original, 2))
    gap, effect = sliced_against_masked(original, inputs)
    assert gap < 1e-12 < effect
    assert tied_is_copied(original, inputs)
    before = sum(p.numel() for p in original.parameters())
    expected = sum(mlp.params() - mlp.params(mlp.hidden_features // 2) for mlp in mlps)
    reduced = mlpreduce.apply(copy.deepcopy(original), "shallow")
    assert sum(p.numel() for p in reduced.parameters()) == before - expected
    mlpreduce.apply(reduced, "grouped")
    assert type(reduced) is type(original)
    assert mlpreduce.verify(reduced).ok


def test_a_model_of_transformers_is_saved_and_loaded(tmp_path) -> None:
    row = next(row for row in TRANSFORMERS if row[0] == "bert")
    model = mlpreduce.apply(mlpreduce.apply(from_config(*row[1:4]), "grouped", group=4), "shallow")
    mlpreduce.save(model, tmp_path)
    loaded = mlpreduce.load(tmp_path, model=from_config(*row[1:4]))
    tokens = torch.randint(0, 100, (2, 7))
    assert torch.equal(loaded(tokens)[0], model(tokens)[0])
    layers = loaded.encoder.layer
    assert layers[3].intermediate.dense is layers[0].intermediate.dense
    assert layers[3].output.dense is layers[0].output.dense
    assert layers[3].output.LayerNorm is not layers[0].output.LayerNorm


@pytest.mark.parametrize(
    ("name", "count", "kwargs"),
    [("vit_b_16", 12, {}), ("swin_t", 12, {}), ("swin_v2_t", 12, {}), ("maxvit_t", 22, {}), ("convnext_tiny", 18, {})],
)
def test_torchvision(name: str, count: int, kwargs: dict) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name, **kwargs)
    mlps = find_mlps(model)
    assert len(mlps) == count
    made = mlpreduce.plan(model, "grouped", group=2, remainder="own")
    assert len(made.edits) > 0
    before = sum(p.numel() for p in model.parameters())
    gone = sum(row.params_before - row.params for row in made.rows)
    mlpreduce.apply(model, made)
    assert sum(p.numel() for p in model.parameters()) == before - gone
    if name == "vit_b_16":
        assert before - gone == 58_233_064


def test_torchvision_is_reduced_exactly() -> None:
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, 4, 2, 48, 96).double().eval()
    nn.init.normal_(model.heads.head.weight)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    gap, effect = sliced_against_masked(model, images)
    assert gap < 1e-12 < effect
    assert tied_is_copied(model, images)


class Encoder(nn.Module):
    """torch.nn's own layers, which symbolic tracing takes as leaves."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True, dropout=0.0)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Branching(nn.Module):
    """A gate in one projection, widths read from the input, and a branch on a number of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(8, 48) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(24, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            if x.shape[1] > 2:
                x = x + down(F.glu(up(x)))
        return x


class Tokens(nn.Module):
    """Token mixing, a depthwise convolution over tokens as a picture, and a feed-forward over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.mix_up, self.mix_down = nn.Linear(16, 40), nn.Linear(40, 16)
        self.ffn = nn.ModuleDict(
            {"up": nn.Linear(8, 32), "conv": nn.Conv2d(32, 32, 3, padding=1, groups=32), "down": nn.Linear(32, 8)}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mix_down(F.silu(self.mix_up(x.transpose(1, 2)))).transpose(1, 2)
        hidden = self.ffn["up"](x).transpose(1, 2).unflatten(2, (4, 4))
        hidden = F.gelu(self.ffn["conv"](hidden)).flatten(2).transpose(1, 2)
        return x + self.ffn["down"](hidden)


@pytest.mark.parametrize(
    ("make", "shape", "names"),
    [
        (Encoder, (2, 5, 16), [f"layers.layers.{i}" for i in range(4)]),
        (Branching, (2, 5, 8), [f"up.{i}" for i in range(3)]),
        (Tokens, (2, 16, 8), ["mix_up", "ffn"]),
    ],
)
def test_users_own(make: Callable[[], nn.Module], shape: tuple[int, ...], names: list[str]) -> None:
    torch.manual_seed(0)
    model = make().double().eval()
    x = torch.randn(shape, dtype=torch.float64)
    assert [mlp.name for mlp in find_mlps(model, example_inputs=x)] == names
    gap, effect = sliced_against_masked(model, x)
    assert gap < 1e-12 < effect


def test_inputs_of_every_form() -> None:
    class Two(Tokens):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return super().forward(x + y)

    x = torch.zeros(2, 16, 8)
    for inputs in ((x, x), {"x": x, "y": x}):
        assert len(find_mlps(Two(), inputs)) == 2
        assert mlpreduce.profile(Two(), inputs).unique_mlps == 2
        assert call_with(Two(), inputs).shape == x.shape


class Bare(nn.Module):
    """Weights that no layer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(16, 8)), nn.Parameter(torch.randn(8, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.linear(F.gelu(x @ self.w1.T), self.w2)


class Unknown(nn.Module):
    """A layer of the user's own on the hidden axis."""

    class Whiten(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight * x.flip(-1)

    def __init__(self) -> None:
        super().__init__()
        self.up, self.whiten, self.down = nn.Linear(8, 16), self.Whiten(), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.whiten(F.gelu(self.up(x))))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Bare, r"multiplies by w\d itself, and only layers are tied and sliced"),
        (Unknown, r"whiten \(Whiten\) is not known to treat hidden units alone"),
    ],
)
def test_refused_with_the_reason(make: Callable[[], nn.Module], reason: str) -> None:
    for inputs in (None, torch.zeros(2, 5, 8)):
        with pytest.raises(ReductionError, match=reason):
            mlpreduce.apply(make(), "shallow", example_inputs=inputs)


def test_what_cannot_be_run_or_traced_says_what_would_help() -> None:
    narrow = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=narrow, vision_config=narrow | {"image_size": 32})
    )
    with pytest.raises(ReductionError, match=r"find_mlps\(CLIPModel\).*give example_inputs=, a batch that it takes"):
        find_mlps(clip)
    with pytest.raises(ReductionError, match=r"a run on example inputs raised \w+"):
        find_mlps(Encoder(), torch.zeros(2, 5, 7))
