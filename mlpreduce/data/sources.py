"""Where images come from: class folders, torchvision, Hugging Face, shards, and formulas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlpreduce.data.folders import check_folders, check_places, compare_classes
from mlpreduce.data.held_out import held_out
from mlpreduce.data.reading import CheckedImages, Tally
from mlpreduce.data.settings import DataSettings
from mlpreduce.errors import ReductionError, did_you_mean, require

__all__ = ["Source", "check", "check_name", "open_source"]

_MADE = ("synthetic", "fractals")
_NAMES = ("folder", "digits", *_MADE)
_TORCHVISION = (
    "cifar10",
    "cifar100",
    "fashion_mnist",
    "imagenet",
    "inaturalist",
    "kmnist",
    "mnist",
    "places365",
    "qmnist",
)
_PREFIXES = {"torch": None, "hfds": "datasets", "wds": "webdataset"}  # and the package each needs


@dataclass(frozen=True)
class Source:
    """Images of one data set, before any transform.

    Attributes:
        train: the training set.
        val: the validation set; of streams, this worker's share.
        num_classes: how many classes it has.
        train_samples: images in an epoch, over all workers.
        val_samples: images in the validation set, over all workers.
        tally: counts training images that could not be read and were replaced.
        set_epoch: sets the order of an epoch of a stream, from (seed, epoch); None = the loader's sampler does.
    """

    train: Any
    val: Any
    num_classes: int
    train_samples: int
    val_samples: int
    tally: Tally
    set_epoch: Callable[[int, int], None] | None = None


def check(data: DataSettings) -> None:
    """Whether the data can be found, before anything is started.

    Raises:
        ReductionError: unknown `data.name`, a package is missing, or `data.root` does not hold what it must.
    """
    check_name(data)
    if data.name in _MADE and not (data.train_samples and data.val_samples and data.classes > 1):
        raise ReductionError(
            f"data.name={data.name!r}: train_samples={data.train_samples}, val_samples={data.val_samples}, classes="
            f"{data.classes}; give the number of images to make (at least 1 each) and at least 2 classes"
        )
    if data.name == "folder":
        check_folders(data.root, data.val_share)
    elif data.name not in _NAMES:
        _check_place(data)


def check_name(data: DataSettings) -> None:
    """Check `data.name` as a run would, wherever the data are.

    Raises:
        ReductionError: an unknown name, one that is not supported, or a package is missing.
    """
    if data.name == "digits":
        require("data.name='digits'", "sklearn")
    if data.name in _NAMES:
        return
    prefix, _, rest = data.name.partition("/")
    if prefix in ("hfids", "tfds"):
        raise ReductionError(
            f"data.name={data.name!r}: timm's {prefix} reader shuffles in a buffer that fills as files arrive, and shards are "
            "split where the host has them, so a run could not go on to the same images; use hfds/ (the same data on disk, "
            "any order) or wds/ (shards on disk)"
        )
    if prefix not in _PREFIXES or (prefix != "wds" and not rest):
        given = f"{prefix}/..." if "/" in data.name else data.name
        known = [*_NAMES, *(f"{name}/..." for name in _PREFIXES)]
        raise ReductionError(f"data.name={data.name!r}: unknown data set{did_you_mean(given, known)}")
    if package := _PREFIXES[prefix]:
        require(f"data.name={data.name!r}", package)
    if prefix == "torch" and not _is_torchvision(rest):
        raise ReductionError(
            f"data.name={data.name!r}: timm opens no such data set of torchvision{did_you_mean(rest, _TORCHVISION)}"
        )


def _is_torchvision(name: str) -> bool:
    """Whether timm knows a data set of torchvision by this name: asked of a folder without data, it misses the data only."""
    from tempfile import TemporaryDirectory

    from timm.data import create_dataset

    with TemporaryDirectory() as empty:
        try:
            create_dataset(f"torch/{name}", root=empty, split="train")
        except AssertionError:
            return False
        except (RuntimeError, OSError, ValueError, ImportError):  # it is known, and finds no files
            return True
    return True


def open_source(data: DataSettings, *, micro_batch: int, rank: int, world: int) -> Source:
    """The images of `data` for worker `rank` of `world`.

    Raises:
        ReductionError: they are not there, or training and validation have different classes.
    """
    if data.name == "synthetic":
        from mlpreduce.data.synthetic import SyntheticImages

        return _made(data, SyntheticImages)
    if data.name == "fractals":
        from mlpreduce.data.fractals import FractalImages

        return _made(data, FractalImages)
    skip = data.on_bad_image == "skip"
    if data.name.startswith("wds/"):
        from mlpreduce.data.streams import open_streams, stream_order

        tally = Tally(0)
        train, val, train_samples, val_samples = open_streams(data, micro_batch, rank, world, tally if skip else None)
        return Source(train, val, data.classes, train_samples, val_samples, tally, stream_order(train.reader))
    if data.val_share:
        train, val = held_out(data.root, data.val_share)
    else:
        train, val = _open(data, "train"), _open(data, "validation")
    train_names, val_names = _class_names(train), _class_names(val)
    compare_classes(train_names, val_names, f"data.name={data.name!r}")
    classes = len(train_names) or data.classes
    if not classes:
        raise ReductionError(f"data.name={data.name!r}: the data set does not tell its classes; give data.classes")
    tally = Tally(len(train))
    checked = CheckedImages(train, "training", tally if skip else None)
    return Source(checked, CheckedImages(val, "validation", None), classes, len(train), len(val), tally)


def _check_place(data: DataSettings) -> None:
    """Check that `data.root` is given where torchvision's data sets and shards need it."""
    prefix = data.name.partition("/")[0]
    if prefix == "torch" and not data.root:
        raise ReductionError(
            f"data.name={data.name!r}: data.root='' is not set; give the directory in which torchvision keeps this data set"
        )
    if prefix != "wds":
        return
    if not data.root or not Path(data.root).is_dir():
        raise ReductionError(
            f"data.root={data.root!r} is no directory; for {data.name!r} it must hold the .tar shards, and _info.json, which "
            "lists them by split"
        )
    if data.classes < 2:
        raise ReductionError(
            f"data.name={data.name!r}: data.classes={data.classes}, and shards do not tell; give the number of classes"
        )


def _made(data: DataSettings, images: Callable[..., Any]) -> Source:
    return Source(
        images(data, "train"), images(data, "val"), data.classes, data.train_samples, data.val_samples, Tally(0)
    )


def _open(data: DataSettings, split: str) -> Any:
    from timm.data import create_dataset

    name = "" if data.name == "folder" else data.name
    if name:
        split = data.train_split if split == "train" else data.val_split
    try:
        images: Any = create_dataset(name, root=data.root or None, split=split)
    except (RuntimeError, ValueError, OSError, AssertionError, ImportError) as error:
        raise ReductionError(
            f"data.name={data.name!r}, data.root={data.root!r}: the split {split!r} cannot be opened ({error}); look at "
            "data.root, data.train_split and data.val_split. Nothing is downloaded for torch/..."
        ) from error
    if not name:
        check_places(images.reader.root, (path for path, _ in images.reader.samples))
    return images


def _class_names(images: Any) -> list[str]:
    """Names of the classes in the order of their labels; empty where the data set has none."""
    reader = getattr(images, "reader", None)
    if reader is None:  # torchvision: a class of ImageNet has several names
        return [name if isinstance(name, str) else ", ".join(name) for name in getattr(images, "classes", None) or []]
    return list(getattr(reader, "class_to_idx", None) or {})
