"""The search on a model in hand: what it keeps, what it says, and that the model stays as it was."""

from __future__ import annotations

import copy
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers.fresh import python
from helpers.runs import DIGITS
from helpers.stores import put_store
from mlflow import MlflowClient
from PIL import Image
from safetensors.torch import save_file
from timm.models.vision_transformer import ParallelScalingBlock
from torch import nn

import mlpreduce
from mlpreduce.__main__ import main as command
from mlpreduce.budget import LatencyTable
from mlpreduce.calibration import Answers
from mlpreduce.criteria import choose
from mlpreduce.data import DataSettings, calibration
from mlpreduce.edits import Assign
from mlpreduce.errors import ReductionError
from mlpreduce.graph import find_mlps
from mlpreduce.repair import Refits, repaired_from
from mlpreduce.testing import tiny_vit


@pytest.fixture
def model() -> nn.Module:
    """A ViT whose MLPs matter and whose examples differ."""
    found = tiny_vit().eval()
    for name, parameter in found.named_parameters():
        if ".mlp." in name or "patch_embed" in name:
            nn.init.normal_(parameter, std=0.3)
    return found


def pictures(count: int = 128) -> list[torch.Tensor]:
    images = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    return list(images.split(16))


def tuned(model: nn.Module, **more: Any) -> mlpreduce.search.Tuning:
    return mlpreduce.tune(
        model, **{"data": pictures(), "budget": "params<=0.7", "trials": 6, "calibration": 64, **more}
    )


def likeness(whole: nn.Module, images: torch.Tensor) -> Callable[[nn.Module], float]:
    with torch.no_grad():
        wanted = whole(images)

    def score(reduced: nn.Module) -> float:
        with torch.no_grad():
            return float(torch.cosine_similarity(reduced(images), wanted).mean())

    return score


def test_the_best_plan_keeps_the_budget_and_has_the_score_that_is_shown(
    model: nn.Module, unchanged: Callable[[nn.Module], Callable[[], None]]
) -> None:
    check = unchanged(model)
    found = tuned(model)
    check()
    whole = sum(parameter.numel() for parameter in model.parameters())
    best = mlpreduce.apply(copy.deepcopy(model), found.best)
    assert sum(parameter.numel() for parameter in best.parameters()) <= 0.7 * whole
    score = likeness(model, torch.cat(pictures())[1::2])
    assert found.front[0]["values"]["score"] == pytest.approx(score(best), abs=1e-6)
    better = max(found.front[0]["runs"], key=lambda run: run["score"])
    assert found.best.config["repair"] == ("parallel" if better["seed"] == 0 else "least_squares")
    assert {edit.tensor for edit in found.best.of(Assign)}
    assert (
        found.front[0]["values"]["score"]
        >= max(p["values"]["score"] for p in found.points if p["kind"] == "trial") - 1e-9
    )
    references = {point["name"]: point["values"]["score"] for point in found.points if point["kind"] == "reference"}
    assert references.keys() == {"baseline", "grouped", "shallow", "uniform"}
    assert references["baseline"] == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_refit_from_moments_is_that_of_each_mlp_by_itself(model: nn.Module, dtype: torch.dtype) -> None:
    model, data = model.to(dtype), [images.to(dtype) for images in pictures()]
    config: dict[str, Any] = {"widths": [40, 128, 64, 90], "criterion": "reconstruction"}
    wanted = mlpreduce.plan(model, "shallow", data=data, repair="parallel", **config)
    chosen = replace(wanted, edits=wanted.structure().edits)
    mlps = find_mlps(model)
    answers = Answers(model, mlps, data, refitted=True)
    refits = Refits(lambda mlp: answers.pairs(mlp, choose("reconstruction")))
    made = repaired_from(model, mlps, chosen, refits)
    refits.near = True  # what was fitted is not fitted again
    assert repaired_from(model, mlps, chosen, refits).edits == made.edits
    values = [{edit.tensor: edit.value for edit in plan.of(Assign)} for plan in (wanted, made)]
    assert values[0].keys() == values[1].keys()
    tolerance = 1e-8 if dtype is torch.float64 else 1e-3
    for path, value in values[0].items():
        torch.testing.assert_close(values[1][path], value, rtol=tolerance, atol=tolerance)
    with pytest.raises(ReductionError, match="edits Scale, Share, of which they tell nothing"):
        repaired_from(model, mlps, mlpreduce.plan(model, "grouped"), refits)


