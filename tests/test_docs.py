"""Snippets of README and docs run, doctests hold, every public name is documented."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import mlpreduce

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- not run:[^>]*-->\n)?```python\n(.*?)```", re.DOTALL)
MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(mlpreduce.__path__, "mlpreduce.")
    if not name.endswith("__main__") and ".recipes" not in name
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlpreduce import criteria, transforms

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transforms.registry, "_TRANSFORMS", dict(transforms.registry._TRANSFORMS))
    monkeypatch.setattr(criteria.registry, "_CRITERIA", dict(criteria.registry._CRITERIA))
    names: dict = {"__name__": "snippets"}
    for skipped, code in BLOCK.findall(page.read_text(encoding="utf-8")):
        if skipped:
            compile(code, page.name, "exec")
        else:
            exec(compile(code, page.name, "exec"), names)


def test_the_readme_has_code_by_line_20() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert any(line.startswith("```python") for line in lines[:20])


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_every_public_name_is_in_the_docs() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert [name for name in mlpreduce.__all__ if f"`{name}" not in text] == []
    text = (ROOT / "docs" / "transforms.md").read_text(encoding="utf-8")
    for name in [*mlpreduce.list_transforms(), *mlpreduce.list_criteria()]:
        assert f"`{name}" in text


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"
