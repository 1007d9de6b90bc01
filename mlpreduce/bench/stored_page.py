"""A page of the bench and the JSON beside it, from which it can be made again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlpreduce.bench.rounds import check_file
from mlpreduce.errors import ReductionError
from mlpreduce.records import store

__all__ = ["check_page_file", "read_page", "write_page"]

PageOf = Callable[[dict[str, Any]], str]


def check_page_file(path: Path | None) -> None:
    """Whether a page can be written, before what it shows is measured.

    Raises:
        ReductionError: the folder of the page does not exist, or the page would overwrite its own JSON.
    """
    check_file(path, "--write")
    if path is not None and path.suffix == ".json":
        raise ReductionError(f"--write {path}: that is the name of the JSON beside the page; use .md")


def read_page(path: Path, page_of: PageOf) -> dict[str, Any]:
    """What the JSON of a page holds.

    Raises:
        ReductionError: the file is not the JSON of such a page.
    """
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        page_of(document)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ReductionError(
            f"--read {path}: not the JSON that --write stores: {type(error).__name__}: {error}"
        ) from error
    return document


def write_page(
    document: dict[str, Any], page_of: PageOf, path: Path | None, figures: Mapping[str, bytes] | None = None
) -> None:
    """Print the page, and where a file is given write it, its JSON, and pictures by their names."""
    text = page_of(document)
    print(text)
    if path is not None:
        path.write_text(text, encoding="utf-8")
        store(path.parent, f"{path.stem}.json", document)
        for name, picture in (figures or {}).items():
            (path.parent / name).write_bytes(picture)
