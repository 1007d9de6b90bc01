"""What a transform declares of itself, recipes and searches ask for: they know none by name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mlpreduce
from mlpreduce import recipe as recipes
from mlpreduce.edits import Slice
from mlpreduce.errors import ReductionError
from mlpreduce.graph import find_mlps
from mlpreduce.search.spaces.points import Pricer
from mlpreduce.search.spaces.space import Suggestion
from mlpreduce.search.spaces.subjects import RecipeModel
from mlpreduce.testing import tiny_vit
from mlpreduce.train.parts import build_model
from mlpreduce.transforms import Config, Follows, list_transforms, register, registry
from mlpreduce.transforms.parts import Parts
from mlpreduce.transforms.steps import follows, needs_data, seeded, without_data, without_weights

PACKAGE = Path(mlpreduce.__file__).parent
DATA = {"transform": "own_halves", "by": "data"}


@pytest.fixture(autouse=True)
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transform that looks at data, draws, and has a cost of its own, by its options."""
    monkeypatch.setattr(registry, "_TRANSFORMS", dict(registry._TRANSFORMS))

    def late(config: Config) -> Follows | None:
        return Follows("least", "scores", "nothing") if config.get("least") is not None else None

    @register(
        "own_halves",
        looks_at_data=lambda config: config.get("by") == "data",
        without_data=lambda config: {**config, "by": "first"},
        draws=lambda config: config.get("by") == "random",
        follows=late,
    )
    def own_halves(parts: Parts, *, by: str = "first", least: float | None = None, seed: int = 0) -> Iterator[Slice]:
        for mlp in parts:
            count = mlp.hidden_features // 2
            if least is not None:
                count = int((parts.scores(mlp, "l2", seed) > least).sum())
            yield parts.keep(mlp, count, "energy" if by == "data" else by, seed)


def test_it_says_so_of_its_steps() -> None:
    assert needs_data(DATA)
    assert not needs_data({"transform": "own_halves"})
    assert without_data(DATA) == {"transform": "own_halves", "by": "first"}
    assert seeded({"transform": "own_halves", "by": "random"}, 7)["seed"] == 7
    assert seeded(DATA, 7) == DATA
    assert follows({"transform": "own_halves"}) is None
    found = follows({"transform": "own_halves", "least": 0.0})
    assert found == Follows("least", "scores", "nothing")


def test_it_is_applied_by_data() -> None:
    model, images = tiny_vit().eval(), torch.randn(32, 3, 16, 16)
    reduced = mlpreduce.apply(model, "own_halves", by="data", data=images.split(8))
    assert {mlp.hidden_features for mlp in find_mlps(reduced)} == {64}


def test_recipes_ask_it(tmp_path: Path) -> None:
    overrides = ["variants={a = \"own_halves(by='data')\", b = \"own_halves(by='random')\"}", "seeds=[1, 2]"]
    recipe = recipes.load("digits_tiny", overrides)
    first, *_ = runs = recipes.runs(recipe, tmp_path)
    assert {mlp.hidden_features for mlp in find_mlps(build_model(first, device="meta"))} == {64}  # without data
    drawn = [build_model(run) for run in runs if run.variant == "b"]
    names = [dict(model.named_parameters())["blocks.0.mlp.fc1.weight"] for model in drawn]
    assert not torch.equal(*names)
    with pytest.raises(ReductionError, match=r"what least=0.0 leaves is known only when scores are.*give nothing"):
        recipes.load("digits_tiny", ['variants={a = "own_halves(least=0.0)"}'])


def test_searches_ask_it() -> None:
    pricer = Pricer(RecipeModel(recipes.load("digits_tiny")))

    def price(**config: Any) -> Any:
        return pricer.price(Suggestion(({"transform": "own_halves", **config},), {}))

    plain, by_data = price(), price(by="data")
    assert plain.cost == by_data.cost
    assert plain.key != by_data.key
    with pytest.raises(
        ReductionError, match=r"with least=0\.0 the cost follows from given weights.*search over nothing"
    ):
        price(least=0.0)


@pytest.mark.parametrize(
    ("what", "function", "message"),
    [
        ("looks_at_data", lambda config: config["by"], "looks_at_data=, of .*, raised KeyError: 'by'"),
        ("looks_at_data", lambda config: None, "looks_at_data= gave None"),
        ("draws", lambda config: 1 / 0, "draws=, of .*, raised ZeroDivisionError"),
        ("without_weights", lambda config: [], r"without_weights= gave \[\]"),
        ("follows", lambda config: "ratio", "follows= gave 'ratio'"),
        ("seeded", lambda config, seed: seed, "seeded= gave 3"),
    ],
)
def test_what_a_declaration_of_others_raises_is_told(what: str, function: Any, message: str) -> None:
    register("own_fault", **{what: function})(lambda parts, *, by="first", seed=0: ())
    step = {"transform": "own_fault"}
    with pytest.raises(ReductionError, match=rf"own_fault\(\): {message}"):
        [ask(step) for ask in (needs_data, follows, without_weights, lambda step: seeded(step, 3))]
    if what == "looks_at_data":
        with pytest.raises(ReductionError, match="looks_at_data="):
            recipes.load("digits_tiny", ['variants={a = "own_fault()"}'])


def test_no_room_above_knows_what_a_transform_looks_at() -> None:
    """Rooms that carry steps out compare their options with no value that one transform alone has."""
    known = {"align_activations", "residual", "min_score", "match_forward", "latency_weight", "cca"}
    for room in ("train", "recipe", "search"):
        for path in (PACKAGE / room).rglob("*.py"):
            texts = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
            assert not {text for text in texts if isinstance(text, str)} & known, path


def test_every_file_of_the_folder_is_found() -> None:
    names = {path.stem for path in (PACKAGE / "transforms").glob("*.py") if "@register(" in path.read_text()}
    assert {"grouped", "shallow", "thin"} <= names
    assert names - {"__init__", "registry"} <= set(list_transforms())
