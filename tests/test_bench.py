"""The bench: what it reads and reports. Nothing here asks how long anything took."""

from __future__ import annotations

import json
import sys

import pytest

from mlpreduce import ReductionError
from mlpreduce.__main__ import main
from mlpreduce.bench import apply as bench
from mlpreduce.bench.rounds import read_models

SMALL = ["depth=2", "img_size=32", "embed_dim=24", "num_heads=2"]


def test_words_are_models_and_their_arguments() -> None:
    words = ["vit_tiny_patch16_224", "depth=2", "img_size=32", "pvt_v2_b0"]
    assert read_models(words, "apply") == [("vit_tiny_patch16_224", {"depth": 2, "img_size": 32}), ("pvt_v2_b0", {})]


def test_the_list_of_peers_names_architectures_of_timm() -> None:
    import timm

    names = [name for name, _ in read_models(bench.LISTS["peers"].split(), "apply")]
    assert len(set(names)) == len(names) == 44
    assert [name for name in names if not timm.is_model(name)] == []


def test_both_leave_as_many_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch_pruning")
    words = ["bench", "apply", "vit_tiny_patch16_224", *SMALL, "--peer", "torch-pruning", "--runs", "1"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == f"vit_tiny_patch16_224 {' '.join(SMALL)}"
    assert found["equal"] is True
    assert found["ours"]["params"] == found["peer"]["params"] == found["params"] - 2 * (2 * 24 * 48 + 48)
    assert [len(found[tool]["seconds"]) for tool in ("ours", "peer")] == [1, 1]
    assert all(ratio > 0 for ratio in found["ratios"])
    assert main([*words, "--threads", "1"]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[1].endswith(" equal")
    assert "1 models, runs of each: 1, threads: 1; ours ran on 1, torch-pruning on 1; where both did" in text
    assert "parameters are equal on 1 of 1" in text


def test_what_a_tool_cannot_do_is_a_row_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch_pruning")
    assert main(["bench", "apply", "resnet18", "--peer", "torch-pruning", "--runs", "1"]) == 0
    text = capsys.readouterr().out
    assert "ours not run: ReductionError: shallow(ratio=0.5): found no MLP in ResNet" in text
    assert "peer not run: ReductionError: found no MLP to tell it of" in text
    assert "ours ran on 0, torch-pruning on 0; where both did, parameters are equal on 0 of 0" in text


def test_a_run_without_peer_leaves_the_random_state(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    before = torch.random.get_rng_state()
    result = bench.compare("vit_tiny_patch16_224", runs=2, depth=1, img_size=32)
    assert torch.equal(before, torch.random.get_rng_state())
    assert (result.peer, result.ratios, result.equal) == (None, None, None)
    assert len(result.ours.seconds) == 2


def test_counts_that_differ_are_told() -> None:
    ours, peer = bench.Timing((1.0, 2.0, 6.0), 7), bench.Timing((2.0, 2.0, 3.0), 8)
    result = bench.Comparison("model", 9, ours, peer)
    assert result.ratios == (1.0, 0.5, 2.0)
    assert result.equal is False
    assert str(result).endswith("1.00 (0.50 to 2.00) peer 8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["depth=2"], "bench apply depth=2: an argument of no model; write MODEL depth=2"),
        (["vit_tiny_patch16_24"], "timm has no architecture 'vit_tiny_patch16_24'; did you mean"),
        (["vit_tiny_patch16_224", "dept=2"], "unexpected keyword argument 'dept'"),
        (["--peer", "nni"], "bench --peer nni: unknown peer; known: torch-pruning"),
        (["--threads", "0"], "bench apply --threads 0: it must be at least 1"),
        (["--runs", "0"], "bench apply --runs 0: it must be at least 1"),
    ],
)
def test_errors_are_one_message(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "apply", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_peer_is_named_with_its_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(
        ReductionError, match=r'needs torch_pruning, which is not installed: pip install "mlpreduce\[bench\]"'
    ):
        bench.compare("vit_tiny_patch16_224", "torch-pruning", depth=1, img_size=32)


def test_options_may_stand_before_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--runs", "0", "apply"]) == 2
    assert "bench apply --runs 0: it must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["prune"], ["--runs", "2"]])
def test_without_a_job_the_jobs_are_named(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 2
    assert (
        "{apply,train,search,criteria,gram_schmidt,latency,layers,calibration,trained,tune}" in capsys.readouterr().err
    )
