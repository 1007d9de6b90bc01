"""The report of a search, from documents made here."""

from __future__ import annotations

import io
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
from helpers.studies import OBJECTIVES, make_document, make_points, make_study, make_trial
from matplotlib.collections import LineCollection
from PIL import Image
from rich.console import Console
from scipy.stats import sem, t

from mlpreduce.errors import ReductionError
from mlpreduce.records import StudyDocument
from mlpreduce.report import search_figures
from mlpreduce.report.search import build_search, console_table, front_table

FIGURES = ["front.png", "patterns.png", "importance.png", "parallel.png"]


def rows(text: str, title: str) -> dict[str, dict[str, str]]:
    """The rows of one table of report.md, by their names."""
    lines = text.split(f"## {title}\n")[1].split("\n## ")[0].splitlines()
    head, _, *found = [
        [cell.strip() for cell in line.removeprefix("|").removesuffix("|").split(" | ")]
        for line in lines
        if line.startswith("|")
    ]
    return {row[0]: dict(zip(head, row, strict=True)) for row in found}


class Page(HTMLParser):
    """Tags that are not closed in order, what the page refers to, and its text."""

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
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def markdown_of(document: StudyDocument, place: Path) -> str:
    build_search(document, place)
    return (place / "report.md").read_text(encoding="utf-8")


def test_files_are_those_that_are_returned(tmp_path: Path) -> None:
    place = tmp_path / "new" / "folder"
    paths = build_search(make_study(), place)
    assert [path.name for path in paths] == ["report.md", "report.html", *FIGURES]
    assert sorted(place.iterdir()) == sorted(paths)
    for path in paths[2:]:
        with Image.open(path) as image:
            assert image.width > 600


def test_the_front_stands_beside_the_references(tmp_path: Path) -> None:
    table = rows(markdown_of(make_study(), tmp_path), "Pareto front and references")
    assert list(table) == ["trial 0", "trial 1", "trial 2", "baseline", "grouped", "shallow"]
    tops = [97.0, 97.4, 96.9]
    low, high = t.interval(0.95, 2, loc=fmean(tops), scale=sem(tops))
    assert table["trial 0"] == {
        "point": "trial 0",
        "reduction": "grouped(group=2), shallow(ratio=0.6)",
        "parameters": "120,000",
        "of baseline": "60.0 %",
        "MACs": "4.920 M",
        "unique MLPs": "2",
        "top-1 %": f"97.10 ± {stdev(tops):.2f}",
        "n": "3",
        "peak-to-final": "0.25",
        "95 % interval": f"[{low:.2f}, {high:.2f}]",
    }
    assert table["trial 1"]["reduction"].endswith("; train.lr=0.001")
    assert table["baseline"]["reduction"] == "as it is"
    assert table["baseline"]["of baseline"] == "100.0 %"
    assert table["grouped"]["reduction"] == "grouped(group=2)"


def test_few_runs_are_too_few_to_conclude(tmp_path: Path) -> None:
    text = markdown_of(make_study(), tmp_path)
    table = rows(text, "Pareto front and references")
    assert table["trial 1"]["95 % interval"] == table["trial 2"]["95 % interval"] == "n below 3"
    assert table["trial 2"]["top-1 %"] == "94.00"
    assert "Points of the front with fewer than 3 runs: 2 of 3." in text
    equal = [make_trial(0, 100_000, 97.0, 97.0, 97.0, front=True)]
    text = markdown_of(make_study(points=equal), tmp_path)
    assert rows(text, "Pareto front")["trial 0"]["95 % interval"] == "not defined"
    assert rows(text, "Pareto front")["trial 0"]["of baseline"] == "no baseline"
    assert "fewer than 3 runs" not in text


