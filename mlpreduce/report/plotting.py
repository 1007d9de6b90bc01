"""What matplotlib is given and gives: texts and pictures. Importing this loads no matplotlib."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["as_png", "plain"]


def as_png(figure: Figure) -> bytes:
    """The figure as it stands in a report."""
    image = BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()


def plain(text: str) -> str:
    """Text in which matplotlib sees no formula."""
    return text.replace("$", r"\$")
