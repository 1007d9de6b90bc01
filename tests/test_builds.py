"""Models that timm cannot build, and builds that are not the model: one message each, wherever they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import mlpreduce
from mlpreduce.__main__ import main
from mlpreduce.errors import ReductionError
from mlpreduce.reduction.builds import built, made_by_timm
from mlpreduce.testing import tiny_vit

VIT = "vit_tiny_patch16_224"
WRONG: dict[str, tuple[str, str]] = {  # each ends in another kind of error inside timm
    "num_heads=5": ("num_heads", "dim should be divisible by num_heads"),
    "patch_size=0": ("patch_size", "ZeroDivisionError"),
    "act_layer=foo": ("act_layer", "KeyError: 'foo'"),
    "img_size=[1,2,3]": ("img_size", "(1, 2, 3)"),
    "dept=3": ("dept", "unexpected keyword argument 'dept'"),
    "model_name=vit": ("model_name", "multiple values"),
}


def small_vit(**kwargs: Any) -> nn.Module:
    model: nn.Module = timm.create_model(VIT, depth=2, embed_dim=48, num_heads=3, **kwargs)
    return model.eval()


@pytest.mark.parametrize("word", list(WRONG))
def test_arguments_that_timm_refuses_are_told_on_the_command_line(
    word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in ([], ["thin", "mlp_ratio=2"], ["grouped"]):
        assert main(["profile", VIT, word, *more]) == 2
        told = capsys.readouterr().err
        assert f"timm cannot build {VIT} with {{'{WRONG[word][0]}'" in told
        assert WRONG[word][1] in told


@pytest.mark.parametrize("name", [VIT, "resnet10t", "swin_tiny_patch4_window7_224"])
def test_a_build_on_meta_has_what_one_with_values_has(name: str) -> None:
    build = {"name": name, "kwargs": {"num_classes": 3}}
    real, meta = built(build, "save"), built(build, "save", device="meta")
    assert all(tensor.is_meta for tensor in meta.state_dict().values())
    assert [(key, t.shape, t.dtype) for key, t in meta.state_dict().items()] == [
        (key, t.shape, t.dtype) for key, t in real.state_dict().items()
    ]
    norms = [m for m in real.modules() if isinstance(m, (nn.LayerNorm, nn.BatchNorm2d))]
    assert norms[0].weight.eq(1).all()  # where there are values, they are filled in


def test_tags_and_names_that_timm_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", f"{VIT}.foo"]) == 2
    assert "Invalid pretrained tag (foo)" in capsys.readouterr().err
    for call in (made_by_timm, lambda name, _: mlpreduce.create_model(name)):
        with pytest.raises(ReductionError, match=rf"timm has no architecture 'vit_tiny'; did you mean '{VIT}'"):
            call("vit_tiny", {})
    with pytest.raises(ReductionError, match="timm has no architecture 3"):
        mlpreduce.create_model(3)  # type: ignore[arg-type]


def test_create_model_tells_what_timm_refuses() -> None:
    with pytest.raises(
        ReductionError,
        match=r"create_model\('vit_tiny_patch16_224'\): timm cannot build .*divisible by num_heads; all other",
    ):
        mlpreduce.create_model(VIT, num_heads=5)
    with pytest.raises(ReductionError, match=r"grouped has .*; all other arguments are timm's"):
        mlpreduce.create_model(VIT, "grouped", depht=5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mlp_ratio=4", "thin", "mlp_ratio=2"], f"mlp_ratio is given twice: to {VIT} and to thin; leave one out"),
        (["pretrained=true", "thin", "mlp_ratio=2"], "use --pretrained"),
        (["pretrained=true", "grouped"], "use --pretrained"),
        (["name=3", "thin"], f"name is not an argument of {VIT}"),
        (["grouped", "include=x"], "grouped(include='x'): unknown argument 'include'"),
    ],
)
def test_an_argument_in_the_wrong_place(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", VIT, *words]) == 2
    assert message in capsys.readouterr().err


def test_plan_checks_options_before_it_builds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", VIT, "grouped", "include=x"]) == 2
    assert "unknown argument 'include'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"norm_layer": "xyz"}, "KeyError: 'xyz'"),
        ({"num_heads": 0}, "ZeroDivisionError"),
        ({"pretrained": True}, "the build has pretrained"),
    ],
)
def test_a_given_build_that_cannot_be_built_is_told_once(kwargs: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ReductionError) as caught:
        mlpreduce.save(small_vit(), tmp_path, build={"name": VIT, "kwargs": kwargs})
    assert message in str(caught.value)
    assert str(caught.value).count("save(") == 1
    assert "is another model" not in str(caught.value)


def test_a_build_in_itself_is_no_json(tmp_path: Path) -> None:
    kwargs: dict[str, Any] = {}
    kwargs["depth"] = kwargs
    with pytest.raises(ReductionError, match="is not JSON"):
        mlpreduce.save(small_vit(), tmp_path, build={"name": VIT, "kwargs": kwargs})


class Stateful(nn.Module):
    def get_extra_state(self) -> dict[str, int]:
        return {"a": 1}

    def set_extra_state(self, state: Any) -> None: ...


def test_state_that_is_no_tensor_is_told(tmp_path: Path) -> None:
    model = small_vit()
    model.extra = Stateful()
    with pytest.raises(ReductionError, match=r"extra\._extra_state is a dict, not a tensor"):
        mlpreduce.save(model, tmp_path / "a")
    mlpreduce.save(nn.Linear(2, 2), tmp_path / "b")
    with pytest.raises(ReductionError, match=r"_extra_state"):
        mlpreduce.load(tmp_path / "b", model=Stateful())


def test_a_replaced_forward_is_no_build(tmp_path: Path) -> None:
    model = small_vit()
    model.blocks[0].mlp.forward = torch.zeros_like
    with pytest.raises(ReductionError, match=r"the forward of blocks\.0\.mlp was replaced .*build=False"):
        mlpreduce.save(model, tmp_path)


def test_what_differs_is_named_in_both(tmp_path: Path) -> None:
    model = small_vit()
    del model.blocks[0].mlp.drop2
    with pytest.raises(ReductionError, match=r"blocks\.0\.mlp\.drop2 is a Dropout in that build and missing in yours"):
        mlpreduce.save(model, tmp_path)
    model = small_vit()
    model.__class__ = type("Mine", (timm.models.VisionTransformer,), {})
    with pytest.raises(ReductionError, match="the model is a VisionTransformer in that build and a Mine in yours"):
        mlpreduce.save(model, tmp_path)
    with pytest.raises(ReductionError, match=r"pos_embed is \(1, 197, 48\) in that build and missing in yours"):
        mlpreduce.save(small_vit(pos_embed="none"), tmp_path)


@pytest.mark.parametrize("rate", [1 / 3, 0.123456789, 0.1])
def test_any_drop_path_rate_is_recorded(rate: float, tmp_path: Path) -> None:
    mlpreduce.save(small_vit(drop_path_rate=rate), tmp_path)
    loaded = mlpreduce.load(tmp_path)
    assert loaded.blocks[1].drop_path1.drop_prob == small_vit(drop_path_rate=rate).blocks[1].drop_path1.drop_prob


@pytest.mark.parametrize("model", ["x", nn.Linear])
def test_load_into_what_is_no_module(model: Any, tmp_path: Path) -> None:
    mlpreduce.save(nn.Linear(2, 2), tmp_path)
    with pytest.raises(ReductionError, match=r"load\(.*\): needs a torch\.nn\.Module, got (str|type)"):
        mlpreduce.load(tmp_path, model=model)


def test_load_leaves_a_model_of_inference_mode_as_it_is(tmp_path: Path) -> None:
    model = mlpreduce.apply(tiny_vit(), "shallow", ratio=0.5)
    mlpreduce.save(model, tmp_path)
    with torch.inference_mode():
        given = tiny_vit()
    with pytest.raises(ReductionError, match=r"built under torch\.inference_mode\(\)"):
        mlpreduce.load(tmp_path, model=given)
    assert mlpreduce.history(given) == []
    assert given.blocks[0].mlp.fc1.weight.shape == (128, 32)


def test_save_where_nothing_can_be_written_leaves_nothing(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder" / "model.safetensors").mkdir(parents=True)
    for place in ("file", "file/below", "folder"):
        with pytest.raises(ReductionError, match=r"save\(.*\): cannot write there: .*; give a directory"):
            mlpreduce.save(model, tmp_path / place)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["model.safetensors"]
    assert (tmp_path / "file").read_text() == "x"


def test_a_failed_save_keeps_the_model_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlpreduce.save(nn.Linear(2, 2), tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("mlpreduce.building.checkpoint.save_file", fail)
    with pytest.raises(ReductionError, match="no space left"):
        mlpreduce.save(nn.Linear(3, 3), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlpreduce.json", "model.safetensors"]
    mlpreduce.load(tmp_path, model=nn.Linear(2, 2))


def test_a_damaged_plan_is_told_with_its_directory(tmp_path: Path) -> None:
    mlpreduce.save(mlpreduce.apply(tiny_vit(), "grouped", group=2), tmp_path)
    file = tmp_path / "mlpreduce.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"plans": [{"x": 1}]}))
    with pytest.raises(ReductionError, match=r"^load\(.*\): a plan in mlpreduce\.json cannot be read: "):
        mlpreduce.load(tmp_path)
