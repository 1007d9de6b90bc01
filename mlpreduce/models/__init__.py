"""Architectures that timm lacks, as names of timm; importing this registers them."""

from __future__ import annotations

import timm

from mlpreduce.models import smlpnet  # noqa: F401  (it registers itself)

__all__ = ["image_size_of", "is_model"]


def is_model(name: str) -> bool:
    """Whether timm has an architecture of this name, or this library; the tag of its weights is not looked at."""
    found: bool = timm.is_model(name.partition(".")[0])
    return found


def image_size_of(name: str) -> int | None:
    """The size of the images that timm made an architecture for, in pixels a side; None where timm does not say."""
    config = timm.get_pretrained_cfg(name, allow_unregistered=True) if is_model(name) else None
    return None if config is None or not config.input_size else int(config.input_size[-1])
