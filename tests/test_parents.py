"""Models that hold a reduced one: saved and loaded as a whole, made plain as a whole, and never left with a wrong history."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import mlpreduce
from mlpreduce import ReductionError
from mlpreduce.testing import tiny_vit


class Detector(nn.Module):
    def __init__(self, backbone: nn.Module, neck: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone, self.neck = backbone, neck
        self.head = nn.Linear(5, 7)

    def forward(self, x: torch.Tensor) -> Any:
        features = self.backbone(x)
        return self.head(features if self.neck is None else features + self.neck(x))


STEPS: list[tuple[str, dict[str, Any]]] = [
    ("grouped", {"scale": "none"}),
    ("shallow", {}),
    ("low_rank", {}),
    ("grouped", {"scale": "none", "per_use": "lora"}),
]


def stir(model: nn.Module) -> nn.Module:
    """Other weights than those of a new model, in every tensor."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.eval()


@pytest.mark.parametrize(("transform", "config"), STEPS)
def test_a_parent_is_saved_and_loaded(
    transform: str, config: dict[str, Any], tmp_path: Path, images: torch.Tensor
) -> None:
    parent = stir(Detector(mlpreduce.apply(tiny_vit(), transform, **config)))
    mlpreduce.save(parent, tmp_path)
    loaded = mlpreduce.load(tmp_path, Detector(tiny_vit())).eval()
    assert torch.equal(loaded(images), parent(images))
    assert mlpreduce.history(loaded.backbone) == mlpreduce.history(parent.backbone)
    assert mlpreduce.verify(loaded).ok
    mlpreduce.save(loaded, tmp_path / "again")
    first, again = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert sum(tensor.numel() for tensor in first.values()) == sum(p.numel() for p in parent.parameters())


def test_two_parts_and_several_steps(tmp_path: Path, images: torch.Tensor) -> None:
    backbone = mlpreduce.apply(mlpreduce.apply(tiny_vit(), "grouped"), "shallow", ratio=0.3)
    parent = stir(Detector(backbone, mlpreduce.apply(tiny_vit(), "shallow", criterion="last")))
    mlpreduce.save(parent, tmp_path)
    description = json.loads((tmp_path / "mlpreduce.json").read_text())
    assert (description["version"], description["plans"]) == (2, [])
    assert {path: len(plans) for path, plans in description["parts"].items()} == {"backbone": 2, "neck": 1}
    loaded = mlpreduce.load(tmp_path, Detector(tiny_vit(), tiny_vit())).eval()
    assert torch.equal(loaded(images), parent(images))


def test_one_part_at_two_places(tmp_path: Path, images: torch.Tensor) -> None:
    backbone = mlpreduce.apply(tiny_vit(), "grouped")
    parent = stir(Detector(backbone, backbone))
    mlpreduce.save(parent, tmp_path)
    fresh = tiny_vit()
    loaded = mlpreduce.load(tmp_path, Detector(fresh, fresh)).eval()
    assert torch.equal(loaded(images), parent(images))
    assert mlpreduce.verify(loaded).ties == 4


def test_the_format_of_a_model_alone_stays(tmp_path: Path) -> None:
    mlpreduce.save(mlpreduce.apply(tiny_vit(), "grouped"), tmp_path)
    description = json.loads((tmp_path / "mlpreduce.json").read_text())
    assert description["version"] == 1
    assert "parts" not in description


def test_a_part_of_a_timm_model(tmp_path: Path, images: torch.Tensor) -> None:
    """It is built again without being given."""
    model = stir(tiny_vit())
    mlpreduce.apply(model.blocks, "shallow", example_inputs=torch.zeros(2, 17, 32))
    mlpreduce.save(model, tmp_path)
    assert torch.equal(mlpreduce.load(tmp_path).eval()(images), model(images))


