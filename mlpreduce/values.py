"""Keys and values as they are written on a command line: `train.epochs=2`."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from typing import Any

from mlpreduce.errors import ReductionError

__all__ = ["flatten", "parse_pairs", "parse_value"]


def parse_value(text: str) -> Any:
    """A TOML value, or else the text itself.

    Example:
        >>> parse_value("0.5"), parse_value("[[0, 1]]"), parse_value("inv_sqrt")
        (0.5, [[0, 1]], 'inv_sqrt')
    """
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError):
        return float(text) if text.removeprefix("-").startswith(".") and text[-1].isdigit() else text
    return parsed["value"] if set(parsed) == {"value"} else text


def parse_pairs(pairs: Iterable[str]) -> dict[str, Any]:
    """`key=value` words as a dictionary.

    Raises:
        ReductionError: a word without key.
    """
    values = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise ReductionError(f"{pair!r} is no key=value")
        values[key.strip()] = parse_value(value)
    return values


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys.

    Example:
        >>> flatten({"train": {"epochs": 2}, "seeds": [1]})
        {'train.epochs': 2, 'seeds': [1]}
    """
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat.update(flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat
