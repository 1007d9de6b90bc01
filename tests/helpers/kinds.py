"""Small models with one kind of MLP each, of float64, and with weights that are no zeros."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from timm.models.mlp_mixer import MlpMixer
from torch import nn

__all__ = ["KINDS", "built"]

PARALLEL = {"block_fn": timm.models.vision_transformer.ParallelScalingBlock, "img_size": 32, "depth": 2}
STAGES = {"depths": (1, 1, 1, 1)}
KINDS: dict[str, tuple[str | Callable[..., nn.Module], dict[str, Any]]] = {
    "gated": ("vit_tiny_patch16_224", {"mlp_layer": timm.layers.SwiGLU, "img_size": 32, "depth": 2}),
    "packed": ("vit_tiny_patch16_224", {"mlp_layer": timm.layers.GluMlp, "img_size": 32, "depth": 2}),
    "convolution": ("pvt_v2_b0", {**STAGES, "embed_dims": (8, 16, 24, 32), "num_heads": (1, 1, 1, 1)}),
    "1 x 1 convolutions": ("convnext_atto", {**STAGES, "dims": (8, 16, 24, 32), "conv_mlp": True}),
    "response norm": ("convnextv2_atto", {**STAGES, "dims": (8, 16, 24, 32)}),
    "groups": ("visformer_tiny", {"depth": (1, 1, 1), "img_size": 64, "embed_dim": 96, "init_channels": 8, "num_heads": 3}),
    "hierarchical": ("swin_tiny_patch4_window7_224", {**STAGES, "img_size": 56, "embed_dim": 16, "num_heads": (1, 2, 2, 4)}),
    "tokens": (partial(MlpMixer, patch_size=32, num_blocks=2, embed_dim=32), {"img_size": 64}),
    "one token": ("cait_xxs24_224", {"img_size": 32, "depth": 2}),
    "inner tokens": ("tnt_s_patch16_224", {"img_size": 32, "depth": 2, "embed_dim": 96, "inner_dim": 16, "num_heads_outer": 3}),
    "fused": ("vit_tiny_patch16_224", PARALLEL),
}  # fmt: skip


def built(name: str | Callable[..., nn.Module], kwargs: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    make = partial(timm.create_model, name) if isinstance(name, str) else name
    model = make(num_classes=5, **kwargs).double().eval()
    head = model.get_classifier()
    nn.init.normal_((head[0] if isinstance(head, nn.ModuleList) else head).weight)  # some start from zeros
    return model
