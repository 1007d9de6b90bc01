"""Recipes with a sweep: several points, each with its own runs and report, and one report of all."""

from __future__ import annotations

import itertools
import json
import shutil
import sqlite3
from pathlib import Path

import pytest
from helpers.records import make_record
from helpers.stores import put_store
from PIL import Image

from mlpreduce import ReductionError, report
from mlpreduce import recipe as recipes
from mlpreduce.__main__ import main as command
from mlpreduce.recipe.schema import points
from mlpreduce.records import store
from mlpreduce.train.advice import advice

# SQLAlchemy about mlflow's own tables
pytestmark = pytest.mark.filterwarnings("ignore:The ..noload.. loader strategy is deprecated:DeprecationWarning")

SMALL = ["launch.workers=0", "train.epochs=2", "train.batch_size=64", "model.kwargs.depth=2", "seeds=[1, 2]"]
SWEEP = "sweep={thick={model={kwargs={embed_dim=16}}}, slim={model={kwargs={embed_dim=8}}, train={lr=1e-2}}}"


def test_a_point_is_the_recipe_with_its_tables_laid_over_it() -> None:
    recipe = recipes.load("digits_tiny", [SWEEP, "sweep.slim.variants.third=[{transform='shallow'}]"])
    found = points(recipe)
    assert list(found) == ["thick", "slim"]  # in the order of the file
    assert [point.name for point in found.values()] == ["digits_tiny/thick", "digits_tiny/slim"]
    thick, slim = found.values()
    assert thick.model.kwargs == {**recipe.model.kwargs, "embed_dim": 16}
    assert (thick.train, slim.train.lr, slim.train.epochs) == (recipe.train, 1e-2, recipe.train.epochs)
    assert list(slim.variants) == ["baseline", "grouped", "third"]
    assert list(thick.variants) == ["baseline", "grouped"]
    assert thick.sweep == slim.sweep == {}
    assert points(thick) == {"": thick}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("sweep.a.model.kwarg=1", "digits_tiny/a.model: unknown key 'kwarg'; did you mean 'kwargs'?"),
        ("sweep.a.train.lr=-1", "digits_tiny/a.train.lr=-1: it must be at least 0"),
        (
            "sweep.a.seeds=[1]",
            "digits_tiny.sweep.a.seeds: a point of a sweep has tables of model, data, train, variants",
        ),
        ("sweep.a.launch.workers=1", "digits_tiny.sweep.a.launch: a point of a sweep has tables of"),
        ("sweep.a.train=3", "digits_tiny.sweep.a.train: a point of a sweep has tables of"),
        (
            "sweep.a.variants.x=[{transform='groupd'}]",
            "digits_tiny/a.variants.x: unknown transform 'groupd'; did you mean 'grouped'",
        ),
        ("sweep.a.train.epochs=1", "digits_tiny/a.train.warmup_epochs=1: the warm-up is part of train.epochs=1"),
        ("sweep.a=1", "digits_tiny.sweep.a=1: it must be a table"),
        ("sweep={'mlflow.db'={}}", "digits_tiny.sweep.mlflow.db: its name is a folder's too"),
        ("variants={'curves.png'=[]}", "digits_tiny.variants.curves.png: a variant's name is a folder's too"),
        ("sweep={'../a'={}}", "digits_tiny.sweep.../a: its name is a folder's too"),
    ],
)
def test_what_is_wrong_at_a_point_is_told_before_anything_runs(change: str, words: str) -> None:
    with pytest.raises(ReductionError) as told:
        recipes.load("digits_tiny", [change])
    assert words in str(told.value)


def test_a_point_that_a_sweep_does_not_have_is_not_made_of_one_key() -> None:
    with pytest.raises(ReductionError, match=r"has no point 'l'.*write a new one as a table: sweep\.l="):
        recipes.load("scaling_tiny", ["sweep.l.train.lr=1e-3"])
    assert set(recipes.load("digits_tiny", ["sweep.a.train.lr=1e-3", "sweep.b.train.lr=1e-2"]).sweep) == {"a", "b"}


