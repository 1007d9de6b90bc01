"""What every file of tests keeps to."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import guard

FILES = sorted(Path(__file__).parent.glob("test_*.py"))


def imported(source: str) -> set[str]:
    """The first names of all modules that a source imports, also inside of functions and in scripts that it holds."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "import " in node.value:
            for line in node.value.splitlines():
                words = line.split()
                if len(words) > 1 and words[0] in ("import", "from"):
                    found.add(words[1].split(".")[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_no_test_file_imports_another(path: Path) -> None:
    """What they share is in tests/helpers."""
    assert imported(path.read_text(encoding="utf-8")) & {file.stem for file in FILES} == set()


def test_an_import_of_another_is_seen_wherever_it_is() -> None:
    sources = [
        "import test_a",
        "from test_a import b",
        "def f():\n    import test_a.c",
        "S = '''\nfrom test_a import *\n'''",
    ]
    assert [imported(source) for source in sources] == [{"test_a"}] * 4


def test_what_an_unmarked_test_starts_is_told(request: pytest.FixtureRequest) -> None:
    assert guard.unmarked(request.node, []) == []
    assert guard.unmarked(request.node, ["a program"]) == ["a program"]


@pytest.mark.processes
def test_programs_are_heard_of(request: pytest.FixtureRequest) -> None:
    import multiprocessing

    with guard.started() as programs:
        subprocess.run([sys.executable, "-c", ""], check=True)
        (first,) = programs
        process = multiprocessing.get_context("spawn").Process(target=int)
        process.start()
        process.join()
    assert "subprocess.Popen" in first
    assert "multiprocessing" in programs[-1]
    assert guard.unmarked(request.node, programs) == []