def test_every_trial_has_a_row(tmp_path: Path) -> None:
    text = markdown_of(make_study(points=make_points()[::-1]), tmp_path)
    table = rows(text, "Trials")
    assert list(table) == [f"trial {number}" for number in range(7)]
    assert [row["state"] for row in table.values()] == [
        *["complete, front"] * 3,
        *("complete", "complete, over a budget", "pruned", "failed"),
    ]
    assert [row["top-1 %"] for row in table.values()] == ["97.10", "96.30", "94.00", "95.50", "97.90", "41.00", ""]
    assert [row["runs"] for row in table.values()] == ["3", "2", "1", "1", "1", "1", "0"]
    assert table["trial 6"]["message"] == "out of memory"
    assert table["trial 3"]["parameters"] == "110,000"
    assert table["trial 3"]["key"] == f"{110_000:08x}"
    without = make_study("top1", points=make_points()[:-1])
    table = rows(markdown_of(without, tmp_path), "Trials")
    assert table["trial 3"]["parameters"] == "110,000"  # though it is no objective
    assert "message" not in table["trial 3"]


def test_budgets_counts_and_settings(tmp_path: Path) -> None:
    text = markdown_of(make_study(), tmp_path)
    table = rows(text, "The search")
    assert {name: row["value"] for name, row in table.items()} == {
        "objective": "minimize parameters",  # the second of two
        "budget": "params&lt;=0.7: parameters at most 140,000",
        **{"trials: trained": "6", "trials: complete": "4", "trials: pruned": "1", "trials: infeasible": "3"},
        **{"trials: duplicate": "2", "trials: failed": "1"},
        "hypervolume": "123.4 (reference top1=0.0, params=202,314)",
        **{"setting: trials": "6", "setting: sampler.name": "tpe", "setting: sampler.seed": "0"},
        "hardware.cpu_cores": "2",
        "versions": "torch 2.15.0, optuna 5.0.0",
        "time": "20 min 34 s",
    }
    assert "| objective | maximize top-1 % |" in text
    table = rows(markdown_of(make_study(budgets=[], hypervolume=None), tmp_path), "The search")
    assert table["budget"]["value"] == "none"
    assert "hypervolume" not in table
    assert "Hypervolume" not in (tmp_path / "report.md").read_text()


def test_verdicts_stand_on_top(tmp_path: Path) -> None:
    text = markdown_of(make_study(), tmp_path)
    assert text.index("## Verdicts") < text.index("- trial 0 dominates") < text.index("## Pareto front")
    assert "Verdicts" not in markdown_of(make_study(verdicts=[]), tmp_path)


def test_html_is_one_file_that_escapes_what_it_shows(tmp_path: Path) -> None:
    name = '<script>alert("1")</script>&|x$y$ [/b]'
    document = make_document(study=name)
    document["objectives"][0] = {**OBJECTIVES["top1"], "unit": "<i>"}  # stands in captions
    document["points"][0]["name"] = document["points"][3]["name"] = name
    document["points"][4]["params"] = {name: 1, "$": name}
    document["budgets"][0]["text"] = name
    document["importance"]["top1"] = {name: 0.5, "ratio": 0.5}
    found = StudyDocument.model_validate(document)
    text = markdown_of(found, tmp_path)
    assert "<script>" not in text
    assert "&amp;\\|x$y$" in text
    page_text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(page_text)
    assert page.open == []
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert len(page.references) == len(FIGURES)
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert "url(" not in page_text
    assert "light dark" in page_text
    assert page.text.count(name) >= 5
    console = Console(width=200, file=io.StringIO())
    console.print(console_table(found))
    assert "[/b]" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "objectives", [("top1",), ("top1", "params"), ("top1", "params", "latency"), ("top1", "params", "macs", "latency")]
)
def test_a_panel_for_each_objective_but_the_first(objectives: tuple[str, ...]) -> None:
    document = make_study(*objectives)
    drawn = search_figures.draw_front(document)
    assert drawn is not None
    axes = drawn[0].axes
    labels = {"params": "parameters", "macs": "MACs", "latency": "latency, ms"}
    assert [axis.get_xlabel() for axis in axes] == ([labels[name] for name in objectives[1:]] or ["trial"])
    assert axes[0].get_ylabel() == "top-1 %"
    texts = {text.get_text() for axis in axes for text in axis.texts}
    assert {"baseline", "grouped", "shallow"} <= texts
    if len(objectives) == 2:  # in one objective the best one alone is the front
        assert {"0", "1", "2"} <= texts
    assert [header for header in front_table(document).headers if "latency" in header] == (
        ["latency, ms"] if "latency" in objectives else []
    )


