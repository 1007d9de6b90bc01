"""The search before anything is trained: spaces, exact costs, budgets, early stopping, racing."""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import optuna
import pytest
from helpers.marks import slow_but
from hypothesis import given
from hypothesis import strategies as st

import mlpreduce
from mlpreduce import recipe as recipes
from mlpreduce.budget import COSTS
from mlpreduce.errors import ReductionError
from mlpreduce.search.driver import run
from mlpreduce.search.owner import Owner
from mlpreduce.search.spaces.choices import Walker, any_of
from mlpreduce.search.spaces.goals import Budget, check_objectives, read_budgets
from mlpreduce.search.spaces.points import Point, Pricer
from mlpreduce.search.spaces.space import Suggestion, list_spaces, load_space
from mlpreduce.search.spaces.subjects import RecipeModel
from mlpreduce.search.stopping import Halving
from mlpreduce.search.study.front import dominates, front, hypervolume, next_runs
from mlpreduce.search.study.jobs import nearest, pricer_of
from mlpreduce.search.study.settings import StudySettings, changes
from mlpreduce.search.study.storage import counts, hidden
from mlpreduce.search.study.study import Study
from mlpreduce.search.training import training_owner
from mlpreduce.train import build_model
from mlpreduce.transforms import is_construction
from mlpreduce.transforms.steps import without_weights

# SQLAlchemy about mlflow's own tables
pytestmark = pytest.mark.filterwarnings("ignore:The ..noload.. loader strategy is deprecated:DeprecationWarning")

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(path.stem for path in (ROOT / "search_spaces").glob("*.py"))
OF_RECIPES = [name for name in NAMES if not name.startswith("trained")]  # those are of models in hand
PATTERNS = [name for name in OF_RECIPES if name != "training"]
SMALL = [name for name in PATTERNS if name != "joint"]  # which has thousands of points, half a second each
DEPTH6 = ("model.kwargs.depth=6", "model.kwargs.embed_dim=16")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


@pytest.fixture(scope="module")
def pricer() -> Pricer:
    return Pricer(RecipeModel(recipes.load("digits_tiny", DEPTH6)))


def built(pricer: Pricer, point: Point) -> mlpreduce.budget.profiling.Profile:
    """Counts of the model that would be trained."""
    run = recipes.runs(recipes.changed(pricer.subject.recipe, point.settings), ".")[0]
    model = build_model(run.model_copy(update={"steps": point.steps}))
    assert [mlp.hidden_features for mlp in mlpreduce.find_mlps(model)] == point.pattern["widths"]
    names = point.pattern["blocks"]
    assert [mlp.owner for mlp in mlpreduce.find_mlps(model)] == [names[owner] for owner in point.pattern["owners"]]
    return mlpreduce.profile(model)


def counted(pricer: Pricer, point: Point, cost: str) -> int:
    """A cost of the model that would be trained."""
    run = recipes.runs(recipes.changed(pricer.subject.recipe, point.settings), ".")[0]
    model = build_model(run.model_copy(update={"steps": point.steps}))
    if cost == "params":
        return sum(parameter.numel() for parameter in model.parameters())
    return int(getattr(mlpreduce.profile(model), cost))


def asked(name: str, pricer: Pricer, number: int, seed: int = 0) -> list[tuple[dict, Point]]:
    """Points of a space at random."""
    space = load_space(name)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    found = []
    for _ in range(number):
        trial = study.ask()
        suggestion = space.suggest(trial, pricer.model)
        found.append((trial.params, pricer.price(suggestion)))
    return found


