"""Which records may stand in one report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.records import make_record

from mlpreduce.errors import ReductionError
from mlpreduce.report.gathering import gather


def write_run(directory: Path, variant: str, seed: int, **changes: Any) -> None:
    """A record without its recorder."""
    record = make_record(variant, seed, [50.0], 0, **changes)
    place = directory / variant / f"seed{seed}"
    place.mkdir(parents=True)
    (place / "record.json").write_text(json.dumps(record))


def test_runs_of_the_same_variant_and_seed_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "grouped", 1)
    write_run(tmp_path / "b", "grouped", 1)
    with pytest.raises(ReductionError, match=r"variant 'grouped' with seed 1 lies in .*/a and in .*/b"):
        gather(tmp_path / "a", tmp_path / "b")
    (record,) = gather(tmp_path / "a", tmp_path / "b" / ".." / "a")  # one directory, named twice
    assert record.output == "a"


def test_an_interrupted_run_may_be_finished_elsewhere(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "grouped", 1, status="interrupted")
    write_run(tmp_path / "a", "grouped", 2)
    write_run(tmp_path / "b", "grouped", 1)
    assert [(record.seed, record.output) for record in gather(tmp_path / "a", tmp_path / "b")] == [
        (2, "a"),
        (1, "b"),
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": [{"transform": "grouped", "group": 3}]}, "steps"),
        ({"recipe": {"name": "toy", "train": {"epochs": 9}}}, r"train.epochs=4 in .* 9 in"),
    ],
)
def test_a_variant_is_the_same_in_all_runs(tmp_path: Path, changes: dict, words: str) -> None:
    write_run(tmp_path / "a", "grouped", 1, recipe={"name": "toy", "train": {"epochs": 4}, "data": {"root": "/a"}})
    recipe = {"name": "toy", "train": {"epochs": 4, "newer": 1}, "data": {"root": "/b"}}
    write_run(tmp_path / "b", "grouped", 2, recipe=recipe)
    assert len(gather(tmp_path / "a", tmp_path / "b")) == 2
    write_run(tmp_path / "c", "grouped", 3, **changes)
    with pytest.raises(ReductionError, match=words):
        gather(tmp_path / "a", tmp_path / "c")


def test_a_directory_that_was_mistyped_is_not_left_out(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "grouped", 1)
    with pytest.raises(ReductionError, match=r"/b': no finished run"):
        gather(tmp_path / "a", tmp_path / "b")


def test_nothing_given() -> None:
    with pytest.raises(ReductionError, match="no run"):
        gather()
