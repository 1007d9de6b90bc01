"""Tables where rich would do something else: in notebooks, and in very few columns."""

from __future__ import annotations

import builtins

import pytest

from mlpreduce.edits import Plan
from mlpreduce.words.console import Column, Grid, wrapped


def test_a_notebook_gets_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = type("ZMQInteractiveShell", (), {})()  # what rich asks for the name of
    grid = Grid("title", [Column("name", ["a", "b"], left=True), Column("count", ["1", "22"])])
    outside = [grid.text(80), grid.text(None)]
    monkeypatch.setattr(builtins, "get_ipython", lambda: shell, raising=False)
    assert [grid.text(80), grid.text(None)] == outside
    assert "22" in outside[0]


def test_a_name_wider_than_the_screen_stays_whole() -> None:
    long = "a" * 50
    assert long in Grid("", [Column("name", [long, "b"])]).text(20).split("\n")
    assert long in Grid("", [Column("name", [long]), Column("count", ["3"])]).text(20).split("\n")


@pytest.mark.parametrize("columns", [0, 1])
def test_text_in_no_columns_has_a_word_a_line(columns: int) -> None:
    assert [line.strip() for line in wrapped("abc def", columns).split("\n")] == ["abc", "def"]


def test_a_plan_made_by_hand_prints_no_empty_table() -> None:
    assert str(Plan("mine", {}, ())) == "mine()"
