"""Files: where those lie that ship with the library, and the one way to write some as a whole or not at all."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing", "shipped"]


@contextmanager
def replacing(folder: Path, *names: str) -> Iterator[list[Path]]:
    """Write files beside those that they replace, and put them there when the block ends.

    The folder is created. After an error the files of before are still there, and nothing else is.

    Args:
        folder: where the files are to be.
        names: their names.

    Yields:
        The paths to write to, one for each name.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with replacing(folder, "a.txt") as (draft,):
        ...     written = draft.write_text("whole")
        >>> [(path.name, path.read_text()) for path in folder.iterdir()]
        [('a.txt', 'whole')]
    """
    folder.mkdir(parents=True, exist_ok=True)
    drafts = [folder / f"{name}.new" for name in names]
    try:
        yield drafts
        for draft, name in zip(drafts, names, strict=True):
            os.replace(draft, folder / name)
    finally:
        for draft in drafts:
            draft.unlink(missing_ok=True)


def shipped(folder: str) -> Path:
    """`mlpreduce.<folder>` where the library is installed, `<folder>/` beside the package in a bare checkout."""
    spec = importlib.util.find_spec(f"mlpreduce.{folder}")  # a folder without `__init__`: never imported, only found
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0]) if places else Path(__file__).resolve().parents[1] / folder
