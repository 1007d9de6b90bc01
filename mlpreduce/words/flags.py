"""Flags of a command from a class of settings: each field with a description is one."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mlpreduce.words.notation import split_outside

__all__ = ["add_flags", "given_flags"]


def add_flags(parser: argparse.ArgumentParser, settings: type[BaseModel], apart: Collection[str] = ()) -> None:
    """Add a flag for each field that has a description.

    Args:
        parser: to which.
        settings: whose fields.
        apart: fields that the command reads in its own way.
    """
    for name, field in _fields(settings, apart).items():
        description = str(field.description)
        default = "" if "(default:" in description else f" (default: {_text(field.default)})"
        parser.add_argument(f"--{name.replace('_', '-')}", help=f"{description}{default}".replace("%", "%%"))


def given_flags(options: argparse.Namespace, settings: type[BaseModel], apart: Collection[str] = ()) -> dict[str, Any]:
    """The fields that were given; of several values, which have commas between them, each."""
    found: dict[str, Any] = {}
    for name, field in _fields(settings, apart).items():
        text = getattr(options, name)
        if text is None:
            continue
        if get_origin(field.annotation) is tuple:
            parts = filter(None, map(str.strip, split_outside(text, ",")))
            found[name] = tuple(parts if get_args(field.annotation)[0] is str else map(_read, parts))
        else:
            found[name] = _read(text)
    return found


def _fields(settings: type[BaseModel], apart: Collection[str]) -> dict[str, FieldInfo]:
    return {name: f for name, f in settings.model_fields.items() if f.description and name not in apart}


def _read(text: str) -> int | str:
    """A whole number, so that messages show it as one; the settings read all else."""
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else text


def _text(value: Any) -> str:
    return (
        ",".join(map(_text, value))
        if isinstance(value, tuple)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )
