"""docs/fidelity.md is the table in the code, and what it names exists."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from mlpreduce.train.fidelity import FACTS, page

TESTS = Path(__file__).parent


def test_the_page_is_the_table() -> None:
    assert (TESTS.parent / "docs" / "fidelity.md").read_text(encoding="utf-8") == page()


@pytest.mark.parametrize("name", sorted({name for fact in FACTS for name in fact.tests}))
def test_named_tests_exist(name: str) -> None:
    file, _, function = name.partition("::")
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert not function or function in functions
    assert any(found.startswith("test_") for found in functions)


def test_what_differs_is_held_by_a_test() -> None:
    assert all(fact.tests for fact in FACTS)
    assert sum(bool(fact.corrected) and not fact.never for fact in FACTS) == 3
