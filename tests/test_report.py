from __future__ import annotations

import io
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers.fresh import python
from helpers.records import COUNTS, HARDWARE, cells, make_record, write
from PIL import Image
from rich.console import Console

from mlpreduce import report
from mlpreduce.errors import ReductionError
from mlpreduce.records import Against, Record, Results, VariantResult, Variants
from mlpreduce.report.published import CELLS, SOURCE
from mlpreduce.report.summing import beyond_noise

TOPS = {"baseline": [81.16, 80.94], "grouped": [81.58, 81.36], "shallow": [81.30, 81.20]}


def write_record(directory: Path, variant: str, seed: int, top1: list[float], order: int, **changes: Any) -> None:
    write(directory, make_record(variant, seed, top1, order, **changes))


def write_all(directory: Path, recipe: str = "toy") -> Path:
    for number, (variant, tops) in enumerate(TOPS.items()):
        for seed, top1 in enumerate(tops):
            write_record(directory, variant, seed, [70.0, top1, top1 - 0.25], 2 * number + seed, recipe=recipe)
    return directory


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return write_all(tmp_path / "run")


class Page(HTMLParser):
    """Collects tags that are not closed in order, attributes that lead outside, and text."""

    VOID = frozenset({"meta", "img", "br", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "data")]
        assert not [name for name, _ in attributes if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_report_is_built_from_records_alone(output: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    document = report.build(output, output=elsewhere).as_json()
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    assert {path.name for path in elsewhere.iterdir()} == set(report.FILES)
    assert json.loads((elsewhere / "results.json").read_text()) == document
    text = (elsewhere / "report.md").read_text()
    here = cells(text, "Table 1: size and compute")["baseline", "run"]
    assert here["parameters"] == "86,567,656"
    assert here["MACs (G)"] == "16.867"
    assert cells(text, "Table 2: validation")["grouped", "run"]["top-1 %"] == "81.47 ± 0.16"
    assert "ddof=1" in text
    assert "attention products left out" in text
    with Image.open(elsewhere / "curves.png") as image:
        assert image.width > 800
    assert report.build(output).as_json() == document  # by default where the records lie
    assert (output / "report.html").is_file()


def test_published_cells_are_those_of_the_paper() -> None:
    """METHODS: 86.6M / 56.7M / 16.9, 58.2 / 28.3 / 16.9, 58.2 / 28.3 / 11.3; accuracy per parameter and per G MACs."""
    table1 = ("params", "mlp_params", "unique_mlps", "macs", "expansion")
    assert [CELLS["baseline"][key] for key in table1] == ["86.6", "56.7", "12", "16.9", "4"]
    assert [CELLS["grouped"][key] for key in table1] == ["58.2", "28.3", "6", "16.9", "4"]
    assert [CELLS["shallow"][key] for key in table1] == ["58.2", "28.3", "12", "11.3", "2"]
    table2 = ("top1", "top5", "peak_epoch", "peak_to_final", "throughput")
    assert [CELLS["baseline"][k] for k in table2] == [
        "81.05 ± 0.11",
        "95.36 ± 0.08",
        "219 ± 13",
        "0.47 ± 0.04",
        "1,020",
    ]
    assert [CELLS["grouped"][k] for k in table2] == ["81.47 ± 0.11", "95.66 ± 0.08", "272 ± 1", "0.06 ± 0.06", "1,017"]
    assert [CELLS["shallow"][k] for k in table2] == ["81.25 ± 0.02", "95.52 ± 0.02", "273 ± 0", "0.03 ± 0.01", "1,411"]
    for (
        name,
        cell,
    ) in CELLS.items():  # the exact counts give the printed figures; 81.25 / 58.238 = 1.3951 is printed as 1.39
        params, _, _, macs = COUNTS[name]
        top1 = float(cell["top1"].split()[0])
        assert f"{params / 1e6:.1f}" == cell["params"]
        assert f"{macs / 1e9:.1f}" == cell["macs"]
        assert float(cell["top1_per_params"]) == pytest.approx(top1 / (params / 1e6), abs=0.0052)
        if "top1_per_macs" in cell:
            assert f"{top1 / (macs / 1e9):.2f}" in (cell["top1_per_macs"], "4.81")
        ratio = int(cell["throughput"].replace(",", "")) / 1020
        assert f"{ratio:.3f}" == cell["throughput_ratio"]


def test_published_numbers_stand_beside_those_of_the_recipe_that_reproduces_them(tmp_path: Path) -> None:
    write_all(tmp_path, "paper_vitb16")
    write_record(tmp_path, "thin", 0, [80.0], 9, recipe="paper_vitb16")
    report.build(tmp_path)
    text = (tmp_path / "report.md").read_text()
    first, second = cells(text, "Table 1: size and compute"), cells(text, "Table 2: validation")
    assert first["grouped", tmp_path.name]["parameters (M)"] == "58.233"
    assert first["grouped", SOURCE]["parameters (M)"] == "58.2"
    assert first["grouped", SOURCE]["parameters"] == "not in the paper"
    assert set(first["thin", SOURCE].values()) == {"thin", SOURCE, "not in the paper"}
    assert second["baseline", SOURCE]["top-1 %"] == "81.05 ± 0.11"
    assert first["grouped", tmp_path.name]["hidden / width"] == "4"
    assert first["shallow", tmp_path.name]["hidden / width"] == "2"
    assert first["thin", tmp_path.name]["hidden / width"] == "2"
    efficiency = cells(text, "Accuracy for its cost")
    assert efficiency["baseline", tmp_path.name]["top-1 % per M parameters"] == "0.936"
    assert efficiency["shallow", tmp_path.name]["top-1 % per G MACs"] == "7.197"
    assert efficiency["shallow", SOURCE]["top-1 % per G MACs"] == "7.20"
    assert efficiency["grouped", SOURCE]["top-1 % per G MACs"] == "not in the paper"
    assert cells(text, "Against the baseline")["grouped", SOURCE]["p"] == "0.018 (n is too small to conclude)"
    assert "ddof=0" in text
    assert "arXiv 2512.01059" in text
    assert "say nothing about the paper" in text  # 3 epochs, not 300


def test_a_tiny_twin_says_nothing_about_the_paper(tmp_path: Path) -> None:
    write_all(tmp_path, "paper_vitb16_tiny")
    report.build(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "say nothing about the paper" in text
    assert "81.05 ± 0.11" in text


def test_a_reduction_that_was_not_published_gets_no_published_numbers(tmp_path: Path) -> None:
    write_record(tmp_path, "baseline", 0, [80.0], 0, recipe="paper_vitb16")
    steps = [{"transform": "grouped", "group": 3}]
    write_record(tmp_path, "grouped", 0, [80.0], 1, recipe="paper_vitb16", steps=steps)
    report.build(tmp_path)
    row = cells((tmp_path / "report.md").read_text(), "Table 2: validation")["grouped", SOURCE]
    assert row["top-1 %"] == "not in the paper"


def test_another_recipe_gets_no_published_numbers(output: Path) -> None:
    report.build(output)
    for name in ("report.md", "report.html"):
        assert "not in the paper" not in (output / name).read_text()
        assert "81.05 ± 0.11" not in (output / name).read_text()


def test_speed_and_memory_are_ratios_to_the_baseline_measured_beside_them(output: Path) -> None:
    report.build(output)
    rows = cells((output / "report.md").read_text(), "Speed and memory, inference")
    assert rows["shallow", "run"] == {
        "variant": "shallow",
        "source": "run",
        "images/s": "1,411",
        "ratio to baseline": "1.383",
        "peak memory, MiB": "710.0",
        "ratio of memory": "0.710",
        "batch": "32",
        "device, dtype": "cpu, float32, 1 threads",
    }
    assert rows["baseline", "run"]["ratio to baseline"] == "1.000"


def test_other_hardware_gives_no_ratio(output: Path) -> None:
    write_record(output, "thin", 0, [80.0], 9, hardware={**HARDWARE, "device": "AVX2"})
    shutil.rmtree(output / "shallow")
    for seed in (0, 1):
        profile = make_record("shallow", seed, [80.0], 9)["profile"] | {"device": "cuda, float32, 1 threads"}
        write_record(output, "shallow", seed, [80.0], 7 + seed, profile=profile)
    report.build(output)
    rows = cells((output / "report.md").read_text(), "Speed and memory, inference")
    assert rows["shallow", "run"]["ratio to baseline"] == "no baseline there"
    assert rows["thin", "run"]["images/s"] == "not measured"


def test_two_pairs_are_too_few_to_conclude(output: Path) -> None:
    document = report.build(output).as_json()
    rows = cells((output / "report.md").read_text(), "Against the baseline")
    against = document["variants"]["shallow"]["vs_baseline"]
    row = rows["shallow", "run"]
    assert row["p"] == f"{against['p_value']:.3f} (n is too small to conclude)"
    assert row["95 % interval"] == f"[{against['ci_low']:+.2f}, {against['ci_high']:+.2f}]"
    assert (row["n"], row["df"]) == ("2", "1")
    equal = rows["grouped", "run"]  # both differences are equal
    assert (equal["p"], equal["95 % interval"]) == ("not defined (n is too small to conclude)", "not defined")


def test_three_pairs_stand_without_the_words(output: Path) -> None:
    for number, (variant, top1) in enumerate((("baseline", 81.0), ("grouped", 81.1), ("shallow", 81.2))):
        write_record(output, variant, 2, [top1], 10 + number)
    report.build(output)
    for name in ("report.md", "report.html"):
        assert "too small" not in (output / name).read_text()


def test_console_shows_one_table(output: Path) -> None:
    console = Console(width=160, file=io.StringIO())
    console.print(report.console_table(report.build(output)))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[-0.56, +0.96]" in text
    for words in ("86.568 M", "16.867 G", "81.47 ± 0.16", "+0.42", "peak-to-final"):
        assert words in text


def test_which_differences_are_beyond_the_noise() -> None:
    def variant(delta: float | None = None, p: float | None = None, n: int = 4) -> VariantResult:
        against = None if delta is None else Against(delta=delta, p_value=p, n=n)
        return VariantResult.model_construct(vs_baseline=against)

    def told_of(**variants: VariantResult) -> str:
        return beyond_noise(Results.model_construct(variants=variants))

    found = {"baseline": variant(), "a": variant(1.5, 0.001), "b": variant(-2, 0.02), "c": variant(0.4, 0.045)}
    others = {"d": variant(0.1, 0.9), "e": variant(0.5, None, 1), "f": variant(5.0, None), "g": variant(1.0, 0.001, 2)}
    told = told_of(**found, **others)
    assert told.startswith("4 differences in top-1 from the baseline are tested, over 4 or more seeds")
    assert (
        "beyond the noise: a (+1.50), b (-2.00); within it: c, d; too few seeds, or equal differences, to tell: e, f, g ("
        in told
    )
    few = told_of(baseline=variant(), a=variant(1, 0.01, 2), b=variant(1, 0.02, 2))
    assert "can be tested; too few seeds, or equal differences, to tell: a, b." in few
    assert told_of(baseline=variant(), a=variant(1, 0.01)) == ""
    parts = {"x": variant(1, 0.01), "y": variant(0, 0.8)}
    points = {point: Variants.model_construct(variants={"a": found}) for point, found in parts.items()}
    swept = Results.model_construct(points=points)
    assert "beyond the noise: x a (+1.00); within it: y a (" in beyond_noise(swept)


def test_html_is_one_file_that_escapes_what_it_shows(tmp_path: Path) -> None:
    name = '<script>alert("1")</script>&|x$y$'
    write_all(tmp_path)
    write_record(tmp_path, name, 0, [50.0], 9)
    report.build(tmp_path)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "iframe", "object", "style>"} & set(page.tags)
    assert len(page.references) == 2  # curves and plans
    assert all(figure.startswith("data:image/png;base64,") for figure in page.references)
    assert "http" not in text.replace("https://arxiv.org", "")
    assert "url(" not in text
    assert "@import" not in text
    assert name in page.text
    markdown = (tmp_path / "report.md").read_text()
    assert "<script>" not in markdown
    assert "&amp;\\|x$y$" in markdown


def test_curves_of_different_length(output: Path) -> None:
    write_record(output, "late", 0, [50.0], 9)
    write_record(output, "late", 1, [50.0, 60.0], 10)
    report.build(output)
    assert (output / "curves.png").is_file()


def test_published_figure_begins_at_epoch_150(tmp_path: Path) -> None:
    from mlpreduce.report import figure

    written = [make_record("baseline", seed, [50.0 + seed] * 300, seed, recipe="paper_vitb16") for seed in (0, 1)]
    left, right = figure.draw([[Record.model_validate(one) for one in written]]).axes
    (line,) = left.lines
    assert (line.get_xdata()[0], line.get_xdata()[-1]) == (150, 300)
    assert set(line.get_ydata()) == {50.5}
    (band,) = left.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (50.0, 51.0)
    assert right.get_ylabel() == "validation loss"
    early = figure.draw([[Record.model_validate(make_record("baseline", 0, [50.0] * 300, 0))]]).axes[0].lines[0]
    assert early.get_xdata()[0] == 1


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(ReductionError, match="no finished run"):
        report.build(tmp_path)


def test_several_runs_make_one_report(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for seed in (0, 1):
        write_record(first, "baseline", seed, [80.0 + seed], seed)
        write_record(second, "grouped", seed, [81.0 + 2 * seed], seed)
    write_record(second, "baseline", 2, [83.0], 3)
    document = report.build(first, second, first, output=tmp_path / "both").as_json()
    assert [run["seed"] for run in document["variants"]["baseline"]["runs"]] == [0, 1, 2]
    assert document["variants"]["grouped"]["vs_baseline"]["n"] == 2
    text = (tmp_path / "both" / "report.md").read_text()
    assert ("baseline", "first, second") in cells(text, "Table 2: validation")
    assert cells(text, "Runs")["grouped", "second"]["MLflow run"] in ("id0", "id1")
    speed = cells(text, "Speed and memory, inference")
    assert speed["grouped", "second"]["ratio to baseline"] == "0.997"
    assert speed["baseline", "first"]["images/s"] == "1,020"


def test_runs_of_one_name_go_by_their_paths(tmp_path: Path) -> None:
    write_record(tmp_path / "a" / "run", "baseline", 0, [80.0], 0)
    write_record(tmp_path / "b" / "run", "baseline", 1, [80.0], 0)
    report.build(tmp_path / "a" / "run", tmp_path / "b" / "run", output=tmp_path / "both")
    assert str(tmp_path / "a" / "run") in (tmp_path / "both" / "report.md").read_text()


def test_settings_that_differ_between_runs_are_named(tmp_path: Path) -> None:
    write_record(tmp_path / "a", "baseline", 0, [80.0], 0)
    write_record(tmp_path / "b", "grouped", 0, [80.0, 81.0], 0)
    report.build(tmp_path / "a", tmp_path / "b", output=tmp_path / "both")
    assert "train.epochs: 1 in a, 2 in b" in (tmp_path / "both" / "report.md").read_text()


def test_several_runs_need_a_place_of_their_own(tmp_path: Path) -> None:
    write_record(tmp_path / "a", "baseline", 0, [80.0], 0)
    write_record(tmp_path / "b", "baseline", 1, [80.0], 0)
    with pytest.raises(ReductionError, match="--output DIR"):
        report.build(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ReductionError, match="holds records"):
        report.build(tmp_path / "a", tmp_path / "b", output=tmp_path / "a")
    assert not (tmp_path / "a" / "results.json").exists()


@pytest.mark.processes
def test_the_command_rebuilds_a_report(output: Path, tmp_path: Path) -> None:
    result = python("-m", "mlpreduce", "report", str(output), "--output", str(tmp_path / "out"))
    result.check_returncode()
    assert "81.47 ± 0.16" in result.stdout
    assert str(tmp_path / "out" / "report.html") in result.stdout
    assert (tmp_path / "out" / "report.html").is_file()


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mlpreduce.__main__ import main

    assert main(["report", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "no finished run" in error