def test_refused_parents(tmp_path: Path, unchanged: Callable[[nn.Module], Callable[[], None]]) -> None:
    mlpreduce.save(Detector(mlpreduce.apply(tiny_vit(), "grouped")), tmp_path)
    with pytest.raises(
        ReductionError, match=r"how the model was built is not recorded; build it and give it as model="
    ):
        mlpreduce.load(tmp_path)
    for given, message in [
        (tiny_vit(), r"VisionTransformer has no module 'backbone', which was reduced on its own"),
        (Detector(tiny_vit(depth=2)), r"the saved plans do not fit Detector: .*'blocks.2.mlp.fc1'"),
        (Detector(mlpreduce.apply(tiny_vit(), "grouped")), r"backbone of the given model is reduced already"),
        (Detector(nn.Identity()), r"no module 'blocks.0.mlp.fc1'"),
    ]:
        check = unchanged(given)
        with pytest.raises(ReductionError, match=message):
            mlpreduce.load(tmp_path, given)
        check()
    path = tmp_path / "mlpreduce.json"
    good = json.loads(path.read_text())
    for parts in ([], {"backbone": 3}, {"": []}):
        path.write_text(json.dumps(good | {"parts": parts}))
        with pytest.raises(ReductionError, match=r"mlpreduce.json is damaged: its parts are"):
            mlpreduce.load(tmp_path, Detector(tiny_vit()))


def test_a_broken_tie_in_a_part_is_not_saved(tmp_path: Path) -> None:
    parent = Detector(mlpreduce.apply(tiny_vit(), "grouped"))
    parent.backbone.blocks[1].mlp.fc1 = nn.Linear(32, 128)
    with pytest.raises(
        ReductionError, match=r"backbone.blocks.1.mlp.fc1 is no longer tied to backbone.blocks.0.mlp.fc1"
    ):
        mlpreduce.save(parent, tmp_path)


@pytest.mark.parametrize(("wrap", "inside"), [(torch.compile, "_orig_mod"), (nn.DataParallel, "module")])
def test_a_wrapped_model_names_what_is_saved(wrap: Any, inside: str, tmp_path: Path) -> None:
    wrapped = wrap(mlpreduce.apply(tiny_vit(), "grouped"))
    with pytest.raises(ReductionError, match=rf"save what is inside, mlpreduce.save\(model.{inside}, ...\)"):
        mlpreduce.save(wrapped, tmp_path)
    mlpreduce.save(getattr(wrapped, inside), tmp_path)


def test_a_whole_is_not_reduced_over_the_history_of_a_part(
    unchanged: Callable[[nn.Module], Callable[[], None]],
) -> None:
    parent = Detector(mlpreduce.apply(tiny_vit(), "grouped"), tiny_vit())
    inputs = torch.zeros(2, 3, 16, 16)
    check = unchanged(parent)
    for change in (mlpreduce.plan, mlpreduce.apply):
        with pytest.raises(
            ReductionError, match=r"shallow\(\): backbone was reduced on its own .*exclude=\"backbone.\*\""
        ):
            change(parent, "shallow", example_inputs=inputs)
    check()
    mlpreduce.apply(parent, "shallow", exclude="backbone.*", example_inputs=inputs)
    assert parent.neck.blocks[0].mlp.fc1.out_features == 64
    assert parent.backbone.blocks[0].mlp.fc1.out_features == 128


def test_a_part_and_the_whole_beside_it_are_saved(tmp_path: Path, images: torch.Tensor) -> None:
    parent = Detector(mlpreduce.apply(tiny_vit(), "grouped"), tiny_vit())
    mlpreduce.apply(parent, "shallow", exclude="backbone.*", example_inputs=images)
    mlpreduce.save(stir(parent), tmp_path)
    loaded = mlpreduce.load(tmp_path, Detector(tiny_vit(), tiny_vit())).eval()
    assert torch.equal(loaded(images), parent(images))
    assert [plan.transform for plan in mlpreduce.history(loaded)] == ["shallow"]


def test_a_part_that_is_reduced_after_the_whole_is_refused(tmp_path: Path) -> None:
    parent = mlpreduce.apply(Detector(tiny_vit()), "grouped", example_inputs=torch.zeros(2, 3, 16, 16))
    mlpreduce.apply(parent.backbone, "shallow")
    assert "the model and its backbone were both reduced, in an order that is not known" in str(
        mlpreduce.verify(parent)
    )
    with pytest.raises(
        ReductionError,
        match=r"and its backbone also on its own, in an order that is not known; build it again and apply all steps either "
        r"to the whole model or to backbone$",
    ):
        mlpreduce.save(parent, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("transform", "config"), STEPS)
