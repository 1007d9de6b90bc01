"""What find_mlps finds, in which kinds, and that it leaves no trace."""

from __future__ import annotations

import copy
import operator
import pickle
from collections import Counter
from typing import Any

import pytest
import timm
import torch
import torchvision
from helpers.marks import slow_but
from torch import fx, nn

import mlpreduce
from mlpreduce import ReductionError, find_mlps
from mlpreduce.graph import chains, example_inputs
from mlpreduce.graph.flow import Flow
from mlpreduce.testing import check_transform

# architecture, kind, MLPs, lengths of the chains that grouped acts on
FAMILIES = [
    ("vit_tiny_patch16_224", "plain", 12, [12]),
    ("vit_large_patch16_224", "plain", 24, [24]),
    ("deit3_small_patch16_224", "plain", 12, [12]),
    ("beit_base_patch16_224", "plain", 12, [12]),
    ("eva02_tiny_patch14_224", "packed", 12, [12]),
    ("eva02_base_patch14_224", "gated+norm", 12, [12]),
    ("vit_giant_patch14_dinov2", "packed", 40, [40]),
    ("vit_small_plus_patch16_dinov3", "gated", 12, [12]),
    ("beit3_base_patch16_224", "plain+norm", 12, [12]),
    ("swin_tiny_patch4_window7_224", "plain", 12, [2, 2, 6, 2]),
    ("swinv2_tiny_window8_256", "plain", 12, [2, 2, 6, 2]),
    ("hiera_tiny_224", "plain", 12, [2, 7, 2]),
    ("twins_svt_small", "plain", 18, [2, 2, 10, 4]),
    ("vit_base_patch16_siglip_224", "plain", 13, [12]),
    ("cait_xxs24_224", "plain", 26, [24]),
    ("xcit_nano_12_p16_224", "plain", 14, [12]),
    ("volo_d1_224", "plain", 20, [4, 4, 8, 2]),
    ("naflexvit_base_patch16_gap", "plain", 12, [12]),
    ("mixer_s32_224", "plain", 16, [8, 8]),
    ("tnt_s_patch16_224", "plain", 24, [12, 12]),
]