def test_the_same_seed_gives_the_same_points(model: nn.Module) -> None:
    one, other, another = (tuned(model, seed=seed, trials=3) for seed in (0, 0, 1))
    keys = [[point["key"] for point in found.points] for found in (one, other, another)]
    assert keys[0] == keys[1]
    assert [p["values"] for p in one.points] == [p["values"] for p in other.points]
    assert keys[0] != keys[2]


def test_data_of_one_reading_is_enough(model: nn.Module) -> None:
    def read() -> Iterator[torch.Tensor]:
        yield from pictures()

    points = [tuned(model, data=data, trials=2).points for data in (read(), pictures())]
    assert [p["values"] for p in points[0]] == [p["values"] for p in points[1]]


def test_a_score_and_a_loss_of_ones_own(model: nn.Module) -> None:
    images = torch.cat(pictures())
    found = tuned(model, score=likeness(model, images[100:]), trials=3)
    assert found.front[0]["values"]["score"] == pytest.approx(
        likeness(model, images[100:])(mlpreduce.apply(copy.deepcopy(model), found.best)), abs=1e-6
    )
    labels = torch.arange(128) % 5
    data = list(zip(images.split(16), labels.split(16), strict=True))
    found = tuned(model, data=data, loss=nn.functional.cross_entropy, trials=3)
    with torch.no_grad():
        expected = -float(nn.functional.cross_entropy(model(images[1::2]), labels[1::2]))
    (baseline,) = (point for point in found.points if point["name"] == "baseline")
    assert baseline["values"]["score"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda reduced: 1 / 0, "score raised ZeroDivisionError: division by zero"),
        (lambda reduced: float("nan"), "score gave nan; it must be a finite number"),
        (lambda reduced: "good", "score gave 'good'"),
        (lambda reduced: (reduced.head.weight.data.zero_(), 1.0)[1], "score changed the weights"),
    ],
)
def test_a_score_that_fails_is_told_with_its_point(model: nn.Module, score: Any, message: str) -> None:
    def fails(reduced: nn.Module) -> Any:  # the whole model, and what is not sliced, can be scored
        return score(reduced) if reduced.blocks[0].mlp.fc1.out_features not in (128, 64) else 0.5  # type: ignore[union-attr, index]

    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ReductionError, match="trials failed one after the other; the last: ") as caught:
        tuned(model, score=fails, trials=20)
    assert message in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_score_that_changes_the_whole_model_is_refused(model: nn.Module) -> None:
    def meddles(reduced: nn.Module) -> float:
        with torch.no_grad():
            model.head.bias.add_(1)  # type: ignore[union-attr, operator]
        return 1.0

    with pytest.raises(ReductionError, match="it changed the model that was given to tune"):
        tuned(model, score=meddles)


def test_it_goes_on_where_it_was(model: nn.Module, tmp_path: Path) -> None:
    scored: list[int] = []
    plain = likeness(model, torch.cat(pictures())[1::2])

    def counts(reduced: nn.Module) -> float:
        scored.append(sum(parameter.numel() for parameter in reduced.parameters()))
        return plain(reduced)

    first = tuned(model, score=counts, output=tmp_path / "out", trials=4)
    number = len(scored)
    with pytest.raises(ReductionError, match="go on with"):
        tuned(model, score=counts, output=tmp_path / "out", trials=4)
    again = tuned(model, score=counts, output=tmp_path / "out", trials=4, resume=True)
    assert len(scored) == number  # nothing is scored twice
    assert [p["values"] for p in again.points] == [p["values"] for p in first.points]
    more = tuned(model, score=counts, output=tmp_path / "out", trials=6, resume=True)
    assert more.document["counts"]["trained"] == 6
    assert [p["key"] for p in more.points][: len(first.points)] == [p["key"] for p in first.points]
    with pytest.raises(ReductionError, match="data: was "):
        tuned(model, score=counts, output=tmp_path / "out", resume=True, data=[images.flip(0) for images in pictures()])
    other = copy.deepcopy(model)
    nn.init.ones_(other.head.bias)  # type: ignore[union-attr, arg-type]
    with pytest.raises(ReductionError, match="model: was "):
        tuned(other, score=counts, output=tmp_path / "out", resume=True)


