"""Marks of fields of settings: a rule about a field stands beside it, as `key: Free[int] = 2`."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from functools import cache
from typing import Annotated, TypeVar

from pydantic import BaseModel

__all__ = ["Free", "Later", "Mark", "marked"]

Value = TypeVar("Value")


class Mark(Enum):
    """What is special about a field.

    Attributes:
        FREE: it may be another value when something is gone on with: what is computed does not change, but for rounding.
        LATER: outputs of earlier versions do not have it; as long as it is at its default, those can be gone on with.
    """

    FREE = "free"
    LATER = "later"


Free = Annotated[Value, Mark.FREE]
Later = Annotated[Value, Mark.LATER]


@cache
def marked(settings: type[BaseModel], mark: Mark) -> tuple[str, ...]:
    """The dotted keys of the fields that have a mark, those of sections too.

    Args:
        settings: whose fields; those that are settings themselves are sections.
        mark: which.
    """
    return tuple(_marked(settings, mark))


def _marked(settings: type[BaseModel], mark: Mark) -> Iterator[str]:
    for name, field in settings.model_fields.items():
        if mark in field.metadata:
            yield name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from (f"{name}.{key}" for key in marked(field.annotation, mark))
