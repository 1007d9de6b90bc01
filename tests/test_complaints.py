"""What is wrong with a setting is said in our words, for every field of every settings model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from mlpreduce.recipe import Recipe
from mlpreduce.search.study.settings import StudySettings
from mlpreduce.train.settings import Run, SupernetSettings
from mlpreduce.words.complaints import complaint, expected

WRONG: list[Any] = [
    None,
    "x",
    "9" * 5000,
    -1,
    -0.5,
    0,
    1.5,
    2,
    10**30,
    float("nan"),
    float("inf"),
    True,
    b"\xff",
    [],
    ["x"],
]
WRONG += [[1, 2, 3, 4], [[]], {}, {"x": 1}, {"x": [1]}, object()]
THEIRS = re.compile(
    r"Input should|Value error|Field required|Extra inputs|valid (integer|number|string|boolean|list|tuple|dict)"
)


def fields(model: type[BaseModel], place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        yield (*place, name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield (*place, name, "no_such_key")
            yield from fields(field.annotation, (*place, name))


CASES = [(model, place) for model in (Recipe, StudySettings, SupernetSettings, Run) for place in fields(model)]


@pytest.mark.parametrize(
    ("model", "place"), CASES, ids=lambda value: ".".join(value) if isinstance(value, tuple) else ""
)
def test_no_word_of_pydantic_is_shown(model: type[BaseModel], place: tuple[str, ...]) -> None:
    refused = 0
    for value in WRONG:
        document: Any = value
        for key in reversed(place):
            document = {key: document}
        try:
            model.model_validate(document)
        except ValidationError as error:
            for item in error.errors():
                refused += 1
                text = complaint(item, "digits", ["epochs"])
                assert not THEIRS.search(text), text
                assert item["msg"] not in text, text
                assert expected(item) != "it cannot be used here" or item["type"] == "extra_forbidden", item["type"]
    assert refused


def test_the_walk_meets_the_kinds_of_errors() -> None:
    """So that the test above does not pass by meeting none."""
    kinds = set()
    for place in fields(Recipe):
        for value in WRONG:
            document: Any = value
            for key in reversed(place):
                document = {key: document}
            try:
                Recipe.model_validate({"name": "x", **document})
            except ValidationError as error:
                kinds |= {item["type"] for item in error.errors()}
    assert {
        "int_type",
        "int_from_float",
        "greater_than_equal",
        "less_than",
        "literal_error",
        "extra_forbidden",
    } <= kinds
    assert {"bool_parsing", "tuple_type", "too_long", "missing", "dict_type", "model_type", "finite_number"} <= kinds


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ({"type": "less_than_equal", "ctx": {"le": 1.0}}, "it must be at most 1"),
        (
            {"type": "too_long", "ctx": {"max_length": 2, "actual_length": 3}},
            "it must have at most 2 values, and has 3",
        ),
        (
            {"type": "literal_error", "ctx": {"expected": "'none', 'bfloat16' or 'float16'"}, "input": "bf16"},
            "it must be one of 'none', 'bfloat16', 'float16'; did you mean 'bfloat16'?",
        ),
        ({"type": "url_scheme"}, "it cannot be used here"),
    ],
)
def test_what_is_expected(item: dict[str, Any], text: str) -> None:
    assert expected(item) == text


def test_a_complaint_about_all_settings() -> None:
    item = {"type": "model_type", "loc": (), "input": 3}
    assert complaint(item, "digits") == "digits=3: it must be a table: {key = value}"
    assert complaint(item, "") == "settings=3: it must be a table: {key = value}"
    unknown = {"type": "extra_forbidden", "loc": ("epoch",), "input": 1}
    assert complaint(unknown, "", ["epochs"]) == "unknown key 'epoch'; did you mean 'epochs'?"
