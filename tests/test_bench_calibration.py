"""The bench of calibration: what it times, and the table that it makes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlpreduce.bench import calibration
from mlpreduce.bench import main as bench


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_plans_are_timed_beside_a_forward_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibration, "_SIZES", ((16, 64),))
    page = tmp_path / "page.md"
    page.write_text("# Calibration\n\n<!-- results: page.json -->\n<!-- end of results -->\n")
    words = ["calibration", "test_vit", "--images", "16", "--runs", "2", "--threads", "1", "--page", str(page)]
    assert bench([*words, "--criteria", "energy", "reconstruction"]) == 0
    document = json.loads((tmp_path / "page.json").read_text())
    assert [(plan["criterion"], plan["repair"]) for plan in document["plans"]] == [
        (criterion, repair)
        for criterion in ("energy", "reconstruction")
        for repair in ("none", "parallel", "least_squares")
    ]
    assert all(len(plan["took"]) == 2 and min(plan["took"]) > 0 for plan in document["plans"])
    assert min(document["forward"]) > 0
    assert "forward passes, without elimination" in capsys.readouterr().out
    assert "reconstruction" in page.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vit_tny"], "timm has no such model"),
        (["--images", "0"], "bench calibration --images 0: it must be at least 1"),
        (["test_vit", "--criteria", "enrgy"], "--criteria enrgy: give some of energy"),
    ],
)
def test_errors_are_one_message(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(["calibration", *words]) == 2
    assert message in capsys.readouterr().err
