"""What a report is made of, before it is written as markdown, HTML or for the console."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Content", "Listing", "Picture", "Table"]


@dataclass(frozen=True)
class Table:
    """A table of text; the first column names the row."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG; the page in markdown refers to it as `file`, beside it."""

    title: str
    file: str
    caption: str
    png: bytes = field(repr=False)


@dataclass(frozen=True)
class Listing:
    """Sentences, one below the other."""

    title: str
    lines: Sequence[str]


@dataclass(frozen=True)
class Content:
    """A report; its sections stand in the order given."""

    title: str
    remarks: Sequence[str]
    sections: Sequence[Table | Picture | Listing]
