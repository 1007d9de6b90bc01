"""save and load: bit-equal in a fresh process, every tie stored once, no pickle, and clear refusals."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers.fresh import python
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import mlpreduce
from mlpreduce import Plan, ReductionError
from mlpreduce.testing import tiny_vit


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    mlpreduce.save(mlpreduce.apply(tiny_vit(), "grouped", group=2), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.processes
def test_fresh_process(tmp_path: Path, images: torch.Tensor) -> None:
    model = tiny_vit().eval()
    mlpreduce.apply(mlpreduce.apply(model, "grouped", group=4), "shallow", ratio=0.3, criterion="l2")
    mlpreduce.save(model, tmp_path)
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import sys, torch, mlpreduce\n"
        "images = torch.load(sys.argv[1] + '/images.pt', weights_only=True)\n"
        "model = mlpreduce.load(sys.argv[1]).eval()\n"
        "assert model.blocks[3].mlp.fc1 is model.blocks[0].mlp.fc1\n"
        "assert [p.transform for p in mlpreduce.history(model)] == ['grouped', 'shallow']\n"
        "torch.save(model(images).detach(), sys.argv[1] + '/output.pt')\n"
    )
    python("-c", code, str(tmp_path)).check_returncode()
    assert torch.equal(torch.load(tmp_path / "output.pt", weights_only=True), model(images))


def test_files(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["mlpreduce.json", "model.safetensors"]
    model = mlpreduce.load(saved)
    with safe_open(saved / "model.safetensors", framework="pt") as file:
        stored = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
        assert json.loads(file.metadata()["aliases"])["blocks.1.mlp.fc1.weight"] == "blocks.0.mlp.fc1.weight"
    assert stored == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    model = mlpreduce.apply(tiny_vit(), "grouped").to(dtype)
    mlpreduce.save(model, tmp_path)
    loaded = mlpreduce.load(tmp_path)
    for (name, ours), theirs in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert ours.dtype == theirs.dtype, name
        assert torch.equal(ours, theirs), name


def test_load_consumes_no_random_numbers(saved: Path) -> None:
    state = torch.random.get_rng_state()
    mlpreduce.load(saved)
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_plain_timm_model_is_recognised(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=64)
    mlpreduce.save(mlpreduce.apply(model, "grouped"), tmp_path)
    assert mlpreduce.load(tmp_path).head.out_features == 7


def test_a_build_that_cannot_be_read_off_is_asked_for(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", act_layer="relu", img_size=32)
    with pytest.raises(
        ReductionError,
        match=r"is another model: blocks.0.mlp.act is a GELU in that build and a ReLU in yours.*give build=",
    ):
        mlpreduce.save(model, tmp_path)
    build = {"name": "vit_tiny_patch16_224", "kwargs": {"act_layer": "relu", "img_size": 32}}
    mlpreduce.save(model, tmp_path, build=build)
    assert repr(mlpreduce.load(tmp_path)) == repr(model)
    with pytest.raises(ReductionError, match=r"is another model"):
        mlpreduce.save(model, tmp_path / "wrong", build={"name": "vit_tiny_patch16_224", "kwargs": {"img_size": 32}})


def test_a_model_changed_after_it_was_built(tmp_path: Path) -> None:
    model = mlpreduce.create_model("vit_tiny_patch16_224", "grouped", depth=2, img_size=32)
    model.reset_classifier(3)
    mlpreduce.save(model, tmp_path)
    assert mlpreduce.load(tmp_path).head.out_features == 3
    model.blocks[1].attn.num_heads = 1
    with pytest.raises(ReductionError, match=r"blocks.1.attn.num_heads is 3 in that build and 1 in yours"):
        mlpreduce.save(model, tmp_path)


def test_what_no_repr_shows_is_compared_too(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224")
    model.blocks[0].attn.scale = 1.0
    with pytest.raises(ReductionError, match=r"blocks.0.attn.scale is 0.125 in that build and 1.0 in yours"):
        mlpreduce.save(model, tmp_path)
    mlpreduce.save(timm.create_model("vit_tiny_patch16_224", global_pool="max", img_size=32), tmp_path)
    assert mlpreduce.load(tmp_path).global_pool == "max"


def test_a_broken_tie_is_not_saved(tmp_path: Path) -> None:
    model = mlpreduce.apply(tiny_vit(), "grouped")
    model.blocks[1] = copy.deepcopy(model.blocks[1])
    with pytest.raises(ReductionError, match=r"blocks.1.mlp.fc1 is no longer tied to blocks.0.mlp.fc1"):
        mlpreduce.save(model, tmp_path)


def test_a_tie_of_the_model_alone_is_refused(tmp_path: Path) -> None:
    mlpreduce.save(tiny_vit(), tmp_path)
    model = tiny_vit()
    model.blocks[1].mlp = model.blocks[0].mlp
    with pytest.raises(ReductionError, match=r"is tied to .* in the model, but not in the file"):
        mlpreduce.load(tmp_path, model=model)


def test_untying_after_slicing(tmp_path: Path, images: torch.Tensor) -> None:
    model = mlpreduce.apply(mlpreduce.apply(tiny_vit().eval(), "grouped", keep="last"), "shallow", ratio=0.3)
    mlpreduce.save(mlpreduce.untie(model), tmp_path)
    model = mlpreduce.load(tmp_path).eval()
    mlpreduce.apply(mlpreduce.apply(model, "grouped", group=4), "shallow", ratio=0.5)
    before = model(images)
    mlpreduce.save(mlpreduce.untie(model), tmp_path)
    assert torch.equal(mlpreduce.load(tmp_path).eval()(images), before)


def test_load_gives_weights_whatever_the_ambient_device(saved: Path) -> None:
    with torch.device("meta"):
        assert not any(p.is_meta for p in mlpreduce.load(saved).parameters())
        empty = timm.create_model("vit_tiny_patch16_224", **tiny_vit().mlpreduce_build["kwargs"])
    with pytest.raises(ReductionError, match="is on the meta device"):
        mlpreduce.load(saved, model=empty)


@pytest.mark.parametrize("build", ["vit", True, {"name": "x"}, {"kwargs": {}}, {}])
def test_bad_builds(tmp_path: Path, build: object) -> None:
    with pytest.raises(ReductionError, match="build is"):
        mlpreduce.save(tiny_vit(), tmp_path, build=build)


def test_a_plan_of_another_model() -> None:
    made = mlpreduce.plan(tiny_vit(), "grouped")
    with pytest.raises(ReductionError, match=r"blocks.4.mlp is in one of them only, of 2 MLPs"):
        mlpreduce.apply(tiny_vit(depth=6), made)
    with pytest.raises(
        ReductionError,
        match=r"has 64 hidden units, 4,192 parameters of its own and the owner blocks.0.mlp; the plan was made for 128, 8,352",
    ):
        mlpreduce.apply(tiny_vit(mlp_ratio=2), made)
    sliced = mlpreduce.plan(mlpreduce.apply(tiny_vit(), "grouped"), "shallow")
    with pytest.raises(
        ReductionError,
        match=r"blocks.1.mlp has 128 hidden units, 8,352 parameters of its own and the owner blocks.1.mlp",
    ):
        mlpreduce.apply(tiny_vit(), sliced)


def test_config_is_json_whatever_was_written(tmp_path: Path) -> None:
    model = mlpreduce.create_model("vit_tiny_patch16_224", depth=4, img_size=32)
    mlpreduce.apply(model, "grouped", pattern=[range(2), np.array([2, 3])])
    mlpreduce.apply(model, "shallow", width=np.int64(64))
    mlpreduce.save(model, tmp_path)
    assert mlpreduce.history(mlpreduce.load(tmp_path)) == mlpreduce.history(model)
    with pytest.raises(ReductionError, match="is a object; arguments are numbers"):
        mlpreduce.apply(model, "shallow", width=object())
    assert pickle.loads(pickle.dumps(mlpreduce.plan(model, "shallow"))).costs is None


def test_own_models_are_loaded_into_a_fresh_one(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = x + block(x)
            return x

    model = mlpreduce.apply(Own(), "grouped")
    mlpreduce.save(model, tmp_path)
    with pytest.raises(ReductionError, match=r"not recorded; build it and give it as model="):
        mlpreduce.load(tmp_path)
    x = torch.randn(3, 4)
    assert torch.equal(mlpreduce.load(tmp_path, model=Own())(x), model(x))
    with pytest.raises(ReductionError, match=r"reduced already; give one as it was built"):
        mlpreduce.load(tmp_path, model=mlpreduce.apply(Own(), "grouped"))
    other, before = tiny_vit(), tiny_vit().state_dict()
    with pytest.raises(ReductionError, match=r"the saved plans do not fit VisionTransformer: .*no module 'blocks.0.0'"):
        mlpreduce.load(tmp_path, model=other)
    assert all(torch.equal(t, before[n]) for n, t in other.state_dict().items())


def test_untied_models_are_saved_as_what_they_are(tmp_path: Path, images: torch.Tensor) -> None:
    model = mlpreduce.untie(mlpreduce.apply(tiny_vit().eval(), "grouped"))
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight.add_(1)
    mlpreduce.save(model, tmp_path)
    assert torch.equal(mlpreduce.load(tmp_path).eval()(images), model(images))
    plain = timm.create_model("vit_tiny_patch16_224", **model.mlpreduce_build["kwargs"])
    plain.load_state_dict(load_file(tmp_path / "model.safetensors"))


def edit_description(saved: Path, **changes: object) -> None:
    path = saved / "mlpreduce.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_refusals(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ReductionError, match=r"there is no mlpreduce.json; mlpreduce.save did not write this directory"
    ):
        mlpreduce.load(tmp_path / "nowhere")
    good = (saved / "mlpreduce.json").read_text()
    for changes, message in [
        ({"version": 99}, r"version 99; this mlpreduce reads versions 1 and 2"),
        ({"format": "other"}, r"is foreign"),
        ({"plans": [{"version": 7}]}, r"plan version 7; this mlpreduce reads version 1"),
        ({"plans": [{"version": 1}]}, r"damaged plan: KeyError"),
        ({"plans": {}}, r"no list of plans"),
        ({"build": {"name": "no_such_vit", "kwargs": {}}}, r"has no architecture 'no_such_vit'"),
        ({"build": {"name": "vit_tiny_patch16_224", "kwargs": {"checkpoint_path": "/x"}}}, r"would read other files"),
        ({"build": {"name": "vit_tiny_patch16_224", "kwargs": {"depht": 3}}}, r"timm cannot build"),
        ({"build": {"name": "vit_tiny_patch16_224", "kwargs": {}}}, r"those of another model: 96 tensors are missing"),
        ({"build": "vit"}, r"build is 'vit'; it must be"),
        ({"plans": []}, r"is tied to .* in the file, but not in the model"),
        ({"sha256": "0"}, r"damaged or from another save"),
    ]:
        edit_description(saved, **changes)
        with pytest.raises(ReductionError, match=message):
            mlpreduce.load(saved)
        (saved / "mlpreduce.json").write_text(good)
    (saved / "mlpreduce.json").write_text(good[:50])
    with pytest.raises(ReductionError, match=r"mlpreduce.json is damaged"):
        mlpreduce.load(saved)
    (saved / "mlpreduce.json").write_text(good)
    weights = bytearray((saved / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (saved / "model.safetensors").write_bytes(weights)
    with pytest.raises(ReductionError, match=r"model.safetensors is damaged"):
        mlpreduce.load(saved)


def test_weights_of_another_model(saved: Path, tmp_path: Path) -> None:
    mlpreduce.save(tiny_vit(depth=2), tmp_path / "other")
    (saved / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    edit_description(saved, sha256=json.loads((tmp_path / "other" / "mlpreduce.json").read_text())["sha256"])
    with pytest.raises(ReductionError, match=r"those of another model: \d+ tensors are missing"):
        mlpreduce.load(saved)


def test_meta_models_have_nothing_to_save(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224")
    with pytest.raises(ReductionError, match="has no values to save"):
        mlpreduce.save(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("config", [{"keep": "mean"}, {"keep": "last"}, {"group": 4}])
def test_plan_files(tmp_path: Path, config: dict, images: torch.Tensor) -> None:
    made = mlpreduce.plan(tiny_vit(), "grouped", **config)
    made.save(tmp_path / "plan.json")
    assert (tmp_path / "plan.plan.safetensors").exists() == (config.get("keep") == "mean")
    read = Plan.load(tmp_path / "plan.json")
    assert read == made
    assert str(read).splitlines()[:6] == str(made).splitlines()[:6]
    if config.get("keep") == "mean":
        with pytest.raises(ReductionError, match="its new values are not in the plan"):
            mlpreduce.apply(tiny_vit(), Plan.from_json(made.to_json()))
    a, b = mlpreduce.apply(tiny_vit().eval(), read), mlpreduce.apply(tiny_vit().eval(), "grouped", **config)
    assert torch.equal(a(images), b(images))


def test_plan_refusals(tmp_path: Path) -> None:
    made = mlpreduce.plan(tiny_vit(), "grouped", keep="mean")
    for text, message in [
        ("{", "not JSON"),
        ("[]", "no plan of mlpreduce"),
        ('{"version": 2}', "plan version 2; this mlpreduce reads version 1"),
        (made.to_json().replace('"share"', '"chare"'), "unknown edit 'chare'; did you mean 'share'"),
        (made.to_json().replace('"edits"', '"edit"', 1), "damaged plan: KeyError: 'edits'"),
    ]:
        with pytest.raises(ReductionError, match=message):
            Plan.from_json(text)
    made.save(tmp_path / "plan.json")
    (tmp_path / "plan.plan.safetensors").unlink()
    with pytest.raises(ReductionError, match=r"the values of .* are missing"):
        Plan.load(tmp_path / "plan.json")
    with pytest.raises(ReductionError, match="no such file"):
        Plan.load(tmp_path / "none.json")
    with pytest.raises(ReductionError, match="a plan is applied as it is"):
        mlpreduce.apply(tiny_vit(), made, group=2)
