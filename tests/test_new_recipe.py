"""`recipe --new`: a folder of class folders becomes a recipe that runs as it is."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn

from mlpreduce import recipe as recipes
from mlpreduce.errors import ReductionError
from mlpreduce.recipe import new as new_recipe
from mlpreduce.recipe.new import write_recipe
from mlpreduce.train import ModelSettings, Run, build_model


def draw(folder: Path, classes: int = 3, count: int = 50, size: int = 12, mode: str = "L") -> Path:
    """Class folders of stripes, at another angle for each class, with noise."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:size, :size]
    for label in range(classes):
        place = folder / f"class {label}"
        place.mkdir(parents=True)
        angle = np.pi * label / classes
        for number in range(count):
            wave = np.sin((rows * np.cos(angle) + columns * np.sin(angle)) * 1.5 + rng.uniform(0, 6))
            pixels = np.clip(128 + 90 * wave + rng.normal(0, 20, wave.shape), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).convert(mode).save(place / f"{number}.png")
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return draw(tmp_path / 'my "own" pictures')


def new(*words: str) -> int:
    return recipes.main(["--new", *words])


def dry_run(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert recipes.main([str(path), "--dry-run"]) == 0
    return capsys.readouterr().out


def test_class_folders(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.toml"
    assert new(str(path), "--data", str(pictures)) == 0
    told = capsys.readouterr().out
    assert "120 training and 30 validation images of 3 classes" in told
    assert f"python -m mlpreduce.recipe {shlex.quote(str(path))}" in told.splitlines()[-1]
    recipe = recipes.load(str(path))
    assert recipe.data.root == str(pictures)
    assert (recipe.data.val_share, recipe.data.train_samples) == (0.2, 120)
    assert list(recipe.variants) == ["baseline", "grouped", "shallow", "thin"]
    assert recipe.model.kwargs["num_classes"] == 3
    assert recipe.data.image_size == recipe.model.kwargs["img_size"] == 12
    assert recipe.train.color_jitter == 0  # gray
    assert recipe.train.ema_decay == 0
    text = dry_run(path, capsys)
    assert "120 training images, 30 validation images, 3 classes, counted" in text
    assert "warning" not in text
    unset = [line for line in path.read_text().splitlines() if line.startswith("# Expected") and "33.3 %" in line]
    assert unset  # chance


def test_train_and_val_folders(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = tmp_path / "both"
    shutil.copytree(pictures, both / "train")
    shutil.copytree(pictures, both / "validation")
    write_recipe(tmp_path / "both.toml", both)
    recipe = recipes.load(str(tmp_path / "both.toml"))
    assert (recipe.data.root, recipe.data.val_share, recipe.data.train_samples) == (str(both), 0.0, 150)
    assert "warning" not in dry_run(tmp_path / "both.toml", capsys)
    shutil.rmtree(both / "validation")
    write_recipe(tmp_path / "train.toml", both)
    recipe = recipes.load(str(tmp_path / "train.toml"))
    assert (recipe.data.root, recipe.data.val_share, recipe.data.train_samples) == (str(both / "train"), 0.2, 120)


@pytest.mark.parametrize(("count", "size"), [(2, 16), (4, 28), (20, 64), (700, 8), (3, 300)])
def test_any_number_and_size_of_pictures_gives_a_recipe_without_warnings(
    count: int, size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(tmp_path / "drawn", classes=2, count=count, size=size, mode="RGB")
    write_recipe(tmp_path / "mine.toml", tmp_path / "drawn")
    recipe = recipes.load(str(tmp_path / "mine.toml"))
    assert recipe.train.batch_size <= recipe.data.train_samples
    assert " 1 updates" not in (tmp_path / "mine.toml").read_text()
    assert "warning" not in dry_run(tmp_path / "mine.toml", capsys)


def test_a_model_of_ones_own_choice(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny.toml"
    assert new(str(path), "--data", str(pictures), "--model", "vit_tiny_patch16_224") == 0
    recipe = recipes.load(str(path))
    assert recipe.model.kwargs == {"img_size": 12, "patch_size": 3, "num_classes": 3}
    for line in (
        "img_size = 12 +# that of the pictures",
        "patch_size = 3 +# 16 patches",
        "num_classes = 3 +# class folders",
    ):
        assert re.search(f"^{line}", path.read_text(), re.MULTILINE), path.read_text()
    assert list(recipe.variants) == ["baseline", "grouped", "shallow", "thin"]
    assert "warning" not in dry_run(path, capsys)


def test_variants_that_a_model_cannot_have_are_left_out_with_the_reason(pictures: Path, tmp_path: Path) -> None:
    path = tmp_path / "convnext.toml"
    write_recipe(path, pictures, "convnext_atto")
    recipe = recipes.load(str(path))
    assert recipe.data.image_size == 224
    assert "patch_size" not in recipe.model.kwargs
    left_out = [line for line in path.read_text().splitlines() if " is left out: " in line]
    assert {"baseline", *recipe.variants} | {line.split()[1] for line in left_out} == {
        "baseline",
        "grouped",
        "shallow",
        "thin",
    }
    assert len(recipe.variants) + len(left_out) == 4
    assert left_out


def test_a_long_reason_is_cut_between_words(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(run: Run, device: str) -> nn.Module:
        if run.steps and run.steps[0]["transform"] == "shallow":
            raise ReductionError("because " * 99)
        return build_model(run, device=device)

    monkeypatch.setattr(new_recipe, "build_model", refuse)
    write_recipe(tmp_path / "mine.toml", pictures)
    (line,) = [line for line in (tmp_path / "mine.toml").read_text().splitlines() if " is left out: " in line]
    assert set(line.partition("# shallow is left out: ")[2].split()) == {"because", "..."}
    assert len(line) < 230


@pytest.mark.slow
def test_a_hybrid_is_left_as_timm_builds_it(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "hybrid.toml"
    write_recipe(path, pictures, "vit_tiny_r_s16_p8_224")
    recipe = recipes.load(str(path))
    assert recipe.model.kwargs == {"num_classes": 3}
    assert recipe.data.image_size == 224
    assert "warning" not in dry_run(path, capsys)


def test_a_size_that_a_hybrid_cannot_have_names_its_own() -> None:
    run = Run(recipe="r", variant="baseline", directory="/r")
    model = ModelSettings(name="vit_tiny_r_s16_p8_224", kwargs={"img_size": 28})
    with pytest.raises(ReductionError, match=r"AssertionError; leave out img_size, and use data.image_size=224"):
        build_model(run.model_copy(update={"model": model}), device="meta")


def test_the_number_of_patches_is_that_of_the_model(pictures: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path / "tiny.toml", pictures, "vit_tiny_patch16_224")
    model = build_model(recipes.runs(recipes.load(str(tmp_path / "tiny.toml")), tmp_path)[0], device="meta")
    assert f"# {model.patch_embed.num_patches} patches; " in (tmp_path / "tiny.toml").read_text()


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit_tiny_patch16_384", 384),
        ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", 224),
        ("deit_tiny_distilled_patch16_224", 0),
    ],
)
def test_pretrained_weights_are_offered_with_what_must_change(
    name: str, size: int, pictures: Path, tmp_path: Path
) -> None:
    path = tmp_path / "mine.toml"
    write_recipe(path, pictures, name)
    text = path.read_text()
    offer = " ".join(
        line.strip("# ") for line in text.partition("# weights = ")[2].partition("[model.kwargs]")[0].splitlines()
    )
    assert ("img_size and patch_size" in offer) == ("data.image_size=" in offer) == bool(size)
    assert f"data.image_size={size}" in offer or not size
    assert "Remove the variant thin" in offer
    lines = []
    for line in text.splitlines():  # as the comment says
        if line.startswith("# weights"):
            line = line.removeprefix("# ")
        elif size and line.startswith("image_size"):
            line = f"image_size = {size}"
        if not line.startswith("thin") and not (size and line.startswith(("img_size", "patch_size"))):
            lines.append(line)
    path.write_text("\n".join(lines))
    recipe = recipes.load(str(path))
    assert recipe.model.weights == "pretrained"
    native = build_model(recipes.runs(recipe, tmp_path)[0], device="meta").patch_embed.img_size
    assert native == (recipe.data.image_size,) * 2


@pytest.mark.slow
def test_pretrained_weights_are_offered_only_where_there_are_some(pictures: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path / "none.toml", pictures, "vit_small_patch16_36x1_224")
    assert "weights" not in (tmp_path / "none.toml").read_text().partition("[model]")[2].partition("[model.kwargs]")[
        0
    ].replace("random initial weights", "")


def test_a_file_that_exists_is_not_overwritten(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.toml").write_text("mine")
    assert new(str(tmp_path / "mine.toml"), "--data", str(pictures)) == 2
    assert "is not overwritten" in capsys.readouterr().err
    assert (tmp_path / "mine.toml").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (["mine.txt", "--data", "pictures"], "a recipe is a .toml file; use --new mine.toml"),
        ([".", "--data", "pictures"], "a recipe is a .toml file; use --new mine.toml"),
        (["..", "--data", "pictures"], "a recipe is a .toml file; use --new ../mine.toml"),
        (["/", "--data", "pictures"], "a recipe is a .toml file; use --new /mine.toml"),
        ([f"{'m' * 300}.toml", "--data", "pictures"], "cannot be written (File name too long); give another name"),
        ([f"{'m' * 300}/mine.toml", "--data", "pictures"], "there is no folder"),
        (["mi\nne.toml", "--data", "pictures"], "rename it"),
        (["mine.toml", "--data", "p" * 300], "does not exist"),
        (["mine.toml", "--data", "latin\udce9"], "--data 'latin\\udce9': a recipe is text in UTF-8"),
        (["mine.toml", "--data", "pictures", "--model", "resnet18"], "--model resnet18: no MLP was found"),
        (["no/such/mine.toml", "--data", "pictures"], "there is no folder 'no/such'"),
        (["mine.toml", "--data", "missing"], "--data 'missing' does not exist"),
        (["mine.toml", "--data", "pictures", "--model", "vit_tinny"], "timm has no such model; did you mean"),
        (["mine.toml"], "--data DIR is missing"),
        (["mine.toml", "--data", "pictures", "digits"], "'digits' does not belong to it"),
        (["mine.toml", "--data", "empty"], "no class folder and no image"),
        (["mine.toml", "--data", "single"], "holds 1 class folder"),
        (["mine.toml", "--data", "both"], "hold 1 class folder"),
    ],
)
def test_what_is_refused_leaves_no_file(
    words: list[str], fact: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "pictures", count=4)
    draw(tmp_path / "single", classes=1, count=4)
    for split in ("train", "val"):
        shutil.copytree(tmp_path / "single", tmp_path / "both" / split)
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin\udce9").symlink_to(tmp_path / "pictures")
    before = sorted(tmp_path.rglob("*.*"))
    assert new(*words) == 2
    assert fact in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*.*")) == before


def test_data_and_model_belong_to_new(capsys: pytest.CaptureFixture[str]) -> None:
    assert recipes.main(["digits", "--data", "pictures"]) == 2
    assert "--new FILE.toml is missing" in capsys.readouterr().err


def test_a_link_to_nothing_counts_as_a_file(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ReductionError, match="is not overwritten"):
        write_recipe(tmp_path / "mine.toml", pictures)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ..noload.. loader strategy is deprecated:DeprecationWarning")  # mlflow's tables
def test_it_trains_as_it_is(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    path, output = tmp_path / "mine.toml", tmp_path / "out"
    write_recipe(path, pictures)
    assert recipes.main([str(path), "seeds=[42]", "--output", str(output)]) == 0
    document = json.loads((output / "results.json").read_text())
    assert list(document["variants"]) == ["baseline", "grouped", "shallow", "thin"]
    assert document["warnings"] == []
    assert document["variants"]["baseline"]["top1_mean"] > 33.3 + 20
    assert "arning" not in capsys.readouterr().out
