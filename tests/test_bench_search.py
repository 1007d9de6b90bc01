"""The bench of the search's driver: what it trains, reads and reports. Nothing here asks how long anything took."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlpreduce.__main__ import main
from mlpreduce.bench import search as bench
from mlpreduce.search.bare import Clock, train_bare
from mlpreduce.search.spaces.space import load_space

SMALL = ["model.kwargs.depth=2", "model.kwargs.embed_dim=16", "train.batch_size=128", "train.warmup_epochs=0"]
# asked, began, ended, told: in quarters, which add up exactly
TIMES = [(0.0, 0.5, 4.5, 4.75), (5.0, 5.25, 9.25, 10.0), (10.0, 10.25, 12.25, 12.5)]
FOUND = [Clock({}, (), float(number), *times) for number, times in enumerate(TIMES)]


def test_all_between_two_asks_that_is_not_training_is_overhead() -> None:
    timed = bench.timing(FOUND, chained=True)
    assert timed.seconds == (5.0, 5.0, 2.5)
    assert timed.training == (4.0, 4.0, 2.0)
    assert timed.ask_to_start == (0.5, 0.25, 0.25)
    assert timed.end_to_tell == (0.25, 0.75, 0.25)
    assert timed.overhead == (1.0, 1.0, 0.5)
    assert sum(timed.overhead) == FOUND[-1].told - FOUND[0].asked - sum(timed.training)
    assert timed.percent == 25.0


def test_with_several_workers_a_trial_ends_when_it_is_told() -> None:
    timed = bench.timing(FOUND, chained=False, leave_out=1)
    assert timed.seconds == (5.0, 2.5)
    assert timed.overhead == (1.0, 0.5)
    assert timed.ask_to_start == (0.25, 0.25)


def test_other_work_is_told() -> None:
    timed = bench.timing(FOUND, chained=True)
    first = (bench.First(6.5, 3.0),)
    result = bench.Comparison("sharing_width", "digits_tiny", 3, 4, 2, 2, timed, timed, first, 20.0, 5.0)
    assert result.ratios == (1.0, 1.0, 1.0)
    lines = str(result).splitlines()
    columns = ["5.00 (2.50 to 5.00)", "4.00 (2.00 to 4.00)", "0.250 (0.250 to 0.500)", "0.250 (0.250 to 0.750)"]
    words = " ".join([*columns, "0.833 (0.500 to 1.000)", "25.00"])  # the mean: what all trials add, over their number
    assert [" ".join(line.split()) for line in lines[1:3]] == [f"ours {words}", f"peer {words}"]
    assert "    same steps and top-1: 2 of 3 trials, not the same work" in lines
    assert "    first of a worker: 6.500 s to start, 3.00 s of training" in lines
    found = json.loads(result.to_json())
    assert found["ours"]["overhead"] == [1.0, 1.0, 0.5]
    assert found["first"] == [{"ask_to_start": 6.5, "training": 3.0}]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_optuna_alone_trains_what_it_is_given(tmp_path: Path) -> None:
    recipe = bench.load_recipe("digits_tiny", [*SMALL, "train.epochs=1", "launch.device=cpu"])
    points = [
        {"share": share, "group": 2, "ratio": ratio, "criterion": "l2"}
        for share, ratio in (("none", 0.5), ("cycle", 1.0))
    ]
    found = train_bare(load_space("sharing_width"), recipe, points, tmp_path)
    assert [clock.params for clock in found] == points
    assert [step["transform"] for clock in found for step in clock.steps] == ["shallow", "grouped"]
    times = [time for c in found for time in (c.asked, c.began, c.ended, c.told)]
    assert times == sorted(times)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("local_ray", "one_thread")
@pytest.mark.filterwarnings("ignore:The ..noload.. loader strategy is deprecated:DeprecationWarning")  # mlflow's tables
def test_both_train_the_same_points(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "search", *SMALL, "--trials", "3", "--epochs", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["trials"], found["equal"], found["workers"], found["first"]) == (3, 3, 1, [])
    assert found["asked"] >= 3
    assert min(found["before"], found["after"]) >= 0
    for tool in ("ours", "peer"):
        timed = found[tool]
        columns = ("seconds", "training", "ask_to_start", "end_to_tell", "overhead")
        assert all(len(timed[column]) == 3 for column in columns)
        assert all(min(timed[column]) >= 0 for column in columns)
        assert min(timed["training"]) > 0
        for whole, training, before, after in zip(*(timed[column] for column in columns[:4]), strict=True):
            assert before + training + after <= whole + 1e-3
        assert timed["percent"] == pytest.approx(100 * sum(timed["overhead"]) / sum(timed["training"]))
    assert found["ratios"][1] <= found["ratios"][2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trials", "0"], "bench search --trials 0: it must be at least 1"),
        (["--workers", "0"], "bench search --workers 0: it must be at least 1"),
        (["--epochs", "0"], "bench search --epochs 0: it must be at least 1"),
        (["--recipe", "digits_tin"], "unknown recipe 'digits_tin'; did you mean"),
        (["--space", "joined"], "unknown search space 'joined'"),
        (["train.epoch=3"], "unknown key 'epoch'"),
        (["3"], "'3': no override"),
    ],
)
def test_errors_are_one_message(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "search", *words]) == 2
    assert message in capsys.readouterr().err
