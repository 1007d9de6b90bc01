"""The one way a person types a step: `grouped(group=4, pattern="cycle")`. Nothing is evaluated."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterable
from typing import Any

from mlpreduce.errors import ReductionError
from mlpreduce.words.values import parse_pairs, parse_value

__all__ = ["Step", "as_steps", "is_call", "parse_steps", "read_words", "split_outside", "with_steps"]

Step = tuple[str, dict[str, Any]]  # a transform's name and its options

_CALL = re.compile(r"\s*([^\s()\[\]{}=,;'\"]+)\s*\((.*)\)\s*", re.DOTALL)
_NAME = re.compile(r"[^\s()\[\]{}=,;'\"]+")
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_BARE = re.compile(r"[\w.:*/+-]+")  # a value without quotes
_DEEPEST = 20  # calls within calls; a criterion of a transform is one
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_EXAMPLE = 'write it as in grouped(group=4, pattern="cycle")'


def is_call(text: str) -> bool:
    """Whether a word is written as a call: a parenthesis stands before any equals sign.

    Example:
        >>> is_call("grouped(group=4)"), is_call("group=4"), is_call("grouped")
        (True, False, False)
    """
    return "(" in text.partition("=")[0]


def parse_steps(text: str) -> list[Step]:
    """Read steps as a person types them, one or several with commas or semicolons between them.

    A value is what Python prints for it, a TOML value, or a word without quotes. A value may be a call itself: that of a
    criterion with options.

    Args:
        text: such as `grouped(group=4), shallow(criterion=taylor(site="fc1"))`.

    Raises:
        ReductionError: it is not written so.

    Example:
        >>> parse_steps('grouped(group=4, pattern="cycle"), shallow')
        [('grouped', {'group': 4, 'pattern': 'cycle'}), ('shallow', {})]
        >>> parse_steps("shallow(ratio=.5, scope=global, criterion=taylor(site='fc1'))")
        [('shallow', {'ratio': 0.5, 'scope': 'global', 'criterion': {'name': 'taylor', 'site': 'fc1'}})]
    """
    if len(text) > 100_000:
        raise ReductionError(f"{text[:40]!r}...: {len(text):,} characters are too many for a step; {_EXAMPLE}")
    parts = split_outside(text, ",;")
    if not all(part.strip() for part in parts):
        raise ReductionError(f"{text!r} names no transform; {_EXAMPLE}")
    return [_step(part.strip(), text) for part in parts]


def as_steps(steps: Any) -> Any:
    """Read the steps of a variant as a recipe has them: tables, text, or a list of both.

    Returns:
        A list of tables `{"transform": name, option: value}`. What is not text stays as it is, for the recipe to check.

    Raises:
        ReductionError: text that is not a step.

    Example:
        >>> as_steps(["grouped(group=4)", {"transform": "shallow"}])
        [{'transform': 'grouped', 'group': 4}, {'transform': 'shallow'}]
    """
    if isinstance(steps, str):
        steps = [steps]
    if not isinstance(steps, (list, tuple)):
        return steps
    read: list[Any] = []
    for step in steps:
        if isinstance(step, str):
            read += [_table(name, options) for name, options in parse_steps(step)]
        else:
            read.append(step)
    return read


def with_steps(tables: Any, place: str) -> Any:
    """Read the steps in the variants of a recipe, and in those of its sweep, whatever else is there.

    Args:
        tables: of a recipe, or of a point of its sweep.
        place: its name, for messages.

    Raises:
        ReductionError: text that is not a step.
    """
    if not isinstance(tables, dict):
        return tables
    read = dict(tables)
    if isinstance(variants := tables.get("variants"), dict):
        read["variants"] = {}
        for name, steps in variants.items():
            try:
                read["variants"][name] = as_steps(steps)
            except ReductionError as error:
                raise ReductionError(f"{place}.variants.{name}: {error}") from error
    if isinstance(swept := tables.get("sweep"), dict):
        read["sweep"] = {point: with_steps(inner, f"{place}.sweep.{point}") for point, inner in swept.items()}
    return read


def read_words(words: Iterable[str]) -> tuple[dict[str, Any], list[Step]]:
    """Read the words of a command line: arguments of a model, then steps in either notation.

    Raises:
        ReductionError: a word is neither.

    Example:
        >>> read_words(["depth=4", "grouped", "group=2", "shallow(ratio=0.5)"])
        ({'depth': 4}, [('grouped', {'group': 2}), ('shallow', {'ratio': 0.5})])
    """
    settings: dict[str, Any] = {}
    steps: list[Step] = []
    for word in words:
        if is_call(word):
            steps += parse_steps(word)
        elif "=" in word and steps:
            _add(steps[-1][1], *_option(word, word), word)
        elif "=" in word:
            for key, value in parse_pairs([word]).items():
                _add(settings, key, value, word)
        else:
            steps.append((word, {}))
    return settings, steps


def split_outside(text: str, separators: str) -> list[str]:
    """Split text at separators that stand outside of quotes and brackets.

    Raises:
        ReductionError: a bracket or a quote is left open.

    Example:
        >>> split_outside("baseline,grouped(group=2, keep='last')", ",")
        ['baseline', "grouped(group=2, keep='last')"]
    """
    parts, start, open_brackets, quote = [], 0, "", ""
    letters = iter(enumerate(text))
    for place, letter in letters:
        if quote:
            if letter == "\\":
                next(letters, None)  # whatever it stands before, it ends no quote
            elif letter == quote:
                quote = ""
        elif letter in "'\"":
            quote = letter
        elif letter in _CLOSING:
            open_brackets += _CLOSING[letter]
        elif letter in ")]}":
            if not open_brackets.endswith(letter):
                raise ReductionError(f"{text!r}: the {letter!r} at character {place + 1} closes nothing; {_EXAMPLE}")
            open_brackets = open_brackets[:-1]
        elif letter in separators and not open_brackets:
            parts.append(text[start:place])
            start = place + 1
    if open_brackets or quote:
        raise ReductionError(f"{text!r}: a {(quote or open_brackets[-1])!r} is missing; {_EXAMPLE}")
    return [*parts, text[start:]]


def _step(part: str, whole: str) -> Step:
    if _NAME.fullmatch(part):
        return part, {}
    call = _CALL.fullmatch(part)
    if call is None:
        raise ReductionError(f"{whole!r}: {part!r} is not a transform with its options; {_EXAMPLE}")
    return call[1], _options(call[2], whole)


def _options(text: str, whole: str, depth: int = 0) -> dict[str, Any]:
    """The options between the parentheses of a call that stands in so many others."""
    if depth > _DEEPEST:
        raise ReductionError(f"{whole[:40]!r}...: calls within calls, more than {_DEEPEST} deep; {_EXAMPLE}")
    options: dict[str, Any] = {}
    parts = split_outside(text, ",")
    for part in parts[:-1] if not parts[-1].strip() else parts:  # none, or a comma at the end
        _add(options, *_option(part, whole, depth), whole)
    return options


def _option(text: str, whole: str, depth: int = 0) -> tuple[str, Any]:
    key, equals, value = (word.strip() for word in text.partition("="))
    if not equals or not _KEY.fullmatch(key) or not value:
        raise ReductionError(f"{whole!r}: {text.strip()!r} is not an option with its value; {_EXAMPLE}")
    return key, _value(value, whole, depth)


def _add(options: dict[str, Any], key: str, value: Any, whole: str) -> None:
    if key in options:
        raise ReductionError(f"{whole!r}: {key} is given twice; leave one out")
    options[key] = value


def _value(text: str, whole: str, depth: int) -> Any:
    """What Python prints, a call with options as a table with a name, a TOML value, or a word."""
    if (call := _CALL.fullmatch(text)) and _KEY.fullmatch(call[1]):
        return {"name": call[1], **_options(call[2], whole, depth + 1)}
    try:
        with warnings.catch_warnings():  # of Python's, about backslashes
            warnings.simplefilter("ignore", SyntaxWarning)
            return _plain(ast.literal_eval(text))  # literals only: nothing is called or looked up
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = parse_value(text)
    if isinstance(value, str) and value == text and not _BARE.fullmatch(text):
        raise ReductionError(f'{whole!r}: {text!r} is not a value; put text in quotes, as in pattern="cycle"')
    return value


def _plain(value: Any) -> Any:
    """A literal as JSON has it: tuples as lists.

    Raises:
        TypeError: it is a set, bytes or a complex number.
    """
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(value)


def _table(name: str, options: dict[str, Any]) -> dict[str, Any]:
    if "transform" in options:
        raise ReductionError(f"{name}(transform=...): 'transform' cannot be an option; leave it out")
    return {"transform": name, **options}
