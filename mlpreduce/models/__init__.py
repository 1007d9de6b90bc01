"""Architectures that timm lacks, as names of timm; importing this registers them."""

from __future__ import annotations

import timm

from mlpreduce.models import smlpnet  # noqa: F401  (it registers itself)

__all__ = ["is_model"]


def is_model(name: str) -> bool:
    """Whether timm has an architecture of this name, or this library; the tag of its weights is not looked at."""
    found: bool = timm.is_model(name.partition(".")[0])
    return found
