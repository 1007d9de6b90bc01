from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from mlpreduce import report
from mlpreduce.errors import ReductionError

PROFILE = {
    "params": 86_567_656,
    "mlp_params": 56_669_184,
    "unique_mlps": 12,
    "macs_linear": 16_848_500_736,
    "macs": 16_867_412_736,
    "macs_with_attention": 17_582_740_224,
    "throughput": 1020.4,
    "latency": 2.0,
    "peak_memory_mib": None,
}


def write_record(directory: Path, variant: str, seed: int, top1: list[float], order: int) -> None:
    """A record as the recorder writes it, by hand: reports need nothing else."""
    epochs = [{"epoch": n, "top1": value, "top5": value + 5, "val_loss": 1 / n} for n, value in enumerate(top1, 1)]
    record = {
        "schema": 1,
        "recipe": {"name": "toy"},
        "variant": variant,
        "steps": [] if variant == "baseline" else [{"transform": variant}],
        "seed": seed,
        "order": order,
        "status": "finished",
        "profile": PROFILE,
        "epochs": epochs,
        "mlflow_run_id": f"id{order}",
    }
    folder = directory / variant / f"seed{seed}"
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps(record))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    values = {"baseline": [81.16, 80.94], "grouped": [81.58, 81.36], "shallow": [81.30, 81.20]}
    for number, (variant, tops) in enumerate(values.items()):
        for seed, top1 in enumerate(tops):
            write_record(tmp_path, variant, seed, [70.0, top1, top1 - 0.25], 2 * number + seed)
    return tmp_path


def test_report_is_built_from_records_alone(output: Path) -> None:
    document = report.build(output)
    assert json.loads((output / "results.json").read_text()) == document
    text = (output / "report.md").read_text()
    assert "| baseline | 86,567,656 | 56,669,184 | 12 | 16.867 G | 81.05 ± 0.16 | 86.05 | 0.25 | 1,020 |" in text
    assert "| 81.47 ± 0.16 |" in text
    assert "ddof=1" in text
    assert "attention products left out" in text
    with Image.open(output / "curves.png") as image:
        assert image.width > 800


def test_two_pairs_are_too_few_to_conclude(output: Path) -> None:
    document = report.build(output)
    text = report.markdown(document)
    p = document["variants"]["shallow"]["vs_baseline"]["p_value"]
    assert f"{p:.3f} (n is too small to conclude) | 2 |" in text
    assert "not defined (n is too small to conclude)" in text  # grouped: both differences are equal


def test_three_pairs_stand_without_the_words(output: Path) -> None:
    for number, (variant, top1) in enumerate((("baseline", 81.0), ("grouped", 81.1), ("shallow", 81.2))):
        write_record(output, variant, 2, [top1], 10 + number)
    assert "too small" not in report.markdown(report.build(output))


def test_console_shows_both_tables(output: Path) -> None:
    console = Console(width=120, file=io.StringIO())
    console.print(report.console_table(report.build(output)))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for words in ("counts and speed", "accuracy", "56,669,184", "16.867 G", "81.47 ± 0.16", "+0.42", "peak-to-final"):
        assert words in text


def test_curves_of_different_length(output: Path) -> None:
    write_record(output, "late", 0, [50.0], 9)
    write_record(output, "late", 1, [50.0, 60.0], 10)
    assert report.plot(output).is_file()


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(ReductionError, match="no finished run"):
        report.build(tmp_path)
