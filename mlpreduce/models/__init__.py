"""Architectures that timm lacks, as names of timm; importing this registers them."""

from __future__ import annotations

from mlpreduce.models import smlpnet  # noqa: F401  (it registers itself)