class TestSpaces:
    def test_names_come_from_the_folder(self) -> None:
        assert sorted(list_spaces()) == NAMES
        assert {
            "width",
            "width_per_block",
            "sharing",
            "sharing_partition",
            "sharing_free",
            "sharing_width",
            "joint",
            "training",
        } <= set(NAMES)

    @pytest.mark.parametrize("count", [2, pytest.param(12, marks=pytest.mark.slow)])
    @pytest.mark.parametrize("name", OF_RECIPES)
    def test_costs_are_those_of_the_model_that_is_trained(self, name: str, count: int, pricer: Pricer) -> None:
        for _, point in asked(name, pricer, count):
            profile = built(pricer, point)
            assert asdict(point.cost) == {cost: getattr(profile, cost) for cost in COSTS}

    @pytest.mark.parametrize("name", slow_but(OF_RECIPES, *SMALL, "training"))
    def test_its_own_points_can_be_carried_out(self, name: str, pricer: Pricer) -> None:
        assert Walker(load_space(name), pricer).check()

    @pytest.mark.parametrize("name", ["joint", "sharing_width", "width", "width_per_block"])
    def test_of_trained_weights_units_may_be_chosen_by_data(self, name: str, pricer: Pricer) -> None:
        recipe = pricer.subject.recipe
        trained = Pricer(RecipeModel(recipe, trained=True))
        chosen = [
            {
                step.get("criterion", "first")
                for point in Walker(load_space(name), known).check()
                for step in point.steps
                if step["transform"] == "shallow"
            }
            for known in (pricer, trained)
        ]
        assert "reconstruction" in chosen[1]
        assert chosen[1] - {"reconstruction"} <= chosen[0] == chosen[0] - {"reconstruction"}

    def test_weights_are_known_to_be_trained(self, pricer: Pricer) -> None:
        recipe = pricer.subject.recipe
        given = recipe.model_copy(update={"model": recipe.model.model_copy(update={"weights": "pretrained"})})
        assert not Pricer(RecipeModel(recipe)).model.trained
        assert Pricer(RecipeModel(given)).model.trained
        plain = StudySettings(name="any")
        for settings, one, trained in (
            (plain, recipe, False),
            (plain, given, True),
            (plain.model_copy(update={"inherit": "baseline"}), recipe, True),
            (plain.model_copy(update={"inherit": "nearest"}), recipe, False),
            (plain.model_copy(update={"inherit": "baseline", "supernet": 1}), recipe, False),
            (plain.model_copy(update={"supernet": 1}), given, False),
        ):
            assert pricer_of(settings, one).model.trained is trained

    def test_the_papers_points_lie_in_the_spaces_that_name_them(self, pricer: Pricer) -> None:
        paper = {
            "grouped": pricer.price(Suggestion(({"transform": "grouped", "group": 2},), {})).key,
            "shallow": pricer.price(Suggestion(({"transform": "shallow", "ratio": 0.5},), {})).key,
        }
        for name, wanted in {
            "sharing_width": ["grouped", "shallow"],
            "joint": ["grouped", "shallow"],
            "width": ["shallow"],
            "sharing": ["grouped"],
        }.items():
            space = load_space(name)
            keys = [pricer.price(Walker(space, pricer).ask(choices)[0]).key for choices in space.points]
            assert keys == [paper[other] for other in wanted]

    def test_all_transforms_of_built_models_are_in_the_joint_space(self, pricer: Pricer) -> None:
        space = load_space("joint")
        choices = [dict(space.points[0]), *({"layers": name} for name in ("block_diagonal", "low_rank", "svft"))]
        choices += [{"own": "ssf"}, {"own": "lora"}, {"gates": True}, {"dropped": 1}, {"ratio": 0.5}]
        found = {step["transform"] for each in choices for step in Walker(space, pricer).ask(each)[0].steps}
        assert found == {name for name in mlpreduce.list_transforms() if not is_construction(name)}

    def test_what_is_not_given_is_the_first(self, pricer: Pricer) -> None:
        _, made, between = Walker(load_space("joint"), pricer).ask({})
        assert len(made) > 3
        for name, value in made.items():
            choices = getattr(between[name], "choices", None)
            assert value == (between[name].low if choices is None else choices[0])  # type: ignore[attr-defined]

    def test_equal_patterns_are_one_point(self, pricer: Pricer) -> None:
        by_pattern: dict[tuple, set[str]] = {}
        for choices in itertools.product(*(range(row + 1) for row in range(5)), (0,)):
            steps = Walker(load_space("sharing_free"), pricer).ask({f"mlp{row}": c for row, c in enumerate(choices)})[0]
            point = pricer.price(steps)
            by_pattern.setdefault(tuple(point.pattern["owners"]), set()).add(point.key)
        assert len(by_pattern) == 52  # the ways to split 5 blocks: Bell's number (block 5 always joins block 0)
        assert all(len(keys) == 1 for keys in by_pattern.values())
        assert len(set.union(*by_pattern.values())) == 52

    def test_partitions_are_runs_of_neighbours(self, pricer: Pricer) -> None:
        patterns = set()
        for choices in itertools.product([True, False], repeat=5):
            given = {f"new{row}": new for row, new in enumerate(choices, 1)}
            owners = pricer.price(Walker(load_space("sharing_partition"), pricer).ask(given)[0]).pattern["owners"]
            assert owners == sorted(owners)
            patterns.add(tuple(owners))
        assert len(patterns) == 2**5

    @pytest.mark.parametrize(
        ("one", "other", "equal"),
        [
            ([("grouped", {"group": 2})], [("grouped", {"pattern": [[0, 1], [2, 3], [4, 5]]})], True),
            ([("grouped", {"scale": "inv_sqrt"})], [("grouped", {"scale": "none"})], False),
            ([("grouped", {"keep": "first"})], [("grouped", {"keep": "mean"})], False),
            ([("shallow", {"ratio": 0.5})], [("shallow", {"width": 32})], True),
            ([("shallow", {"criterion": "first"})], [("shallow", {"criterion": "last"})], False),
            ([("shallow", {"criterion": "first"})], [("shallow", {"criterion": "l2"})], False),
            ([("shallow", {"criterion": "taylor"})], [("shallow", {"criterion": "first"})], False),
            ([("shallow", {"criterion": "taylor"})], [("shallow", {"criterion": "fisher"})], False),
            ([("shallow", {"repair": "least_squares"})], [("shallow", {"repair": "none"})], False),
            ([("thin", {"mlp_ratio": 2.0})], [("shallow", {"ratio": 0.5})], False),
            (
                [("shallow", {"criterion": "l2"}), ("grouped", {"pattern": "cycle", "group": 6})],
                [("shallow", {"criterion": "l2"}), ("grouped", {"pattern": "cycle_reverse", "group": 6})],
                True,
            ),
            (
                [("shallow", {"criterion": "l2"}), ("grouped", {"group": 2})],
                [("shallow", {"criterion": "l2"}), ("grouped", {"group": 2, "keep": "mean"})],
                False,
            ),
        ],
    )
    def test_equal_reductions_have_one_key(self, one: list, other: list, equal: bool, pricer: Pricer) -> None:
        keys = [
            pricer.price(Suggestion(tuple({"transform": name, **config} for name, config in steps), {})).key
            for steps in (one, other)
        ]
        assert (keys[0] == keys[1]) is equal

    def test_what_looks_at_images_costs_the_same_or_is_refused(self, pricer: Pricer) -> None:
        plain, looking, beyond = (
            Suggestion(({"transform": "shallow", "ratio": 0.5, **config},), {})
            for config in (
                {},
                {"criterion": "nvit", "repair": "least_squares"},
                {"criterion": "nvit", "scope": "global"},
            )
        )
        assert pricer.price(looking).cost == pricer.price(plain).cost
        assert pricer.price(looking).pattern == pricer.price(plain).pattern
        with pytest.raises(ReductionError, match="with scope='global' the cost follows from training images"):
            pricer.price(beyond)

    def test_settings_are_part_of_a_point(self, pricer: Pricer) -> None:
        steps = ({"transform": "grouped"},)
        keys = {pricer.price(Suggestion(steps, {"train.lr": rate})).key for rate in (1e-3, 2e-3)}
        assert len(keys) == 2
        with pytest.raises(ReductionError, match="unknown key 'rate'"):
            pricer.price(Suggestion(steps, {"train.rate": 1.0}))


