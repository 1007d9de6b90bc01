"""Images that cannot be read: an error that names the file, or the next image in its place, counted."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

from mlpreduce.errors import ReductionError

if TYPE_CHECKING:
    import torch

__all__ = ["REMEDIES", "CheckedImages", "Tally", "UnreadableImage"]

_LOG = logging.getLogger(__name__)
REMEDIES = {
    "training": "mend or remove the file, or use data.on_bad_image='skip' to train on the next one in its place",
    "validation": "mend or remove the file: in validation no image is replaced, as the accuracy would be of other images",
}
_IN_A_ROW = 10  # unreadable images one after another: more is no accident (timm's number)


class UnreadableImage(ReductionError):
    """An image that cannot be read; the message names its file."""

    def __init__(self, text: str) -> None:
        # From a loading process torch gives the traceback as text and makes the error anew: only the message is wanted.
        super().__init__(text.rpartition(f"{UnreadableImage.__name__}: ")[2].strip())


class Tally:
    """Counts unreadable images over all loading processes of a worker, in shared memory.

    Args:
        images: images in the data set; 0 where they have no numbers (streams).
    """

    def __init__(self, images: int) -> None:
        import multiprocessing

        self._replaced = multiprocessing.Value("q", 0)
        self._unreadable = multiprocessing.RawArray("B", images)  # 1 where an image could not be read

    def add(self, index: int | None = None) -> None:
        """Count one image that was replaced; `index` is its number."""
        with self._replaced.get_lock():
            self._replaced.value += 1
        if index is not None:
            self._unreadable[index] = 1  # always to the same value, so without a lock

    @property
    def replaced(self) -> int:
        """How often an image took the place of an unreadable one."""
        return int(self._replaced.value)

    def indices(self) -> list[int]:
        """The numbers of the images that could not be read."""
        return [index for index, bad in enumerate(bytes(self._unreadable)) if bad]


class CheckedImages:
    """A data set of timm or torchvision, read with a policy for unreadable images.

    timm's own `ImageDataset` replaces an unreadable image without telling; here it is an error, or counted.

    Args:
        images: `timm.data.ImageDataset`, or a data set of torchvision that gives (PIL image, label).
        split: for messages, and for what they recommend.
        tally: counts replaced images; None = never replace, raise `UnreadableImage`.
    """

    def __init__(self, images: Any, split: Literal["training", "validation"], tally: Tally | None) -> None:
        self.images = images
        self.transform: Any = None  # set by timm's create_loader
        self._split = split
        self._tally = tally

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        damaged = _damaged()
        for attempt in range(_IN_A_ROW):
            number = (index + attempt) % len(self)
            try:
                image, label = self._read(number)
            except damaged as error:
                fact = f"{self.file(number)}: image {number} of the {self._split} set cannot be read ({_text(error)})"
                if self._tally is None:
                    raise UnreadableImage(f"{fact}; {REMEDIES[self._split]}") from error
                self._tally.add(number)
                _LOG.warning("%s; the next one takes its place", fact)
            else:
                return (image if self.transform is None else self.transform(image)), label
        raise UnreadableImage(
            f"{self.file(index)}: image {index} of the {self._split} set and the {_IN_A_ROW - 1} after it cannot be read; "
            "data.on_bad_image='skip' is for single damaged files: look whether the storage can be read"
        )

    def file(self, index: int) -> str:
        """The file of image `index`; without one, the number."""
        if hasattr(self.images, "reader"):
            found = self.images.filename(index, absolute=True)
        else:
            found = getattr(self.images, "samples", {index: [None]})[index][0]
        return str(found) if found else f"number {index}"

    def pictures(self, count: int = 32) -> tuple[int | None, bool]:
        """Look at pictures spread evenly over the set, as they are stored; those that cannot be read are left out.

        Args:
            count: how many, at most.

        Returns:
            The median of the shorter side, in pixels, None where none can be read; and whether all are without colours.
        """
        from statistics import median_low

        from PIL import Image

        sides, gray = [], []
        for number in range(min(count, len(self))):
            index = number * len(self) // min(count, len(self))
            try:
                if hasattr(self.images, "reader"):
                    file, _ = self.images.reader[index]
                    with file, Image.open(file) as image:  # the header alone
                        size, bands = image.size, image.getbands()
                else:
                    image = self.images[index][0]
                    size, bands = image.size, image.getbands()
            except _damaged():
                continue
            sides.append(min(size))
            gray.append(bands[0] in ("1", "L", "I", "F"))
        return (median_low(sides), all(gray)) if sides else (None, False)

    def _read(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        if not hasattr(self.images, "reader"):
            image, label = self.images[index]
            return image.convert("RGB"), label
        file, label = self.images.reader[index]
        with file, Image.open(file) as image:
            return image.convert("RGB"), label


def _damaged() -> tuple[type[Exception], ...]:
    """What Pillow raises for damaged files; OSError is also what a missing file gives."""
    from PIL import Image

    return (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")