def test_interrupted_it_gives_what_there_is(model: nn.Module, tmp_path: Path) -> None:
    plain, calls = likeness(model, torch.cat(pictures())[1::2]), 0

    def impatient(reduced: nn.Module) -> float:
        nonlocal calls
        calls += 1
        if calls == 8:  # of four references five scores
            raise KeyboardInterrupt
        return plain(reduced)

    found = tuned(model, score=impatient, output=tmp_path / "out")
    assert found.document["counts"]["trained"] == 2
    assert mlpreduce.apply(copy.deepcopy(model), found.best)
    done = tuned(model, score=impatient, output=tmp_path / "out", resume=True)
    assert done.document["counts"]["trained"] == 6


def test_time_that_is_over_ends_it(model: nn.Module) -> None:
    assert tuned(model, timeout=0.0).document["counts"]["trained"] == 0


def test_what_is_shown_and_saved(model: nn.Module, tmp_path: Path) -> None:
    found = tuned(model)
    text = str(found)
    assert all(word in text for word in ("baseline", "grouped", "shallow", "uniform", "score", "trial"))
    assert "top-1" not in text
    assert repr(found).startswith("<Tuning of VisionTransformer: 10 points, best score 0.")
    assert found._repr_html_().startswith("<table>")
    labels = {text.get_text() for axis in found.plot().axes for text in (axis.xaxis.label, axis.yaxis.label)}
    assert labels == {"parameters", "score"}
    files = {path.name for path in found.save(tmp_path / "saved")}
    assert {"study.json", "report.md", "report.html"} <= files
    assert "top-1" not in (tmp_path / "saved" / "report.md").read_text()
    document = json.loads((tmp_path / "saved" / "study.json").read_text())
    assert document["environment"]["points"] >= 5
    assert -1 <= document["environment"]["rank correlation of the errors of reconstruction with the score"] <= 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"budget": "params<=0.01"}, "cannot be reached by slicing 4 MLPs; the range is"),
        ({"budget": 0.67}, 'budget is 0.67; write one such as budget="params<=0.67"'),
        ({"timeout": "soon"}, "timeout is 'soon'"),
        ({"budget": ()}, 'write one such as budget="params<=0.67"'),
        ({"budget": "prams<=0.5"}, "did you mean 'params'"),
        ({"budget": "unique_mlps<=0.5"}, "no width changes unique_mlps"),
        ({"data": [torch.zeros(20, 3, 16, 16)]}, "the data has 20 examples, and at least 32 are needed"),
        ({"space": "trainedd"}, "did you mean 'trained'"),
        ({"space": "training"}, "the space sets train.lr"),
        ({"space": lambda trial: [("thin", {"mlp_ratio": 2.0})]}, "acts when a model is built"),
        ({"sampler": "tpee"}, "sampler='tpee'"),
        ({"trials": 0}, "trials=0"),
        ({"calibration": 2}, "calibration"),
    ],
)
def test_what_cannot_be_done_is_told_before_anything_begins(model: nn.Module, more: Any, message: str) -> None:
    def never(reduced: nn.Module) -> float:
        raise AssertionError

    with pytest.raises(ReductionError) as caught:
        tuned(model, score=never, **more)
    assert message in str(caught.value)


def test_a_layer_shared_with_attention_is_not_refitted_by_any_way() -> None:
    whole = timm.create_model(
        "vit_tiny_patch16_224",
        **{
            "img_size": 16,
            "patch_size": 4,
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 2,
            "block_fn": ParallelScalingBlock,
        },
    )
    with pytest.raises(ReductionError, match="shares a layer with attention, which would change too; exclude it"):
        tuned(whole.eval(), budget="params<=0.9")


def test_a_model_whose_mlps_cannot_share_is_compared_without_grouped() -> None:
    found = tuned(tiny_vit(depth=1).eval(), budget="params<=0.9", trials=2)
    assert {point["name"] for point in found.points if point["kind"] == "reference"} == {
        "baseline",
        "shallow",
        "uniform",
    }


def test_images_of_another_size_are_told(model: nn.Module) -> None:
    with pytest.raises(ReductionError, match=r"does not run on images \(\d+, 3, 20, 20\) of the data: AssertionError"):
        tuned(model, data=[torch.zeros(16, 3, 20, 20)] * 4)


