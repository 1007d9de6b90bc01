"""What is wrong with a setting, in our words: pydantic finds it, and its sentences stay inside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mlpreduce.errors import did_you_mean

__all__ = ["complaint", "expected"]

# pydantic's name of an error: what the value must be, from the error's own numbers
_EXPECTED = {
    "bool_parsing": "it must be true or false",
    "bool_type": "it must be true or false",
    "dataclass_type": "it must be a table: {key = value}",
    "dict_type": "it must be a table: {key = value}",
    "finite_number": "it must be a finite number",
    "float_parsing": "it must be a number",
    "float_type": "it must be a number",
    "greater_than": "it must be above {gt}",
    "greater_than_equal": "it must be at least {ge}",
    "int_from_float": "it must be a whole number",
    "int_parsing": "it must be a whole number",
    "int_parsing_size": "it must be a whole number of fewer digits",
    "int_type": "it must be a whole number",
    "less_than": "it must be below {lt}",
    "less_than_equal": "it must be at most {le}",
    "list_type": "it must be a list: [a, b]",
    "model_attributes_type": "it must be a table: {key = value}",
    "model_type": "it must be a table: {key = value}",
    "none_required": "it must be left out",
    "string_type": 'it must be text in quotes: "..."',
    "string_unicode": "it must be text in UTF-8",
    "too_long": "it must have at most {max_length} values, and has {actual_length}",
    "too_short": "it must have at least {min_length} values, and has {actual_length}",
    "tuple_type": "it must be a list: [a, b]",
}


def expected(item: Mapping[str, Any]) -> str:
    """Say what a value must be.

    Args:
        item: one of the errors of a pydantic `ValidationError`.

    Example:
        >>> expected({"type": "greater_than_equal", "ctx": {"ge": 1}, "input": 0})
        'it must be at least 1'
    """
    kind, context = item["type"], item.get("ctx", {})
    if kind == "literal_error":
        options = context["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        given = str(item.get("input", ""))
        return f"it must be one of {', '.join(map(repr, options))}{_near(given, options)}"
    if kind == "missing":
        return "it is missing"
    if kind not in _EXPECTED:
        return "it cannot be used here"
    text = _EXPECTED[kind]
    for key, value in context.items():
        text = text.replace(f"{{{key}}}", f"{value:g}" if isinstance(value, float) else str(value))
    return text


def complaint(item: Mapping[str, Any], place: str, keys: Iterable[str] = ()) -> str:
    """Say what is wrong with one key.

    Args:
        item: one of the errors of a pydantic `ValidationError`.
        place: what its dotted key is part of, or empty.
        keys: that could stand in its place, for a key that does not exist.

    Example:
        >>> item = {"type": "int_type", "loc": ("train", "epochs"), "input": "x"}
        >>> complaint(item, "digits")
        "digits.train.epochs='x': it must be a whole number"
        >>> complaint({"type": "extra_forbidden", "loc": ("train", "epoch"), "input": 1}, "digits", ["epochs"])
        "digits.train: unknown key 'epoch'; did you mean 'epochs'?"
    """
    words = [*filter(None, [place]), *map(str, item["loc"])]  # no key where it is about all settings
    if item["type"] == "extra_forbidden":
        *tables, key = words
        return f"{'.'.join(tables)}{': ' if tables else ''}unknown key {key!r}{did_you_mean(key, keys)}"
    given = "" if item["type"] == "missing" else f"={_shown(item['input'])}"
    return f"{'.'.join(words) or 'settings'}{given}: {expected(item)}"


def _near(given: str, options: list[str]) -> str:
    near = did_you_mean(given, options)
    return near if "did you mean" in near else ""


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
