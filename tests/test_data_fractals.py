from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from mlpreduce.data import AugmentSettings, DataSettings, check, load
from mlpreduce.data.fractals import _JITTER, FractalImages, _draw_class
from mlpreduce.errors import ReductionError

FRACTALS = DataSettings(
    name="fractals", image_size=32, classes=10, train_samples=400, val_samples=100, workers=0, eval_batch_size=50
)


def gray(images: FractalImages) -> tuple[torch.Tensor, torch.Tensor]:
    """All images as rows of brightness (images, pixels), and their labels."""
    pairs = [images[index] for index in range(len(images))]
    pixels = np.stack([np.asarray(image, dtype=np.float32).mean(2).ravel() / 128 - 1 for image, _ in pairs])
    return torch.from_numpy(pixels), torch.tensor([label for _, label in pairs])


@pytest.mark.parametrize("size", [1, 8, 33, 224])
def test_any_size_and_number(size: int) -> None:
    data = FRACTALS.model_copy(update={"image_size": size, "classes": 3, "train_samples": 7})
    images = FractalImages(data, "train")
    assert len(images) == 7
    assert [label for _, label in (images[i] for i in range(7))] == [0, 1, 2, 0, 1, 2, 0]
    assert images[6][0].size == (size, size)
    with pytest.raises(IndexError):
        images[7]


def test_an_image_follows_from_split_and_index() -> None:
    images = FractalImages(FRACTALS, "train")
    late = np.asarray(images[321][0])
    assert np.array_equal(late, np.asarray(FractalImages(FRACTALS, "train")[321][0]))  # no image before it was drawn
    assert not np.array_equal(late, np.asarray(images[331][0]))
    val = FractalImages(FRACTALS, "val")
    assert not np.array_equal(np.asarray(images[3][0]), np.asarray(val[3][0]))


@pytest.mark.processes
def test_an_image_is_the_same_in_every_process() -> None:
    late = np.asarray(FractalImages(FRACTALS, "train")[321][0])
    code = (
        "import hashlib\n"
        "from mlpreduce.data import DataSettings\n"
        "from mlpreduce.data.fractals import FractalImages\n"
        f"images = FractalImages(DataSettings(**{FRACTALS.model_dump()!r}), 'train')\n"
        "print(hashlib.sha256(images[321][0].tobytes()).hexdigest())"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.strip() == hashlib.sha256(late.tobytes()).hexdigest()


def test_loading_processes_give_the_same_images() -> None:
    few = FRACTALS.model_copy(update={"train_samples": 16, "val_samples": 20})
    batches = []
    for workers in (0, 2):
        loaders = load(few.model_copy(update={"workers": workers}), AugmentSettings(), micro_batch=8)
        batches.append(torch.cat([images for images, _ in loaders.val]))
    assert torch.equal(*batches)


def test_maps_stay_contractive_under_jitter() -> None:
    for number in range(50):
        system = _draw_class(number)
        linear = system.maps[:, :4].reshape(-1, 2, 2)
        # each coefficient changes by at most the jitter, so the norm by at most the jitter times the Frobenius norm
        worst = np.linalg.norm(linear, 2, axis=(1, 2)) + _JITTER * np.linalg.norm(linear, axis=(1, 2))
        assert worst.max() < 1
        assert system.chances.sum() == pytest.approx(1)


def test_classes_can_be_learned() -> None:
    # a linear probe on brightness; chance is 10 %, and classes beyond the seen instances must be told apart
    torch.set_num_threads(1)
    (images, labels), (held, truth) = (gray(FractalImages(FRACTALS, split)) for split in ("train", "val"))  # type: ignore[arg-type]
    probe = torch.nn.Linear(1024, 10)
    optimizer = torch.optim.AdamW(probe.parameters(), 1e-3)
    for _ in range(100):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(probe(images), labels).backward()
        optimizer.step()
    assert (probe(held).argmax(1) == truth).double().mean() > 0.5


def test_counts_are_required() -> None:
    with pytest.raises(ReductionError, match=r"data.name='fractals': train_samples=0.*at least 2 classes"):
        check(DataSettings(name="fractals"))
    check(FRACTALS)
