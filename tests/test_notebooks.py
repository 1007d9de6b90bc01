"""What a notebook shows: short reprs, tables as HTML, names that tab completion finds, and progress of what takes long."""

from __future__ import annotations

import copy
import html.parser
import io
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

import mlpreduce
from mlpreduce import budget
from mlpreduce.budget.latency import timed
from mlpreduce.budget.profiling import Profile
from mlpreduce.edits import History, Plan, Row
from mlpreduce.reduction.verification import Report
from mlpreduce.testing import tiny_vit
from mlpreduce.words import waiting

EVIL = '<script>alert("1")</script>'


class Table(html.parser.HTMLParser):
    """The cells of a table by row, the items below it, and a check that there are tables and lists of text only."""

    ALLOWED = frozenset({"table", "caption", "thead", "tbody", "tr", "th", "td", "ul", "li"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.items: list[str] = []
        self.caption = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag in self.ALLOWED
        assert {name for name, _ in attributes} <= {"scope"}
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "li":
            self.items.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        if inside in ("td", "th"):
            self.rows[-1][-1] += data
        elif inside == "li":
            self.items[-1] += data
        elif inside == "caption":
            self.caption += data
        else:
            assert not data.strip()


@pytest.fixture(scope="module")
def base() -> nn.Module:
    with torch.device("meta"):
        return timm.create_model("vit_base_patch16_224")


def test_reprs_are_one_short_line(base: nn.Module) -> None:
    model = copy.deepcopy(base)
    widths = [2048 + 8 * block for block in range(12)]
    sliced = mlpreduce.plan(model, "shallow", widths=widths)
    mlpreduce.apply(model, sliced)
    mlpreduce.apply(model, "shallow", ratio=0.5)
    mlps = mlpreduce.find_mlps(model)
    for shown in (sliced, *mlps, mlpreduce.profile(model), mlpreduce.verify(model), mlpreduce.history(model)):
        assert len(repr(shown)) < 200
        assert "\n" not in repr(shown)
    assert repr(mlps[3]) == f"<MLP blocks.3.mlp: plain, 768 -> {(2048 + 24) // 2:,} -> 768>"
    after = sum(widths) * (2 * 768 + 1) + 12 * 768  # both weights and fc1's bias of each unit, and the biases of fc2
    assert f"MLP parameters 56,669,184 -> {after:,}>" in repr(sliced)


def test_reprs_say_what_a_plan_does(base: nn.Module) -> None:
    made = mlpreduce.plan(base, "grouped", group=2)
    assert repr(made) == "<Plan grouped(group=2): 12 MLPs, unique 12 -> 6, MLP parameters 56,669,184 -> 28,334,592>"
    alone = mlpreduce.plan(base, "grouped", group=2, exclude=["blocks.0.*", "blocks.1.*"])
    assert repr(alone).endswith(", 2 left out>")
    assert repr(replace(made, rows=())) == f"<Plan grouped(group=2): {len(made.edits)} edits, made by hand>"
    tied = mlpreduce.find_mlps(mlpreduce.apply(tiny_vit(), made_for_tiny()))
    assert repr(tied[1]).endswith("tied to blocks.0.mlp>")


def made_for_tiny() -> Plan:
    return mlpreduce.plan(tiny_vit(), "grouped", group=2)


def test_a_repr_computes_nothing(base: nn.Module) -> None:
    def costs() -> tuple[object, object]:
        raise AssertionError("computed")

    assert "grouped" in repr(replace(mlpreduce.plan(base, "grouped"), costs=costs))


def test_long_names_keep_reprs_short() -> None:
    name = "a" * 300
    row = Row(name, "plain", 8, 4, name, name, 100, 50)
    made = Plan(name, {"widths": list(range(200))}, (), (row,), {name: name}, (name,))
    assert len(repr(made)) < 200
    assert len(repr(History([made] * 30))) < 200
    assert len(repr(Report(1, 2, 3, 4, (name,) * 9))) < 200


def test_a_plan_as_html_has_what_print_has() -> None:
    made = mlpreduce.plan(tiny_vit(), "grouped", group=2, exclude="blocks.3.*", remainder="own")
    table = Table(made._repr_html_())
    assert table.caption == made.call
    assert table.rows[0] == ["#", "MLP", "kind", "hidden", "parameters", "owner"]
    assert [row[1] for row in table.rows[1:]] == [row.mlp for row in made.rows]
    assert table.rows[2][5] == "blocks.0.mlp"
    assert table.rows[2][4].endswith(" -> 0")
    text = str(made)
    assert table.items
    for item in table.items:
        assert item.strip() in text
    assert any("left out: blocks.3.mlp: in exclude" in item for item in table.items)


def test_names_are_text_in_html() -> None:
    row = Row(EVIL, EVIL, 8, 4, EVIL, "b&b", 100, 50)
    made = Plan(EVIL, {"x": EVIL}, (), (row,), {EVIL: EVIL}, (EVIL,))
    profile = Profile(1, 1, 1, 1, 1, 1, batch_size=1, throughput=1.0, latency=1.0, peak_memory_mib=1.0, device=EVIL)
    for shown in (made, History([made]), Report(1, 1, 1, 1, (EVIL,)), profile):
        text = shown._repr_html_()
        assert EVIL not in text
        table = Table(text)
        assert any(
            EVIL in words for words in [table.caption, *table.items, *(cell for row in table.rows for cell in row)]
        )


def test_profile_and_report_as_html() -> None:
    model = tiny_vit()
    profile = mlpreduce.profile(model)
    assert [row[0].strip() for row in Table(profile._repr_html_()).rows[1:]][:2] == ["parameters", "of MLPs"]
    for _, value, remark in Table(profile._repr_html_()).rows[1:]:
        assert f"{value}  {remark}" in str(profile)
    mlpreduce.apply(model, "grouped", group=2)
    good = mlpreduce.verify(model)
    assert Table(good._repr_html_()).rows[1] == ["verdict", "ok"]
    model.blocks[1].mlp.fc1 = copy.deepcopy(model.blocks[1].mlp.fc1)
    bad = mlpreduce.verify(model)
    assert Table(bad._repr_html_()).rows[1] == ["verdict", "something is wrong"]
    assert Table(bad._repr_html_()).items == list(bad.problems)
    assert repr(bad).startswith("<Report: 1 problem; ")


def test_a_history_is_still_a_list() -> None:
    model = tiny_vit()
    empty = mlpreduce.history(model)
    assert empty == []
    assert "no reduction" in repr(empty)
    assert "not reduced" in Table(empty._repr_html_()).caption  # type: ignore[attr-defined]
    mlpreduce.apply(model, "grouped", group=2)
    mlpreduce.apply(model, "shallow")
    found = mlpreduce.history(model)
    assert isinstance(found, list)
    assert found == model.mlpreduce_history == list(found)
    assert type(model.mlpreduce_history) is list  # what is stored with a model stays as it was
    for other in (copy.copy(found), copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert other == found
        assert repr(other) == repr(found) == "<History of 2 plans: grouped(group=2), shallow()>"
    rows = Table(found._repr_html_()).rows[1:]  # type: ignore[attr-defined]
    assert [row[:4] for row in rows] == [["0", "grouped(group=2)", "4", "4 -> 2"], ["1", "shallow()", "4", "2"]]
    assert mlpreduce.history(copy.deepcopy(model)) == found


def test_dir_has_names_and_packages() -> None:
    assert set(mlpreduce.__all__) | set(mlpreduce._PACKAGES) | {"__version__"} <= set(dir(mlpreduce))
    for name in dir(mlpreduce):
        getattr(mlpreduce, name)


@pytest.mark.processes
def test_completion_imports_nothing_heavy() -> None:
    code = (
        "import sys, mlpreduce\n"
        "names = [name for name in dir(mlpreduce) if name.startswith('p')]\n"
        "assert names == ['plan', 'plot', 'plugins', 'profile'], names\n"
        "assert 'budget' in dir(mlpreduce)\n"
        "heavy = {'torch', 'timm', 'numpy', 'matplotlib', 'pydantic', 'rich', 'ray'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """A terminal, to be stderr within a test, on which progress appears at once."""
    stream = Terminal()
    monkeypatch.setattr(waiting, "DELAY", 0.0)
    monkeypatch.setattr(waiting, "_EVERY", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    yield stream
    assert not waiting._busy  # whatever happened


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 3, 16, 16, generator=generator), torch.arange(16) % 5) for _ in range(3)]


WORK: dict[str, Callable[[nn.Module], object]] = {
    "criterion taylor": lambda model: mlpreduce.plan(model, "shallow", criterion="taylor", data=batches()),
    "criterion gate": lambda model: mlpreduce.plan(
        model, "shallow", criterion={"name": "gate", "epochs": 2}, data=batches()
    ),
    "repair least_squares": lambda model: mlpreduce.plan(
        model, "shallow", repair="least_squares", data=[images for images, _ in batches()]
    ),
    "similarity of the MLPs": lambda model: mlpreduce.plan(
        model, "grouped", pattern="similarity", data=[images for images, _ in batches()]
    ),
    "inputs of the layers": lambda model: mlpreduce.plan(
        model, "low_rank", ratio=0.5, init="data", data=[images for images, _ in batches()]
    ),
    "budget.Loss: widths": lambda model: budget.Loss(1e-3).widths(model, [images for images, _ in batches()]),
}


@pytest.mark.parametrize("what", WORK)
def test_long_work_shows_progress_and_changes_nothing(what: str, terminal: Terminal) -> None:
    with redirect_stderr(terminal):
        shown = WORK[what](tiny_vit())
    assert what in terminal.getvalue()
    if not what.startswith("budget"):
        examples = 96 if what == "criterion gate" else 48  # that one reads them twice
        assert f"{examples}/{examples}" in terminal.getvalue()
    with waiting.silent(), redirect_stderr(terminal):
        length = len(terminal.getvalue())
        again = WORK[what](tiny_vit())
        assert len(terminal.getvalue()) == length
    assert str(again) == str(shown)


@pytest.mark.parametrize("work", ["latency", "profile"])
def test_timing_shows_progress(work: str, terminal: Terminal) -> None:
    with redirect_stderr(terminal):
        if work == "latency":
            timed([tiny_vit(), tiny_vit()], torch.zeros(1, 3, 16, 16), torch.device("cpu"), 2)
        else:
            mlpreduce.profile(tiny_vit(), measure_speed=True, batch_size=1, repeats=2)
    assert work in terminal.getvalue()
    assert ("3/3" if work == "latency" else "6/6") in terminal.getvalue()


def line_of(stream: io.StringIO, what: str = "counting") -> str:
    """What two steps of work show on a stream that is stderr."""
    with redirect_stderr(stream), waiting.steps(what, 2) as advance:
        advance(1)
        advance(1)
    return stream.getvalue()


def test_progress_is_for_those_who_look(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "counting" in line_of(Terminal())
    monkeypatch.setenv("FORCE_COLOR", "1")  # which makes no terminal of a file
    assert line_of(io.StringIO()) == ""
    monkeypatch.setattr(waiting, "DELAY", 1000.0)
    assert line_of(Terminal()) == ""


def test_work_within_work_shows_one_line(terminal: Terminal) -> None:
    with redirect_stderr(terminal), waiting.steps("outer", 2) as advance:
        advance(1)
        line_of(terminal, "inner")
        advance(1)
    assert "outer" in terminal.getvalue()
    assert "inner" not in terminal.getvalue()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError])
def test_an_interrupt_leaves_the_terminal_as_it_was(stop: type[BaseException], terminal: Terminal) -> None:
    def broken() -> Iterator[torch.Tensor]:
        yield from (images for images, _ in batches())
        raise stop("enough")

    kept = None
    try:
        with redirect_stderr(terminal):
            mlpreduce.plan(tiny_vit(), "shallow", criterion="activation", data=broken())
    except stop as error:
        kept = error  # a notebook keeps the last error, with all that was running
    assert kept is not None
    text = terminal.getvalue()
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor was hidden, and is back
    assert not waiting._busy


def test_training_a_recipe_shows_no_second_line(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlpreduce import train
    from mlpreduce.launch.here import train_all

    busy = []
    monkeypatch.setattr(train, "fit", lambda run, runtime: busy.append(waiting._busy))
    train_all([None], None)  # type: ignore[list-item, arg-type]
    assert busy == [True]


def test_tables_of_reports_are_escaped_too() -> None:
    from mlpreduce.report import pages
    from mlpreduce.report.content import Table as Section

    text = pages._table(Section("t", ("a", "b"), [["x<", EVIL]]))
    assert "x&lt;" in text
    assert EVIL not in text