def space_file(folder: Path, body: str) -> str:
    path = folder / "mine.py"
    path.write_text(body)
    return str(path)


class TestWrongSpaces:
    @pytest.mark.parametrize(
        ("body", "message"),
        [
            (
                "def suggest(trial):\n    return [('groupped', {})]",
                "unknown transform 'groupped'; did you mean 'grouped'",
            ),
            (
                "def suggest(trial):\n    return [('grouped', {'grop': 2})]",
                "unknown argument 'grop'; did you mean 'group'",
            ),
            (
                "def suggest(trial):\n"
                "    if trial.suggest_categorical('a', ['x', 'y', 'z']) == 'z':\n"
                "        if trial.suggest_int('deep', 0, 9) == 7:\n"
                "            return [('grouped', {'grop': 2})]\n"
                "    return []",
                "unknown argument 'grop'",
            ),
            ("def suggest(trial):\n    return 'grouped'", "suggest gave 'grouped'; it must give a list such as"),
            ("def suggest(trial):\n    return 1 / 0", "ZeroDivisionError: division by zero"),
            ("def suggest(trial):\n    return [('grouped', {'group': 99})]", "none of .* points can be carried out"),
            ("suggest = 3", "has no function suggest"),
            ("import nothing_there", "ModuleNotFoundError"),
            ("def suggest(", "SyntaxError"),
            (
                "POINTS = [{'ratio': 2.0}]\ndef suggest(trial):\n"
                "    return [('shallow', {'ratio': trial.suggest_float('ratio', 0.25, 0.75)})]",
                "POINTS has what it does not suggest: ratio=2.0",
            ),
            (
                "def suggest(trial):\n    return []\ndef settings(trial):\n    return {'train.lrr': 1}",
                "unknown key 'lrr'",
            ),
        ],
    )
    def test_all_is_told_before_the_first_trial(self, body: str, message: str, tmp_path: Path) -> None:
        with pytest.raises(ReductionError, match=message):
            run(space_file(tmp_path, body), "digits_tiny", output=tmp_path / "out", workers=0)
        assert not (tmp_path / "out").exists()

    def test_unknown_names(self, tmp_path: Path) -> None:
        with pytest.raises(ReductionError, match="unknown search space 'jont'; did you mean 'joint'"):
            load_space("jont")
        with pytest.raises(ReductionError, match="no such file"):
            load_space(str(tmp_path / "none.py"))