def test_what_the_front_shows() -> None:
    drawn = search_figures.draw_front(make_study())
    assert drawn is not None
    figure, caption = drawn
    (axis,) = figure.axes
    marks = {bars.get_label(): bars.lines[0] for bars in axis.containers}
    assert set(marks) == {"front", "complete", "complete, over a budget", "baseline", "grouped", "shallow"}
    assert sorted(marks["front"].get_xdata()) == [80_000, 100_000, 120_000]
    assert list(marks["complete"].get_xydata()[0]) == [110_000, 95.5]
    assert list(marks["complete, over a budget"].get_xydata()[0]) == [180_000, 97.9]
    for name, colour in (("complete, over a budget", "white"), ("baseline", "white"), ("grouped", "black")):
        assert marks[name].get_markerfacecolor() == colour
    bars = {bars.get_label(): bars.lines[2] for bars in axis.containers}
    low, high = t.interval(0.95, 2, loc=97.1, scale=sem([97.0, 97.4, 96.9]))
    three, two, one = (segment[:, 1] for segment in bars["front"][0].get_segments())
    assert list(three) == pytest.approx([low, high])
    assert list(two) == pytest.approx([96.0, 96.6])  # the range
    assert list(one) == pytest.approx([94.0, 94.0])
    lines = {line.get_label(): line for line in axis.lines if not str(line.get_label()).startswith("_")}
    assert list(lines["budget params<=0.7"].get_xdata()) == [140_000, 140_000]
    assert lines["pruned"].get_marker() == "v"  # at the edge: it was stopped at 41 %
    assert lines["pruned"].get_ydata()[0] > 85
    (stairs,) = [line for line in axis.lines if line.get_drawstyle() == "steps-post"]
    assert stairs.get_xydata().tolist() == [
        [80_000, 94.0],
        [100_000, pytest.approx(96.3)],
        [120_000, pytest.approx(97.1)],
    ]
    assert "triangle" in caption
    assert "Hollow" in caption


def test_stairs_leave_out_what_another_panel_put_on_the_front() -> None:
    points = [
        make_trial(0, 100_000, 97.0, front=True, values={"top1": 97.0, "params": 100_000, "latency": 5.0}),
        make_trial(1, 120_000, 96.0, front=True, values={"top1": 96.0, "params": 120_000, "latency": 1.0}),
    ]
    drawn = search_figures.draw_front(make_study("top1", "params", "latency", points=points))
    assert drawn is not None
    steps = [
        [line.get_xydata().tolist() for line in axis.lines if line.get_drawstyle() == "steps-post"]
        for axis in drawn[0].axes
    ]
    assert steps == [[], [[[1.0, 96.0], [5.0, 97.0]]]]


def test_one_objective_shows_the_best_so_far() -> None:
    points = make_points()
    for point in points:
        point["front"] = point["name"] == "trial 3"
        if point["name"] in ("trial 0", "trial 1"):
            point["values"]["top1"] = 90.0 + point["number"]
    drawn = search_figures.draw_front(make_study("top1", points=points))
    assert drawn is not None
    (axis,) = drawn[0].axes
    (line,) = [line for line in axis.lines if line.get_drawstyle() == "steps-post"]
    assert line.get_xydata().tolist() == [
        [0, 90.0],
        [1, 91.0],
        [2, 94.0],
        [3, 95.5],
        [3, 95.5],
    ]  # trial 4 is over the budget
    assert "best value so far" in drawn[1]


