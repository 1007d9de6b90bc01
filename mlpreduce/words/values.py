"""Keys, values and counts as they are written on a command line and a console: `train.epochs=2`, `16.867 G`."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any

from mlpreduce.errors import ReductionError

__all__ = ["Config", "Step", "flatten", "parse_pairs", "parse_value", "short", "unit_of"]

Config = Mapping[str, Any]  # options of a transform, a criterion or a layer: which, each says itself
Step = dict[str, Any]  # of a reduction: {"transform": name, **config}


def parse_value(text: str) -> Any:
    """A TOML value, or else the text itself; dates and times stay text, as do numbers of too many digits.

    Example:
        >>> parse_value("0.5"), parse_value("[[0, 1]]"), parse_value("inv_sqrt")
        (0.5, [[0, 1]], 'inv_sqrt')
    """
    try:
        parsed = tomllib.loads(f"value = {text}")
        json.dumps(parsed)  # records are JSON, which has no dates
    except (ValueError, TypeError, RecursionError):
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


def unit_of(count: float) -> tuple[float, str]:
    """The unit that suits a count: its size and its letter.

    Example:
        >>> unit_of(16_867_412_736), unit_of(136_138), unit_of(999)
        ((1000000000.0, 'G'), (1000.0, 'k'), (1.0, ''))
    """
    units = [(1.0, ""), (1e3, "k"), (1e6, "M"), (1e9, "G")]
    return next((unit for unit in units if abs(round(count / unit[0], 3)) < 1000), units[-1])


def short(count: float, like: float | None = None) -> str:
    """A count with three decimals, and the letter that suits its size, or that of another count.

    Example:
        >>> short(16_867_412_736), short(2_184_000), short(136_138), short(512)
        ('16.867 G', '2.184 M', '136.138 k', '512')
        >>> short(730_993_152, like=1_080_000_000)
        '0.731 G'
    """
    size, letter = unit_of(count if like is None else like)
    return f"{count / size:.3f} {letter}" if letter else f"{count:.0f}"
