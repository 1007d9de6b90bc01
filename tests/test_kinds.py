"""MLPs of every kind: what is sliced together, what is shared, and what stays out."""

from __future__ import annotations

import copy
from collections import Counter
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import ParallelScalingBlock
from torch import nn

import mlpreduce
from mlpreduce import ReductionError, find_mlps
from mlpreduce.budget import measure
from mlpreduce.coverage.proofs import sliced_against_masked, tied_is_copied
from mlpreduce.edits import Setting
from mlpreduce.graph import survey


def build(name: str, **kwargs: Any) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


# architecture, kinds, how many grouped leaves out
KINDS = [
    ("convnextv2_atto", {"plain+norm": 12}, 0),
    ("pvt_v2_b0", {"plain+conv": 8}, 0),
    ("efficientformerv2_s0", {"plain+norm+conv": 14}, 0),
    ("visformer_tiny", {"plain": 8, "plain+conv": 7}, 0),
    ("fastvit_t8", {"plain": 10}, 0),
    ("levit_128s", {"plain+norm": 11}, 2),
    ("starnet_s1", {"gated": 15}, 0),
    ("swiftformer_xs", {"plain": 20}, 8),
    ("caformer_s18", {"plain": 18}, 0),
    ("tiny_vit_5m_224", {"plain": 10}, 0),
    ("mobilevit_xxs", {"plain": 9}, 0),
    ("gemma4_vit_167m", {"gated": 16}, 0),
    ("mvitv2_tiny", {"plain": 10}, 1),
    ("gmlp_ti16_224", {"packed+norm+mix": 30}, 0),
    ("vit_base_patch16_xp_224", {"plain+fused": 12}, 12),
    ("coat_tiny", {"plain": 26}, 12),
]


SLOW = ("gemma4_vit_167m", "coat_tiny")  # their kinds are those of others above


@pytest.mark.parametrize(
    ("name", "kinds", "left_out"),
    [pytest.param(*row, id=row[0], marks=[pytest.mark.slow] if row[0] in SLOW else []) for row in KINDS],
)
def test_kinds(name: str, kinds: dict[str, int], left_out: int) -> None:
    model = build(name)
    mlps = find_mlps(model)
    assert Counter(mlp.kind for mlp in mlps) == kinds
    baseline = measure(model, mlps=mlps)
    made = mlpreduce.plan(model, "shallow", ratio=0.25)
    assert measure(mlpreduce.apply(copy.deepcopy(model), made), mlps=()).cost.macs == baseline.after(made).macs
    if left_out == len(mlps):
        with pytest.raises(ReductionError, match=r"none of 12 MLPs is in scope.*also attention's"):
            mlpreduce.plan(model, "grouped", remainder="own")
    else:
        assert len(mlpreduce.plan(model, "grouped", remainder="own").left_out) == left_out


def visformer() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("visformer_tiny", img_size=64, embed_dim=96, depth=(2, 1, 1), num_heads=2)