def test_a_front_without_candidates_says_so(tmp_path: Path) -> None:
    points = [point for point in make_points() if not point["front"] and point["name"] != "trial 3"]
    text = markdown_of(make_study(points=points), tmp_path)
    assert "There is no front: 1 of 3 trials are complete, 0 of them within the budgets." in text
    assert list(rows(text, "References")) == ["baseline", "grouped", "shallow"]
    assert (tmp_path / "front.png").is_file()
    assert (tmp_path / "patterns.png").is_file()


@pytest.mark.parametrize("points", [[], make_points()[:3], make_points()[-1:]], ids=["none", "references", "failed"])
def test_a_search_that_completed_nothing(points: list[dict[str, Any]], tmp_path: Path) -> None:
    text = markdown_of(make_study(points=points, importance={}), tmp_path)
    assert f"There is no front: 0 of {len([p for p in points if p['kind'] == 'trial'])} trials are complete" in text
    for file in ("front.png", "importance.png", "parallel.png"):
        assert not (tmp_path / file).exists()
        assert file not in text


def test_figures_with_nothing_to_show_are_left_out(tmp_path: Path) -> None:
    build_search(make_study(), tmp_path)
    points = [{**point, "params": {"ratio": n}, "pattern": {}} for n, point in enumerate(make_points())]
    document = make_study(points=points, importance={"top1": {"ratio": 1.0}})
    paths = build_search(document, tmp_path)
    assert [path.name for path in paths] == ["report.md", "report.html", "front.png"]
    assert sorted(tmp_path.iterdir()) == sorted(paths)  # those of the earlier report are gone
    for page in paths[:2]:
        text = page.read_text(encoding="utf-8")
        assert not [word for word in ("importance", "parallel", "patterns", "Importance") if word in text]


def test_importance_has_a_panel_for_each_objective() -> None:
    names = {f"parameter {n}": 1 / (n + 1) for n in range(20)}
    document = make_study("top1", "params", "macs", importance={"top1": names, "params": {"a": 0.2, "b": 0.8}})
    drawn = search_figures.draw_importance(document)
    assert drawn is not None
    figure, caption = drawn
    assert [axis.get_title() for axis in figure.axes] == ["top-1 %", "parameters"]
    assert [len(axis.patches) for axis in figure.axes] == [15, 2]
    assert [text.get_text() for text in figure.axes[1].get_yticklabels()] == ["b", "a"]
    assert [bar.get_width() for bar in figure.axes[1].patches] == [0.8, 0.2]
    assert caption.endswith("the first 15 of 20")


def test_parallel_has_an_axis_for_each_parameter_and_objective() -> None:
    document = make_document("top1", "params", "latency")
    for point in document["points"]:
        if point["kind"] == "trial":
            point["params"]["constant"] = 1
    drawn = search_figures.draw_parallel(StudyDocument.model_validate(document))
    assert drawn is not None
    figure, caption = drawn
    axis = figure.axes[0]
    titles = [text.get_text() for text in axis.get_xticklabels()]
    assert titles == ["ratio", "share", "top-1 %", "parameters", "latency, ms"]
    pruned, complete = [c for c in axis.collections if isinstance(c, LineCollection)]
    assert [len(line) for line in pruned.get_segments()] == [2]
    lines = complete.get_segments()
    assert [len(line) for line in lines] == [5] * 5
    assert complete.get_array().tolist() == [94.0, 95.5, pytest.approx(96.3), pytest.approx(97.1), 97.9]
    heights = [[height for _, height in line] for line in lines]
    assert [row[0] for row in heights] == pytest.approx([0.0, 0.3, 0.2, 0.4, 1.0])  # ratio 0.4 to 0.9
    assert [row[1] < 0 for row in heights] == [True, False, False, True, True]  # share is not set in even trials
    assert (heights[0][2], heights[-1][2]) == (0.0, 1.0)
    assert {"not set", "cycle"} <= {text.get_text() for text in axis.texts}
    assert "dashed" in caption


