"""Synthetic images, made in memory from a seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from mlpreduce.data.settings import DataSettings

if TYPE_CHECKING:
    import numpy as np

__all__ = ["SyntheticImages"]


class SyntheticImages:
    """Images made from a seed: a coloured pattern per class, shifted, with changing contrast and noise. No real data.

    Args:
        data: number of images and classes, and their size.
        split: "train" or "val"; both show the same patterns.
    """

    def __init__(self, data: DataSettings, split: Literal["train", "val"]) -> None:
        import numpy as np
        from PIL import Image

        self.transform: Callable[[Any], Any] | None = None  # set by timm's create_loader
        count = data.train_samples if split == "train" else data.val_samples
        size = data.image_size
        patterns = np.random.default_rng(0).integers(0, 256, (data.classes, 4, 4, 3), dtype=np.uint8)
        large = [
            np.asarray(Image.fromarray(p).resize((size, size), Image.Resampling.BICUBIC), np.float32) for p in patterns
        ]
        rng = np.random.default_rng(1 if split == "train" else 2)
        self.labels = np.arange(count) % data.classes
        self.images: np.ndarray[Any, Any] = np.empty((count, size, size, 3), np.uint8)
        for number, label in enumerate(self.labels):
            shift = rng.integers(-(size // 8), size // 8 + 1, 2)
            image = (np.roll(large[label], shift, (0, 1)) - 128) * rng.uniform(0.3, 1.0) + 128
            self.images[number] = np.clip(image + rng.normal(0, 48, image.shape), 0, 255)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        image = Image.fromarray(self.images[index])
        return (image if self.transform is None else self.transform(image)), int(self.labels[index])
