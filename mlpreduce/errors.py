"""The one error of the library, and the words it uses."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

__all__ = ["ReductionError", "call_text", "check_number", "check_one_of", "check_whole", "did_you_mean"]


class ReductionError(ValueError):
    """A request that cannot be carried out.

    The message holds the call as written, the fact with its numbers, and what would work. Whenever it is raised, the
    model is as it was before the call.
    """


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Text to append to an error about an unknown name.

    Example:
        >>> did_you_mean("groupped", ["grouped", "shallow"])
        "; did you mean 'grouped'?"
        >>> did_you_mean("xyz", ["grouped", "shallow"])
        '; known: grouped, shallow'
    """
    options = sorted(options)
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(options)}" if options else ""


def check_one_of(name: str, value: Any, options: Iterable[str]) -> None:
    """Whether a value is one of the options, whatever its type.

    Raises:
        ReductionError: it is none.
    """
    options = list(options)
    if value not in options:
        raise ReductionError(f"{name} is {value!r}{did_you_mean(str(value), options)}")


def check_whole(name: str, value: Any, *, least: int = 1) -> None:
    """Whether a value is a whole number from `least`.

    Raises:
        ReductionError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ReductionError(f"{name} is {value!r}; it must be a whole number from {least}")


def check_number(name: str, value: Any, *, least: float = 0.0, most: float = math.inf, above: bool = False) -> None:
    """Whether a value is a finite number from `least`, or above it, to `most`.

    Raises:
        ReductionError: it is none.
    """
    try:
        number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond floating point
        number = False
    if not number or not least <= value <= most or (above and value == least):
        upper = "" if most == math.inf else f" to {most:g}"
        raise ReductionError(
            f"{name} is {value!r}; it must be a number {'above' if above else 'from'} {least:g}{upper}"
        )


def call_text(name: str, config: Mapping[str, Any]) -> str:
    """A call as the user wrote it, for messages.

    Example:
        >>> call_text("grouped", {"group": 5})
        'grouped(group=5)'
    """
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in config.items())})"
