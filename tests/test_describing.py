"""What `mlpreduce list NAME` says of a name: nothing that its source says is lost."""

from __future__ import annotations

import pytest

from mlpreduce.describing import describe, described
from mlpreduce.recipe import list_recipes
from mlpreduce.recipe.shelf import header


@pytest.mark.parametrize("name", sorted(list_recipes()))
def test_every_line_of_a_header_is_told(name: str) -> None:
    found = next(each for each in described(name) if each.kind == "recipe")
    told = " ".join([found.summary, *(text for _, text in found.facts)])
    lines = [line.partition(":")[2].strip() if line.startswith(("Command:", "Cost:", "Expected:")) else line
             for line in header(list_recipes()[name])]  # fmt: skip
    assert [line for line in lines if line not in told] == []


def test_a_recipe_with_two_commands_tells_both_in_order() -> None:
    command = dict(describe("dgmr_tiny").facts)["command"]
    assert command == "python -m mlpreduce.recipe digits_tiny && python -m mlpreduce.recipe dgmr_tiny"


def test_a_notebook_names_the_second_column_as_the_console_does() -> None:
    assert '<th scope="col">default</th>' in describe("grouped")._repr_html_()
    assert '<th scope="col">value</th>' in describe("digits")._repr_html_()
