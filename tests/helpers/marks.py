"""Parameters of which some are slow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(values: Iterable[Any], *quick: Any) -> list[Any]:
    """The values as parameters of a test that is slow for all but the quick ones, which must be among them."""
    values = list(values)
    assert all(value in values for value in quick), quick
    return [pytest.param(value, marks=[] if value in quick else pytest.mark.slow) for value in values]