class TestBudgets:
    @pytest.mark.parametrize("name", slow_but(SMALL, "width", "sharing"))
    @pytest.mark.parametrize("cost", ["params", "macs"])
    def test_the_smallest_is_found(self, name: str, cost: str) -> None:
        pricer = Pricer(RecipeModel(recipes.load("digits_tiny", ["model.kwargs.depth=3", "model.kwargs.embed_dim=16"])))
        space = load_space(name)
        with warnings.catch_warnings():  # it is marked experimental since long
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study = optuna.create_study(sampler=optuna.samplers.BruteForceSampler(seed=0))
        values: list[int] = []

        def objective(trial: optuna.Trial) -> float:
            try:
                values.append(getattr(pricer.price(space.suggest(trial, pricer.model)).cost, cost))
            except ReductionError:
                return 0.0
            return 0.0

        study.optimize(objective, n_trials=2000)
        assert len(study.trials) < 2000
        assert getattr(Walker(space, pricer).cheapest(cost)[1].cost, cost) == min(values)

    @pytest.mark.slow
    @pytest.mark.parametrize("part", range(4))
    def test_every_trial_keeps_its_budget(self, part: int) -> None:
        """Of a hundred random budgets, 25 in each part."""
        pricer = Pricer(RecipeModel(recipes.load("digits_tiny", ["model.kwargs.embed_dim=16"])))
        generator = random.Random(part)
        least: dict[tuple[str, str], int] = {}
        baseline = pricer.price(Suggestion((), {})).cost
        trained = 0
        for number in range(25):
            name, cost = generator.choice(SMALL), generator.choice(["params", "macs"])
            space = load_space(name)
            if (name, cost) not in least:
                least[name, cost] = getattr(Walker(space, pricer).cheapest(cost)[1].cost, cost)
            limit = generator.randint(least[name, cost], getattr(baseline, cost))
            (budget,) = read_budgets([f"{cost}<={limit}"], baseline)
            settings = StudySettings(name=f"s{number}", seed=number, trials=2)
            study = Study(settings, space, pricer, [budget], optuna.storages.InMemoryStorage(), rungs=())
            for _ in range(2):
                trial = study.ask({})
                if trial is None:  # no other point keeps the budget
                    break
                assert counted(pricer, trial.point, cost) <= limit
                study.tell(trial.number, [50.0, float(trial.point.cost.params)])
                trained += 1
            told = counts(study.study)
            assert told["complete"] >= 1, (name, cost, limit)
            for frozen in study.study.get_trials(states=[optuna.trial.TrialState.FAIL]):
                assert frozen.user_attrs["message"]
        assert trained > 37

    def test_an_unreachable_budget_tells_the_smallest(self, tmp_path: Path, pricer: Pricer) -> None:
        least = Walker(load_space("width"), pricer).cheapest("params")[1].cost.params
        with pytest.raises(
            ReductionError, match=f"the smallest that width reaches is {least:,}: shallow\\(ratio=0.125\\)"
        ):
            run(
                "width",
                "digits_tiny",
                overrides=DEPTH6,
                budgets=(f"params<={least - 1}",),
                output=tmp_path / "out",
                workers=0,
            )
        settings = {"budgets": ("params<=0.6", "unique_mlps<=2"), "output": tmp_path / "out", "workers": 0}
        with pytest.raises(ReductionError, match=r"unique_mlps<=2.*smallest that width reaches is 6"):
            run("width", "digits_tiny", overrides=DEPTH6, **settings)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("params", "write <cost><=<number>"),
            ("params>=0.5", "write <cost><=<number>"),
            ("param<=0.5", "no such cost; did you mean 'params'"),
            ("latency<=3", "latency is known after a trial only"),
            ("params<=-1", "must be above 0"),
            ("params<=1e999", "must be above 0"),
            ("params<=e", "is no number"),
        ],
    )
    def test_wrong_budgets(self, text: str, message: str, pricer: Pricer) -> None:
        with pytest.raises(ReductionError, match=message):
            read_budgets([text], pricer.price(Suggestion((), {})).cost)

    def test_fractions_are_of_the_baseline(self, pricer: Pricer) -> None:
        cost = pricer.price(Suggestion((), {})).cost
        found = read_budgets(["params<=1", "macs <= 0.5", "mlp_params<=1_000"], cost)
        assert [budget.limit for budget in found] == [cost.params, cost.macs // 2, 1000]
        assert Budget("any", "params", 5).excess(cost) == cost.params - 5


class TestStudy:
    def test_what_was_trained_is_not_trained_again(self, pricer: Pricer) -> None:
        settings = StudySettings(name="any", trials=99, sampler="random")
        study = Study(settings, load_space("width"), pricer, [], optuna.storages.InMemoryStorage(), rungs=())
        keys = []
        while (trial := study.ask({})) is not None:
            keys.append(trial.point.key)
            study.tell(trial.number, None if len(keys) % 2 else [50.0, 1.0])
        assert len(keys) == len(set(keys)) == 8  # all there are: eighths
        told = counts(study.study)
        assert (told["trained"], told["complete"], told["pruned"]) == (8, 4, 4)
        assert told["duplicate"] > 0
        assert not study.study.get_trials(states=[optuna.trial.TrialState.RUNNING])

    @pytest.mark.slow
    def test_a_study_ends_when_nearly_every_point_within_the_budget_was_trained(self, pricer: Pricer) -> None:
        space, axes = load_space("sharing_width"), ("none", "sequence", "cycle", "cycle_reverse")
        grid = itertools.product(axes, range(2, 7), [eighth / 8 for eighth in range(1, 9)], ("first", "l2"))
        names = ("share", "group", "ratio", "criterion")
        every = [pricer.price(Walker(space, pricer).ask(dict(zip(names, one, strict=True)))[0]) for one in grid]
        budgets = read_budgets(["params<=0.7"], pricer.price(Suggestion((), {})).cost)
        within = {point.key for point in every if not budgets[0].excess(point.cost) > 0}
        settings = StudySettings(name="any", trials=999)
        study = Study(settings, space, pricer, budgets, optuna.storages.InMemoryStorage(), rungs=())
        keys = []
        while (trial := study.ask({})) is not None:  # TPE suggests what it found best again and again
            keys.append(trial.point.key)
            study.tell(trial.number, None if len(keys) % 3 else [97.0, float(trial.point.cost.params)])
        assert len(keys) == len(set(keys))
        assert set(keys) <= within
        assert len(keys) >= 0.97 * len(within)  # the last ones are sought at random

    def test_a_lost_trial_is_tried_again_and_counted_once(self, pricer: Pricer) -> None:
        storage = optuna.storages.InMemoryStorage()
        settings = StudySettings(name="any", sampler="random")
        study = Study(settings, load_space("width"), pricer, [], storage, rungs=())
        first = study.ask({})
        assert first is not None
        assert first.fixed  # the paper's point
        study.fail(first.number, "its worker was lost", lost=True)
        again = study.ask({})
        assert again is not None
        assert (again.point.key, again.fixed) == (first.point.key, True)
        other = study.ask({})  # the process ends here
        assert other is not None
        later = Study(settings, load_space("width"), pricer, [], storage, rungs=())
        assert not later.study.get_trials(states=[optuna.trial.TrialState.RUNNING])
        found = [trial.point.key for trial in (later.ask({}), later.ask({})) if trial is not None]
        assert set(found) == {first.point.key, other.point.key}
        assert counts(later.study) == {
            "trained": 0,
            "complete": 0,
            "pruned": 0,
            "screened": 0,
            "infeasible": 0,
            "duplicate": 0,
            "failed": 0,
            "lost": 3,
        }

    def test_a_resumed_sampler_does_not_repeat_itself(self, pricer: Pricer) -> None:
        storage = optuna.storages.InMemoryStorage()
        settings = StudySettings(name="any", sampler="random", seed=3)
        values = []
        for _ in range(2):
            study = Study(settings, load_space("training"), pricer, [], storage, rungs=())
            trial = study.ask({})
            assert trial is not None
            values.append(trial.point.settings["train.lr"])
            study.tell(trial.number, [50.0, 1.0])
        assert values[0] != values[1]

    @pytest.mark.parametrize("sampler", ["auto", "tpe", "nsga2", "random", "grid"])
    def test_samplers(self, sampler: str, pricer: Pricer) -> None:
        settings = StudySettings(name="any", trials=12, sampler=sampler)
        study = Study(settings, load_space("sharing_width"), pricer, [], optuna.storages.InMemoryStorage(), rungs=())
        for number in range(12):
            trial = study.ask({})
            assert trial is not None
            study.tell(trial.number, [50.0 + number, float(trial.point.cost.params)])
        assert counts(study.study)["complete"] == 12


class TestGoals:
    def test_objectives(self) -> None:
        check_objectives(["top1", "params", "latency"])
        with pytest.raises(ReductionError, match="did you mean 'params'"):
            check_objectives(["top1", "param"])
        for names in (["params"], ["top1", "top1"]):
            with pytest.raises(ReductionError, match="each once, and top1 among them"):
                check_objectives(names)

    @given(st.lists(st.tuples(*[st.integers(0, 5)] * 3), max_size=7), st.integers(1, 3))
    def test_hypervolume_counts_unit_cubes(self, points: list[tuple[int, ...]], objectives: int) -> None:
        points = [point[:objectives] for point in points]
        cubes = itertools.product(range(6), repeat=objectives)
        covered = sum(any(all(a <= b for a, b in zip(point, cube, strict=True)) for point in points) for cube in cubes)
        assert hypervolume(points, (6,) * objectives) == covered

    @given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=8))
    def test_the_front_dominates_all_others(self, points: list[tuple[int, int]]) -> None:
        named = dict(enumerate(points))
        found = front(named)
        assert found
        for name, point in named.items():
            assert (name in found) == (not any(dominates(other, point) for other in points))