def test_a_parent_becomes_plain(transform: str, config: dict[str, Any], tmp_path: Path, images: torch.Tensor) -> None:
    parent = stir(Detector(mlpreduce.apply(tiny_vit(), transform, **config)))
    before, widths = parent(images), [mlp.hidden_features for mlp in mlpreduce.find_mlps(parent.backbone)]
    assert mlpreduce.merge(parent) is parent
    torch.testing.assert_close(parent(images), before, rtol=1e-4, atol=1e-5)
    assert mlpreduce.verify(parent).ties == 0
    plain = Detector(tiny_vit(mlp_ratio=widths[0] / 32)).eval()
    plain.load_state_dict(parent.state_dict())
    assert torch.equal(plain(images), parent(images))
    mlpreduce.save(parent, tmp_path)
    assert torch.equal(mlpreduce.load(tmp_path, Detector(tiny_vit())).eval()(images), parent(images))


def test_untying_a_parent_is_all_or_nothing(unchanged: Callable[[nn.Module], Callable[[], None]]) -> None:
    parent = Detector(mlpreduce.apply(tiny_vit(), "grouped"), mlpreduce.apply(tiny_vit(), "grouped"))
    parent.neck.blocks[1].mlp.fc2 = nn.Linear(128, 32)
    check = unchanged(parent)
    with pytest.raises(ReductionError, match=r"blocks.1.mlp.fc2 is no longer tied"):
        mlpreduce.untie(parent)
    check()
    whole = mlpreduce.untie(Detector(mlpreduce.apply(tiny_vit(), "grouped"), mlpreduce.apply(tiny_vit(), "grouped")))
    assert whole.backbone.blocks[1].mlp.fc1 is not whole.backbone.blocks[0].mlp.fc1
    assert whole.neck.blocks[1].mlp.fc1 is not whole.neck.blocks[0].mlp.fc1
    assert mlpreduce.verify(whole).ok


SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"drop_path_rate": 0.1, "mlp_ratio": 2.0, "in_chans": 1},
        {"drop_rate": 0.1, "attn_drop_rate": 0.2, "proj_drop_rate": 0.3, "pos_drop_rate": 0.4, "qkv_bias": False},
        {"class_token": False, "global_pool": "avg", "init_values": 1e-4, "qk_norm": True},
        {"reg_tokens": 2, "no_embed_class": True, "dynamic_img_size": True, "weight_init": "jax"},
    ],
)
def test_how_timm_built_a_model_is_read_off(more: dict[str, Any], tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", **SMALL | more).eval()
    mlpreduce.apply(mlpreduce.apply(model, "grouped"), "shallow", ratio=0.3)
    mlpreduce.save(model, tmp_path)
    loaded = mlpreduce.load(tmp_path).eval()
    assert repr(loaded) == repr(model)
    images = torch.randn(2, more.get("in_chans", 3), 16, 16)
    assert torch.equal(loaded(images), model(images))
    assert json.loads((tmp_path / "mlpreduce.json").read_text())["build"]["kwargs"].items() >= (more.items())


def test_a_choice_by_data_warns_of_what_save_will_need(tmp_path: Path, images: torch.Tensor) -> None:
    model = timm.create_model("vit_tiny_patch16_224", **SMALL, act_layer="relu")
    made = mlpreduce.plan(model, "shallow", criterion="activation", data=[images])
    assert "note: save cannot tell how this VisionTransformer was built" in str(made)
    with pytest.warns(
        UserWarning, match=r"save cannot tell how .*build=.*blocks.0.mlp.act is a GELU in that build"
    ) as caught:
        mlpreduce.apply(model, "shallow", criterion="activation", data=[images])
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with pytest.raises(ReductionError, match="give build="):
        mlpreduce.save(model, tmp_path)
    mlpreduce.save(model, tmp_path, build={"name": "vit_tiny_patch16_224", "kwargs": {**SMALL, "act_layer": "relu"}})
    mlpreduce.load(tmp_path)


def test_where_save_can_tell_nothing_is_warned_of(images: torch.Tensor) -> None:
    """Warnings are errors here."""
    known = mlpreduce.create_model("vit_tiny_patch16_224", **SMALL, act_layer="relu")
    for model in (known, timm.create_model("vit_tiny_patch16_224", **SMALL, drop_path_rate=0.1), Detector(tiny_vit())):
        mlpreduce.apply(model, "shallow", criterion="activation", data=[images], example_inputs=images)
    mlpreduce.apply(timm.create_model("vit_tiny_patch16_224", **SMALL, act_layer="relu"), "shallow")  # not by data
