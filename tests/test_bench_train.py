"""The bench of training: what it runs, reads and reports. Nothing here asks how long anything took."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mlpreduce import ReductionError
from mlpreduce.__main__ import main
from mlpreduce.bench import train
from mlpreduce.bench.rounds import turns

SMALL = ["vit_tiny_patch16_224", "depth=1", "img_size=16", "patch_size=8", "embed_dim=24", "num_heads=2"]
SHORT = ["bench", "train", *SMALL, "--updates", "2", "--batch-size", "8", "--runs", "1", "--threads", "1"]


# as many updates as are asked for, and as many parameters as the first argument says
STAND_IN = """
import sys
import torch
weight = torch.nn.Parameter(torch.ones(int(sys.argv[1]) if sys.argv[1].isdigit() else 3))
optimizer = torch.optim.SGD([weight], lr=0.1)
for _ in range(7):
    weight.grad = torch.ones_like(weight)
    optimizer.step()
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A script that takes the place of ours, where ours is not what is looked at."""
    path = tmp_path / "stand_in.py"
    path.write_text(STAND_IN)
    monkeypatch.setattr(train, "_own_command", lambda plan, folder: [str(path), str(plan.parameters)])
    return str(path)


def test_neither_tool_is_always_first() -> None:
    assert list(turns(4, "ab")) == [*"ab", *"ba", *"ab", *"ba"]


def test_keys_with_a_dot_are_the_recipes() -> None:
    models, keys = train.read_words([*SMALL[:2], "train.amp=bfloat16", "data.workers=2"])
    assert models == [("vit_tiny_patch16_224", {"depth": 1})]
    assert keys == ["train.amp=bfloat16", "data.workers=2"]


def test_flags_say_what_the_recipe_says(tmp_path: Path) -> None:
    plan = train.make_plan(
        "", {}, ["train.amp=bfloat16", "train.ema_decay=0"], tmp_path, workers=2, batch_size=64, updates=7
    )
    run = plan.run
    assert (run.train.epochs, run.train.accum_steps, run.micro_batch, run.train.aug_repeats) == (1, 2, 16, 3)
    assert run.data.name == "folder"
    words = plan.peer_arguments
    given = {word: words[at + 1] for at, word in enumerate(words[:-1]) if word.startswith("--")}
    expected = {
        "--model": "vit_base_patch16_224",
        "--num-classes": "10",
        "--drop-path": "0.1",
        "--batch-size": "16",
        "--grad-accum-steps": "2",
        "--opt": "adamw",
        "--lr": "0.001",
        "--weight-decay": "0.05",
        "--aa": "rand-m9-mstd0.5-inc1",
        "--reprob": "0.25",
        "--mixup": "0.8",
        "--cutmix": "1.0",
        "--smoothing": "0.1",
        "--aug-repeats": "3",
        "--workers": "0",
        "--amp-dtype": "bfloat16",
        "--epochs": "1",
    }
    assert {name: given.get(name) for name in expected} == expected
    assert {"--amp", "--channels-last"} <= set(words)
    assert not {"--model-ema", "--clip-grad", "--pin-mem"} & set(words)
    at = words.index("--model-kwargs")
    assert list(words[at + 1 : at + 5]) == ["img_size=32", "patch_size=8", "embed_dim=48", "num_heads=3"]
    assert plan.images >= (train.WARM_UP + 7) * 64


def test_one_process_repeats_no_images(tmp_path: Path) -> None:
    plan = train.make_plan("", {}, [], tmp_path, workers=1, batch_size=64, updates=7)
    assert plan.run.train.aug_repeats == 0
    assert plan.images == (train.WARM_UP + 7) * 64
    assert plan.run.updates_per_epoch(plan.images) == train.WARM_UP + 7


def test_a_class_has_an_image_in_both_folders(tmp_path: Path) -> None:
    from mlpreduce.data import check

    kwargs = {"depth": 1, "img_size": 16, "patch_size": 8, "num_classes": 70}
    plan = train.make_plan("vit_tiny_patch16_224", kwargs, [], tmp_path, workers=1, batch_size=8, updates=1)
    train.write_images(plan)
    check(plan.run.data)
    assert len(list(tmp_path.glob("data/train/*/*.jpg"))) == plan.images == 70
    assert len(list(tmp_path.glob("data/val/*"))) == 70


@pytest.mark.processes
def test_the_peer_is_skipped_with_the_reason(tmp_path: Path, stand_in: str, capsys: pytest.CaptureFixture[str]) -> None:
    absent = str(tmp_path / "train.py")
    assert main([*SHORT, "--timm-train", absent]) == 0
    text = capsys.readouterr().out
    assert f"peer not run: skipped: --timm-train {absent}: no such file" in text
    assert "ours not run" not in text
    assert "batch 8 = 1 worker(s) x 4 images x 2 steps" in text
    assert "ours ran with: " in text
    assert "train.lr=0.001" in text


@pytest.mark.processes
def test_a_run_without_the_script_says_where_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SHORT, "--runs", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["peer"]["failure"].startswith(
        "skipped: --timm-train is not given; it is train.py of timm's repository"
    )
    assert found["ratios"] is None
    assert found["ours"]["failure"] == ""
    assert len(found["ours"]["images_per_s"]) == 2  # the second run has trained again, and not read what the first left
    assert min(found["ours"]["images_per_s"]) > 0
    assert found["ours"]["ran"]["updates"] == train.WARM_UP + 2
    assert found["ours"]["ran"]["parameters"] == found["parameters"]
    assert found["ours"]["ran"]["threads"] == 1
    assert found["settings"]["train.batch_size"] == 8


@pytest.mark.processes
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("raise RuntimeError('no weights\\nand more')", "RuntimeError: no weights"),
        (
            "import argparse; argparse.ArgumentParser(prog='t').parse_args()",
            "exit status 2: t: error: unrecognized arguments",
        ),
        ("print('nothing')", "it made 0 updates, and 7 are wanted"),
        ("import os; os._exit(3)", "exit status 3"),
        ("import", "SyntaxError: "),
    ],
)
def test_a_script_that_fails_is_told_why(tmp_path: Path, script: str, reason: str) -> None:
    path = tmp_path / "train.py"
    path.write_text(script)
    plan = train.make_plan(SMALL[0], {"depth": 1}, [], tmp_path, workers=1, batch_size=8, updates=2)
    found = train._measure(train.Rate(), plan, [str(path), *plan.peer_arguments], tmp_path, 1)
    assert found.failure.startswith(reason)
    row = str(train.Comparison("model", 9, {}, train.Rate((1.0,)), found))
    assert f"not run\n    peer not run: {reason}" in row


@pytest.mark.processes
def test_another_model_is_no_peer(stand_in: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SHORT, "--timm-train", stand_in, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ours"]["failure"] == ""
    assert found["peer"]["failure"].startswith("it trained 3 parameters, and the model has ")


@pytest.mark.processes
@pytest.mark.slow
def test_two_workers_train_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SHORT, "--workers", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ours"]["failure"] == ""
    assert found["ours"]["ran"]["workers"] == 2
    assert found["settings"]["train.aug_repeats"] == 3


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_beside_the_real_script(workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    script = os.environ.get("MLPREDUCE_TIMM_TRAIN")
    if not script:
        pytest.skip("MLPREDUCE_TIMM_TRAIN is not set: it is the path of timm's train.py")
    assert main([*SHORT, "--timm-train", script, "--workers", str(workers), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [found[tool]["failure"] for tool in ("ours", "peer")] == ["", ""]
    same = ("updates", "parameters", "workers", "threads", "device")
    ours, peer = ({key: found[tool]["ran"][key] for key in same} for tool in ("ours", "peer"))
    assert ours == peer
    assert all(ratio > 0 for ratio in found["ratios"])


def test_rates_are_compared_round_by_round() -> None:
    ours, peer = train.Rate((10.0, 20.0, 60.0)), train.Rate((20.0, 20.0, 30.0))
    result = train.Comparison("model", 9, {}, ours, peer)
    assert result.ratios == (1.0, 0.5, 2.0)
    assert str(result).endswith("1.00 (0.50 to 2.00)")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["depth=2"], "bench train depth=2: an argument of no model; write MODEL depth=2"),
        (["vit_tiny_patch16_24"], "timm has no architecture 'vit_tiny_patch16_24'; did you mean"),
        (["--batch-size", "10"], "a batch of 5 images per worker cannot be mixed in pairs; choose train.batch_size"),
        (
            ["train.fidelity=published"],
            "bench train train.fidelity=published: timm's script has no such setting; it has",
        ),
        (["train.ema_deca=0"], "bench train train.ema_deca=0: timm's script has no such setting; it has"),
        (["data.workers=-1"], "data.workers=-1"),
        (["--updates", "0"], "bench train --updates 0: it must be at least 1"),
        (["--workers", "0"], "bench train --workers 0: it must be at least 1"),
    ],
)
def test_errors_are_one_message(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "train", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_model_must_take_colour_images(tmp_path: Path) -> None:
    with pytest.raises(ReductionError, match=r"bench train vit_tiny_patch16_224: it takes 1 x 224 x 224, not 3"):
        train.make_plan("vit_tiny_patch16_224", {"in_chans": 1}, [], tmp_path, workers=1, batch_size=8, updates=1)


def test_devices_are_dropped_where_cpus_join() -> None:
    from mlpreduce.bench.watch import no_cpus

    assert no_cpus(["cpu"]) is None
    assert no_cpus(None) is None
    assert no_cpus([0]) == [0]
    assert no_cpus(["cuda:0"]) == ["cuda:0"]