class TestEarlyStopping:
    def test_a_small_model_is_not_ended_for_being_less_accurate_than_a_large_one(self) -> None:
        halving = Halving([2], reduction=3)
        for number in range(9):  # smaller and worse each
            halving.add(str(number), 2, (-90.0 + number, 100 - number))
        assert not any(halving.stops(str(number), 2) for number in range(9))
        halving.add("bad", 2, (-60.0, 100))
        assert halving.stops("bad", 2)

    def test_only_at_rungs_and_among_enough(self) -> None:
        halving = Halving([2], reduction=3)
        halving.add("a", 2, (-90.0, 1))
        halving.add("b", 2, (-10.0, 1))
        assert not halving.stops("b", 2)
        halving.add("c", 2, (-80.0, 1))
        assert halving.stops("b", 2)
        assert not halving.stops("b", 3)
        halving.add("d", 3, (-1.0, 1))
        assert not halving.stops("d", 3)


class TestRacing:
    def test_seeds_go_to_the_front_and_to_what_is_unsure(self) -> None:
        top1 = {"best": {1: 90.0}, "near": {1: 89.5}, "far": {1: 80.0}, "small": {1: 70.0}}
        costs = {"best": (10,), "near": (10,), "far": (10,), "small": (5,)}
        assert next_runs(top1, costs, (1, 2), deviation=0.0) == [("best", 2), ("small", 2)]
        assert next_runs(top1, costs, (1, 2), deviation=1.0) == [("best", 2), ("near", 2), ("small", 2)]
        done = {key: {**values, 2: values[1]} for key, values in top1.items()}
        assert next_runs(done, costs, (1, 2), deviation=1.0) == []

    def test_those_with_the_fewest_seeds_come_first(self) -> None:
        top1 = {"a": {1: 90.0, 2: 90.0}, "b": {1: 90.0}}
        assert next_runs(top1, {"a": (1,), "b": (1,)}, (1, 2, 3), deviation=0.0) == [("b", 2)]

    def test_a_run_that_failed_gives_way_to_the_next_seed(self) -> None:
        top1, costs = {"a": {1: 90.0}}, {"a": (1,)}
        assert next_runs(top1, costs, (1, 2, 3), deviation=0.0, failed={("a", 2)}) == [("a", 3)]
        assert next_runs(top1, costs, (1, 2), deviation=0.0, failed={("a", 2)}) == []


