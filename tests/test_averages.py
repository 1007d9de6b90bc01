"""The trained weights' own top-1 beside that of their moving average, in results, tables and remarks."""

from __future__ import annotations

from typing import Any

from helpers.records import make_record

from mlpreduce.records import Record, Results, summarize
from mlpreduce.report.summing import cautions, overview


def record(variant: str, top1: list[float], raw: list[float], decay: float = 0.9998, **more: Any) -> Record:
    document = make_record(variant, 1, top1, 0, recipe={"name": "mine", "train": {"ema_decay": decay}}, **more)
    for entry, own in zip(document["epochs"], raw, strict=True):
        entry["raw_top1"] = own
    return Record.model_validate(document)


def test_each_is_the_best_of_its_own_epochs() -> None:
    document = summarize([record("baseline", [20.0, 27.0], [52.0, 51.0])])
    (run,) = document.variants["baseline"].runs
    assert (run.top1, run.raw_top1) == (27.0, 52.0)
    assert document.variants["baseline"].raw_top1_mean == 52.0


def test_without_an_average_there_is_nothing_beside() -> None:
    document = summarize([record("baseline", [50.0], [50.0], decay=0.0)])
    assert document.variants["baseline"].raw_top1_mean is None
    assert "raw top-1 %" not in overview(document).headers
    assert cautions(document) == []


def test_records_of_earlier_versions_are_reported_still() -> None:
    old = record("baseline", [50.0], [50.0]).as_json()
    del old["epochs"][0]["raw_top1"], old["recipe"]["train"]
    document = summarize([Record.model_validate(old)])
    assert document.warnings == ()
    assert document.variants["baseline"].raw_top1_mean is None
    kept = document.as_json()
    del kept["warnings"], kept["variants"]["baseline"]["raw_top1_mean"]
    del kept["variants"]["baseline"]["runs"][0]["raw_top1"]  # results.json of an earlier version
    document = Results.model_validate(kept)
    assert len(overview(document).rows) == 1
    assert cautions(document) == []


def test_an_average_far_behind_is_remarked_on_with_the_ranking_that_it_turns_round() -> None:
    document = summarize([record("baseline", [27.0], [52.0]), record("grouped", [25.0], [55.0])])
    table = overview(document)
    at = list(table.headers).index("raw top-1 %")
    assert [row[at] for row in table.rows] == ["52.00", "55.00"]
    (text,) = cautions(document)
    assert "the averaged weights of baseline have 27.00 %, the trained weights 52.00 %" in text
    assert "from best to worst baseline, grouped by the average, grouped, baseline by the trained weights" in text


def test_an_average_that_is_near_is_not_remarked_on() -> None:
    assert cautions(summarize([record("baseline", [51.0], [52.0]), record("grouped", [50.0], [51.9])])) == []


def test_warnings_of_all_runs_are_told_once() -> None:
    records = [
        record(name, [50.0], [50.0], warnings=["train.lr=1: a fact; a remedy"]) for name in ("baseline", "grouped")
    ]
    document = summarize(records)
    assert document.warnings == ("train.lr=1: a fact; a remedy",)
    assert cautions(document) == ["Warning: train.lr=1: a fact; a remedy"]