def test_groups_of_a_convolution_are_kept_alike() -> None:
    model = visformer().eval()
    mlp = find_mlps(model)[0]
    assert (mlp.kind, mlp.groups, mlp.hidden_features) == ("plain+conv", 8, 96)
    made = mlpreduce.plan(model, "shallow", ratio=0.4, criterion="l2")
    edit = next(edit for edit in made.edits if edit.mlp == mlp.name)
    assert len(edit.units) == 32  # 38, rounded down to a multiple of 8
    assert set(Counter(unit // 12 for unit in edit.units).values()) == {4}
    assert mlpreduce.Plan.from_json(made.to_json()) == made
    gap, effect = sliced_against_masked(model.double(), torch.randn(2, 3, 64, 64, dtype=torch.float64))
    assert gap < 1e-12 < effect
    mlpreduce.apply(model, made)
    assert model.get_submodule(f"{mlp.name}.conv2").weight.shape == (32, 4, 3, 3)
    assert model.get_submodule(f"{mlp.name}.conv2").groups == 8


def test_units_of_groups_cannot_be_aligned() -> None:
    with pytest.raises(ReductionError, match="units in 8 groups, which cannot trade places"):
        mlpreduce.apply(visformer(), "grouped", keep="align_mean", remainder="own")
    assert tied_is_copied(visformer().eval(), torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("fuse_out_proj", [True, False])
def test_a_fused_block_is_sliced_and_not_shared(qkv_bias: bool, fuse_out_proj: bool) -> None:
    torch.manual_seed(0)
    block = partial(ParallelScalingBlock, fuse_out_proj=fuse_out_proj)
    settings = {"img_size": 32, "embed_dim": 48, "depth": 3, "num_heads": 2, "qkv_bias": qkv_bias, "block_fn": block}
    model = timm.create_model("vit_tiny_patch16_224", **settings).double().eval()
    mlps = find_mlps(model)
    assert [(mlp.name, mlp.kind, mlp.hidden_features) for mlp in mlps[:1]] == [("blocks.0", "plain+fused", 192)]
    assert mlps[0].settings == (Setting("blocks.0", "in_split", 0),)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    gap, effect = sliced_against_masked(model, images)
    assert gap < 1e-12 < effect
    with pytest.raises(ReductionError, match="its expanding or contracting layer is also attention's"):
        mlpreduce.apply(model, "grouped", group=3)
    sizes = [block.in_split for block in model.blocks]
    before = measure(model)
    made = mlpreduce.plan(model, "shallow", width=40)
    mlpreduce.apply(model, made)
    assert [block.in_split for block in model.blocks] == [[40, 48, 48, 48]] * 3
    assert sizes == [[192, 48, 48, 48]] * 3
    assert measure(model).cost == before.after(made)
    model(images).sum().backward()


def test_one_module_under_several_names_is_one_mlp() -> None:
    model = build("coat_tiny")
    made = mlpreduce.plan(model, "grouped")
    assert made.left_out["parallel_blocks.0.mlp2@1"].startswith("is the same module as an earlier MLP of its block")
    mlpreduce.apply(model, made)
    blocks = model.parallel_blocks
    assert blocks[1].mlp3.fc1 is blocks[1].mlp2.fc1 is blocks[0].mlp4.fc1 is blocks[0].mlp2.fc1
    assert blocks[2].mlp2.fc1 is not blocks[0].mlp2.fc1


def test_inverted_residuals_are_told_from_mlps() -> None:
    model = build("mobilevit_xxs")
    found = survey(model)
    assert list(found.others) == ["stages.0.0", "stages.1.1", "stages.1.2"]
    note = mlpreduce.plan(model, "shallow").notes[-1]
    assert note.startswith("3 blocks are no MLPs: stages.0.0, ...: expands, convolves and projects; no name says MLP")
    with pytest.raises(ReductionError, match=r"found no MLP in EfficientVit.*6 blocks look like one"):
        mlpreduce.apply(build("efficientvit_b0"), "grouped")


def test_token_and_channel_mlps_are_apart() -> None:
    made = mlpreduce.plan(build("mixer_s32_224"), "grouped", group=8)
    owners = {row.mlp: row.owner for row in made.rows}
    assert set(owners.values()) == {"blocks.0.mlp_tokens", "blocks.0.mlp_channels"}


def test_a_hidden_value_in_the_output_is_seen() -> None:
    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            hidden = torch.relu(self.up(x))
            return {"x": x + self.down(hidden), "hidden": hidden}

    assert find_mlps(Leaky(), torch.zeros(2, 3, 8)) == []


def test_a_module_out_of_the_tree_and_another_thread_do_not_disturb() -> None:
    import threading

    class Loose(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)
            self.loose = [nn.ReLU()]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.loose[0](x + self.down(self.loose[0](self.up(x))))

    stop, failures = threading.Event(), []
    busy = nn.Linear(4, 4)

    def work() -> None:
        while not stop.is_set():
            try:
                busy(torch.zeros(1, 4))
            except Exception as error:
                failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        names = [mlp.name for _ in range(20) for mlp in find_mlps(Loose(), torch.zeros(2, 3, 8))]
    finally:
        stop.set()
        thread.join()
    assert (names, failures) == (["up"] * 20, [])


def test_a_graph_of_a_model_with_shapes_inside() -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "pvt_v2_b0", embed_dims=(8, 8, 16, 16), num_heads=(1, 1, 1, 1), mlp_ratios=(2, 2, 2, 2)
    ).eval()
    graph = mlpreduce.to_graph(model)
    images = torch.randn(1, 3, 224, 224)
    for transform in ("grouped", "shallow"):
        mlpreduce.apply(graph, transform)
        mlpreduce.apply(model, transform)
    assert torch.equal(graph(images), model(images))