class TestOwner:
    """Nothing is trained here: what becomes of the workers is told to the owner."""

    @pytest.fixture
    def owner(self, tmp_path: Path) -> Iterator[Owner]:
        space = tmp_path / "space.py"
        space.write_text(
            "def suggest(trial):\n    return [('shallow', {'ratio': trial.suggest_float('r', 0.3, 0.3)})]\n"
        )
        recipe = recipes.load("digits_tiny", DEPTH6)
        settings = StudySettings(name="any", trials=9, references=(), seeds=(1,))
        document, storage = recipe.model_dump(mode="json"), f"sqlite:///{tmp_path}/optuna.db"
        found = training_owner(settings.model_dump(mode="json"), document, str(space), storage, str(tmp_path), False)
        yield found
        found.close()

    def test_the_last_point_is_tried_again_when_its_worker_is_lost(self, owner: Owner) -> None:
        first = owner.next_job()
        assert first is not None
        assert owner.next_job() is None  # there is no other
        owner.lost(first.id, "the worker died")
        again = owner.next_job()
        assert again is not None
        assert again.key == first.key
        for _ in range(2):  # a third loss is one too many
            owner.lost(again.id, "the worker died")
            again = owner.next_job() or again
        assert owner.next_job() is None
        assert owner.counts()["failed"] == 1
        assert owner.counts()["lost"] == 2

    def test_a_study_of_this_name_is_gone_on_with_only_if_asked(self, owner: Owner, tmp_path: Path) -> None:
        owner.close()
        recipe, space = recipes.load("digits_tiny", DEPTH6).model_dump(mode="json"), "width"
        known = {"trials": 9, "references": (), "seeds": (1,)}
        url = f"sqlite:///{tmp_path}/optuna.db"
        with pytest.raises(ReductionError, match="has a study of this name; go on with resume"):
            training_owner({"name": "any", **known}, recipe, space, url, str(tmp_path / "other"), False)
        foreign = optuna.create_study(study_name="foreign", storage=url)
        foreign.add_trial(optuna.trial.create_trial(value=1.0))
        with pytest.raises(ReductionError, match="not made by mlpreduce search"):
            training_owner({"name": "foreign", **known}, recipe, space, url, str(tmp_path / "other"), True)
        assert len(foreign.trials) == 1
        assert not foreign.user_attrs