def test_parallel_of_many_parameters_shows_the_most_important() -> None:
    points = [make_trial(n, 100_000 + n, 95.0 + n) for n in range(3)]
    for n, point in enumerate(points):
        point["params"] = {f"p{k}": n + 10.0 ** (k % 3 * n) for k in range(20)}
    importance = {"top1": {f"p{k}": k / 20 for k in range(20)}}
    drawn = search_figures.draw_parallel(make_study(points=points, importance=importance))
    assert drawn is not None
    titles = [text.get_text() for text in drawn[0].axes[0].get_xticklabels()]
    assert titles == [*(f"p{k}" for k in range(6, 20)), "top-1 %", "parameters"]
    assert "the 14 most important of 20 parameters" in drawn[1]


def test_patterns_show_which_block_uses_which_mlp() -> None:
    drawn = search_figures.draw_patterns(make_study())
    assert drawn is not None
    figure, caption = drawn
    assert [axis.get_title().split("\n")[0] for axis in figure.axes] == [
        *("trial 0", "trial 1", "trial 2", "baseline", "grouped", "shallow"),
    ]
    assert figure.axes[0].get_title().split("\n")[1] == "120 k parameters, 97.10 %"
    texts = [[text.get_text() for text in axis.texts] for axis in figure.axes]  # width and owner of each block
    assert texts[0] == ["64", "0", "64", "0", "32", "2", "32", "2"]
    assert texts[4] == ["64", "0", "64", "0", "64", "2", "64", "2"]
    assert "in an outline of the widest" in caption


def test_patterns_are_those_of_the_best_points() -> None:
    trials = [make_trial(n, 100_000 - n, 80.0 + n, front=True) for n in range(15)]
    drawn = search_figures.draw_patterns(make_study(points=[*make_points()[:1], *trials]))
    assert drawn is not None
    names = [axis.get_title().split("\n")[0] for axis in drawn[0].axes]
    assert names == [*(f"trial {n}" for n in range(14, 2, -1)), "baseline"]
    assert "the 12 best of 15 points" in drawn[1]


def test_the_console_shows_what_fits() -> None:
    trials = [make_trial(n, 100_000 - n, 70.0 + n, front=True) for n in range(25)]
    console = Console(width=120, file=io.StringIO())
    console.print(console_table(make_study(points=[*make_points()[:3], *trials])))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "its 20 best of 25" in text
    for words in ("trial 24", "trial 5", "94.00", "baseline", "97.83 ± 0.76", "67.5 %", "shallow(ratio=0.5)"):
        assert words in text
    assert "trial 4 " not in text
    assert max(map(len, text.splitlines())) <= 120


def test_what_is_no_document_of_a_study_is_refused() -> None:
    with pytest.raises(ReductionError, match="the study has schema 2, this version reads 1"):
        make_study(schema=2)
    with pytest.raises(ReductionError, match="no study: objectives: "):
        make_study(objectives=[])
    with pytest.raises(ReductionError, match=r"no study: points\.0\.name: Field required"):
        make_study(points=[{"kind": "trial"}])
    drawn = make_study(points=[{**make_trial(0, 1, 1.0), "params": {"width": np.int64(96), "space": Path("a")}}])
    assert drawn.as_json()["points"][0]["params"] == {
        "width": 96,
        "space": "a",
    }  # whatever a space of one's own chooses of
    assert make_study(later=1).as_json() == make_document(later=1)  # what another version adds is kept


def test_names_stand_evenly_on_their_axis() -> None:
    from mlpreduce.report.search_parallel import _scale

    scale = _scale("criterion", ["b", "a", "b", "d", "c"])
    assert scale.heights == pytest.approx([0.375, 0.125, 0.375, 0.875, 0.625])
    assert [text for _, text in scale.ticks] == ["a", "b", "c", "d"]