@pytest.mark.processes
def test_a_storage_has_one_owner(model: nn.Module, tmp_path: Path) -> None:
    told: list[str] = []

    def score(reduced: nn.Module) -> float:
        if not told:  # a lock is a process's, so another one asks
            code = f"from mlpreduce.launch.locks import drive\nwith drive([{str(tmp_path)!r}]):\n    print('held')"
            told.append("".join((run := python("-c", code)).stdout + run.stderr))
        return 1.0

    tuned(model, storage=f"sqlite:///{tmp_path}/studies.db", score=score, trials=1)
    assert "held" not in told[0]
    assert "trains this run; wait for it or end it" in told[0]


def test_a_space_of_ones_own_takes_several_steps(model: nn.Module) -> None:
    def suggest(trial: Any, view: Any) -> list[tuple[str, dict[str, Any]]]:
        ratio = trial.suggest_float("ratio", 0.25, 0.75, step=0.25)
        shared = trial.suggest_categorical("shared", [True, False])
        half = ("shallow", {"ratio": ratio, "criterion": "energy", "repair": "least_squares"})
        return [half, ("grouped", {"group": 2, "scale": "none"})] if shared else [half]

    found = tuned(model, space=suggest, trials=4)
    assert {len(point["steps"]) for point in found.points if point["kind"] == "trial"} == {1, 2}
    found = tuned(model, space=suggest, trials=6, budget="params<=0.48")
    with pytest.raises(ReductionError, match="takes 2 steps; carry them out one after the other"):
        _ = found.best
    best = copy.deepcopy(model)
    for plan in found.plans:
        mlpreduce.apply(best, plan)
    score = likeness(model, torch.cat(pictures())[1::2])
    assert found.front[0]["values"]["score"] == pytest.approx(score(best), abs=1e-6)


def test_the_command_tunes_a_timm_model_on_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "vit_tiny_patch16_224",
        "img_size=16",
        "patch_size=4",
        "embed_dim=32",
        "depth=3",
        "num_heads=2",
        "num_classes=3",
    ]
    whole = timm.create_model(words[0], img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=3)
    save_file(whole.state_dict(), tmp_path / "whole.safetensors")
    noise = np.random.default_rng(0)
    for number in range(60):
        place = tmp_path / "images" / f"class{number % 3}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(place / f"{number}.png")
    given = ["--data", str(tmp_path / "images"), "--budget", "params<=0.7", "--trials", "3", "--calibration", "24"]
    given += ["--weights", str(tmp_path / "whole.safetensors"), "--output", str(tmp_path / "out")]
    assert command(["tune", *words, *given, "--save", str(tmp_path / "smaller")]) == 0
    shown = capsys.readouterr().out
    assert "uniform" in shown
    assert (tmp_path / "out" / "report.html").is_file()
    smaller = mlpreduce.load(tmp_path / "smaller")
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (smaller, whole)]
    assert counts[0] <= 0.7 * counts[1]
    for wrong, message in (
        (
            [*words, "--data", str(tmp_path / "images"), "--budget", "params<=0.7"],
            "give --weights FILE or --pretrained",
        ),
        ([*words, "grouped", *given], "it is given no transforms"),
        ([*words, *given, "--save", str(tmp_path / "smaller")], "it exists, and is not overwritten"),
        ([*words, *given], "a study of this name; go on with resume"),
    ):
        assert command(["tune", *wrong]) == 2
        assert message in capsys.readouterr().err


def four_ratios(trial: Any, view: Any) -> list[tuple[str, dict[str, Any]]]:
    ratio = trial.suggest_categorical("ratio", [0.3, 0.4, 0.5, 0.6])
    return [("shallow", {"ratio": ratio, "criterion": "reconstruction", "repair": "least_squares"})]


