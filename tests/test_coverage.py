"""The coverage table holds: one architecture of each family and kind of MLP, as docs/coverage.md says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
from helpers.marks import slow_but

from mlpreduce.__main__ import main
from mlpreduce.coverage import PROVED_PARAMS, Entry, Proof, examine, prove, smallest
from mlpreduce.coverage.entries import architectures, family_of
from mlpreduce.coverage.table import family_row, markdown

TABLE = (Path(__file__).parents[1] / "docs" / "coverage.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (\w+) \| (\d+) \| `(\w+)` \|.*\| ([^|]+) \|$", TABLE.partition("## Without")[0], re.MULTILINE)
KINDS = dict(re.findall(r"^\| \w+ \| \d+ \| `(\w+)` \| (\d+ [^|(]+)", TABLE.partition("## Without")[0], re.MULTILINE))
WITHOUT = re.findall(r"^\| (\w+) \| (\d+) \| `(\w+)` \| ([^|]+) \|$", TABLE.partition("## Without")[2], re.MULTILINE)

# The smallest architectures that have every kind of MLP between them, which all runs of the tests look at.
SHOWN = {
    "test_convnext",
    "starnet_s050",
    "efficientvim_m1",
    "efficientformerv2_s0",
    "pvt_v2_b0",
    "eva02_tiny_patch14_224",
    "gmlp_ti16_224",
    "vit_dpwee_patch16_reg1_gap_256",
    "eva02_base_patch14_224",
    "test_byobnet",
    "mobilenetv3_small_050",
}


# The command looks at it too: the counter of MACs takes an LSTM apart step by step, for 40 s.
LONG = {"sequencer2d_s"}


def rows(table: list[tuple[str, ...]]) -> list[Any]:
    return [
        pytest.param(*row, id=row[2], marks=[] if row[2] in SHOWN else pytest.mark.slow)
        for row in table
        if row[2] not in LONG
    ]


# every kind of MLP once, on real weights; the command proves all rows
PROVED = [
    "test_vit",
    "gmlp_ti16_224",
    "gmixer_12_224",
    "pvt_v2_b0",
    "visformer_tiny",
    "convnextv2_atto",
    "levit_128s",
    "coat_tiny",
    "efficientformerv2_s0",
    "starnet_s050",
    "tiny_vit_5m_224",
    "vit_dpwee_patch16_reg1_gap_256",
]


def test_the_table_is_of_this_timm() -> None:
    assert f"with timm {timm.__version__}" in TABLE, "generate it again: python -m mlpreduce coverage --output ..."
    total = int(re.search(r"(\d+) architectures in", TABLE)[1])  # type: ignore[index]
    assert total == len(architectures())
    assert {row[0] for row in ROWS} | {row[0] for row in WITHOUT} == {family_of(name) for name in architectures()}
    assert "0 failures" in TABLE


def test_the_rows_that_are_shown_have_every_kind() -> None:
    every = {architecture: set(re.findall(r"\d+ ([a-z+]+)", text)) for architecture, text in KINDS.items()}
    shown = [found for architecture, found in every.items() if architecture in SHOWN]
    assert set.union(*shown) == set.union(*every.values())
    assert len(shown) == len(set.union(*every.values()))  # and none twice


@pytest.mark.parametrize(("family", "count", "architecture", "proof"), rows(ROWS))
def test_a_row(family: str, count: str, architecture: str, proof: str) -> None:
    entry = examine(architecture)
    assert entry.failure == ""
    assert proof.startswith("holds") or (proof == "not run: too large" and entry.params > PROVED_PARAMS)
    shown = Proof(architecture, grouped="nothing" not in proof or None) if proof.startswith("holds") else None
    row = family_row(entry, int(count), shown)
    assert row in TABLE.splitlines()


@pytest.mark.parametrize("architecture", slow_but(PROVED, "test_vit", "pvt_v2_b0", "convnextv2_atto", "starnet_s050"))
def test_on_real_weights(architecture: str) -> None:
    assert f"`{architecture}`" in TABLE
    assert prove(architecture).failure == ""


@pytest.mark.parametrize(("family", "count", "architecture", "reason"), rows(WITHOUT))
def test_without_mlps(family: str, count: str, architecture: str, reason: str) -> None:
    assert examine(architecture).reason == reason


def test_failures_are_told() -> None:
    good = Entry("a", "f", 100, 2, {"plain": 2}, 60, 50)
    bad = Entry("b", "f", 90, failure="planned 1, counted 2")
    alone = Entry("c", "g", 80, 1, {"gated": 1}, None, 70, reason="grouped: alone")
    proofs = {"a": Proof("a", failure="tied differs from copied"), "c": Proof("c", 1e-7, 0.1, None, True, True)}
    text = markdown([good, bad, alone], proofs, "")
    assert "3 architectures in 2 families: 1 grouped and sliced, 1 sliced only, 0 without MLPs, 2 failures" in text
    assert "- b: planned 1, counted 2" in text
    assert "FAILED: tied differs from copied" in text
    assert "- `c`: grouped: alone" in text
    assert "holds, nothing to tie" in text
    assert [entry.architecture for entry in smallest([good, bad, alone]).values()] == ["a", "c"]


def test_a_wrong_cost_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlpreduce.graph import MLP

    right = MLP.params

    def wrong(self: MLP, hidden: int | None = None, *, owned: bool = True) -> int:
        return right(self, hidden, owned=owned) + (hidden is not None)  # one more after a plan

    monkeypatch.setattr(MLP, "params", wrong)
    assert "planned" in examine("test_vit").failure


def test_a_wrong_slice_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlpreduce.surgery import slicing

    right = slicing._picked

    def shifted(tensor, dim, positions):  # another choice of units in fc2 than in fc1
        part = right(tensor, dim, positions)
        return part.roll(1, dim) if dim == 1 else part

    monkeypatch.setattr(slicing, "_picked", shifted)
    assert "sliced differs from masked" in prove("test_vit").failure


@pytest.mark.processes
@pytest.mark.slow
def test_the_command(tmp_path, capsys) -> None:
    output = tmp_path / "table.md"
    assert main(["coverage", "--family", "starn*", "--family", "vgg", "--output", str(output), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {entry["family"] for entry in rows["entries"]} == {"starnet", "vgg"}
    assert all(proof["failure"] == "" for proof in rows["proofs"])
    assert "## Without MLPs" in output.read_text(encoding="utf-8")
    assert main(["coverage", "--family", "swim_transformer"]) == 2
    assert "did you mean 'swin_transformer'" in capsys.readouterr().err


def test_names_stand_to_the_left_and_numbers_to_the_right_on_a_console() -> None:
    from mlpreduce.coverage.table import for_console

    entries = [
        Entry("small", "vit", 1_000_000, 1, {"plain": 1}),
        Entry("a_longer_name", "a_longer_family", 22_000_000, 12, {"gated": 12}),
    ]
    lines = for_console(entries, {}, 200).splitlines()
    places = [[line.index(word) for word in ("vit", "small")] for line in lines if "vit" in line]
    others = [
        [line.index(word) for word in ("a_longer_family", "a_longer_name")] for line in lines if "a_longer" in line
    ]
    assert places == others
