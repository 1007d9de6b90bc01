"""Parameters of which some are slow."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def slow_after_the_first(rows: Iterable[tuple[Any, ...]], kind: Callable[..., Any]) -> list[Any]:
    """The rows as parameters of a test that is slow for all but the first of each kind; `kind(*row)` says which that is."""
    found, seen = [], set()
    for row in rows:
        found.append(pytest.param(*row, marks=[pytest.mark.slow] if (which := kind(*row)) in seen else []))
        seen.add(which)
    return found


def slow_but(values: Iterable[Any], *quick: Any) -> list[Any]:
    """The values as parameters of a test that is slow for all but the quick ones, which must be among them."""
    values = list(values)
    assert all(value in values for value in quick), quick
    return [pytest.param(value, marks=[] if value in quick else pytest.mark.slow) for value in values]
