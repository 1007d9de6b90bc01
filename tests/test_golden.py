"""What users read, to the letter. To change it: `pytest tests/test_golden.py --force-regen`, and read the diff."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
from helpers.figures import drawn
from helpers.marks import slow_but
from helpers.records import make_record, write
from helpers.studies import make_points, make_study
from pytest_regressions.file_regression import FileRegressionFixture

import mlpreduce
from mlpreduce import report
from mlpreduce.__main__ import main
from mlpreduce.bench.trained.page import page_of
from mlpreduce.coverage.entries import Entry
from mlpreduce.coverage.proofs import Proof
from mlpreduce.coverage.table import for_console, markdown
from mlpreduce.recipe import main as recipe
from mlpreduce.records import Record
from mlpreduce.report.figure import draw
from mlpreduce.report.search import build_search, console_table, front_table
from mlpreduce.report.search_figures import draw_importance, draw_patterns
from mlpreduce.report.search_front import draw_front
from mlpreduce.report.search_parallel import draw_parallel
from mlpreduce.report.trained import draw as draw_trained
from mlpreduce.testing import tiny_vit

TOPS = {"baseline": (81.16, 80.94, 80.7), "grouped": (81.58, 81.36, 81.2), "shallow": (81.30, 81.20), "thin": (80.1,)}


@pytest.fixture
def golden(file_regression: FileRegressionFixture) -> Callable[..., None]:
    """Compare with what is kept; versions, styles and embedded pictures are left out."""

    def check(text: str, extension: str = ".txt") -> None:
        text = re.sub(r"base64,[A-Za-z0-9+/=]+", "base64,...", text).replace(f"timm {timm.__version__}", "timm X")
        text = re.sub(r"<style>.*?</style>", "<style>...</style>", text, flags=re.DOTALL)
        file_regression.check(
            "\n".join(map(str.rstrip, text.splitlines())) + "\n", extension=extension, encoding="utf-8"
        )

    return check


def records() -> list[dict[str, Any]]:
    found = []
    for number, (variant, tops) in enumerate(TOPS.items()):
        for seed, top1 in enumerate(tops):
            found.append(make_record(variant, seed, [60.0, 70.0, top1, top1 - 0.25], 3 * number + seed))
    return found


@pytest.mark.parametrize("page", ["report.md", "report.html"])
def test_report_of_runs(page: str, golden: Any, tmp_path: Path) -> None:
    for record in records():
        write(tmp_path, record)
    report.build(tmp_path)
    golden((tmp_path / page).read_text(encoding="utf-8"), Path(page).suffix)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_table_of_runs(width: int, golden: Any, tmp_path: Path) -> None:
    for record in records():
        write(tmp_path, record)
    golden(report.console_table(report.build(tmp_path)).text(width))


def test_figure_of_runs(golden: Any) -> None:
    found = [Record.model_validate(record) for record in records()]
    golden(drawn(draw([found[:3], found[3:]])))


@pytest.mark.parametrize("page", ["report.md", "report.html"])
def test_report_of_a_search(page: str, golden: Any, tmp_path: Path) -> None:
    build_search(make_study("top1", "params", "macs"), tmp_path)
    golden((tmp_path / page).read_text(encoding="utf-8"), Path(page).suffix)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_table_of_a_search(width: int, golden: Any) -> None:
    document = make_study("top1", "latency")
    golden(console_table(document).text(width) + "\n\n" + repr(front_table(document)))


@pytest.mark.parametrize("draw", [draw_front, draw_parallel, draw_importance, draw_patterns])
def test_figures_of_a_search(draw: Any, golden: Any) -> None:
    figure, caption = draw(make_study("top1", "params", points=make_points()))
    golden(caption + "\n" + drawn(figure))


PLANS: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped": ("grouped", {"group": 2}),
    "cycle": ("grouped", {"group": 2, "pattern": "cycle", "scale": "none"}),
    "shallow": ("shallow", {"ratio": 0.4, "criterion": "l2", "include": "*.[12].*"}),
    "low_rank": ("low_rank", {"rank": 4}),
    "block_diagonal": ("block_diagonal", {"groups": 4, "align": "none"}),
}


@pytest.mark.parametrize("name", PLANS)
def test_plans(name: str, golden: Any) -> None:
    transform, config = PLANS[name]
    model = tiny_vit().eval()
    made = mlpreduce.plan(model, transform, **config)
    mlpreduce.apply(model, made)
    shown = [made, repr(made), made._repr_html_(), mlpreduce.profile(model), mlpreduce.verify(model)]
    golden("\n\n".join(map(str, shown)) + "\n\n" + drawn(mlpreduce.plot(made)))


def test_picture_of_a_hierarchical_model(golden: Any) -> None:
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, window_size=7, depths=(2, 2, 2, 2), embed_dim=24
    )
    mlpreduce.apply(model, "grouped", group=2)
    mlpreduce.apply(model, "shallow", ratio=0.3)
    golden(drawn(mlpreduce.plot(model)))


@pytest.mark.parametrize("name", ["", *mlpreduce.list_transforms(), *mlpreduce.list_criteria()])
def test_lists(name: str, golden: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", *([name] if name else [])]) == 0
    golden(capsys.readouterr().out)


RECIPES = ["digits_tiny", "nvit_tiny", "dgmr_tiny", "systems_tiny", "finetune_tiny", "scaling_tiny"]


@pytest.mark.parametrize("name", slow_but(RECIPES, "digits_tiny", "dgmr_tiny", "finetune_tiny"))
def test_dry_runs(name: str, golden: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipe([name, "--dry-run"]) == 0
    golden(capsys.readouterr().out)


def test_coverage(golden: Any) -> None:
    entries = [
        Entry("vit_a", "vision_transformer", 86_567_656, 12, {"plain": 12}, 58_233_064, 57_000_000),
        Entry("vit_b", "vision_transformer", 22_050_664, 12, {"plain": 12}, 15_000_000, 14_000_000),
        Entry("eva_a", "eva", 5_750_000, 12, {"gated": 11, "gated+norm": 1}, None, 4_000_000, reason="grouped: alone"),
        Entry("vgg_a", "vgg", 132_000_000, reason="no residual stream"),
        Entry("odd", "odd", 90, failure="planned 1, counted 2"),
    ]
    proofs = {
        "vit_b": Proof("vit_b", 1e-7, 0.1, 0.0, True, True),
        "eva_a": Proof("eva_a", 1e-7, 0.1, None, True, True),
        "odd": Proof("odd", failure="tied differs from copied"),
    }
    tables = [
        markdown(entries, proofs, "with timm X"),
        *(for_console(entries, proofs, width) for width in (60, 80, 200)),
    ]
    golden("\n\n".join(tables))


def trained_models() -> dict[str, Any]:
    """The JSON of the bench of trained models, by hand: several draws of some rows, and a refusal."""
    whole = {"params": 21_536_640, "macs": 365_000_000}
    facts = {
        "conditions": "images; 512 to calibrate",
        "tests": 2000,
        "whole": whole,
        "of_whole": {"cosine": 1.0, "probe": 82.1, "knn": 72.8},
    }
    cells = []
    for number, (row, kind, repair) in enumerate(
        [
            ("README's advice", "advice", "least_squares"),
            ("l2", "criteria", "none"),
            ("l2", "criteria", "parallel"),
            ("l2", "criteria", "least_squares"),
            ("Torch-Pruning magnitude", "peers", "none"),
            ("grouped(2, keep=auto)", "sharing", "least_squares"),
        ]
    ):
        for width in (0.5, 0.25) if kind != "sharing" else (0.5,):
            for seed in (0, 1, 2) if row == "l2" or kind == "advice" else (0,):
                quality = width * (1 - 0.1 * number) + (0.4 if repair != "none" else 0.0) - 0.01 * seed * (1 + number)
                cells.append(
                    {
                        **{"row": row, "kind": kind, "repair": repair, "width": width, "draw": seed, "tests": 2000},
                        **{
                            "params": int(whole["params"] * (0.35 + 0.65 * width)),
                            "macs": int(whole["macs"] * (0.4 + width)),
                        },
                        "measured": {"cosine": quality, "probe": 80 * quality, "knn": 70 * quality},
                    }
                )
    refused = {"row": "grouped(3, lora zero)", "kind": "sharing", "repair": "none", "width": 0.5, "draw": 0}
    cells.append(refused | {"tests": 2000, "refused": "share among more blocks"})
    return {"schema": 1, "subjects": {"vit_s": {"of": {"2000": facts}, "cells": cells}}}


def test_page_of_trained_models(golden: Any) -> None:
    golden(page_of(trained_models()), ".md")


def test_figure_of_trained_models(golden: Any) -> None:
    golden(drawn(draw_trained("vit_s", trained_models()["subjects"]["vit_s"])))
