"""What the console shows at 80 and at 60 columns, and how commands end whose reader goes."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import mlpreduce
from mlpreduce import report
from mlpreduce.__main__ import main
from mlpreduce.launch import LaunchSettings
from mlpreduce.recipe import cli as recipe_cli
from mlpreduce.recipe.progress import Display, starting
from mlpreduce.records import Record, Results, StudyDocument, summarize
from mlpreduce.report.search import console_table, front_table
from mlpreduce.report.summing import HEADERS
from mlpreduce.search import cli as search_cli
from mlpreduce.search import tuning_cli
from mlpreduce.testing import tiny_vit
from mlpreduce.train.events import Ended, Event, Progressed, Started
from mlpreduce.train.settings import Run, TrainSettings
from mlpreduce.words.console import Column, Grid, command_line, from_here, run_command, wrapped
from mlpreduce.words.pulse import Pulse

WIDTHS = (80, 60)
NUMBER = re.compile(r"\d[\d.,]*\d|\d")


def longest(text: str) -> int:
    return max(map(len, text.splitlines()))


def printed(renderable: Any, width: int) -> str:
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(renderable)
    return file.getvalue()


def whole(text: str, cells: list[str]) -> None:
    """Every number and every word of the cells stands whole in the text."""
    words = set(re.findall(r"[A-Za-z][\w-]+", text))
    numbers = set(NUMBER.findall(text))
    for cell in cells:
        assert set(NUMBER.findall(cell)) <= numbers, cell
        assert set(re.findall(r"[A-Za-z][\w-]+", cell)) <= words, cell


def record(variant: str, seed: int, top1: float, order: int) -> dict[str, Any]:
    """A record as the recorder writes it, of a small model."""
    half = variant == "grouped(group=2)"
    epochs = [
        {"epoch": n, "top1": value, "top5": 99.0, "val_loss": 1.0, "train_loss": 1.0}
        for n, value in enumerate((70.0, top1, top1 - 0.25), 1)
    ]
    return {
        "schema": 1,
        "recipe": {"name": "digits_tiny", "train": {"epochs": 3}},
        "variant": variant,
        "steps": [{"transform": "grouped", "group": 2}] if half else [],
        "seed": seed,
        "order": order,
        "status": "finished",
        "epochs_planned": 3,
        "train_samples": 1437,
        "plans": [],
        "profile": {
            **{"params": 34_890 if half else 51_722, "mlp_params": 16_832 if half else 33_664},
            **{"unique_mlps": 2 if half else 4, "macs": 789_440, "macs_linear": 1, "macs_with_attention": 3},
            **{"batch_size": 32, "throughput": 12_345.6, "latency": 2.0, "peak_memory_mib": 3.0, "device": "cpu"},
        },
        "hardware": {"device": "cpu", "machine": "x86_64", "cpu_cores": 2, "workers": 2},
        "versions": {"torch": "2"},
        "epochs": epochs,
        "mlflow_run_id": f"id{order}",
        "output": "run",
    }


@pytest.fixture(scope="module")
def results() -> Results:
    tops = {"baseline": (91.31, 90.52, 92.04), "grouped(group=2)": (89.11, 87.92, 88.53)}
    every = [(variant, seed, top1) for variant, found in tops.items() for seed, top1 in enumerate(found)]
    return summarize([Record.model_validate(record(*run, order)) for order, run in enumerate(every)])


def study() -> StudyDocument:
    """The document of a search with long reductions."""

    def point(name: str, number: int | None, steps: list[dict[str, Any]], *tops: float) -> dict[str, Any]:
        runs = [{"seed": s, "top1": t, "final_top1": t - 0.1, "top5": 99.0, "latency": 0.5} for s, t in enumerate(tops)]
        size = 10_005 + 17 * len(steps)
        costs = {"params": size, "mlp_params": 5_003, "unique_mlps": 2, "macs": 41 * size}
        return {
            **{"name": name, "kind": "reference" if number is None else "trial", "number": number, "state": "complete"},
            **{"steps": steps, "settings": {}, "cost": costs, "values": {"top1": tops[0], "params": size}},
            **{"feasible": True, "front": number is not None, "runs": runs, "params": {}, "message": ""},
        }

    grouped = {"transform": "grouped", "group": 3, "pattern": [[0, 1, 2], [3, 4, 5]], "scale": "inv_sqrt"}
    shallow = {"transform": "shallow", "ratio": 0.375, "criterion": {"name": "taylor", "site": "fc1"}}
    document = {
        **{"schema": 1, "study": "sharing_width-digits_tiny", "space": "sharing_width", "recipe": "digits_tiny"},
        "objectives": [
            {"name": "top1", "direction": "maximize", "unit": "%"},
            {"name": "params", "direction": "minimize", "unit": ""},
        ],
        "points": [
            point("trial 12", 12, [grouped, shallow], 91.23, 92.34),
            point("trial 7", 7, [shallow], 90.11),
            point("baseline", None, [], 93.45, 93.01),
        ],
    }
    return StudyDocument.model_validate(document)


@pytest.mark.parametrize("width", WIDTHS)
class TestTables:
    def test_results(self, width: int, results: Results) -> None:
        text = printed(report.console_table(results), width)
        assert longest(text) <= width
        table = report.overview(results)
        whole(text, [*table.headers, *(cell for row in table.rows for cell in row)])
        assert "34.890 k" in text
        assert "789.440 k" in text  # not 0.001 G
        assert not any(note[:40] in text for note in report.NOTES)

    def test_search(self, width: int) -> None:
        text = printed(console_table(study()), width)
        assert longest(text) <= width
        table = front_table(study())
        kept = [
            number for number, header in enumerate(table.headers) if header in ("point", "reduction", "top-1 %", "n")
        ]
        whole(text, [row[number] for row in table.rows for number in kept])
        assert "91.78 ± 0.78" in text

    @pytest.mark.parametrize("transform", ["grouped", "shallow"])
    def test_plan(self, width: int, transform: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", str(width))
        plan = mlpreduce.plan(tiny_vit(depth=12), transform)
        text = str(plan)
        assert longest(text) <= width
        whole(text, [cell for row in plan.rows for cell in (row.mlp, f"{row.hidden:,}", f"{row.params:,}")])

    def test_plan_of_long_names(self, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", str(width))
        row = mlpreduce.plan(tiny_vit(), "grouped").rows[0]
        long = {
            "mlp": "encoder.stages.2.blocks.0.mlp",
            "owner": "encoder.stages.2.blocks.17.mlp",
            "params_before": 10**7,
        }
        rows = tuple(type(row)(**{**vars(row), **long, "mlp": long["mlp"].replace("0", str(n))}) for n in range(18))
        plan = mlpreduce.Plan("grouped", {}, (), rows, left_out={"encoder.neck": "it stands alone in its stage"})
        text = str(plan)
        assert longest(text) <= width
        whole(text, [row.mlp for row in rows])
        assert "#17" in text

    def test_profile(self, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", str(width))
        profile = mlpreduce.Profile(
            5_717_416, 3_550_464, 12, 1_075_000_000, 2_184_000, 1_258_000_000, 32, 123_456.7, 1.2, 9.8
        )
        text = str(profile)
        assert longest(text) <= width
        whole(text, ["5,717,416", "3,550,464", "123,456.7"])
        assert "2.184 M" in text

    @pytest.mark.parametrize(
        "words", [["list"], ["list", "grouped"], ["list", "digits_tiny"], ["recipe", "--list"], ["search", "--list"]]
    )
    def test_lists(
        self, width: int, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        monkeypatch.setenv("COLUMNS", str(width))
        assert main(words) == 0
        text = capsys.readouterr().out
        assert longest(text) <= width
        monkeypatch.delenv("COLUMNS")
        assert main(words) == 0
        whole(text, capsys.readouterr().out.splitlines())  # what a file gets

    def test_coverage(self, width: int) -> None:
        from mlpreduce.coverage.entries import Entry
        from mlpreduce.coverage.table import for_console

        found = Entry("swin_tiny_patch4_window7_224", "swin_transformer", 28_288_354, 12, {"plain": 12}, 19_651_138, 1)
        none = Entry(
            "resnet50", "resnet", 25_557_032, reason="no MLP: 53 convolutions (17 larger than 1 x 1), 1 Linear"
        )
        text = for_console([found, none], {}, width)
        assert longest(text) <= width
        whole(text, ["swin_tiny_patch4_window7_224", "28.288", "19.651", "12 plain", "resnet50", none.reason])


def test_a_table_keeps_its_full_width_in_a_file(results: dict[str, Any]) -> None:
    text = report.console_table(results).text()
    header = next(line for line in text.splitlines() if line.startswith("variant"))
    assert all(name in header for name in HEADERS)


def test_a_row_becomes_a_block_where_no_column_fits() -> None:
    grid = Grid(
        "",
        [
            Column("variant", ["grouped_by_similarity"], left=True),
            Column("parameters", ["136.138 k"]),
            Column("p", [""]),
        ],
    )
    assert grid.text(24) == "grouped_by_similarity\n  parameters: 136.138 k"


def test_a_number_keeps_its_unit() -> None:
    assert wrapped("it takes 234.137 M MACs", 16).splitlines() == ["it takes", "  234.137 M MACs"]
    assert wrapped("97.92 ± 0.08 in the mean", 8).splitlines()[0] == "97.92 ± 0.08"
    assert wrapped("a path/that/is/longer/than/the/line", 10).splitlines()[1] == "  path/that/is/longer/than/the/line"


def test_a_command_can_be_pasted_from_any_width() -> None:
    words = ["mlflow", "ui", "--backend-store-uri", "sqlite:///a b/mlflow.db"]
    text = command_line(words, 40)
    assert longest(text) <= 40
    import shlex

    assert shlex.split(text.replace("\\\n", " ")) == words


def test_paths_are_as_typed_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert from_here(tmp_path / "runs" / "a") == Path("runs/a")
    assert from_here(tmp_path.parent / "b") == tmp_path.parent / "b"


class TestSignsOfLife:
    def test_the_first_line_comes_at_once_and_others_while_nothing_happens(self) -> None:
        file, told = io.StringIO(), threading.Event()

        class Telling(io.StringIO):
            def write(self, text: str) -> int:
                if file.write(text) and file.getvalue().count("starting Ray") >= 3:
                    told.set()
                return len(text)

        console = Console(file=Telling(), width=200)
        with Pulse(console, "starting Ray and 2 workers", every=0.05):
            assert file.getvalue() == "starting Ray and 2 workers\n"
            assert told.wait(30)
        lines = file.getvalue().splitlines()
        assert re.fullmatch(r"starting Ray and 2 workers \(\d+ s\)", lines[1])
        assert not [thread for thread in threading.enumerate() if thread.name == "pulse"]

    def test_what_is_going_on_is_told_while_a_recipe_trains(self, tmp_path: Path) -> None:
        file = io.StringIO()
        run = Run(
            recipe="toy",
            variant="baseline",
            seed=1,
            train=TrainSettings(epochs=2, warmup_epochs=0),
            directory=str(tmp_path),
        )
        with Display(Console(file=file, width=200), [run], 1, starting(LaunchSettings(workers=2))) as display:
            display.handle(Event("baseline", 1, 2, Started({}, notes=["a note"])))
            assert display._pulse._text == "run 1 of 1: baseline, seed 1"
            display.handle(Event("baseline", 1, 2, Progressed(1, fraction=0.5, loss=1.5, images_per_s=900.0)))
            assert display._pulse._text == "run 1 of 1: baseline, seed 1, epoch 1/2, loss 1.500, 900 images/s"
            display.handle(Event("baseline", 1, 2, Ended("finished")))
            assert display._pulse._text == "ending the workers"
        assert file.getvalue().splitlines()[0] == "starting Ray and 2 workers"
        assert "run 1 of 1: baseline, seed 1: a note" in file.getvalue()

    def test_starting(self) -> None:
        assert starting(LaunchSettings(workers=1)) == "starting Ray and 1 worker"
        assert starting(LaunchSettings(workers=0)) == "loading the data and the model"


class TestEnds:
    def test_alone_it_prints_help(self, capsys: pytest.CaptureFixture) -> None:
        assert main([]) == 0
        assert capsys.readouterr().out.startswith("usage: mlpreduce")

    def test_version(self, capsys: pytest.CaptureFixture) -> None:
        assert main(["--version"]) == 0
        assert capsys.readouterr().out == f"mlpreduce {mlpreduce.__version__}\n"

    def test_words_that_are_no_command(self, capsys: pytest.CaptureFixture) -> None:
        assert main(["lst"]) == 2
        assert "invalid choice: 'lst'" in capsys.readouterr().err

    def test_an_interrupt_and_a_pipe_of_something_else(self, capsys: pytest.CaptureFixture) -> None:
        def interrupted() -> int:
            raise KeyboardInterrupt

        def other() -> int:
            raise BrokenPipeError("of a worker")

        assert run_command(interrupted) == 130
        assert capsys.readouterr().err == "\ninterrupted\n"
        with pytest.raises(BrokenPipeError, match="of a worker"):
            run_command(other)

    @pytest.mark.parametrize(
        ("words", "told"),
        [
            (
                "recipe digits data.root=/a",
                "python -m mlpreduce.recipe digits data.root=/a --resume --output runs/digits",
            ),
            ("recipe --new mine.toml --data photos", ""),
            ("recipe --list", ""),
            ("recipe digits --dry-run", ""),
            ("search width --trials 3", "python -m mlpreduce.search width --trials 3 --resume"),
            ("search show runs/x", ""),
            ("search --list", ""),
            ("tune vit_tiny_patch16_224 --data photos --budget macs<=0.5", ""),
        ],
    )
    def test_an_interrupt_tells_how_to_go_on_where_that_is_possible(
        self, words: str, told: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(*given: Any, **more: Any) -> int:
            raise KeyboardInterrupt

        command, *rest = words.split()
        module = {"recipe": recipe_cli, "search": search_cli, "tune": tuning_cli}[command]
        monkeypatch.setattr(module, "_main", interrupted)
        assert module.main(rest) == 130
        after = f"; all workers have ended. To go on: {told}" if told else ""
        assert capsys.readouterr().err == f"\ninterrupted{after}\n"

    @pytest.mark.processes
    @pytest.mark.slow
    @pytest.mark.parametrize("unbuffered", [False, True])
    @pytest.mark.parametrize(
        "words",
        [
            "mlpreduce list",
            "mlpreduce coverage --help",
            "mlpreduce.recipe --list",
            "mlpreduce.search --help",
            "mlpreduce",
        ],
    )
    def test_no_traceback_when_the_reader_has_gone(self, words: str, unbuffered: bool) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
        command = [sys.executable, "-u" if unbuffered else "-b", "-m", *words.split()]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()  # before anything is printed
            errors = process.stderr.read()
        assert errors == ""
        assert process.returncode == 141 or (
            unbuffered and "list" not in words
        )  # argparse passes over what it cannot write