def test_lost_workers_end_a_study_that_only_loses(tmp_path: Path) -> None:
    recipe = recipes.load("digits_tiny", DEPTH6).model_dump(mode="json")
    settings = StudySettings(name="any", trials=9, references=(), seeds=(1,)).model_dump(mode="json")
    owner = training_owner(settings, recipe, "width", f"sqlite:///{tmp_path}/optuna.db", str(tmp_path), False)

    def lose() -> None:
        job = owner.next_job()
        assert job is not None
        owner.lost(job.id, "no memory")

    for _ in range(4):
        lose()
    with pytest.raises(ReductionError, match="5 trials failed one after the other; the last: no memory"):
        lose()
    owner.close()


def test_near_choices_are_on_the_scale_of_their_distribution() -> None:
    generator = random.Random(0)
    wide = optuna.distributions.FloatDistribution(1e-6, 1.0, log=True)
    small = sum(any_of(wide, generator) < 1e-3 for _ in range(400))
    assert 150 < small < 250  # half of the decades
    for distribution in (
        wide,
        optuna.distributions.FloatDistribution(0.1, 0.9, step=0.2),
        optuna.distributions.FloatDistribution(0.0, 1.0),
        optuna.distributions.IntDistribution(1, 10**12),  # never listed
        optuna.distributions.IntDistribution(2, 1024, log=True),
        optuna.distributions.CategoricalDistribution(["a", "b"]),
    ):
        for _ in range(50):
            value = any_of(distribution, generator)
            assert distribution._contains(distribution.to_internal_repr(value))
            assert isinstance(value, int) == isinstance(distribution, optuna.distributions.IntDistribution)


