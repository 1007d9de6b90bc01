"""The bench jobs about criteria: what they measure and print. Nothing here asks how long anything took."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mlpreduce.__main__ import main
from mlpreduce.bench.criteria import CHOICES, _claims, page
from mlpreduce.bench.gram_schmidt import plain_loop
from mlpreduce.bench.layers import layers_text
from mlpreduce.criteria import choose, list_criteria
from mlpreduce.criteria.gram_schmidt import pivots

TINY = ["train.epochs=1", "train.warmup_epochs=0", "model.kwargs.embed_dim=16", "model.kwargs.depth=2"]


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_accuracy_of_every_criterion(scope: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--seeds", "1", "2", "--ratios", "0.5", "--samples", "40", "--scope", scope]
    words += ["--output", str(tmp_path / "runs"), "--write", str(tmp_path / "page.md")]
    assert main(["bench", "criteria", *words, *TINY]) == 0
    text = capsys.readouterr().out
    assert (tmp_path / "page.md").read_text() == text.removesuffix("\n")
    rows = re.findall(r"^\| `([^`]*)` \| ([\d.]+) ± [\d.]+ \| ([\d.]+) ± [\d.]+ \|$", text, re.MULTILINE)
    names = {name for name, _, _ in rows}
    assert "looked at 40 training images" in text
    if scope == "uniform":
        assert names == {str(choose(choice)).removesuffix("()") for choice in CHOICES}
        assert set(list_criteria()) <= {name.partition("(")[0] for name in names}
        assert "- at 50% without repair the best criterion, " in text
    else:
        assert {"taylor", "l1"} <= names
        assert not {"first", "last", "random", "gram_schmidt"} & names


def test_the_claims_are_counted_from_the_table() -> None:
    pair = [(0.5, "none"), (0.5, "parallel")]
    table = {
        "random": {pair[0]: [90.0, 91.0, 92.0], pair[1]: [91.0, 91.0, 91.0]},
        "taylor": {pair[0]: [92.0, 91.0, 93.0], pair[1]: [93.0, 93.0, 93.0]},
        "fisher": {pair[0]: [90.0, 90.0, 90.0], pair[1]: [95.0, 95.0, 95.0]},
    }
    repair, best, repaired = _claims(table, pair)[2:5]
    # gains 1, 0, -1, 1, 2, 0, 5, 5, 5
    assert repair.startswith(
        "- at 50% repair adds +2.00 points on average over criteria and models (6 of 9 better, 1 worse)"
    )
    assert "without repair the best criterion, `taylor`, is 1.00 ± 1.00 points from `random`, ahead for 2 of 3" in best
    # taylor is ahead by 2, 0, 1 points and fisher by 0, -1, -2, with equal |t|: 6 of the 8 sign flips reach it, those in which
    # models 1 and 3 keep the same sign, or models 2 and 3
    assert best.endswith("models; p = 0.750 for the best of 2")
    assert "repaired the best criterion, `fisher`, is 4.00 ± 0.00 points" in repaired
    facts = {"seeds": [1, 2, 3], "samples": 8, "images": 50, "scope": "uniform"}
    text = page(table, [95.0, 96.0, 97.0], {**facts, "command": "COMMAND", "recipe": "recipe digits"})
    assert "\nCOMMAND\n" in text
    assert text.index("`taylor`") < text.index("| `random`") < text.index("| `fisher`")
    assert "Whole models: 96.00 ± 1.00." in text


def test_the_loop_beside_gram_schmidt_does_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    rows = torch.randn(60, 12, dtype=torch.float64)
    assert plain_loop(rows, 12) == pivots(rows)[:12]
    assert main(["bench", "gram_schmidt", "--units", "64", "--features", "16", "--runs", "1"]) == 0
    text = capsys.readouterr().out
    assert "one round of 64 x 16, float32" in text
    assert re.search(r"plain loop +[\d.]+ \([\d.]+ to [\d.]+\) +plain loop / ours [\d.]+", text)
    assert main(["bench", "gram_schmidt", "--units", "0"]) == 2
    assert "--units 0: it must be at least 1" in capsys.readouterr().err


def test_layers_are_timed_beside_dense_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--batch", "2", "--tokens", "5", "--features", "16", "--hidden", "32", "--runs", "1", "--ratios", "0.5"]
    page = tmp_path / "page.md"
    page.write_text("<!-- results: page.json -->\n<!-- end of results -->\n")
    assert main(["bench", "layers", *small, "--page", str(page)]) == 0
    text = capsys.readouterr().out
    assert text in page.read_text()
    assert layers_text(json.loads((tmp_path / "page.json").read_text())) == text.rstrip("\n")
    assert "2 x 5 tokens, 16 x 32, float32, cpu" in text
    for what in ("projections", "MLP"):
        for name, part in (
            ("dense", "1.000"),
            ("block_diagonal 4", "0.250"),
            ("low_rank 0.5", "0.469"),
            ("svft", "1.000"),
        ):
            assert re.search(rf"{what}, {name} \| {part} \| [\d.]+ \([\d.]+ to [\d.]+\) \| [\d.]+ .* \d+ %", text)
    assert main(["bench", "layers", *small, "--groups", "3"]) == 2
    assert "groups must divide both widths" in capsys.readouterr().err


def test_what_cannot_be_measured_is_told_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = str(tmp_path / "nowhere" / "file")
    for words, message in (
        (["criteria", "--write", nowhere], "there is no folder"),
        (["criteria", "--ratios", "1.5"], "a ratio is above 0 and at most 1"),
        (["latency", "--save", nowhere], "there is no folder"),
        (["latency", "vit_tiny_patch16_224", "deit_tiny_patch16_224", "--save", str(tmp_path / "table")], "one by one"),
        (["latency", "vit_tiny_patch16_225"], "vit_tiny_patch16_224"),
        (
            ["latency", "vit_tiny_patch16_224", "depth=1", "--points", "1"],
            "points is 1; it must be a whole number from 2",
        ),
    ):
        assert main(["bench", *words]) == 2
        assert message in capsys.readouterr().err


def test_predicted_and_measured_latency(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["vit_tiny_patch16_224", "depth=2", "img_size=32", "embed_dim=24", "num_heads=2"]
    more = [
        "--widths",
        "3",
        "--batch-size",
        "1",
        "--points",
        "2",
        "--repeats",
        "1",
        "--save",
        str(tmp_path / "table.json"),
    ]
    assert main(["bench", "latency", *words, *more]) == 0
    text = capsys.readouterr().out
    assert len(re.findall(r"^ {2}mean width .* predicted .* measured", text, re.MULTILINE)) == 3
    assert re.search(r"within 10 %: \d of 3", text)
    assert (tmp_path / "table.json").is_file()
