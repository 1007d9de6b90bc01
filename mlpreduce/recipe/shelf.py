"""The recipes that ship with the library, and recipe files."""

from __future__ import annotations

from pathlib import Path

from mlpreduce.errors import ReductionError, did_you_mean
from mlpreduce.files import shipped

__all__ = ["find", "header", "list_recipes"]


def list_recipes() -> dict[str, Path]:
    """The recipes that ship with the library, or lie in `recipes/` beside it in a checkout."""
    return {path.stem: path for path in sorted(shipped("recipes").glob("*.toml"))}


def find(name: str) -> Path:
    """The file of a recipe: a name of `list_recipes`, or a path to a .toml.

    Raises:
        ReductionError: there is none; the message has the nearest name.
    """
    if name.endswith(".toml"):
        if not Path(name).is_file():
            raise ReductionError(f"recipe {name!r}: no such file; names: {', '.join(list_recipes())}")
        return Path(name)
    known = list_recipes()
    if name not in known:
        raise ReductionError(f"unknown recipe {name!r}{did_you_mean(name, known)}")
    return known[name]


def header(path: Path) -> list[str]:
    """The first comment lines of a recipe: source, command, cost, expected numbers."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return lines
