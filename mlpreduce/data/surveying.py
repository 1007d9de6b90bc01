"""What a data set holds, looked at without training: how many images, which classes, how large the pictures are."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass

from mlpreduce.data.loaders import digits_tensors
from mlpreduce.data.settings import DataSettings
from mlpreduce.data.sources import check, check_name, open_source
from mlpreduce.errors import ReductionError

__all__ = ["Survey", "survey"]


@dataclass(frozen=True)
class Survey:
    """What a data set holds.

    Attributes:
        train: training images; of a stream, images in an epoch.
        val: validation images.
        classes: number of classes.
        side: median of the shorter side of some training pictures in pixels, before they are resized; None = not known.
        gray: whether those pictures have no colours.
        smallest_class: training images of the smallest class; None = not known.
    """

    train: int
    val: int
    classes: int
    side: int | None = None
    gray: bool = False
    smallest_class: int | None = None


def survey(data: DataSettings) -> Survey | None:
    """Count images and classes as a run will, and look at the size of some pictures. Nothing is downloaded.

    Args:
        data: which images.

    Returns:
        What is there; None where `data.root` is not, so that only the name could be checked, and for Hugging Face data sets,
        which may have to be downloaded.

    Raises:
        ReductionError: an unknown `data.name`, a package is missing, or what is in `data.root` cannot be trained on.

    Example:
        >>> survey(DataSettings(name="digits", image_size=8)).train
        1437
    """
    check_name(data)
    if data.name == "digits":
        (_, labels), (_, val_labels) = digits_tensors()
        return Survey(len(labels), len(val_labels), len(labels.unique()))
    if data.name in ("synthetic", "fractals"):
        check(data)
        return Survey(data.train_samples, data.val_samples, data.classes)
    if data.name.startswith("hfds/") or not data.root or not os.path.exists(data.root):
        return None
    check(data)
    source = open_source(data, micro_batch=1, rank=0, world=1)
    if not source.train_samples or not source.val_samples:
        raise ReductionError(
            f"data.root={data.root!r}: {source.train_samples} training and {source.val_samples} validation images; both need "
            f"at least one"
        )
    if source.set_epoch is not None:
        return Survey(source.train_samples, source.val_samples, source.num_classes)
    side, gray = source.train.pictures()
    of_each = [label for _, label in getattr(getattr(source.train.images, "reader", None), "samples", ())]
    smallest = min(Counter(of_each).values(), default=None)
    return Survey(source.train_samples, source.val_samples, source.num_classes, side, gray, smallest)
