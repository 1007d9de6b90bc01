"""Supernets: sub-models with the weights of one model, their training, their estimates, and what those are worth."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from helpers.marks import slow_but
from torch import nn

import mlpreduce
from mlpreduce import recipe as recipes
from mlpreduce.budget import Cost
from mlpreduce.data import load
from mlpreduce.edits import Plan, Slice
from mlpreduce.errors import ReductionError
from mlpreduce.search.spaces.choices import Walker
from mlpreduce.search.spaces.goals import read_budgets
from mlpreduce.search.spaces.points import Point, Pricer
from mlpreduce.search.spaces.space import Suggestion, load_space
from mlpreduce.search.spaces.subjects import RecipeModel
from mlpreduce.search.supernet.candidates import Candidate, agreement, front_of, sample, supernet_of
from mlpreduce.testing import tiny_vit
from mlpreduce.train import Run, Runtime, evaluate, fit
from mlpreduce.train.blocks import Remembering
from mlpreduce.train.events import EpochEnded, Event
from mlpreduce.train.settings import Step, SupernetSettings
from mlpreduce.train.setup import Setup, prepare
from mlpreduce.train.state import checkpoints
from mlpreduce.train.submodels import Entangled, Planner, check_views
from mlpreduce.train.supernet import check_points, estimate

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = [f"blocks.{number}.mlp" for number in range(4)]
WIDTHS = {"transform": "shallow", "widths": {NAMES[0]: 16, NAMES[1]: 128, NAMES[2]: 1, NAMES[3]: 100}}
LAST = {"transform": "shallow", "ratio": 0.25, "criterion": "last"}
ANY = {"transform": "shallow", "ratio": 0.5, "criterion": "random", "seed": 3}
PAIRS = {"transform": "grouped", "pattern": [[0, 1, 2], [3]], "scale": "none"}
CROSSED = {"transform": "grouped", "pattern": "cycle_reverse", "group": 2, "keep": "last", "scale": "none"}
OWNERS = {"transform": "shallow", "widths": {NAMES[0]: 20, NAMES[3]: 128}}  # of what PAIRS leaves
POINTS: dict[str, tuple[Step, ...]] = {
    "whole": (),
    "widths": (WIDTHS,),
    "last": (LAST,),
    "any": (ANY,),
    "pairs": (PAIRS,),
    "crossed": (CROSSED,),
    "attention": ({"transform": "grouped", "share": "attention", "pattern": "cycle"},),
    "blocks": ({"transform": "grouped", "share": "block", "scale": "none", "keep": "last"}, LAST),
    "narrow, then shared": (LAST, CROSSED),
    "shared, then narrow": (PAIRS, OWNERS),
    "twice narrow, then shared": (ANY, {"transform": "shallow", "ratio": 0.5, "criterion": "last"}, PAIRS),
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


def reduced(model: nn.Module, steps: Sequence[Step]) -> nn.Module:
    """The model that is built for these steps, with the values of the full one."""
    for step in steps:
        config = {key: value for key, value in step.items() if key != "transform"}
        model = mlpreduce.apply(model, step["transform"], **config)
    return model


def small_run(directory: Path, points: Sequence[Sequence[Step]] = (), **settings: Any) -> Run:
    """A supernet of a ViT of two blocks on the digits; without points a plain run."""
    keys = ["model.kwargs.depth=2", "model.kwargs.embed_dim=16", "train.epochs=2", "launch.workers=0", "seeds=[1]"]
    keys += ["variants={any=[]}", "model.kwargs.drop_path_rate=0.1"]
    recipe = recipes.load("digits_tiny", [*keys, *(f"{key}={value}" for key, value in settings.items())])
    (run,) = recipes.runs(recipe, directory)
    smallest = ({"transform": "shallow", "ratio": 0.125}, {"transform": "grouped", "group": 2})
    given = SupernetSettings(points=tuple(map(tuple, points)), smallest=smallest) if points else None
    return run.model_copy(update={"directory": str(directory), "supernet": given})


SMALL: list[tuple[Step, ...]] = [
    ({"transform": "shallow", "widths": {NAMES[0]: 24}},),
    ({"transform": "shallow", "widths": {NAMES[0]: 40, NAMES[1]: 8}},),
    ({"transform": "grouped", "group": 2},),
    ({"transform": "shallow", "widths": {NAMES[0]: 40, NAMES[1]: 16}},),
    (),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = small_run(tmp_path_factory.mktemp("supernet"), SMALL)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    fit(run)
    torch.set_num_threads(threads)
    return run


class TestSubModels:
    @pytest.mark.parametrize("name", POINTS)
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
    def test_output_is_that_of_the_reduced_model(
        self, name: str, dtype: torch.dtype, tolerance: float, images: torch.Tensor
    ) -> None:
        model, images = tiny_vit().eval().to(dtype), images.to(dtype)
        view = Planner(model, "test").view(POINTS[name])
        with torch.no_grad():
            before, found = model(images), Entangled.of(model).run(view, images)
            assert torch.equal(model(images), before)  # the full model is as it was
            expected = reduced(model, POINTS[name])(images)
        assert (found - expected).abs().max() <= tolerance
        assert (name == "whole") == torch.equal(found, before)

    def test_a_packed_gate_is_sliced_in_both_halves(self, images: torch.Tensor) -> None:
        model = _gated()
        steps = ({"transform": "shallow", "ratio": 0.3},)
        view = Planner(model, "test").view(steps)
        assert any(not isinstance(kept, range) for part in view.values() for _, kept in part.cuts)
        with torch.no_grad():
            found = Entangled.of(model).run(view, images)
            assert (found - reduced(model, steps)(images)).abs().max() <= 1e-6

    def test_gradients_reach_the_kept_units_only(self, images: torch.Tensor) -> None:
        model = tiny_vit()
        view = Planner(model, "test").view((WIDTHS,))
        Entangled.of(model).run(view, images).square().sum().backward()
        for name, width in WIDTHS["widths"].items():  # type: ignore[attr-defined]
            mlp = model.get_submodule(name)
            for grad in (mlp.fc1.weight.grad, mlp.fc1.bias.grad[:, None], mlp.fc2.weight.grad.T):  # type: ignore[union-attr]
                reached = grad.abs().sum(1) > 0
                assert reached.tolist() == [unit < width for unit in range(128)], name

    def test_tied_weights_get_the_sum_of_their_uses(self, images: torch.Tensor) -> None:
        model = tiny_vit().double()
        Entangled.of(model).run(Planner(model, "test").view((PAIRS,)), images.double()).square().sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        alone = tiny_vit().double()  # the shared weights, once in each block
        for number in (1, 2):
            alone.blocks[number].mlp.load_state_dict(alone.blocks[0].mlp.state_dict())
        alone(images.double()).square().sum().backward()
        for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
            uses = sum(alone.get_parameter(f"blocks.{number}.mlp.{name}").grad for number in range(3))
            assert torch.allclose(grads[f"blocks.0.mlp.{name}"], uses, rtol=0, atol=1e-12)
            assert grads[f"blocks.1.mlp.{name}"] is None
            assert grads[f"blocks.3.mlp.{name}"] is not None

    def test_a_model_that_is_tied_already(self, images: torch.Tensor) -> None:
        model = reduced(tiny_vit().eval(), (PAIRS,))
        steps = (OWNERS,)
        parameters = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
        with torch.no_grad():
            found = Entangled.of(model).run(Planner(model, "test").view(steps), images)
            assert {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)} == parameters
            assert (found - reduced(model, steps)(images)).abs().max() <= 1e-6

    def test_values_are_learnt_so_edits_of_values_do_nothing(self, vit: nn.Module) -> None:
        planner = Planner(vit, "test")
        plain = planner.view(({"transform": "grouped", "group": 2, "scale": "none"},))
        assert planner.view(({"transform": "grouped", "group": 2, "scale": "paper"},)) == plain

    def test_what_cannot_be_a_sub_model_is_refused(self, vit: nn.Module) -> None:
        planner = Planner(vit, "search")
        refused = {
            "any weights": ({"transform": "shallow", "criterion": "l2"},),
            "slice it with shallow": ({"transform": "thin", "mlp_ratio": 2.0},),
            "do not split": ({"transform": "grouped", "group": 3},),
            "values of": ({"transform": "grouped", "group": 2, "keep": "mean"},),
        }
        for words, steps in refused.items():
            with pytest.raises(ReductionError, match=rf"^search: .*{words}"):
                planner.view(steps)

    def test_running_statistics_are_refused(self) -> None:
        model = tiny_vit()
        model.blocks[2].norm1 = nn.BatchNorm1d(17)
        with pytest.raises(ReductionError, match=r"blocks\.2\.norm1 is a BatchNorm1d"):
            Planner(model, "search")

    def test_a_width_that_a_layer_stores_is_refused(self) -> None:
        model = tiny_vit(mlp_layer=_NormedMlp)
        planner = Planner(model, "search")
        with pytest.raises(ReductionError, match=r"does not run .*stored width \(blocks\.0\.mlp\.norm, a LayerNorm\)"):
            check_views(model, planner, [({"transform": "shallow", "ratio": 0.5},)], "search")
        check_views(model, planner, [({"transform": "grouped", "group": 2},)], "search")  # nothing is sliced

    def test_a_width_that_changes_what_is_computed_is_refused(self) -> None:
        model = tiny_vit(mlp_layer=_ScaledMlp)
        nn.init.zeros_(model.head.weight)  # as some begin: it gives the same whatever is before it
        with pytest.raises(ReductionError, match=r"computes something else .* have in common"):
            check_views(model, Planner(model, "search"), [(), ({"transform": "shallow", "ratio": 0.5},)], "search")

    def test_a_stored_setting_is_refused(self, vit: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        from mlpreduce.edits import Setting
        from mlpreduce.train import submodels

        original = submodels.make_plan

        def with_setting(*args: Any, **kwargs: Any) -> Any:
            made, found = original(*args, **kwargs)
            edits = [
                Slice(e.mlp, e.hidden, e.units, e.axes, (Setting("blocks.0", "sizes", 0),)) for e in made.of(Slice)
            ]
            return Plan(made.transform, made.config, tuple(edits)), found

        monkeypatch.setattr(submodels, "make_plan", with_setting)
        with pytest.raises(ReductionError, match=r"blocks\.0 reads the hidden width from its sizes"):
            Planner(vit, "search").view((LAST,))

    def test_planning_and_checking_take_no_random_numbers(self, vit: nn.Module, unchanged: Any) -> None:
        check, before = unchanged(vit), torch.get_rng_state()
        check_views(vit, Planner(vit, "test"), list(POINTS.values()), "test")
        assert torch.equal(torch.get_rng_state(), before)
        check()


class _NormedMlp(nn.Module):
    """An MLP with a norm on its hidden axis."""

    def __init__(self, in_features: int, hidden_features: int, **_: Any) -> None:
        super().__init__()
        self.fc1, self.norm = nn.Linear(in_features, hidden_features), nn.LayerNorm(hidden_features)
        self.act, self.fc2 = nn.GELU(), nn.Linear(hidden_features, in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.norm(self.act(self.fc1(x))))


class _ScaledMlp(_NormedMlp):
    """An MLP whose output depends on the width that a layer says it has."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.norm = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x))) * (64 / self.fc1.out_features)


