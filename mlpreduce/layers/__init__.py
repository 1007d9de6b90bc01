"""Layers that stand in for a `Linear`: fewer weights, or few that train. Each turns back into a `Linear` by `merged()`.

They are plain modules and can be used alone. All take and give tensors `(..., features)`.
"""

from __future__ import annotations

from mlpreduce.layers.block_diagonal import BlockDiagonalLinear
from mlpreduce.layers.channel_covariance import ChannelCovariance
from mlpreduce.layers.energy import BlockOrders, block_orders
from mlpreduce.layers.lora import LoraLinear
from mlpreduce.layers.low_rank import LowRankLinear
from mlpreduce.layers.scale_shift import ScaleShift
from mlpreduce.layers.svft import SvftLinear

__all__ = [
    "BlockDiagonalLinear",
    "BlockOrders",
    "ChannelCovariance",
    "LoraLinear",
    "LowRankLinear",
    "ScaleShift",
    "SvftLinear",
    "block_orders",
]
