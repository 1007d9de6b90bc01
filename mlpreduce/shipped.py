"""Where the recipes and search spaces lie that ship with the library."""

from __future__ import annotations

import importlib.util
from pathlib import Path

__all__ = ["shipped"]


def shipped(folder: str) -> Path:
    """`mlpreduce.<folder>` where the library is installed, `<folder>/` beside the package in a bare checkout."""
    spec = importlib.util.find_spec(f"mlpreduce.{folder}")  # a folder without `__init__`: never imported, only found
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0]) if places else Path(__file__).resolve().parents[1] / folder
