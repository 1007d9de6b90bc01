"""Class folders without a validation set: a share of each class is held out, always the same images."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

from mlpreduce.data.folders import check_places
from mlpreduce.errors import ReductionError

__all__ = ["held_out"]


def held_out(root: str, share: float) -> tuple[Any, Any]:
    """Open the class folders in `root` as a training and a validation set.

    The images of a class are ranked by the SHA-256 of their path below `root`, and the first of them are held out. So no
    seed, machine or order of files changes which they are, and a new image moves at most one other.

    Args:
        root: holds one folder of images per class.
        share: of each class, held out for validation: above 0, below 1; at least one image, and at most all but one.

    Returns:
        Two `timm.data.ImageDataset`, of the same classes and without a common image.

    Raises:
        ReductionError: there is no image, one is not directly in a class folder, or a class has fewer than 2.
    """
    from timm.data import ImageDataset
    from timm.data.readers.reader_image_folder import ReaderImageFolder

    call = f"data.val_share={share:g}, data.root={root!r}"
    try:
        reader: Any = ReaderImageFolder(root)
    except (RuntimeError, OSError) as error:
        raise ReductionError(f"{call}: the images cannot be listed: {error}") from error
    check_places(root, (path for path, _ in reader.samples))
    of_class: dict[int, list[int]] = {}
    for number, (_, label) in enumerate(reader.samples):
        of_class.setdefault(label, []).append(number)
    single = [name for name, label in reader.class_to_idx.items() if len(of_class[label]) < 2]
    if single:
        raise ReductionError(
            f"{call}: {len(single)} of {len(of_class)} classes have 1 image ({', '.join(single[:5])}), and one is needed to "
            f"train and one to validate; add images, or remove the folders"
        )
    held: set[int] = set()
    for numbers in of_class.values():
        ranked = sorted(numbers, key=lambda number: _rank(reader.filename(number)))
        held.update(ranked[: min(max(1, round(share * len(numbers))), len(numbers) - 1)])

    def part(numbers: list[int]) -> Any:
        chosen = copy.copy(reader)
        chosen.samples = [reader.samples[number] for number in numbers]
        return ImageDataset(root, reader=chosen)

    every = range(len(reader.samples))
    return part([number for number in every if number not in held]), part(sorted(held))


def _rank(path: str) -> bytes:
    """What an image is ranked by: its path below the root, with slashes on every system."""
    return hashlib.sha256(path.replace("\\", "/").encode("utf-8", "surrogateescape")).digest()