def _gated() -> nn.Module:
    from timm.layers import GluMlp

    return tiny_vit(mlp_layer=GluMlp).eval()


class TestTraining:
    def test_loss_is_the_mean_over_largest_smallest_and_random_ones(self, tmp_path: Path) -> None:
        run = small_run(tmp_path, SMALL[:2], **{"model.kwargs.drop_path_rate": 0.0, "train.mixup": 0.0})
        parts = prepare(run, Runtime(), None)
        parts.model.train()
        nn.init.normal_(parts.core.get_parameter("head.weight"))  # it begins as zeros, and all losses are the same
        images, targets = next(iter(parts.loaders.train))
        torch.manual_seed(5)
        drawn = torch.randint(2, (2,)).tolist()
        torch.manual_seed(5)
        loss = parts.training_loss(images, targets)
        assert run.supernet is not None
        every = [(), run.supernet.smallest, *(run.supernet.points[number] for number in drawn)]
        alone = [parts.loss(self.without_scale(parts, steps)(images), targets) for steps in every]
        assert len({round(value.item(), 5) for value in alone[:3]}) == 3
        assert loss.item() == pytest.approx(sum(value.item() for value in alone) / 4, abs=1e-6)

    def without_scale(self, parts: Setup, steps: Sequence[Step]) -> nn.Module:
        """The really reduced model, with the weights of the supernet."""
        model = mlpreduce.create_model(parts.run.model.name, **parts.run.model.kwargs)
        model.load_state_dict(parts.core.state_dict())
        return reduced(model, [s if s["transform"] != "grouped" else {**s, "scale": "none"} for s in steps])

    def test_all_points_are_drawn(self, tmp_path: Path) -> None:
        parts = prepare(small_run(tmp_path, SMALL), Runtime(), None)
        assert parts.supernet is not None
        assert (len(parts.supernet.pool), parts.supernet.per_update) == (5, 2)
        images = torch.zeros(1, 1, 8, 8)
        parts.core.eval()
        nn.init.normal_(parts.core.get_parameter("head.weight"))
        outputs = {tuple(logits.flatten().tolist()) for _ in range(12) for logits in parts.supernet.logits(images)}
        assert len(outputs) == 6  # the whole model is one of the points

    @pytest.mark.slow
    def test_a_resumed_supernet_is_exact(self, tmp_path: Path, trained: Run) -> None:
        class Interrupted(Exception):
            pass

        def report(event: Event) -> None:
            if isinstance(event.what, EpochEnded):
                raise Interrupted

        parted = trained.model_copy(update={"directory": str(tmp_path)})
        with pytest.raises(Interrupted):
            fit(parted, Runtime(report=report))
        torch.rand(7)
        fit(parted)
        for name in ("state.pt", "rng0.pt"):
            one, other = (torch.load(self.last(run) / name, weights_only=True) for run in (trained, parted))
            one, other = (flat(state) for state in (one, other))
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one)

    def last(self, run: Run) -> Path:
        return next(iter(checkpoints(run.directory).values()))

    def test_settings_that_do_not_go_with_a_supernet(self, tmp_path: Path) -> None:
        good = small_run(tmp_path, SMALL)
        train, data = good.train, good.data
        changes: dict[str, dict[str, Any]] = {
            "the run has steps": {"steps": ({"transform": "shallow"},)},
            "trial_workers=1": {"workers": 2},
            "compile=true": {"train": train.model_copy(update={"compile": True})},
            "grad_checkpointing=true": {"train": train.model_copy(update={"grad_checkpointing": True})},
            "any weights": {
                "supernet": SupernetSettings(points=(({"transform": "shallow", "criterion": "l2"},),), smallest=())
            },
        }
        for words, change in changes.items():
            run = good.model_copy(update={"data": data, **change})
            with pytest.raises(ReductionError, match=words):
                prepare(run, Runtime(), None)
            with pytest.raises(ReductionError, match=words):
                check_points(run)
        with pytest.raises(ReductionError, match="2 workers"):
            prepare(good, Runtime(world=2), None)
        check_points(good)

    def test_the_hash_of_other_runs_stays(self, tmp_path: Path) -> None:
        plain, one = small_run(tmp_path), small_run(tmp_path, SMALL)
        document = plain.model_dump(mode="json")
        assert document["supernet"] is None
        del document["supernet"]
        assert Run.model_validate(document).config_hash == plain.config_hash
        assert Run.model_validate(one.model_dump(mode="json")) == one
        assert len({plain.config_hash, one.config_hash, small_run(tmp_path, SMALL[:1]).config_hash}) == 3


