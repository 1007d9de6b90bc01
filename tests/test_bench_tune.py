"""The bench of searches on trained models: its cells, its page, and that a run goes on where it was stopped."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mlpreduce.bench import main as bench
from mlpreduce.bench import tune
from mlpreduce.bench.trained import subjects
from mlpreduce.bench.trained.subjects import SUBJECTS, Subject
from mlpreduce.testing import tiny_vit


def small(tests: int) -> Subject:
    """A subject whose MLPs matter, of random weights."""
    model = tiny_vit(num_classes=0).eval()
    for name, parameter in model.named_parameters():
        if ".mlp." in name or "patch_embed" in name:
            nn.init.normal_(parameter, std=0.3)
    pixels = torch.randn(200, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return Subject(
        "vit_s",
        model,
        pixels[40:],
        pixels[:tests],
        "random images",
        lambda output: output,
        lambda whole, found: {},
        lambda some: some,
    )


@pytest.fixture
def subject(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SUBJECTS, "vit_s", lambda weights, images, tests: small(tests))
    monkeypatch.setattr(subjects, "CALIBRATION", 64)


def run(tmp_path: Path, *words: str) -> int:
    given = ["--tests", "40", "--trials", "3", "--output", str(tmp_path / "cells"), "--budgets", "params<=0.7"]
    return bench(["tune", "vit_s", *given, *words])


def cells(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((tmp_path / "cells").glob("cell*.json"))]


@pytest.mark.slow
def test_cells_are_kept_and_a_page_is_made_of_them(
    subject: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    assert run(tmp_path, "--ways", "tuned", "random", "--draws", "0", "1", "--write", str(page)) == 0
    found = cells(tmp_path)
    whole = sum(parameter.numel() for parameter in tiny_vit(num_classes=0).parameters())
    assert [(cell["draw"], cell["way"]) for cell in found] == [(0, "random"), (0, "tuned"), (1, "random"), (1, "tuned")]
    for cell in found:
        assert cell["params"] <= 0.7 * whole
        assert 0 < cell["error"] < 1
        assert len(cell["scores"]) == 3
    text = page.read_text()
    ratio = statistics.mean(cell["error"] / cell["uniform"] for cell in found if cell["way"] == "tuned")
    assert "| vit_s | params&lt;=0.7 | 3 | 2 | " in text
    assert f"| {ratio:.3f} (" in text
    assert "Beside a random search" in text
    assert "FastNAS" not in text
    monkeypatch.setattr(tune, "_search", lambda *given: pytest.fail("it was measured before"))
    for path in (tmp_path / "cells").glob("*"):  # a page has all that its cells have
        path.unlink()
    assert run(tmp_path, "--ways", "tuned", "random", "--draws", "0", "1", "--write", str(page)) == 0
    assert page.read_text() == text
    capsys.readouterr()
    assert bench(["tune", "--read", str(page.with_suffix(".json"))]) == 0
    assert capsys.readouterr().out.strip() == text.strip()


def test_hypervolumes_are_compared_pair_by_pair() -> None:
    given = {
        "model": "vit_s",
        "tests": 9,
        "budget": "params<=0.5",
        "trials": 2,
        "error": 0.1,
        "passes": 10.0,
        "params": 7,
    }
    pairs = [
        {**given, "draw": draw, "way": way, "scores": scores, "uniform": 0.2}
        for draw, way, scores in (
            (0, "tuned", [0.5, 0.9]),
            (0, "random", [0.4, 0.8]),
            (1, "tuned", [0.6, 0.7]),
            (1, "random", [0.5, 0.7]),
        )
    ]
    peer = {**given, "draw": 0, "way": "fastnas", "calls": 229}
    text = tune.page_of({"cells": [*pairs, peer]})
    assert "| vit_s | params&lt;=0.5 | 2 | 2 | 1.125 (" in text  # of .5 / .4 and .2 / .2
    assert "| FastNAS, 229 scores | 7 | 0.10000 | 10 |" in text


def test_a_budget_that_no_width_reaches_is_told_on_the_page(
    subject: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others are measured all the same, and a page of others names no file."""
    page = tmp_path / "page.md"
    assert run(tmp_path, "--trials", "1", "--budgets", "params<=0.001", "--write", str(page)) == 0
    (cell,) = cells(tmp_path)
    assert "cannot be reached" in cell["refused"]
    assert cell["refused"].replace("<", "&lt;") in page.read_text() or cell["refused"] in page.read_text()
    document = json.loads(page.with_suffix(".json").read_text())
    document["cells"][0]["budget"] = "../../../params<=0.001"
    page.with_suffix(".json").write_text(json.dumps(document))
    assert run(tmp_path, "--trials", "1", "--budgets", "params<=0.001", "--write", str(page)) == 0
    assert {path.parent for path in tmp_path.rglob("cell-*")} == {tmp_path / "cells"}
    assert len(cells(tmp_path)) == 2


def test_random_points_that_are_all_alike_span_no_volume() -> None:
    given = {
        "model": "vit_s",
        "tests": 9,
        "budget": "b",
        "trials": 1,
        "error": 0.1,
        "passes": 1.0,
        "params": 7,
        "draw": 0,
    }
    pair = [{**given, "way": way, "scores": [0.5], "uniform": 0.2} for way in ("tuned", "random")]
    assert "random search of as many" not in tune.page_of({"cells": pair})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ways", "fastnas"], "into another environment, and run it there"),
        (["--budgets", "parms<=0.5"], "did you mean 'params'"),
        (["--ways", "fast"], "'fastnas'"),
        (["--trials", "0"], "--trials 0: it must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_told(
    subject: None, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, *words) == 2
    assert message in capsys.readouterr().err