def build(name: str, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


@pytest.mark.parametrize(("name", "kind", "count", "lengths"), FAMILIES)
def test_families(name: str, kind: str, count: int, lengths: list[int]) -> None:
    model = build(name)
    mlps = find_mlps(model)
    assert Counter(mlp.kind for mlp in mlps) == {kind: count}
    made = mlpreduce.plan(model, "grouped", group=2, remainder="own")
    in_scope = {row.mlp for row in made.rows}
    assert [len(chain) for chain in chains([mlp for mlp in mlps if mlp.name in in_scope])] == lengths
    before = sum(p.numel() for p in model.parameters())
    units = sum(mlp.params() - mlp.params(mlp.hidden_features // 2) for mlp in mlps)
    mlpreduce.apply(model, "shallow")
    assert sum(p.numel() for p in model.parameters()) == before - units
    assert [mlp.hidden_features for mlp in find_mlps(model)] == [mlp.hidden_features // 2 for mlp in mlps]


def test_images_are_of_the_size_that_a_model_without_a_patch_embedding_says() -> None:
    with torch.device("meta"):
        model = timm.create_model("convnext_atto", in_chans=4)
    model.pretrained_cfg["input_size"] = (3, 96, 160)
    assert example_inputs(model, 2).shape == (2, 4, 96, 160)
    with torch.device("meta"):
        swin = torchvision.models.swin_t()  # says nothing at all
    assert example_inputs(swin, 1).shape == (1, 3, 224, 224)


@pytest.mark.parametrize("first", ["tokens[:, :1]", "tokens[:, 0:1]", "tokens[:, 0]"])
def test_the_first_of_the_tokens_is_one_token_without_shapes(first: str) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    at: Any = {"tokens[:, :1]": slice(None, 1), "tokens[:, 0:1]": slice(0, 1), "tokens[:, 0]": 0}[first]
    one = graph.call_function(operator.getitem, (x, (slice(None), at)))
    two = graph.call_function(operator.getitem, (x, (slice(None), slice(None, 2))))
    rest = graph.call_function(operator.getitem, (x, (slice(None), slice(1, None))))
    graph.output((one, two, rest))
    flow = Flow(nn.Module(), graph)
    assert flow.acts_on_one_token([one, two, rest]) == [True, False, False]


def test_left_out_with_the_reason() -> None:
    assert mlpreduce.plan(build("vit_base_patch16_siglip_224"), "grouped").left_out == {
        "attn_pool.mlp": "acts on one token only, as class attention and pooling do"
    }
    left_out = mlpreduce.plan(build("cait_xxs24_224"), "grouped").left_out
    assert left_out == {
        f"blocks_token_only.{i}.mlp": "acts on one token only, as class attention and pooling do" for i in range(2)
    }


# small models with real weights: the whole contract
SMALL = [
    ("vit_tiny_patch16_224", {"img_size": 32, "depth": 4}),
    ("deit3_small_patch16_224", {"img_size": 32, "depth": 4, "embed_dim": 48, "num_heads": 2}),
    ("beit_base_patch16_224", {"img_size": 32, "depth": 4, "embed_dim": 48, "num_heads": 2}),
    ("eva02_tiny_patch14_224", {"img_size": 28, "depth": 4}),
    ("vit_giant_patch14_dinov2", {"img_size": 28, "depth": 4, "embed_dim": 48, "num_heads": 2}),
    ("swin_tiny_patch4_window7_224", {"img_size": 56, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 2)}),
    ("vit_base_patch16_siglip_224", {"img_size": 32, "depth": 4, "embed_dim": 48, "num_heads": 2}),
    ("cait_xxs24_224", {"img_size": 32, "depth": 4, "embed_dim": 48, "num_heads": 2}),
    ("naflexvit_base_patch16_gap", {"img_size": 32, "depth": 4, "embed_dim": 48, "num_heads": 2}),
    ("eva02_base_patch14_224", {"img_size": 28, "depth": 4, "embed_dim": 48, "num_heads": 2}),
]


@pytest.mark.parametrize(
    "name", slow_but(dict(SMALL), "beit_base_patch16_224", "swin_tiny_patch4_window7_224", "cait_xxs24_224")
)
@pytest.mark.parametrize(("transform", "config"), [("grouped", {"group": 2}), ("shallow", {"ratio": 0.5})])
def test_contract_on_families(name: str, transform: str, config: dict) -> None:
    kwargs = dict(SMALL)[name]

    def make() -> nn.Module:
        torch.manual_seed(0)
        model = timm.create_model(name, **kwargs)
        model.mlpreduce_build = {"name": name, "kwargs": kwargs}
        return model

    side = kwargs["img_size"]
    check_transform(transform, make, torch.randn(2, 3, side, side), **config)


# where no norm mixes the hidden units
UNMIXED = [(name, kwargs) for name, kwargs in SMALL if name != "eva02_base_patch14_224"]


@pytest.mark.parametrize(("name", "kwargs"), UNMIXED, ids=[name for name, _ in UNMIXED])
def test_sliced_is_masked(name: str, kwargs: dict) -> None:
    """A hidden unit whose fc2 column is zero is as good as gone."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).double().eval()
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for mlp in find_mlps(masked):
            masked.get_parameter(f"{mlp.leaf('fc2').path}.weight")[:, mlp.hidden_features // 2 :] = 0
        mlpreduce.apply(model, "shallow")
        images = torch.randn(2, 3, kwargs["img_size"], kwargs["img_size"], dtype=torch.float64)
        torch.testing.assert_close(model(images), masked(images), atol=1e-12, rtol=1e-12)


def test_sliced_with_a_hidden_norm_is_built_narrower() -> None:
    """The norm takes its statistics over the units that are left, as in a model built that narrow."""
    kwargs = {"img_size": 28, "depth": 2, "embed_dim": 48, "num_heads": 2}
    model = timm.create_model("eva02_base_patch14_224", mlp_ratio=4, **kwargs).eval()
    narrow = timm.create_model("eva02_base_patch14_224", mlp_ratio=2, **kwargs).eval()
    mlpreduce.apply(model, "shallow")
    narrow.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 28, 28)
    assert torch.equal(model(images), narrow(images))
    assert repr(model) == repr(narrow)


@pytest.mark.parametrize("name", slow_but(["levit_128s", "efficientformer_l1"], "efficientformer_l1"))
def test_no_trace_in_models_that_cache(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        before = model(images)
        find_mlps(model)
        assert torch.equal(copy.deepcopy(model)(images), before)
        assert torch.equal(pickle.loads(pickle.dumps(model))(images), before)
    model(images)  # with gradients, after which the cache holds tensors that deepcopy refuses
    find_mlps(model)


def test_nothing_is_changed_by_looking(vit: nn.Module, unchanged) -> None:
    check = unchanged(vit.train())
    modes = [m.training for m in vit.modules()]
    find_mlps(vit)
    mlpreduce.to_graph(vit)
    print(mlpreduce.plan(vit, "grouped"), mlpreduce.profile(vit), mlpreduce.verify(vit))
    check()
    assert modes == [m.training for m in vit.modules()]


CONVOLUTIONAL = ["resnet18", "seresnet18", "gcresnet33ts", "vgg11", "mobilenetv3_small_050", "efficientnet_b0"]


@pytest.mark.parametrize("name", slow_but(CONVOLUTIONAL, "resnet18", "gcresnet33ts"))
def test_convolutional_networks_have_none(name: str) -> None:
    assert find_mlps(build(name)) == []
    with pytest.raises(ReductionError, match="found no MLP in"):
        mlpreduce.apply(build(name), "grouped")


SLOW_OF_TORCHVISION = [("swin_t", 12), ("swin_v2_t", 12), ("maxvit_t", 22)]


@pytest.mark.parametrize(
    ("name", "count"),
    [("vit_b_16", 12), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW_OF_TORCHVISION)],
)
def test_torchvision(name: str, count: int) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    assert len(find_mlps(model)) == count
    assert len(mlpreduce.plan(model, "grouped", group=2, remainder="own").edits) > 0


class Own(nn.Module):
    """A user's model: functional activations, an MLP as Sequential, one that is no residual, attention by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + self.proj((q @ k.transpose(-2, -1)).softmax(-1) @ v)
        x = x + scale * self.down(torch.relu(self.up(x)))
        x = x + self.mlp(x)
        return self.head(x.mean(1))


def test_a_users_own_model() -> None:
    model = Own().eval()
    assert [(mlp.name, mlp.hidden_features) for mlp in find_mlps(model)] == [("up", 24), ("mlp", 16)]
    x = torch.randn(2, 5, 8)
    mlpreduce.apply(model, "shallow", ratio=0.25)
    assert model(x).shape == (2, 3)
    assert (model.up.out_features, model.mlp[1].out_features, model.head[0].out_features) == (6, 4, 12)


def test_a_hidden_layer_used_elsewhere_is_none() -> None:
    class Leaky(Own):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = torch.relu(self.up(x))
            return x + self.down(hidden), hidden

    assert find_mlps(Leaky()) == []


def test_module_tied_by_hand_is_one_mlp(vit: nn.Module) -> None:
    vit.blocks[1].mlp = vit.blocks[0].mlp
    assert [mlp.owner for mlp in find_mlps(vit)] == ["blocks.0.mlp", "blocks.0.mlp", "blocks.2.mlp", "blocks.3.mlp"]
    with pytest.raises(ReductionError, match=r"blocks.0.mlp, blocks.1.mlp are tied already"):
        mlpreduce.apply(vit, "grouped")


def test_parallel_mlps_pair_across_blocks() -> None:
    rows = mlpreduce.plan(build("vit_small_patch16_18x2_224", depth=4), "grouped").rows
    owners = {row.mlp: row.owner for row in rows}
    assert owners["blocks.1.ffns.0.mlp"] == "blocks.0.ffns.0.mlp"
    assert owners["blocks.1.ffns.1.mlp"] == "blocks.0.ffns.1.mlp"


def test_a_leaf_used_elsewhere_is_left_alone() -> None:
    class Twice(Own):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.down(torch.relu(self.up(x)))
            return x, self.up(x)

    class Read(Own):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.down(torch.relu(self.up(x)))
            return x @ self.up.weight.T

    assert find_mlps(Twice()) == []
    assert find_mlps(Read()) == []


def test_what_is_pooled_first_is_no_mlp() -> None:
    class Squeeze(Own):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.relu(self.up(x.mean(1, keepdim=True))))

    assert find_mlps(Squeeze()) == []


def test_a_computed_position_embedding_is_no_class_token() -> None:
    class Positions(Own):
        def __init__(self) -> None:
            super().__init__()
            self.pos = nn.Parameter(torch.zeros(1, 5, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            pos = self.pos.to(x.dtype)
            return super().forward(self.proj(x) + pos)

    assert {mlp.acts_on for mlp in find_mlps(Positions())} == {"tokens"}


def test_odd_layers_do_not_stop_the_search() -> None:
    class Keywords(Own):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = torch.nn.functional.gelu(input=self.up(input=x)).to(x.dtype)
            return x + self.down(hidden)

    model = Keywords()
    model.head[0] = nn.utils.parametrizations.weight_norm(model.head[0])
    assert [mlp.name for mlp in find_mlps(model)] == ["up"]
    model.up = nn.utils.parametrizations.spectral_norm(model.up)
    assert find_mlps(model) == []


def test_activations_nobody_knows() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.beta = 0, nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x * torch.sigmoid(self.beta * x)

    class Rolling(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.roll(1, -1)

    model = Own()
    model.mlp[2] = Scaled()
    assert len(find_mlps(model)) == 2
    assert model.mlp[2].calls == 0
    with torch.device("meta"):
        model.mlp[2] = Scaled()
    assert len(find_mlps(model)) == 2
    model.mlp[2] = Rolling()
    assert len(find_mlps(model)) == 1


def test_untraceable_says_why() -> None:
    class Flow(Own):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(
        ReductionError,
        match=r"find_mlps\(Flow\): torch.fx cannot trace the forward of Flow: TraceError.*give example_inputs=",
    ):
        find_mlps(Flow())


@pytest.mark.parametrize("transform", ["grouped", "shallow"])
def test_a_graph_traced_elsewhere(vit: nn.Module, images: torch.Tensor, transform: str) -> None:
    graph = torch.fx.symbolic_trace(vit, concrete_args={"attn_mask": None, "is_causal": False})
    mlpreduce.apply(graph, transform)
    mlpreduce.apply(vit, transform)
    assert torch.equal(graph(images), vit(images))
    assert sum(p.numel() for p in graph.parameters()) == sum(p.numel() for p in vit.parameters())
    targets = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    assert ("blocks.1.mlp.fc1" in targets) == (transform == "shallow")
    assert dict(graph.named_modules()).keys() >= targets


def test_graph_modules_are_not_entangled(vit: nn.Module, images: torch.Tensor) -> None:
    graph = mlpreduce.to_graph(vit)
    other = mlpreduce.to_graph(graph)
    mlpreduce.apply(other, "grouped")
    assert torch.equal(graph(images), vit(images))
    assert "blocks.1.mlp.fc1" in {str(node.target) for node in graph.graph.nodes}
    assert mlpreduce.profile(other, images).unique_mlps == 2
    assert mlpreduce.history(copy.deepcopy(other)) == mlpreduce.history(other)