def test_weights_are_inherited_from_a_point_of_equal_depth_only(pricer: Pricer) -> None:
    deep = pricer.price(Suggestion((), {}))
    shallower = pricer.price(Suggestion((), {"model.kwargs.depth": 4}))
    half = pricer.price(Suggestion(({"transform": "shallow", "ratio": 0.5},), {}))
    assert nearest(deep, [shallower]) is None
    assert nearest(deep, []) is None
    assert nearest(deep, [shallower, half]) == half


def test_a_password_is_not_shown() -> None:
    assert hidden("postgresql+psycopg://me:s3:cr/et@host:5432/db") == "postgresql+psycopg://me:***@host:5432/db"
    for url in ("postgresql://me@host:5432/db", "sqlite:////tmp/a@b:c@d.db", "--budget", "params<=0.7"):
        assert hidden(url) == url


def test_a_study_goes_on_with_other_seeds_but_the_first() -> None:
    before = StudySettings(name="any", seeds=(1, 2))
    assert not changes(before, before.model_copy(update={"seeds": (1, 3, 2)}))
    assert list(changes(before, before.model_copy(update={"seeds": (2, 1)}))) == ["seeds: the first was 1, is 2"]


def test_what_another_transform_calls_a_criterion_is_left_to_it() -> None:
    assert without_weights({"transform": "shallow", "criterion": "mine"}) == {
        "transform": "shallow",
        "criterion": "mine",
    }
    assert without_weights({"transform": "shallow", "criterion": "l2"}) == {
        "transform": "shallow",
        "criterion": "first",
    }
    nvit = {"transform": "shallow", "criterion": "nvit"}  # of data, which without_data replaces
    assert without_weights(nvit) == nvit
