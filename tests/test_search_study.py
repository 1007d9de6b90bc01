"""Whole studies, in this process and on Ray: what they leave behind can be read, run and gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
from helpers.stores import put_store
from mlflow import MlflowClient
from scipy.stats import spearmanr

from mlpreduce import recipe as recipes
from mlpreduce.__main__ import main as command
from mlpreduce.errors import ReductionError
from mlpreduce.recipe.describe import describe as dry_run
from mlpreduce.search import main, run
from mlpreduce.search.answer import describe, history
from mlpreduce.search.comparison import compare, comparison_text
from mlpreduce.search.export import as_toml
from mlpreduce.search.verbs import open_study
from mlpreduce.train import build_model

# SQLAlchemy about mlflow's own tables
pytestmark = [
    pytest.mark.filterwarnings("ignore:The ..noload.. loader strategy is deprecated:DeprecationWarning"),
    pytest.mark.usefixtures("one_thread"),
]

SMALL = (
    "model.kwargs.depth=2",
    "model.kwargs.embed_dim=16",
    "train.epochs=3",
    "train.batch_size=128",
    "train.warmup_epochs=0",
)


def search(output: Path, space: Any = "sharing_width", **settings: Any) -> dict[str, Any]:
    if not (output / "mlflow.db").exists():
        put_store(output)
    return run(
        space, "digits_tiny", overrides=SMALL, output=output, **{"workers": 0, "trials": 5, "seeds": (1, 2), **settings}
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("study") / "out"
    search(output)
    return output


@pytest.mark.slow
def test_counts_values_and_front(study: Path) -> None:
    assert open_study(str(study)).metric_names == ["top1", "params"]
    document = json.loads((study / "study.json").read_text())
    assert document["counts"]["trained"] == 5 == document["counts"]["complete"] + document["counts"]["pruned"]
    points = document["points"]
    assert [point["name"] for point in points if point["kind"] == "reference"] == ["baseline", "grouped", "shallow"]
    assert len({point["key"] for point in points}) == len(points)
    for point in points:
        found = recipes.load("digits_tiny", SMALL)
        model = build_model(recipes.runs(found, ".")[0].model_copy(update={"steps": tuple(point["steps"])}))
        assert sum(parameter.numel() for parameter in model.parameters()) == point["cost"]["params"]
        for one in point["runs"]:
            record = json.loads((study / "points" / point["key"] / f"seed{one['seed']}" / "record.json").read_text())
            assert one["top1"] == max(epoch["top1"] for epoch in record["epochs"])
        seeds = [one["seed"] for one in point["runs"]]
        assert seeds == [1, 2] if point["kind"] == "reference" or point["front"] else seeds[:1] == [1]
    trials = [point for point in points if point["kind"] == "trial" and point["state"] == "complete"]
    for point in trials:
        better = [
            other
            for other in trials
            if other["values"]["top1"] >= point["values"]["top1"]
            and other["values"]["params"] <= point["values"]["params"]
            and other["values"] != point["values"]
        ]
        assert point["front"] == (not better)
    assert (study / "report.html").is_file()


@pytest.mark.slow
def test_optuna_opens_it(study: Path) -> None:
    found = optuna.load_study(study_name="sharing_width-digits_tiny", storage=f"sqlite:///{study}/optuna.db")
    states = [trial.state for trial in found.get_trials()]
    assert optuna.trial.TrialState.RUNNING not in states
    assert optuna.trial.TrialState.WAITING not in states
    references = [trial for trial in found.get_trials() if "reference" in trial.user_attrs]
    assert sorted(trial.user_attrs["reference"] for trial in references) == [
        "grouped",
        "shallow",
    ]  # they lie in the space
    assert all(trial.values for trial in references)
    assert [direction.name for direction in found.directions] == ["MAXIMIZE", "MINIMIZE"]


@pytest.mark.slow
def test_mlflow_has_a_run_for_the_study_and_nested_ones(study: Path) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{study}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'mlpreduce search'")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [one for one in runs if "mlflow.parentRunId" not in one.data.tags]
    assert parent.info.status == "FINISHED"
    assert {"report.html", "study.json", "front.png"} <= {
        file.path for file in client.list_artifacts(parent.info.run_id)
    }
    nested = [one for one in runs if one is not parent]
    assert {one.data.tags["mlflow.parentRunId"] for one in nested} == {parent.info.run_id}
    assert {one.info.status for one in nested} == {"FINISHED"}
    document = json.loads((study / "study.json").read_text())
    assert len(nested) == sum(len(point["runs"]) for point in document["points"])
    (one,) = [one for one in nested if one.data.tags["mlflow.runName"] == "baseline-seed1"]
    assert one.data.tags["kind"] == "reference"
    assert [metric.step for metric in client.get_metric_history(one.info.run_id, "top1")] == [1, 2, 3]


@pytest.mark.slow
def test_the_best_are_recipes_that_run(study: Path, tmp_path: Path) -> None:
    document = json.loads((study / "study.json").read_text())
    best = sorted((study / "best").glob("*.toml"))
    assert len(best) == sum(point["front"] for point in document["points"])
    recipe = recipes.load(str(best[0]))
    point = next(point for point in document["points"] if point["name"].replace(" ", "-") == best[0].stem)
    assert recipe.variants[best[0].stem] == tuple(point["steps"])
    original = recipes.load("digits_tiny", SMALL)
    assert (recipe.model, recipe.data, recipe.train) == (original.model, original.data, original.train)
    assert f"parameters {point['cost']['params']:,}" in dry_run(recipe)
    again_at = put_store(tmp_path / "again")
    assert recipes.main([str(best[0]), "launch.workers=0", "seeds=[1]", "--output", str(again_at)]) == 0
    again = json.loads((tmp_path / "again" / "results.json").read_text())["variants"]
    assert again[best[0].stem]["runs"][0]["top1"] == point["runs"][0]["top1"]  # the very same training


@pytest.mark.slow
def test_show_export_compare(study: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert command(["search", "show", str(study)]) == 0
    assert "baseline" in capsys.readouterr().out
    assert main(["show", str(study), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["counts"] == json.loads((study / "study.json").read_text())["counts"]
    number = next(str(point["number"]) for point in document["points"] if point["kind"] == "trial")
    assert main(["export", str(study), number]) == 0
    text = capsys.readouterr().out
    (tmp_path / "one.toml").write_text(text)
    assert f"trial-{number}" in recipes.load(str(tmp_path / "one.toml")).variants
    assert main(["export", str(study), "shallow"]) == 0
    assert "shallow of the study sharing_width-digits_tiny: not of its front" in capsys.readouterr().out
    assert main(["export", str(study), "999"]) == 2
    assert "no such trial was trained; there are" in capsys.readouterr().err
    page = tmp_path / "page.md"
    page.write_text("<!-- results: page.json -->\n<!-- end of results -->\n")
    assert main(["compare", str(study), str(study), str(study), "--page", str(page)]) == 0
    text = capsys.readouterr().out
    assert text.count("| 1.000 |") == 2  # each with the first
    assert text in page.read_text()
    assert comparison_text(json.loads((tmp_path / "page.json").read_text())) == text.rstrip("\n")
    assert main(["show", str(tmp_path)]) == 2
    assert "there is no such file" in capsys.readouterr().err


@pytest.mark.slow
def test_equal_cost_is_that_of_the_one_that_spent_less(study: Path, tmp_path: Path) -> None:
    search(tmp_path / "random", sampler="random", pruner="none", trials=3, seed=9)
    one, other = open_study(str(study)), open_study(str(tmp_path / "random"))
    (found,) = compare([one], [other])
    paths = [history(study) for study in (one, other)]
    assert found.spent == min(path[-1][0] for path in paths)
    assert found.trials == tuple(sum(total <= found.spent for total, _ in path) for path in paths)
    assert sum(count == len(path) for count, path in zip(found.trials, paths, strict=True)) >= 1
    with pytest.raises(ReductionError, match="2 studies against 1"):
        compare([one, one], [other])
    search(tmp_path / "other", objectives=("top1", "macs"), trials=1, references=("baseline",))
    with pytest.raises(ReductionError, match="differ:\n  objectives"):
        compare([one], [open_study(str(tmp_path / "other"))])


@pytest.mark.slow
def test_it_goes_on_with_more_trials_and_with_nothing_else(study: Path) -> None:
    before = {point["key"]: point for point in describe(open_study(str(study))).as_json()["points"]}
    with pytest.raises(ReductionError, match="a study lies there; go on with --resume"):
        search(study)
    with pytest.raises(ReductionError, match=r"sampler: was 'auto', is 'random'"):
        search(study, resume=True, sampler="random")
    with pytest.raises(ReductionError, match=r"train.lr: was 0.005, is 0.1"):
        run(
            "sharing_width",
            "digits_tiny",
            overrides=(*SMALL, "train.lr=0.1"),
            output=study,
            workers=0,
            seeds=(1, 2),
            resume=True,
        )
    with pytest.raises(ReductionError, match="space: was"):
        search(study, "width", resume=True, name="sharing_width-digits_tiny")
    document = search(study, resume=True, trials=7)
    assert document["counts"]["trained"] == 7
    after = {point["key"]: point for point in document["points"]}
    for key, point in before.items():
        assert after[key]["runs"][: len(point["runs"])] == point["runs"]
    assert len(after) == len(before) + 2
    behind = next(point["name"] for point in document["points"] if point["kind"] == "trial" and not point["front"])
    mine = [study / "best" / "mine.toml", study / "best" / "shallow.toml"]  # a reference is never written there
    stale = study / "best" / f"{behind.replace(' ', '-')}.toml"
    for path in (*mine, stale):
        path.write_text("")
    document = search(study, resume=True, trials=7, seeds=(1, 3))  # what was trained with seed 2 stays
    baseline = next(point for point in document["points"] if point["name"] == "baseline")
    assert [one["seed"] for one in baseline["runs"]] == [1, 3, 2]
    assert all(path.is_file() for path in mine)
    front = {point["name"] for point in document["points"] if point["front"]}
    assert stale.exists() == (behind in front)


@pytest.mark.slow
def test_a_space_with_fewer_points_than_trials_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def suggest(trial: optuna.Trial) -> list[tuple[str, dict[str, Any]]]:
        return [("shallow", {"ratio": trial.suggest_categorical("ratio", [0.25, 0.5])})]

    document = search(tmp_path, suggest, references=("baseline",))
    assert document["counts"]["trained"] == 2
    lonely = search(tmp_path / "lonely", suggest, references=(), trials=1, seeds=(1,))
    assert lonely["hypervolume"] is None  # there is no baseline to measure it by
    with pytest.raises(ReductionError, match="it has no baseline among its --references"):
        compare([open_study(str(tmp_path / "lonely"))], [open_study(str(tmp_path / "lonely"))])
    assert "no other point of the space was found" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_one_objective_and_optunas_pruner(tmp_path: Path) -> None:
    document = search(
        tmp_path, objectives=("top1",), budgets=("params<=0.9",), pruner="median", trials=8, references=("baseline",)
    )
    limit = document["budgets"][0]["limit"]
    trials = [point for point in document["points"] if point["kind"] == "trial"]
    assert len(trials) == 8
    assert all(point["cost"]["params"] <= limit for point in trials)
    assert sum(point["front"] for point in trials) >= 1


@pytest.mark.slow
def test_screening_and_inherited_weights(tmp_path: Path) -> None:
    few: dict[str, Any] = {"references": ("baseline",), "seeds": (1,)}
    document = search(tmp_path / "screened", inherit="baseline", screen=64, trials=4, seed=3, **few)
    found = optuna.load_study(
        study_name="sharing_width-digits_tiny", storage=f"sqlite:///{tmp_path}/screened/optuna.db"
    )
    tried = [trial.user_attrs["sensitivity"] for trial in found.get_trials() if "sensitivity" in trial.user_attrs]
    assert len(tried) == 4 + document["counts"]["screened"]
    assert "Trials started from trained weights" in document["verdicts"][0]
    document = search(tmp_path / "nearest", inherit="nearest", trials=3, **few)
    points = {point["name"]: tmp_path / "nearest" / "points" / point["key"] / "seed1" for point in document["points"]}
    random, inherited = (
        json.loads((points[name] / "record.json").read_text())["epochs"][0]["train_loss"]
        for name in ("baseline", "trial 2")
    )
    assert inherited < 0.95 * random


@pytest.mark.slow
def test_points_of_trained_weights_are_chosen_by_data_and_repaired(tmp_path: Path) -> None:
    given: dict[str, Any] = {"trials": 2, "references": ("baseline",), "seeds": (1,)}
    document = search(tmp_path / "inherited", "width", inherit="baseline", **given)
    steps = [step for point in document["points"] if point["kind"] == "trial" for step in point["steps"]]
    assert {(step["criterion"], step["repair"]) for step in steps} == {("reconstruction", "least_squares")}
    assert document["counts"]["trained"] == 2
    for name, more in (("random", {}), ("supernet", {"supernet": 1, "supernet_points": 5, "inherit": "baseline"})):
        document = search(tmp_path / name, "width", **given, **more)
        assert not any("criterion" in step for point in document["points"] for step in point["steps"])


@pytest.mark.slow
def test_a_supernet_says_what_is_trained(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"supernet": 2, "supernet_points": 30, "references": ("baseline",), "seeds": (1,)}
    document = search(tmp_path, "width_per_block", trials=8, **settings)
    trials = [point for point in document["points"] if point["kind"] == "trial"]
    drawn = [trial for trial in trials if trial.get("drawn") == "random"]
    assert len(trials) == 8
    assert len(drawn) == 5
    assert all(trial["state"] == "complete" for trial in drawn)  # or the agreement would be that of the good ones
    assert sum(trial.get("drawn") == "front" for trial in trials) == 3
    told = document["supernet"]
    assert (told["points"], told["n"]) == (30, 5)
    top1 = [trial["runs"][0]["top1"] for trial in drawn]
    loss = [trial["estimate"]["loss"] for trial in drawn]
    assert told["spearman"] == pytest.approx(spearmanr([-one for one in loss], top1).statistic)
    assert f"Spearman {told['spearman']:.2f}" in document["verdicts"][-1]
    assert document["verdicts"][-1] in (tmp_path / "report.md").read_text()
    (record,) = (tmp_path / "points" / "supernet").glob("seed1/record.json")
    assert len(json.loads(record.read_text())["epochs"]) == 2
    again = search(tmp_path, "width_per_block", trials=9, resume=True, **settings)
    assert again["supernet"]["n"] == 5  # it is neither trained nor drawn from again
    with pytest.raises(ReductionError, match='choose units by "first" or "last"'):
        search(tmp_path / "sharing_width", **settings)
    with pytest.raises(ReductionError, match="the space also sets"):
        search(tmp_path / "training", "training", **settings)


@pytest.mark.slow
def test_settings_are_searched(tmp_path: Path) -> None:
    document = search(tmp_path, "training", objectives=("top1",), trials=2, references=("baseline",))
    trials = [point for point in document["points"] if point["kind"] == "trial"]
    assert len({point["settings"]["train.lr"] for point in trials}) == 2
    best = recipes.load(str(next((tmp_path / "best").glob("*.toml"))))
    assert best.train.lr in {point["settings"]["train.lr"] for point in trials}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_on_ray_two_at_a_time(tmp_path: Path) -> None:
    document = search(tmp_path / "ray", workers=2, trials=3, objectives=("top1", "params", "latency"), seeds=(1,))
    assert document["counts"]["trained"] == 3
    assert all(point["values"]["latency"] > 0 for point in document["points"] if point["values"])
    here = search(tmp_path / "here", workers=0, trials=1, seeds=(1,))
    for name in ("baseline", "grouped", "shallow"):
        runs = [next(p for p in d["points"] if p["name"] == name)["runs"][0] for d in (document, here)]
        assert runs[0]["top1"] == runs[1]["top1"]  # a worker trains as this process does


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_trial_may_be_trained_by_a_group(tmp_path: Path) -> None:
    document = search(tmp_path, "width", workers=1, trial_workers=2, trials=1, references=(), seeds=(1,))
    (point,) = document["points"]
    (record,) = tmp_path.glob("points/*/seed1/record.json")
    assert {entry["workers"] for entry in json.loads(record.read_text())["epochs"]} == {2}
    assert point["front"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sharing_width", "--objectives", "params"], "top1 among them"),
        (["sharing_width", "--budget", "params<=0.1"], "the smallest that sharing_width reaches is"),
        (["sharing_width", "--pruner", "median"], "it compares one objective, and there are 2"),
        (["sharing_width", "--sampler", "tpee"], "sampler='tpee'"),
        (["sharing_width", "--trials", "0"], "trials=0"),
        (["sharing_width", "--seeds", "1,1"], "each once"),
        (["sharing_width", "--seeds", "a"], "it must be a whole number"),
        (["sharing_width", "--references", "thinn"], "neither a variant of"),
        (["sharing_width", "--inherit", "baseline", "--references", "grouped"], "the baseline is not trained"),
        (
            ["sharing_width", "--inherit", "baseline", "model.weights='pretrained'"],
            "trials start from those; leave one out",
        ),
        (["sharing_width", "--screen", "64"], "untrained weights tell nothing"),
        (["jont"], "did you mean 'joint'"),
        (["trained"], "the worth of units is known of a model in hand only; use mlpreduce.tune"),
        (["sharing_width", "train.lrr=1"], "unknown key 'lrr'"),
        (["sharing_width", "--recipe", "nothing"], "unknown recipe 'nothing'"),
        (["sharing_width", "--storage", "sqlite://"], "a study in memory is lost"),
        (["sharing_width", "--storage", "nonsense"], "no URL of a database"),
        (["sharing_width", "--storage", "oracle://host/db"], "is not supported"),
    ],
)
def test_what_cannot_be_done_is_told_before_anything_begins(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--workers", "0", *([] if "--recipe" in arguments else ["--recipe", "digits_tiny"])]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.db"))


def test_toml_is_what_it_was_made_of() -> None:
    import tomllib

    document = {
        "a": 'with "quotes" and \\',
        "b": [1.5e-5, True],
        "t": {"k v": {"x": "ü"}, "steps": [{"transform": "grouped", "p": [[0, 1]]}]},
    }
    assert tomllib.loads(as_toml(document)) == document
    empty = {"a": None, "t": {"x": None, "steps": [{"transform": "shallow", "ratio": 0.5, "width": None}]}}
    assert tomllib.loads(as_toml(empty)) == {"t": {"steps": [{"transform": "shallow", "ratio": 0.5}]}}