def flat(state: Any, path: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a state, and its numbers but for times, by path."""
    if isinstance(state, torch.Tensor):
        return {path: state}
    if isinstance(state, dict):
        entries: Any = [
            (key, value) for key, value in state.items() if key not in ("train_seconds", "images_per_s", "facts")
        ]
    elif isinstance(state, (list, tuple)):
        entries = enumerate(state)
    else:
        return {path: torch.tensor(state)} if isinstance(state, (int, float)) else {}
    return {name: value for key, entry in entries for name, value in flat(entry, f"{path}.{key}").items()}


class TestEstimate:
    def test_it_is_the_evaluation_of_the_reduced_model(self, trained: Run) -> None:
        told: list[tuple[int, int]] = []
        points = [*SMALL, (SMALL[1][0], {"transform": "shallow", "ratio": 0.5})]
        found = estimate(trained, points, report=lambda done, total: told.append((done, total)))
        loaders = load(trained.data, trained.train, micro_batch=32)
        for steps, result in zip(points, found, strict=True):
            plain = [step if step["transform"] != "grouped" else {**step, "scale": "none"} for step in steps]
            model = reduced(mlpreduce.load(Path(trained.directory) / "model"), plain)
            expected = evaluate(model, loaders.val, Runtime())
            assert result["loss"] == pytest.approx(expected["loss"], abs=1e-6)
            assert result["top1"] == pytest.approx(expected["top1"], abs=1e-9)
        assert len({round(result["loss"], 6) for result in found}) == len(points)
        assert told[-1] == (18, 18)  # 6 points, 360 images by 128

    def test_the_first_images_only(self, trained: Run) -> None:
        (found,) = estimate(trained, [()], images=50)
        images, labels = next(iter(load(trained.data, trained.train, micro_batch=32).val))
        expected = evaluate(mlpreduce.load(Path(trained.directory) / "model"), [(images[:50], labels[:50])], Runtime())
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-6)
        assert found["top1"] == pytest.approx(expected["top1"])
        with pytest.raises(ReductionError, match="images=0"):
            estimate(trained, [()], images=0)

    def test_what_there_is_nothing_to_estimate_with(self, trained: Run, tmp_path: Path) -> None:
        with pytest.raises(ReductionError, match="no supernet is trained"):
            estimate(trained.model_copy(update={"directory": str(tmp_path)}), [()])
        mlpreduce.save(reduced(mlpreduce.load(Path(trained.directory) / "model"), SMALL[0]), tmp_path / "model")
        with pytest.raises(ReductionError, match="reduced by shallow"):
            estimate(trained.model_copy(update={"directory": str(tmp_path)}), [()])
        with pytest.raises(ReductionError, match="any weights"):
            estimate(trained, [({"transform": "shallow", "criterion": "l2"},)])

    def test_blocks_are_computed_once_where_models_begin_alike(self, images: torch.Tensor) -> None:
        model = tiny_vit().eval()
        planner = Planner(model, "test")
        options = itertools.product((32, 128), repeat=4)
        points = [({"transform": "shallow", "widths": dict(zip(NAMES, widths, strict=True))},) for widths in options]
        views = [planner.view(steps) for steps in points[:-1]]  # the last is the whole model
        with torch.no_grad():
            expected = [Entangled.of(model).run(view, images) for view in views]
            calls = {name: 0 for name in NAMES}
            for name in NAMES:
                model.get_submodule(name).register_forward_hook(
                    lambda *_, name=name: calls.update({name: calls[name] + 1})
                )
            blocks, whole = Remembering(model, planner.mlps, views), Entangled.of(model)
            for batch in (images, images + 1):  # other images are not taken for the same
                for number in blocks.order:
                    blocks.choose(number)
                    if batch is images:
                        assert torch.equal(whole.run(views[number], batch), expected[number])
                    else:
                        assert not torch.allclose(whole.run(views[number], batch), expected[number], atol=1e-3)
        assert list(calls.values()) == [2 * 2, 2 * 4, 2 * 8, 2 * 15]

    def test_an_output_that_was_changed_is_computed_again(self, images: torch.Tensor) -> None:
        model = tiny_vit().eval()
        planner = Planner(model, "test")
        view = planner.view((LAST,))
        with torch.no_grad():
            expected = Entangled.of(model).run(view, images)
            blocks = Remembering(model, planner.mlps, [view])
            blocks.choose(0)
            model.blocks[3].register_forward_hook(lambda module, given, output: output.mul_(2))
            outputs = [Entangled.of(model).run(view, images) for _ in range(3)]
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[0], outputs[2])
        assert expected.shape == outputs[0].shape


DEPTH6 = ("model.kwargs.depth=6", "model.kwargs.embed_dim=16")


@pytest.fixture(scope="module")
def pricer() -> Pricer:
    return Pricer(RecipeModel(recipes.load("digits_tiny", DEPTH6)))


def candidate(**cost: int) -> Candidate:
    whole = dict.fromkeys(("params", "mlp_params", "unique_mlps", "macs_linear", "macs", "macs_with_attention"), 0)
    return Candidate({}, Point((), {}, Cost(**{**whole, **cost}), {}, ""))


class TestSample:
    @pytest.mark.parametrize("budget", [(), ("params<=0.7",)])
    @pytest.mark.parametrize(
        "name", slow_but(["width_per_block", "sharing_partition", "sharing_width"], "width_per_block")
    )
    def test_points_are_distinct_and_within_budgets(self, name: str, budget: tuple[str, ...], pricer: Pricer) -> None:
        walker = Walker(load_space(name), pricer)
        budgets = read_budgets(budget, pricer.price(Suggestion((), {})).cost)
        found = sample(walker, pricer, budgets, 60, seed=1)
        space = 32 if name == "sharing_partition" else 60
        assert len(found) == space if not budget else 4 < len(found) <= space
        assert len({one.point.key for one in found}) == len(found)
        for one in found:
            assert pricer.price(walker.ask(one.choices)[0]) == one.point  # the choices are those of the point
            assert all(limit.excess(one.point.cost) <= 0 for limit in budgets)
        assert [one.choices for one in sample(walker, pricer, budgets, 60, seed=1)] == [one.choices for one in found]

    def test_costs_lie_over_the_whole_range(self, pricer: Pricer) -> None:
        walker = Walker(load_space("width_per_block"), pricer)
        found = sample(walker, pricer, (), 200)
        kept = np.array([sum(one.point.pattern["widths"]) for one in found])
        assert (kept.min(), kept.max()) == (6 * 8, 6 * 64)
        counts, _ = np.histogram((kept - kept.min()) / np.ptp(kept), bins=8, range=(0, 1))
        assert counts.min() >= 8  # uniform draws alone leave the outer eighths empty

    def test_choices_within_all_kinds_of_ranges(self) -> None:
        import random

        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        from mlpreduce.search.supernet.candidates import _near_level

        generator = random.Random(0)
        ranges = {
            IntDistribution(2, 10, step=2): (2, 10),
            IntDistribution(1, 1000, log=True): (1, 1000),
            IntDistribution(0, 1000): (0, 1000),
            FloatDistribution(0.125, 1.0, step=0.125): (0.125, 1.0),
            FloatDistribution(1e-4, 1e-2, log=True): (1e-4, 1e-2),
            FloatDistribution(0.0, 2.0): (0.0, 2.0),
            CategoricalDistribution(["a", "b", "c"]): ("a", "c"),
        }
        for given, ends in ranges.items():
            assert (_near_level(given, 0.0, generator), _near_level(given, 1.0, generator)) == ends
            drawn = [_near_level(given, generator.random(), generator) for _ in range(200)]
            assert all(given._contains(given.to_internal_repr(value)) for value in drawn)
            assert len(set(drawn)) > 2
        low = [_near_level(IntDistribution(1, 8), 0.1, generator) for _ in range(300)]
        assert sum(low) / 300 == pytest.approx(1.7, abs=0.2)  # 1 + 7 x 0.1

    def test_settings_of_training_are_refused(self, pricer: Pricer) -> None:
        walker = Walker(load_space("training"), pricer)
        with pytest.raises(ReductionError, match=r"also sets train\.lr"):
            sample(walker, pricer, (), 5)

    def test_what_a_supernet_is_trained_with(self, pricer: Pricer) -> None:
        walker = Walker(load_space("width_per_block"), pricer)
        found = sample(walker, pricer, (), 10)
        settings = supernet_of(walker, found, per_update=3)
        assert settings.points == tuple(one.point.steps for one in found)
        assert pricer.price(Suggestion(settings.smallest, {})).pattern["widths"] == [8] * 6
        assert settings.per_update == 3
        with pytest.raises(ReductionError, match="nothing to train"):
            supernet_of(walker, [])


class TestFront:
    def test_fronts_follow_each_other_from_the_best(self) -> None:
        points = [candidate(params=p) for p in (30, 10, 20, 31, 11, 40)]
        estimates = [{"loss": loss, "top1": 0.0} for loss in (1.0, 3.0, 2.0, 1.5, 3.5, 1.2)]
        assert front_of(points, estimates, ("top1", "params", "latency"), 3) == [0, 2, 1]
        assert front_of(points, estimates, ("top1", "params"), 6) == [0, 2, 1, 5, 3, 4]
        assert front_of(points, estimates, ("top1", "params"), 60) == [0, 2, 1, 5, 3, 4]
        assert front_of(points, estimates, ("top1", "params"), 2) == [0, 1]  # both ends
        assert front_of(points, estimates, ("top1", "params"), 1) == [0]
        assert front_of(points, estimates, ("top1",), 3) == [0, 5, 3]
        assert front_of([], [], ("top1", "params"), 3) == []

    def test_a_loss_that_is_not_finite_is_the_worst(self) -> None:
        points = [candidate(params=p) for p in (1, 2, 3)]
        estimates = [{"loss": loss} for loss in (math.nan, 1.0, math.inf)]
        assert front_of(points, estimates, ("top1", "params"), 3) == [1, 0, 2]


class TestAgreement:
    def test_values_by_hand(self) -> None:
        # orders of the loss, best first, and of the top-1: 1 2 3 4 5 and 1 3 2 5 4: two of ten pairs are reversed
        found = agreement([0.1, 0.2, 0.3, 0.4, 0.5], [90, 80, 85, 60, 70], [5, 4, 3, 2, 1])
        assert found.kendall == pytest.approx((8 - 2) / 10)
        assert found.spearman == pytest.approx(1 - 6 * 4 / (5 * 24))  # 1 - 6 sum d^2 / (n (n^2 - 1))
        assert (found.size_kendall, found.size_spearman) == (found.kendall, found.spearman)
        # 120 orders; 8 of them have a rho of 0.8 or more (sums of d^2 up to 4: 1 + 4 + 3), twice for both directions
        assert found.p_value == pytest.approx(2 * 8 / 120)
        assert found.low is not None
        assert found.high is not None
        assert -1 <= found.low < found.spearman <= found.high <= 1
        assert "5 points are too few to conclude" in found.reason

    def test_ties_are_those_of_tau_b(self) -> None:
        found = agreement([1, 2, 2, 3], [9, 8, 7, 7], [1, 1, 1, 1])
        # 6 pairs: one tied in the loss, one in the top-1, the other four agree
        assert found.kendall == pytest.approx(4 / math.sqrt(5 * 5))
        ranks = np.corrcoef([4, 2.5, 2.5, 1], [4, 3, 1.5, 1.5])[0, 1]
        assert found.spearman == pytest.approx(ranks)
        assert found.size_spearman is None
        assert "same size" in found.reason

    def test_the_interval_tells_much_from_little(self) -> None:
        generator = np.random.default_rng(0)
        top1 = generator.normal(size=30)
        good = agreement(
            (-top1 + 0.2 * generator.normal(size=30)).tolist(), top1.tolist(), generator.normal(size=30).tolist()
        )
        none = agreement(generator.normal(size=30).tolist(), top1.tolist(), generator.normal(size=30).tolist())
        assert good.low is not None
        assert good.low > 0.6
        assert good.p_value is not None
        assert good.p_value < 0.001
        assert none.low is not None
        assert none.high is not None
        assert none.low < 0 < none.high
        assert none.p_value is not None
        assert none.p_value > 0.05
        assert good.reason == none.reason == ""

    @pytest.mark.parametrize(
        ("estimated", "trained", "size", "reason"),
        [
            ([], [], [], "0 points"),
            ([1.0, 2.0], [3.0, 4.0], [1, 2], "2 points"),
            ([1.0, math.nan, 2.0], [1.0, 2.0, 3.0], [1, 2, 3], "1 of 3 points have no finite value"),
            ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], [1, 2, 3], "all estimates are the same"),
            ([1.0, 2.0, 3.0], [5.0, 5.0, 5.0], [1, 2, 3], "the same top-1"),
        ],
    )
    def test_what_no_correlation_can_tell(self, estimated: Any, trained: Any, size: Any, reason: str) -> None:
        found = agreement(estimated, trained, size)
        assert reason in found.reason
        assert (found.kendall, found.spearman, found.low, found.p_value) == (None, None, None, None)
