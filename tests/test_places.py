"""Where an MLP is drawn, as its name tells."""

from __future__ import annotations

import pytest

from mlpreduce.report.widths import _places

NAMES = {
    "blocks.3.mlp": ("mlp", "blocks", "3"),
    "blocks.3.mlp@1": ("mlp", "blocks", "3"),
    "stages.0.blocks.1.ffn0.m": ("ffn0.m", "stages.0.blocks", "1"),
    "parallel_blocks.0.mlp2@1": ("mlp2", "parallel_blocks", "0"),
    "layer1.mlp": ("mlp", "layer", "1"),
    "layers.encoder_layer_3.mlp": ("mlp", "layers.encoder_layer_", "3"),
}


@pytest.mark.parametrize("name", list(NAMES))
def test_block_and_place_of_a_name(name: str) -> None:
    found = _places([name, f"{name.partition('@')[0].rpartition('.')[0]}.other"])[
        name
    ]  # two at a block: places are kept
    assert (found.place, found.stage, found.number) == NAMES[name]
