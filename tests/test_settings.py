"""Fields of settings: marks, and flags that are made of them."""

from __future__ import annotations

import argparse
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field

from mlpreduce.recipe import Recipe
from mlpreduce.search.cli import _parser
from mlpreduce.search.study.settings import StudySettings
from mlpreduce.train.settings import Run
from mlpreduce.words.flags import add_flags, given_flags
from mlpreduce.words.marks import Free, Later, Mark, marked


class Inner(BaseModel):
    root: Free[str] = ""
    share: Later[Annotated[float, Field(ge=0)]] = 0.0


class Outer(BaseModel):
    inner: Inner = Inner()
    count: Free[Annotated[int, Field(ge=1)]] = Field(2, description="how many")
    kind: Literal["a", "b"] = Field("a", description="of what kind, 100 %")
    seeds: tuple[int, ...] = Field((1, 2), description="of runs (default: the recipe's)")
    names: tuple[str, ...] = Field(("a",), description="of things")
    unseen: int = 3


def test_marks_are_found_in_sections_too() -> None:
    assert marked(Outer, Mark.FREE) == ("inner.root", "count")
    assert marked(Outer, Mark.LATER) == ("inner.share",)
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        Outer(count=0)  # the mark leaves the bound


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning")  # "7" is no value of some
def test_a_run_is_told_by_what_is_not_free() -> None:
    run = Run(recipe="any", variant="any", directory="/any")

    def changed(key: str, value: object) -> Run:
        section, name = key.split(".")
        return run.model_copy(update={section: getattr(run, section).model_copy(update={name: value})})

    assert {changed(key, "7").config_hash for key in marked(Run, Mark.FREE)} == {run.config_hash}
    assert len({changed(key, "7").config_hash for key in marked(Run, Mark.LATER)}) == len(marked(Run, Mark.LATER))
    assert set(marked(Run, Mark.FREE)) < set(marked(Recipe, Mark.FREE))


def test_flags_are_those_of_the_settings() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, Outer, ["kind"])
    assert "how many (default: 2)" in parser.format_help()
    assert parser.format_help().count("(default: the recipe's)") == 1
    options = parser.parse_args(["--count", "5", "--seeds", "7, 8", "--names", "a,f(x=1, y=2),3"])
    assert given_flags(options, Outer, ["kind"]) == {"count": 5, "seeds": (7, 8), "names": ("a", "f(x=1, y=2)", "3")}
    assert given_flags(parser.parse_args([]), Outer, ["kind"]) == {}
    with pytest.raises(SystemExit):
        parser.parse_args(["--unseen", "1"])


def test_every_setting_of_a_study_has_a_flag() -> None:
    flags = {action.dest for action in _parser()._actions}
    assert set(StudySettings.model_fields) - {"budgets", "name"} < flags
    assert {"budget", "study"} < flags