def test_dry_run_has_each_point_and_the_sum(capsys: pytest.CaptureFixture[str]) -> None:
    assert recipes.main(["digits_tiny", SWEEP, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert text.index("digits_tiny/thick") < text.index("digits_tiny/slim") < text.index("all 2 points: 8 runs,")
    parts = [float(line.split()[2]) for line in text.splitlines() if line.startswith("  4 runs:")]
    assert len(parts) == 2
    assert float(text.split()[-2]) == pytest.approx(sum(parts), rel=1e-3)


@pytest.mark.slow
def test_a_sweep_from_start_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = put_store(tmp_path / "out")
    arguments = ["digits_tiny", *SMALL, SWEEP, "--output", str(output)]
    assert recipes.main(arguments) == 0
    told = capsys.readouterr().out
    assert "digits_tiny/slim: 4 runs (2 variants x 2 seeds) of 2 epochs" in told
    assert "thick grouped" in told  # the table of all
    document = json.loads((output / "results.json").read_text())
    assert document["recipe"] == "digits_tiny"
    assert list(document["points"]) == ["thick", "slim"]
    for point, width in (("thick", 16), ("slim", 8)):
        own = json.loads((output / point / "results.json").read_text())
        assert own["recipe"] == f"digits_tiny/{point}"
        assert own["variants"] == document["points"][point]["variants"]
        assert own["variants"]["baseline"]["mlp_params"] == 2 * (2 * width * 4 * width + 5 * width)
        assert own["variants"]["grouped"]["vs_baseline"]["n"] == 2
    page = (output / "report.md").read_text()
    first = [line.split("|")[1:3] for line in page.split("## Table 2")[0].splitlines() if line.startswith("| ")]
    assert [[cell.strip() for cell in row] for row in first[1:]] == [
        [variant, point] for point in ("thick", "slim") for variant in ("baseline", "grouped")
    ]
    with Image.open(output / "curves.png") as figure, Image.open(output / "slim" / "curves.png") as one:
        assert figure.height == pytest.approx(
            3 * one.height, abs=3
        )  # a row for each point, and top-1 against parameters
    with sqlite3.connect(output / "mlflow.db") as database:  # one store for all points
        names = {name for (name,) in database.execute("select name from experiments")}
    assert {"digits_tiny/thick", "digits_tiny/slim"} <= names
    assert not list(output.glob("*/mlflow.db"))

    assert recipes.main(arguments) == 2
    assert "holds 8 finished or interrupted run(s); go on with --resume" in capsys.readouterr().err
    assert recipes.main([*arguments, "sweep.slim.train.lr=0.1", "--resume"]) == 2
    assert "sweep.slim.train.lr: was 0.01, is 0.1" in capsys.readouterr().err
    shutil.rmtree(output / "slim" / "grouped" / "seed2")  # as if it had not been reached
    assert command(["report", str(output)]) == 0
    capsys.readouterr()
    assert recipes.main([*arguments, "--resume"]) == 0
    told = capsys.readouterr().out
    assert "digits_tiny/thick: 4 runs (2 variants x 2 seeds) of 2 epochs on this process; 4 finished before" in told
    assert "digits_tiny/slim: 4 runs (2 variants x 2 seeds) of 2 epochs on this process; 3 finished before" in told
    again = json.loads((output / "results.json").read_text())
    tops = [
        [run["top1"] for run in v["runs"]]
        for d in (document, again)
        for p in d["points"].values()
        for v in p["variants"].values()
    ]
    assert tops[:4] == tops[4:]

    # what the directory holds is seen, whichever points are named now
    for other in ("sweep={third={}}", "sweep={}"):
        assert recipes.main([*arguments[:-2], other, "--output", str(output)]) == 2
        assert "holds 8 finished or interrupted run(s)" in capsys.readouterr().err
    elsewhere = tmp_path / "elsewhere"
    assert command(["report", str(output), "--output", str(elsewhere)]) == 0
    assert json.loads((elsewhere / "results.json").read_text()) == again
    assert command(["report", str(output), str(output), "--output", str(elsewhere)]) == 0
    for run, place in ((output, output / "slim"), (output / "slim", output)):
        assert command(["report", str(run), "--output", str(place)]) == 2
        assert "holds records and has a report of its own" in capsys.readouterr().err
    assert command(["report", str(output), str(output / "slim"), "--output", str(elsewhere)]) == 2
    assert (
        f"holds a sweep, which is reported alone; name it alone, or its points: {output}/thick"
        in capsys.readouterr().err
    )
    assert command(["report", str(tmp_path)]) == 2  # what lies above is no sweep
    assert "no finished run lies there" in capsys.readouterr().err


def test_a_sweep_of_seeds_that_are_equal_and_a_point_without_a_finished_run(tmp_path: Path) -> None:
    for point, status in (("a", "finished"), ("b", "finished"), ("c", "interrupted")):
        for order, (variant, seed) in enumerate(itertools.product(("baseline", "grouped"), (1, 2, 3))):
            record = make_record(variant, seed, [100 * 5 / 360], order, recipe=f"toy/{point}", status=status)
            record["started"] = f"2026-01-01T00:00:0{order}"
            store(tmp_path / point / variant / f"seed{seed}", "record.json", record)
    document = report.build(tmp_path).as_json()
    assert (document["recipe"], list(document["points"])) == ("toy", ["a", "b"])
    assert "No run has finished at c." in (tmp_path / "report.md").read_text()
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "b")
    with pytest.raises(ReductionError, match="no run has finished at c"):
        report.build(tmp_path)


def test_what_is_free_on_resume_is_free_at_a_point() -> None:
    before = recipes.load("digits_tiny", [SWEEP]).model_dump(mode="json")
    free = [
        "sweep.thick.train.accum_steps=2",
        "sweep.slim.data.root=/elsewhere",
        "sweep.slim.train.probes=['gradients']",
    ]
    assert recipes.differences(before, recipes.load("digits_tiny", [SWEEP, *free]).model_dump(mode="json")) == []
    now = recipes.load("digits_tiny", [SWEEP, "sweep.thick.train.lr=1.0"]).model_dump(mode="json")
    assert recipes.differences(before, now) == ["sweep.thick.train.lr: was None, is 1.0"]


def test_advice_names_the_key_of_the_point(tmp_path: Path) -> None:
    slow = "train.ema_decay=0.9998"
    (thick, _) = points(recipes.load("digits_tiny", [SWEEP, slow])).values()
    for recipe, place in ((thick, "sweep.thick."), (recipes.load("digits_tiny", [slow]), "")):
        (text,) = advice(recipes.runs(recipe, tmp_path)[0], images=1437, updates_per_epoch=22)
        assert text.startswith(f"{place}{slow}: ")
        assert f"; use {place}train.ema_warmup=true, or {place}train.ema_decay=0." in text
