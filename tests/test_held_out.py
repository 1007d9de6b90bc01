"""Class folders without a validation set, and what `survey` tells of a data set."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mlpreduce import recipe as recipes
from mlpreduce.data import AugmentSettings, DataSettings, Survey, calibration, check, load, survey
from mlpreduce.data.held_out import held_out
from mlpreduce.data.sources import open_source
from mlpreduce.errors import ReductionError
from mlpreduce.train import Run


def draw(path: Path, value: int, size: tuple[int, int] = (12, 16), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).convert(mode).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for label, (name, count) in enumerate({"cat": 10, "dog": 5, "emu": 2}.items()):
        for number in range(count):
            draw(tmp_path / "pictures" / name / f"{number}.png", 100 * label + number)
    return tmp_path / "pictures"


def settings(root: Path, **changes: Any) -> DataSettings:
    return DataSettings(**{"root": str(root), "image_size": 12, "workers": 0, "val_share": 0.2, **changes})


def names(images: Any) -> list[str]:
    return sorted(images.filename(index) for index in range(len(images)))


def test_a_share_of_each_class_is_held_out_and_none_is_in_both(root: Path) -> None:
    train, val = held_out(str(root), 0.2)
    assert [sum(name.startswith(kind) for name in names(val)) for kind in ("cat", "dog", "emu")] == [2, 1, 1]
    assert not set(names(train)) & set(names(val))
    assert len(train) + len(val) == 17
    assert train.reader.class_to_idx == val.reader.class_to_idx == {"cat": 0, "dog": 1, "emu": 2}
    assert all(label == train.reader.class_to_idx[Path(path).parent.name] for path, label in train.reader.samples)


def test_the_same_images_are_held_out_wherever_the_folder_is(root: Path, tmp_path: Path) -> None:
    before = names(held_out(str(root), 0.2)[1])
    shutil.copytree(root, tmp_path / "elsewhere")
    assert names(held_out(str(tmp_path / "elsewhere"), 0.2)[1]) == before


def test_a_new_image_moves_at_most_one_other(root: Path) -> None:
    before = set(names(held_out(str(root), 0.2)[1]))
    for number in range(10, 14):
        draw(root / "cat" / f"{number}.png", 0)
        after = set(names(held_out(str(root), 0.2)[1]))
        assert len(before - after) <= 1
        before = after


@pytest.mark.parametrize(("share", "left"), [(0.01, 16), (0.99, 1)])
def test_both_sides_keep_an_image_of_each_class(root: Path, share: float, left: int) -> None:
    shutil.rmtree(root / "dog")
    shutil.rmtree(root / "emu")
    for number in range(17):
        draw(root / "cat" / f"{number}.png", 0)
    train, val = held_out(str(root), share)
    assert (len(train), len(val)) == (left, 17 - left)


def test_loaders_count_and_calibration_takes_training_images_only(root: Path) -> None:
    data = settings(root)
    loaders = load(data, AugmentSettings(), micro_batch=4)
    assert (loaders.train_samples, loaders.val_samples, loaders.num_classes, loaders.side) == (13, 4, 3, 12)
    assert sum(len(labels) for _, labels in loaders.val) == 4
    assert sum(len(labels) for _, labels in calibration(data, 100)) == 13
    source = open_source(data, micro_batch=1, rank=0, world=1)
    assert {source.train.file(index) for index in range(13)}.isdisjoint(source.val.file(index) for index in range(4))


def test_a_survey_counts_classes_and_looks_at_pictures(root: Path) -> None:
    assert survey(settings(root)) == Survey(13, 4, 3, side=12, gray=False, smallest_class=1)
    for path in root.rglob("*.png"):
        draw(path, 9, mode="L")
    found = survey(settings(root))
    assert found is not None
    assert found.gray
    (root / "cat" / "0.png").write_bytes(b"no image")  # left out, not told: training tells it by name
    assert survey(settings(root)) == found


def test_a_survey_of_data_that_are_not_here(tmp_path: Path) -> None:
    assert survey(DataSettings(root=str(tmp_path / "missing"))) is None
    assert survey(DataSettings(root="")) is None
    assert survey(DataSettings(name="torch/cifar10", root=str(tmp_path / "missing"))) is None
    with pytest.raises(ReductionError, match="unknown data set"):
        survey(DataSettings(name="folders"))


def test_what_cannot_be_held_out_is_refused(root: Path, tmp_path: Path) -> None:
    draw(root / "fox" / "only.png", 1)
    with pytest.raises(ReductionError, match=r"1 of 4 classes have 1 image \(fox\)"):
        load(settings(root), AugmentSettings(), micro_batch=4)
    for split in ("train", "val"):
        shutil.copytree(root, tmp_path / "both" / split)
    with pytest.raises(
        ReductionError, match=r"holds train/ and val/, which would become classes.*use data.val_share=0"
    ):
        check(settings(tmp_path / "both"))
    shutil.rmtree(tmp_path / "both" / "val")
    with pytest.raises(ReductionError, match=r"holds train/.*use data.root='.*train'"):
        check(settings(tmp_path / "both"))
    with pytest.raises(ReductionError, match="holds 1 class folder"):
        check(settings(_single(tmp_path)))
    with pytest.raises(ReductionError, match="does not exist"):
        check(settings(tmp_path / "missing"))
    with pytest.raises(ReductionError, match=r"or one folder of images per class, with data.val_share=0.2"):
        check(settings(root, val_share=0.0))


def test_images_that_are_not_directly_in_a_class_folder_are_refused(tmp_path: Path) -> None:
    for number, place in enumerate(["cats/young", "cats/old", "dogs/young", "dogs/old"]):
        for image in range(3):
            draw(tmp_path / "deep" / place / f"{image}.png", number)
    for open_them in (lambda: check(settings(tmp_path / "deep")), lambda: held_out(str(tmp_path / "deep"), 0.2)):
        with pytest.raises(ReductionError, match=r"\(cats/.*dogs/.*put them directly into their class folder"):
            open_them()
    draw(tmp_path / "deep" / "cats" / "0.png", 1)
    draw(tmp_path / "deep" / "dogs" / "0.png", 2)
    with pytest.raises(
        ReductionError, match=r"4 folders hold images in .*\(cats/old, cats/young, dogs/old, dogs/young\)"
    ):
        held_out(str(tmp_path / "deep") + "/", 0.2)


def _single(tmp_path: Path) -> Path:
    draw(tmp_path / "single" / "cat" / "0.png", 1)
    return tmp_path / "single"


def test_only_class_folders_are_held_out_of() -> None:
    with pytest.raises(ReductionError, match=r"data.val_share=0.2: only data.name='folder' holds images out"):
        recipes.load("digits", ["data.val_share=0.2"])


def test_outputs_of_earlier_versions_have_the_same_identity() -> None:
    plain = Run(recipe="r", variant="v", directory="/r")
    held = plain.model_copy(update={"data": plain.data.model_copy(update={"val_share": 0.2})})
    assert plain.config_hash != held.config_hash
    before = recipes.load("digits").model_dump(mode="json")
    del before["data"]["val_share"]
    assert recipes.differences(before, recipes.load("digits").model_dump(mode="json")) == []


def test_dry_run_counts_the_folder_that_is_there(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [
        "digits_tiny",
        "--dry-run",
        "data.name=folder",
        f"data.root={root}",
        "data.val_share=0.2",
        "train.batch_size=4",
    ]
    small = ["data.train_samples=99", "model.kwargs.in_chans=3", "train.ema_decay=0.0", "launch.workers=0"]
    assert recipes.main([*given, *small, "model.kwargs.num_classes=3"]) == 0
    text = capsys.readouterr().out
    assert (
        "13 training images (data.train_samples=99 is another number), 4 validation images, 3 classes, counted" in text
    )
    assert "3 an epoch" in text  # of 4 images each
    assert recipes.main([*given, *small]) == 2
    assert "has 10 classes, data.name='folder' has 3; use model.kwargs.num_classes=3" in capsys.readouterr().err
