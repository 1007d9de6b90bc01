"""sMLPNet: tokens are mixed along rows and along columns, by weights that all rows and all columns share.

Source: Tang et al., "Sparse MLP for Image Recognition: Is Self-Attention Really Necessary?", arXiv 2109.05422: widths, depths
and layers, written from a description of them. Published: 24 M parameters and 5.0 G MACs (tiny), 49 M and 10.3 G (small), 66 M
and 14.0 G (base), with 81.9, 83.1 and 83.4 % top-1 on ImageNet-1K.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d, Mlp, PatchEmbed, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from mlpreduce.errors import ReductionError

__all__ = ["SMLPNet"]


class SparseMLP(nn.Module):
    """Token mixing: what a token is, and what a linear layer makes of its column and one of its row, put together.

    Args:
        dim: channels.
        size: rows and columns of the map.
    """

    def __init__(self, dim: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(dim), nn.GELU()
        self.column, self.row = nn.Conv2d(size[0], size[0], 1), nn.Conv2d(size[1], size[1], 1)
        self.fuse = nn.Conv2d(3 * dim, dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, rows, columns), and the same again."""
        x = self.act(self.norm(x))
        along_columns = self.column(x.transpose(1, 2)).transpose(1, 2)
        along_rows = self.row(x.transpose(1, 3)).transpose(1, 3)
        return self.fuse(torch.cat([x, along_columns, along_rows], 1))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Token mixing after a depthwise convolution, then an MLP of each token.

    Args:
        dim: channels.
        size: rows and columns of the map.
        mlp_ratio: hidden units of the MLP, in parts of the channels.
        drop_path: how often a branch is left out while training.
    """

    def __init__(self, dim: int, size: tuple[int, int], mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.act1 = nn.BatchNorm2d(dim), nn.GELU()
        self.local = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.mix = SparseMLP(dim, size)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, rows, columns), and the same again."""
        x = x + self.drop_path1(self.mix(self.local(self.act1(self.norm1(x)))))
        tokens = self.mlp(self.norm2(x.permute(0, 2, 3, 1)))
        return x + self.drop_path2(tokens.permute(0, 3, 1, 2))  # type: ignore[no-any-return]


class SMLPNet(nn.Module):
    """The network, with the interface of timm's.

    Args:
        img_size: rows and columns of the images, multiples of 32.
        in_chans: their channels.
        num_classes: of the head; 0 for none.
        embed_dim: channels of the first stage; each further one has twice as many.
        depths: blocks of each stage.
        mlp_ratio: hidden units of the MLPs, in parts of the channels.
        patch_size: of the embedding.
        drop_rate: dropout before the head.
        drop_path_rate: of the last block; it grows evenly from 0.

    Raises:
        ReductionError: the image does not split into maps of all stages.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 80,
        depths: Sequence[int] = (2, 8, 14, 2),
        mlp_ratio: float = 3.0,
        patch_size: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        step = patch_size * 2 ** (len(depths) - 1)
        height, width = to_2tuple(img_size)
        if min(height, width) < step or height % step or width % step or global_pool != "avg":
            raise ReductionError(
                f"SMLPNet(img_size={img_size!r}, global_pool={global_pool!r}): the sides of the image must be multiples of "
                f'{step}, and pooling "avg"'
            )
        self.num_classes, self.num_features = num_classes, embed_dim * 2 ** (len(depths) - 1)
        self.head_hidden_size = self.num_features
        self.patch_embed = PatchEmbed((height, width), patch_size, in_chans, embed_dim, flatten=False)
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()
        stages = []
        for number, depth in enumerate(depths):
            dim, parts = embed_dim * 2**number, patch_size * 2**number
            merge = nn.Conv2d(dim // 2, dim, 2, 2) if number else nn.Identity()
            blocks = [Block(dim, (height // parts, width // parts), mlp_ratio, rates.pop(0)) for _ in range(depth)]
            stages.append(nn.Sequential(merge, nn.Sequential(*blocks)))
        self.stages = nn.Sequential(*stages)
        self.norm = LayerNorm2d(self.num_features)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.apply(_initialize)

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Another head, of that many classes."""
        if global_pool not in (None, "avg"):
            raise ReductionError(f"SMLPNet.reset_classifier: global_pool is {global_pool!r}; it is 'avg'")
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head.apply(_initialize)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Features (batch, channels, rows, columns) of images."""
        return self.norm(self.stages(self.patch_embed(x)))  # type: ignore[no-any-return]

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Logits (batch, classes) of features, or what goes into the head."""
        x = self.head_drop(x.mean((2, 3)))
        return x if pre_logits else self.head(x)  # type: ignore[no-any-return]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes) of images (batch, channels, height, width)."""
        return self.forward_head(self.forward_features(x))


def _initialize(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_CONFIG = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "fixed_input_size": True,
    "first_conv": "patch_embed.proj",
    "classifier": "head",
}
default_cfgs = generate_default_cfgs({f"smlpnet_{size}.untrained": _CONFIG for size in ("tiny", "small", "base")})


def _build(name: str, pretrained: bool, kwargs: dict[str, Any], **own: Any) -> SMLPNet:
    return build_model_with_cfg(SMLPNet, name, pretrained, **{**own, **kwargs})  # type: ignore[no-any-return]


@register_model
def smlpnet_tiny(pretrained: bool = False, **kwargs: Any) -> SMLPNet:
    """24 M parameters, 5.0 G MACs."""
    return _build("smlpnet_tiny", pretrained, kwargs, embed_dim=80, depths=(2, 8, 14, 2))


@register_model
def smlpnet_small(pretrained: bool = False, **kwargs: Any) -> SMLPNet:
    """49 M parameters, 10.3 G MACs; published with drop_path_rate=0.2."""
    return _build("smlpnet_small", pretrained, kwargs, embed_dim=96, depths=(2, 10, 24, 2))


@register_model
def smlpnet_base(pretrained: bool = False, **kwargs: Any) -> SMLPNet:
    """66 M parameters, 14.0 G MACs; published with drop_path_rate=0.3."""
    return _build("smlpnet_base", pretrained, kwargs, embed_dim=112, depths=(2, 10, 24, 2))
