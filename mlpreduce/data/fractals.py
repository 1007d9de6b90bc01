"""Images made from formulas: attractors of iterated function systems, any number of any size, without a data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mlpreduce.data.settings import DataSettings

if TYPE_CHECKING:
    import numpy as np

__all__ = ["FractalImages", "System"]

_JITTER = 0.08  # largest relative change of a coefficient between the instances of a class
_BURN_IN = 16  # steps before points are drawn, so that where they started does not show
_STEPS = 16  # steps whose points are drawn
_FILLED = 0.2  # smallest share of the 32 x 32 cells of a class that its points visit


@dataclass(frozen=True)
class System:
    """An iterated function system: affine maps of the plane, x -> A x + b, and how often each is chosen.

    Attributes:
        maps: A and b of each map, (maps, 6), as a11, a12, a21, a22, b1, b2.
        chances: probability of each map, (maps,).
    """

    maps: np.ndarray[Any, Any]
    chances: np.ndarray[Any, Any]


class FractalImages:
    """Images of fractals: a class is an iterated function system, an image one of its attractors, drawn by chance.

    The classes follow from their number alone. An image follows from (split, index) alone, so it has the same bits in every
    process: the coefficients of its class, each changed by up to 8 %, points from the chaos game, flips and two colours.
    It is drawn when it is asked for.

    Args:
        data: number of images and classes, and their size in pixels.
        split: "train" or "val"; both show the same classes, no image is in both.

    Example:
        >>> data = DataSettings(name="fractals", image_size=32, classes=10, train_samples=1000, val_samples=100)
        >>> image, label = FractalImages(data, "train")[7]
        >>> image.size, label
        ((32, 32), 7)

    Source: formula-driven pre-training, FractalDB (Kataoka et al., arXiv 2101.08515): the chaos game, |det A| as the chance
    of a map, and the smallest filled share of a class are theirs. Maps are drawn by their singular values, so that each is
    contractive for certain; images have colours; flips and jitter are drawn for each image.
    """

    def __init__(self, data: DataSettings, split: Literal["train", "val"]) -> None:
        self.transform: Callable[[Any], Any] | None = None  # set by timm's create_loader
        self._count = data.train_samples if split == "train" else data.val_samples
        self._size = data.image_size
        self._split = 0 if split == "train" else 1
        self._systems = [_draw_class(number) for number in range(data.classes)]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        if not 0 <= index < self._count:
            raise IndexError(f"image {index} of {self._count}")
        label = index % len(self._systems)
        image = Image.fromarray(self._draw(index, self._systems[label]))
        return (image if self.transform is None else self.transform(image)), label

    def _draw(self, index: int, system: System) -> np.ndarray[Any, Any]:
        """One image (size, size, 3), 0..255."""
        import numpy as np

        rng = np.random.default_rng((1, self._split, index))
        changed = system.maps * rng.uniform(1 - _JITTER, 1 + _JITTER, system.maps.shape)
        points = max(96, self._size**2 // (2 * _STEPS))
        density = _density(System(changed, system.chances), rng, self._size, points)
        if rng.random() < 0.5:
            density = density[::-1]
        if rng.random() < 0.5:
            density = density[:, ::-1]
        shade = np.log1p(density)[..., None] / np.log1p(density.max())
        dark, bright = rng.uniform(0, 64, 3), rng.uniform(128, 255, 3)
        image: np.ndarray[Any, Any] = (dark + (bright - dark) * np.sqrt(shade)).astype(np.uint8)
        return image


def _draw_class(number: int) -> System:
    """The system of class `number`: 2 to 6 contractive maps whose attractor is no dust and no line."""
    import numpy as np

    rng = np.random.default_rng((0, number))
    while True:
        count = int(rng.integers(2, 7))
        turn, tilt = rng.uniform(-np.pi, np.pi, (2, count))
        large = rng.uniform(0.3, 0.85, count)  # singular values below 1: contractive, and so are its jittered copies
        small = large * rng.uniform(0.2, 1.0, count) * rng.choice((-1, 1), count)  # a negative one mirrors
        c, s, d, t = np.cos(turn), np.sin(turn), np.cos(tilt), np.sin(tilt)
        # R(turn) diag(large, small) R(tilt), written out: no BLAS, whose sums may differ between processes
        maps = np.stack(
            [
                c * large * d - s * small * t,
                -c * large * t - s * small * d,
                s * large * d + c * small * t,
                -s * large * t + c * small * d,
                *rng.uniform(-1, 1, (2, count)),
            ],
            axis=1,
        )
        volume = np.abs(large * small)
        system = System(maps, volume / volume.sum())
        if np.count_nonzero(_density(system, rng, 32, 256)) >= _FILLED * 32 * 32:
            return system


def _density(system: System, rng: np.random.Generator, size: int, points: int) -> np.ndarray[Any, Any]:
    """How many points of the chaos game fall into each pixel, (size, size); `points` of them are moved at a time."""
    import numpy as np

    x, y = rng.uniform(-1, 1, (2, points))
    chosen = np.searchsorted(np.cumsum(system.chances)[:-1], rng.random((_BURN_IN + _STEPS, points)))
    a, b, c, d, e, f = system.maps.T
    xs, ys = np.empty((2, _STEPS, points))
    for step, k in enumerate(chosen):
        x, y = a[k] * x + b[k] * y + e[k], c[k] * x + d[k] * y + f[k]
        if step >= _BURN_IN:
            xs[step - _BURN_IN], ys[step - _BURN_IN] = x, y
    cells = _cells(xs.ravel(), size) + size * _cells(ys.ravel(), size)
    return np.bincount(cells, minlength=size * size).reshape(size, size)


def _cells(values: np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
    """The pixel of each coordinate, where the attractor fills the image."""
    import numpy as np

    low, high = values.min(), values.max()
    cells: np.ndarray[Any, Any] = ((values - low) * (size / max(high - low, 1e-12))).astype(np.int64)
    return cells.clip(0, size - 1)