@pytest.mark.ray
def test_workers_find_what_one_process_finds(model: nn.Module, local_ray: None, tmp_path: Path) -> None:
    """One of the workers is killed on the way; its point is scored again."""
    killed = tmp_path / "killed"
    plain = likeness(copy.deepcopy(model), torch.cat(pictures())[1::2])

    def dies_once(reduced: nn.Module) -> float:
        if reduced.blocks[0].mlp.fc1.out_features == 51 and not killed.exists():  # type: ignore[union-attr, index]
            killed.touch()
            os._exit(1)
        return plain(reduced)

    given: dict[str, Any] = {"space": four_ratios, "sampler": "grid", "trials": 4, "score": plain}
    alone = tuned(model, **given)
    found = tuned(model, **{**given, "workers": 2, "score": dies_once})
    assert killed.exists()
    scores = [
        {(p["key"], run["seed"]): run["score"] for p in made.points for run in p["runs"]} for made in (alone, found)
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert len(scores[0]) >= 4 + 5
    plans = [made.best for made in (alone, found)]
    assert plans[0].structure().edits == plans[1].structure().edits
    for one, other in zip(plans[0].of(Assign), plans[1].of(Assign), strict=True):
        torch.testing.assert_close(one.value, other.value, rtol=1e-3, atol=1e-4)


@pytest.mark.ray
def test_interrupted_with_workers_it_gives_what_there_is(model: nn.Module, local_ray: None, tmp_path: Path) -> None:
    told, driver = tmp_path / "told", os.getpid()
    plain = likeness(copy.deepcopy(model), torch.cat(pictures())[1::2])

    def interrupts(reduced: nn.Module) -> float:
        with told.open("a") as file:
            file.write("1")
        if told.stat().st_size == 7:
            os.kill(driver, signal.SIGINT)
        return plain(reduced)

    given: dict[str, Any] = {"score": interrupts, "output": tmp_path / "out", "trials": 8}
    found = tuned(model, workers=2, **given)
    assert 0 < len(found.points) <= 8
    assert found.document["counts"]["trained"] < 8
    again = tuned(model, workers=2, resume=True, **given)
    assert again.document["counts"]["trained"] == 8
    assert {point["key"] for point in found.points} <= {point["key"] for point in again.points}


@pytest.mark.ray
def test_what_cannot_travel_is_told(model: nn.Module, local_ray: None) -> None:
    lock = threading.Lock()
    with pytest.raises(ReductionError, match="cannot be sent to another process"):
        tuned(model, workers=1, score=lambda reduced: float(lock.locked()))
    with pytest.raises(ReductionError, match="workers=1000: each takes a core, and Ray has"):
        tuned(model, workers=1000)


KILLED = """
import os, sys, torch
import mlpreduce
from mlpreduce.testing import tiny_vit

def score(reduced):
    open({told!r}, "a").write(f"{{sum(p.numel() for p in reduced.parameters())}} ")
    if open({told!r}).read().count(" ") == 9:
        os.kill(os.getpid(), 9)
    return float(sum(p.double().sum() for p in reduced.parameters()))

torch.manual_seed(0)
model, images = tiny_vit(), torch.randn(96, 3, 16, 16)
tuning = mlpreduce.tune(model, data=images.split(16), budget="params<=0.7", trials=5, calibration=32, output={out!r},
                        score=score, resume={resume})
print(tuning.document["counts"]["trained"], len({{p["key"] for p in tuning.points}}), len(tuning.points))
"""


@pytest.mark.processes
def test_killed_it_goes_on_and_scores_nothing_twice(tmp_path: Path) -> None:
    told = tmp_path / "told"
    given = {"told": str(told), "out": str(tmp_path / "out")}
    first = python("-c", KILLED.format(**given, resume=False))
    assert first.returncode == -9
    before = told.read_text().split()
    assert len(before) == 9
    second = python("-c", KILLED.format(**given, resume=True))
    assert second.returncode == 0, second.stderr
    shown = second.stdout.splitlines()[-1].split()
    assert shown[0] == "5"
    assert shown[1] == shown[2]  # no point twice
    # five scores of references, five of trials, three of the best again, and that which was being scored
    assert len(told.read_text().split()) == 5 + 5 + 3 + 1


def test_pairs_share_with_corrections_as_large_as_the_budget_allows(model: nn.Module) -> None:
    found = tuned(model, space="trained_sharing", trials=3, budget=["params<=0.8"])
    whole = sum(parameter.numel() for parameter in model.parameters())
    best = mlpreduce.apply(copy.deepcopy(model), found.best)
    assert 0.7 * whole < sum(parameter.numel() for parameter in best.parameters()) <= 0.8 * whole
    trials = [point for point in found.points if point["kind"] == "trial"]
    assert {point["steps"][0]["per_use"]["target_params"] for point in trials} == {int(0.8 * whole)}
    assert all(len(point["runs"]) == 1 for point in trials)  # there is one way to repair them
    few = tuned(model, space="trained_sharing", trials=1, budget="unique_mlps<=0.5")
    assert "per_use" not in few.best.config
    assert "uniform" not in {point["name"] for point in few.points}  # no width changes how many MLPs there are


@pytest.mark.slow
def test_readme_tunes_a_trained_model_in_one_call(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The section runs word for word; the model that is asked for is one that was trained here, on the digits."""
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    code = text.partition("## A trained model")[2].partition("```python\n")[2].partition("```")[0]
    assert len(code.splitlines()) <= 10
    whole = mlpreduce.load(trained / "model").eval()
    loader = [images for images, _ in calibration(DataSettings(**DIGITS), 1000)]
    create = timm.create_model
    monkeypatch.setattr(
        timm,
        "create_model",
        lambda name, **more: copy.deepcopy(whole) if more == {"pretrained": True} else create(name, **more),
    )
    monkeypatch.chdir(tmp_path)
    exec(code, {"loader": loader})
    assert "uniform" in capsys.readouterr().out
    smaller = mlpreduce.load("vit_smaller")
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (smaller, whole)]
    assert counts[0] <= 0.67 * counts[1]


def test_mlflow_keeps_a_run_for_each_score(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ReductionError, match="track=True needs a place"):
        tuned(model, track=True)
    put_store(tmp_path / "out")

    calls: list[nn.Module] = []

    def fails_once(reduced: nn.Module) -> float:
        calls.append(reduced)
        return float("nan") if len(calls) == 6 else 0.5  # the references come before

    found = tuned(model, output=tmp_path / "out", track=True, score=fails_once, trials=2)
    client = MlflowClient(f"sqlite:///{tmp_path}/out/mlflow.db")
    (experiment,) = [one for one in client.search_experiments() if one.name == "mlpreduce tune"]
    runs = {run.data.tags["mlflow.runName"]: run for run in client.search_runs([experiment.experiment_id])}
    parent = runs.pop("trained-VisionTransformer")
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["trials/trained"] == 2
    assert parent.data.params["score"] == "test_mlflow_keeps_a_run_for_each_score.<locals>.fails_once"
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    whole = runs["baseline, repaired at once"]
    assert (whole.info.status, whole.data.metrics["score"]) == ("FINISHED", 0.5)
    assert whole.data.metrics["model/params"] == sum(parameter.numel() for parameter in model.parameters())
    failed = [run for run in runs.values() if run.info.status == "FAILED"]
    assert failed
    assert "score gave nan" in failed[0].data.params["message"]
    assert found.points


def times(base: float) -> LatencyTable:
    owners = tuple(f"blocks.{number}.mlp" for number in range(4))
    return LatencyTable(base, (owners,), ((4, 128),), ((0.0, 0.5),), {"batch_size": 8})


def test_a_latency_is_timed_once_in_a_study(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LatencyTable, "measure", lambda *given, **more: times(2.0))
    first = tuned(model, budget="latency<=0.8", output=tmp_path, trials=4)
    monkeypatch.setattr(LatencyTable, "measure", lambda *given, **more: times(3.0))  # the machine is slower now
    again = tuned(model, budget="latency<=0.8", output=tmp_path, resume=True, trials=6)
    assert again.document["budgets"] == first.document["budgets"]
    costs = [{point["key"]: point["cost"]["latency"] for point in found.points} for found in (first, again)]
    assert len(costs[0]) < len(costs[1])
    assert costs[0].items() <= costs[1].items()
    assert max(costs[1].values()) == 4.0  # of the whole model, by the first table


def test_a_budget_of_latency_is_kept_by_a_table_of_widths(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    table = times(2.0)
    monkeypatch.setattr(LatencyTable, "measure", lambda *given, **more: table)  # what is timed is never the same
    found = tuned(model, budget="latency<=0.8")
    assert table.predict({}) == 4.0
    (budget,) = found.document["budgets"]
    assert (budget["cost"], budget["limit"]) == ("latency", pytest.approx(3.2))
    trials = [point for point in found.points if point["kind"] == "trial"]
    for point in trials:
        assert 2.8 < point["cost"]["latency"] <= 3.2  # the space is of widths at the budget
    best = mlpreduce.apply(copy.deepcopy(model), found.best)
    assert table.predict({mlp.name: mlp.hidden_features for mlp in find_mlps(best)}) <= 3.2
    with pytest.raises(ReductionError, match="kept by widths, and this changes layers"):
        tuned(model, budget="latency<=0.9", space=lambda trial: [("low_rank", {"ratio": 0.5, "init": "weights"})])
    with pytest.raises(ReductionError, match=r"cannot be reached by slicing 4 MLPs; the range is 2 to 4"):
        tuned(model, budget="latency<=0.4")
