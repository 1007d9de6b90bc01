"""The one way a person types a step, wherever one is typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlpreduce.__main__ import main
from mlpreduce.errors import ReductionError, call_text
from mlpreduce.recipe import load
from mlpreduce.search.cli import _parser, _settings
from mlpreduce.search.spaces.points import Pricer
from mlpreduce.search.spaces.subjects import RecipeModel
from mlpreduce.search.study.jobs import references_of
from mlpreduce.search.study.settings import StudySettings
from mlpreduce.words.notation import as_steps, parse_steps, read_words, split_outside

VALUES: dict[str, Any] = {
    "4": 4,
    "-1e-3": -1e-3,
    ".5": 0.5,
    '"cycle"': "cycle",
    "'cycle'": "cycle",
    "cycle": "cycle",
    "global": "global",  # a word of Python's
    "none": "none",  # a value of many options
    "None": None,
    "true": True,
    "True": True,
    "false": False,
    "[[0, 1], [2, 3]]": [[0, 1], [2, 3]],
    "('fc1', 'fc2')": ["fc1", "fc2"],
    "{'blocks.0.mlp': 8}": {"blocks.0.mlp": 8},
    '{name = "lora", rank = 8}': {"name": "lora", "rank": 8},
    "taylor(site='fc1')": {"name": "taylor", "site": "fc1"},
    r"'it\'s, (so)'": "it's, (so)",
    r"'\d'": r"\d",
    "1979-05-27": "1979-05-27",  # a date of TOML's, and none of ours
    "07:32:00": "07:32:00",
    "9" * 5000: "9" * 5000,  # no number that can be read
}


@pytest.mark.parametrize("text", list(VALUES))
def test_values(text: str) -> None:
    assert parse_steps(f"any(option={text}, last=1)") == [("any", {"option": VALUES[text], "last": 1})]
    assert read_words(["any", f"option={text}", "last=1"]) == ({}, [("any", {"option": VALUES[text], "last": 1})])


def test_what_the_library_prints_can_be_typed() -> None:
    config = {
        "group": 4,
        "pattern": [[0, 1]],
        "scale": {"fc1.weight": 0.5},
        "per_use": None,
        "keep": "it's",
        "on": True,
    }
    assert parse_steps(call_text("grouped", config)) == [("grouped", config)]
    assert parse_steps("grouped(group=2), shallow(); my-own") == [
        ("grouped", {"group": 2}),
        ("shallow", {}),
        ("my-own", {}),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no transform"),
        ("grouped,,shallow", "names no transform"),
        ("grouped(group=4", "a ')' is missing"),
        ("grouped(keep='last)", 'a "\'" is missing'),
        ("grouped)", "the ')' at character 8 closes nothing"),
        ("grouped(4)", "'4' is not an option with its value"),
        ("grouped(group=)", "'group=' is not an option with its value"),
        ("grouped(group=2, group=3)", "group is given twice"),
        ("grouped(keep=the last)", "'the last' is not a value; put text in quotes"),
        ("grouped(keep={1, 2})", "is not a value"),
        ("grouped(keep=b'x')", "is not a value"),
        ("grouped(group=1+__import__('os').getpid())", "is not a value"),
        ("grouped group=4", "is not a transform with its options"),
        (f"grouped(keep={'[' * 3000}{']' * 3000})", "is not a value"),
        ("a(" + "b=a(" * 1500 + ")" * 1501, "calls within calls, more than 20 deep"),
        ("grouped(keep=[1979-05-27])", "is not a value"),
        ("x" * 100_001, "100,001 characters are too many"),
    ],
)
def test_what_is_not_a_step_is_refused(text: str, message: str) -> None:
    with pytest.raises(ReductionError) as caught:
        parse_steps(text)
    assert message in str(caught.value)
    assert (
        "grouped(group=4, pattern=" in str(caught.value)
        or "quotes" in message
        or "twice" in message
        or "not a value" in message
    )


def test_both_notations_on_a_command_line() -> None:
    one = read_words(["img_size=32", "grouped", "group=4", "pattern=cycle", "shallow"])
    assert one == read_words(["img_size=32", 'grouped(group=4, pattern="cycle")', "shallow()"])
    assert read_words(["grouped(group=4)", "keep=last"])[1] == [("grouped", {"group": 4, "keep": "last"})]


@pytest.mark.parametrize(
    "words", [["depth=4", "depth=5"], ["grouped", "group=2", "group=3"], ["grouped(group=2)", "group=3"]]
)
def test_a_key_that_is_given_twice_is_refused(words: list[str]) -> None:
    with pytest.raises(ReductionError, match=r"(depth|group) is given twice; leave one out"):
        read_words(words)


def test_split_outside() -> None:
    assert split_outside("a, b(c=1, d='x,y'),[e,f]", ",") == ["a", " b(c=1, d='x,y')", "[e,f]"]


def test_plans_of_two_transforms_follow_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    model = ["vit_tiny_patch16_224", "depth=4"]
    assert main(["plan", *model, "grouped(group=2)", "shallow(ratio=0.5)"]) == 0
    text = capsys.readouterr().out
    first, second, total = text.split("\n\n")
    assert first.startswith("grouped(group=2)")
    assert second.startswith("shallow(ratio=0.5)")
    assert total.startswith("all 2 together")
    assert main(["profile", *model, "--json"]) == 0
    before = json.loads(capsys.readouterr().out)["params"]
    assert main(["profile", *model, "grouped", "shallow", "ratio=0.5", "--json"]) == 0
    after = json.loads(capsys.readouterr().out)["params"]
    assert f"model: {before:,} -> {after:,} parameters" in total
    between = before - 2 * 295_872
    assert f"model: {before:,} -> {between:,} parameters" in first
    assert f"model: {between:,} -> {after:,} parameters" in second
    assert main(["plan", *model, "grouped", "shallow", "--json"]) == 0
    assert [plan["transform"] for plan in json.loads(capsys.readouterr().out)] == ["grouped", "shallow"]
    assert main(["plan", *model, "grouped", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["transform"] == "grouped"


@pytest.mark.parametrize(
    "override",
    [
        "variants.mine=grouped(group=4), shallow",
        'variants.mine=["grouped(group=4)", "shallow"]',
        'variants.mine=["grouped(group=4)", {transform="shallow"}]',
        'variants={baseline=[], mine=["grouped(group=4)", "shallow()"]}',
    ],
)
def test_recipes(override: str) -> None:
    assert load("digits_tiny", [override]).variants["mine"] == (
        {"transform": "grouped", "group": 4},
        {"transform": "shallow"},
    )


def test_recipe_files_and_sweeps(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        '[variants]\nbaseline = []\nmine = "grouped(group=4)"\n[sweep.a.variants]\nother = ["shallow(ratio=0.25)"]\n'
    )
    recipe = load(str(path))
    assert recipe.variants["mine"] == ({"transform": "grouped", "group": 4},)
    assert recipe.sweep["a"]["variants"]["other"] == [{"transform": "shallow", "ratio": 0.25}]
    path.write_text('[sweep.a.variants]\nother = ["shallow(ratio=0.25"]\n')
    with pytest.raises(ReductionError, match=r"mine\.sweep\.a\.variants\.other: .*a '\)' is missing"):
        load(str(path))


def test_what_is_no_text_stays() -> None:
    assert as_steps(3) == 3
    assert as_steps([3]) == [3]
    with pytest.raises(ReductionError, match="'transform' cannot be an option"):
        as_steps("grouped(transform='shallow')")


def test_references_of_a_search() -> None:
    options = _parser().parse_intermixed_args(["width", "--references", "baseline, grouped(group=4, keep='last')"])
    found = _settings(options)["references"]
    assert found == ("baseline", "grouped(group=4, keep='last')")
    recipe = load("digits_tiny")
    points = references_of(StudySettings(name="any", references=found), recipe, Pricer(RecipeModel(recipe)))
    assert points[found[1]].cost.unique_mlps == 1
    with pytest.raises(ReductionError, match=r"--references groupd: neither .*grouped\(group=4\)"):
        references_of(StudySettings(name="any", references=("groupd",)), recipe, Pricer(RecipeModel(recipe)))
