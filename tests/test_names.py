"""Near names, and what describes a name."""

from __future__ import annotations

import json
import pickle

import pytest
import timm

import mlpreduce
from mlpreduce.__main__ import main
from mlpreduce.criteria import list_criteria
from mlpreduce.describing import _arguments, described
from mlpreduce.errors import ReductionError, did_you_mean
from mlpreduce.recipe import list_recipes
from mlpreduce.search.spaces.space import list_spaces

NEAR = {
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "ViT-Base": "vit_base_patch16_224",
    "vit_tiny_patch16_22": "vit_tiny_patch16_224",
    "vit_bse_patch16_224": "vit_base_patch16_224",
    "deit_tiny_patch16": "deit_tiny_patch16_224",
    "swin_small": "swin_small_patch4_window7_224",
    "efficientnet_b9": "efficientnet_b8",
}


@pytest.mark.parametrize("name", list(NEAR))
def test_names_of_timm(name: str) -> None:
    assert did_you_mean(name, timm.list_models()) == f"; did you mean {NEAR[name]!r}?"


@pytest.mark.parametrize("name", ["prune", "quantize", "bert", "llama", "gpt2", "xyz", "", "a"])
def test_no_silly_name_of_timm(name: str) -> None:
    assert did_you_mean(name, timm.list_models()) == f"; none of {len(timm.list_models()):,} names is near"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("groupped", "grouped"),
        ("group", "grouped"),
        ("low", "low_rank"),
        ("LowRank", "low_rank"),
        ("gate", "block_gate"),
    ],
)
def test_transforms(name: str, near: str) -> None:
    assert did_you_mean(name, mlpreduce.list_transforms()) == f"; did you mean {near!r}?"


@pytest.mark.parametrize("name", ["prune", "tailor", "sharing", "ties", "grad", "hessian"])
def test_no_silly_transform(name: str) -> None:
    assert did_you_mean(name, mlpreduce.list_transforms()).startswith("; known: block_diagonal, ")


def test_nothing_to_suggest() -> None:
    assert did_you_mean("any", []) == ""
    assert did_you_mean("l3", ["l1", "l2", "last"]) == "; did you mean 'l2'?"


EVERY = [*mlpreduce.list_transforms(), *list_criteria(), *list_recipes(), *list_spaces()]


@pytest.mark.parametrize("name", EVERY)
def test_every_option_is_described(name: str) -> None:
    for found in described(name):
        assert found.summary
        assert "no description" not in [option.meaning for option in found.options]
        assert len(repr(found)) < 100
        text = str(found)
        for option in found.options:
            assert option.name in text
            assert option.default in text


def test_a_transform() -> None:
    found = mlpreduce.describe("grouped")
    assert [option.name for option in found.options][:4] == ["group", "pattern", "scale", "keep"]
    assert found.options[0].default == "2"
    assert found.options[0].meaning == "blocks that share one MLP; `all`: those of a stage."
    assert "arXiv 2512.01059, equation 1" in found.source
    assert repr(found) == "<transform grouped: 8 options; print it>"
    assert found._repr_html_().count("<tr>") == 9
    assert "sqrt(2). The" in found._repr_html_()
    assert pickle.loads(pickle.dumps(found)) == found


def test_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert ("looks at", "calibration images and a loss") in mlpreduce.describe("taylor").facts
    assert ("variant grouped", "grouped(group=2)") in mlpreduce.describe("digits_tiny").facts
    assert mlpreduce.describe("width").kind == "search space"
    with pytest.raises(ReductionError, match=r"describe\('groupd'\): nothing has this name; did you mean 'grouped'"):
        mlpreduce.describe("groupd")
    assert main(["list", "thin"]) == 0
    assert "mlp_ratio  2.0" in capsys.readouterr().out
    assert main(["list", "thin", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["options"][0]["name"] == "mlp_ratio"


def test_meanings_come_from_the_docstring() -> None:
    text = "Do it.\n\nArgs:\n    one: is first,\n        and goes on.\n    two: is\n        `a: b`.\n\nRaises:\n    Error: no."
    assert dict(_arguments(text)) == {"one": "is first, and goes on.", "two": "is `a: b`."}
    assert dict(_arguments("Do it.")) == {}
