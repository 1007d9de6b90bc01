"""Names of timm for reduced models and for baselines that timm lacks."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers.fresh import python
from helpers.marks import slow_but
from helpers.runs import digits_run, state
from torch import nn

import mlpreduce
import mlpreduce.timm_models
from mlpreduce import ReductionError
from mlpreduce.edits import Scale, Slice
from mlpreduce.models.smlpnet import SMLPNet
from mlpreduce.testing import check_transform
from mlpreduce.train import create_ema, fit


def small(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    given = {"img_size": 32, "embed_dim": 8, "depths": (2, 2, 4, 2), "num_classes": 5} | kwargs
    return mlpreduce.create_model("smlpnet_tiny", **given)


TINY = ("tiny", 24, 5.0)


@pytest.mark.parametrize("published", slow_but([TINY, ("small", 49, 10.3), ("base", 66, 14.0)], TINY))
def test_smlpnet_has_the_published_counts(published: tuple[str, int, float]) -> None:
    size, millions, giga = published
    with torch.device("meta"):
        model = timm.create_model(f"smlpnet_{size}")
    cost = mlpreduce.profile(model)
    assert round(cost.params / 1e6) == millions
    assert round(cost.macs_linear / 1e9, 1) == giga
    assert len(mlpreduce.find_mlps(model)) == sum(len(stage[1]) for stage in model.stages)


def test_weights_are_drawn_as_timm_draws_them() -> None:
    model = small(embed_dim=64)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    weights = torch.cat([layer.weight.detach().flatten() for layer in layers])
    assert float(weights.std()) == pytest.approx(0.02, rel=0.02)
    assert not any(layer.bias.any() for layer in layers if layer.bias is not None)


def test_rows_and_columns_share_their_weights() -> None:
    """What reaches a token lies in its row or its column, and moving the image along an axis moves what the other gives."""
    mix = small(embed_dim=8).stages[0][1][0].mix.eval()
    x = torch.randn(1, 8, 8, 8, requires_grad=True)
    mix(x)[0, :, 3, 5].sum().backward()
    reached = x.grad[0].abs().sum(0) > 0  # type: ignore[index]
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[3], expected[:, 5] = True, True
    assert torch.equal(reached, expected)
    with torch.no_grad():
        mix.column.weight.zero_()  # then rows are treated alike
        torch.testing.assert_close(mix(x.roll(2, dims=2)), _rolled(mix, x, 2))


def _rolled(mix: nn.Module, x: torch.Tensor, by: int) -> torch.Tensor:
    mix.column.bias.data.zero_()
    return mix(x).roll(by, dims=2)


@pytest.mark.parametrize(("name", "config"), [("grouped", {}), ("shallow", {"criterion": "l2", "round_to": 4})])
def test_transforms_of_smlpnet(name: str, config: dict[str, Any]) -> None:
    made = check_transform(name, make=small, inputs=torch.randn(2, 3, 32, 32), **config)
    stages = {row.mlp: row.mlp.split(".")[1] for row in made.rows}
    assert all(stages[row.owner] == stages[row.mlp] for row in made.rows)  # groups lie within a stage
    assert {row.hidden for row in made.rows} == {24, 48, 96, 192} if name == "grouped" else {12, 24, 48, 96}


def test_the_interface_is_that_of_timm() -> None:
    model = small().eval()
    images = torch.randn(2, 3, 32, 32)
    assert model.forward_features(images).shape == (2, 64, 1, 1)
    torch.testing.assert_close(model(images), model.forward_head(model.forward_features(images)))
    assert model.forward_head(model.forward_features(images), pre_logits=True).shape == (2, 64)
    model.reset_classifier(7)
    assert model(images).shape == (2, 7)
    assert model.get_classifier() is model.head
    model.reset_classifier(0)
    assert model(images).shape == (2, 64)
    rates = [module.drop_prob for module in small(drop_path_rate=0.3).modules() if type(module).__name__ == "DropPath"]
    assert rates[::2] == rates[1::2] == pytest.approx([0.3 * n / 9 for n in range(10)])
    for size in (40, 16, (32, 48)):
        with pytest.raises(ReductionError, match="must be multiples of 32"):
            SMLPNet(img_size=size)  # type: ignore[arg-type]


def test_a_recipe_trains_it(tmp_path: Path) -> None:
    run = digits_run(tmp_path, epochs=1, warmup_epochs=0)
    size = run.model.kwargs["img_size"]
    kwargs = {
        "img_size": size,
        "embed_dim": 8,
        "depths": (2, 2),
        "num_classes": 10,
        "in_chans": 1,
        "patch_size": size // 4,
    }
    run = run.model_copy(update={"model": run.model.model_copy(update={"name": "smlpnet_tiny", "kwargs": kwargs})})
    (entry,) = fit(run.model_copy(update={"steps": ({"transform": "grouped"},)}))
    assert entry["train_loss"] > 0


def in_a_fresh_process(code: str) -> str:
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.processes
def test_a_fresh_process_loads_it_and_knows_its_name(tmp_path: Path) -> None:
    mlpreduce.save(small(), tmp_path / "model")
    assert (
        in_a_fresh_process(f"import mlpreduce; print(type(mlpreduce.load({str(tmp_path / 'model')!r})).__name__)")
        == "SMLPNet"
    )
    told = "import mlpreduce; print(mlpreduce.create_model('smlpnet_tiny', 'shallow', embed_dim=8).num_classes)"
    assert in_a_fresh_process(told) == "1000"


@pytest.mark.processes
def test_names_that_another_package_has_taken_are_left_alone() -> None:
    """The published script registers one of them; importing the training loop must not mind."""
    code = """
import sys, timm
sys.modules[__name__].default_cfgs = {}
@timm.models.register_model
def vit_base_patch16_224_dgmlp(pretrained=False, **kwargs):
    return timm.create_model("vit_tiny_patch16_224", **kwargs)
import mlpreduce.train.parts
from mlpreduce import recipe as recipes
from mlpreduce.recipe.schema import runs
from mlpreduce.train import build_model
kwargs = 'model.kwargs={img_size=32}'
theirs = runs(recipes.load("digits_tiny", ["model.name=vit_base_patch16_224_dgmlp", kwargs]), ".")[0]
print(build_model(theirs, device="meta").embed_dim)
"""
    assert in_a_fresh_process(code) == "192"
    ours = (
        code.partition("import sys")[0]
        + """
from mlpreduce import recipe as recipes
from mlpreduce.recipe.schema import runs
from mlpreduce.train import build_model
run = runs(recipes.load("digits_tiny", ["model.name=vit_tiny_patch16_224_revit", "model.kwargs={img_size=32}"]), ".")[0]
print([block.mlp.fc1.out_features for block in build_model(run, device="meta").blocks][2:4])
"""
    )
    assert in_a_fresh_process(ours) == "[576, 1152]"


@pytest.mark.parametrize(("size", "width"), [("tiny", 192), ("small", 384), ("base", 768)])
def test_names_of_vits(size: str, width: int) -> None:
    with torch.device("meta"):
        dgmlp = timm.create_model(f"vit_{size}_patch16_224_dgmlp")
        revit = timm.create_model(f"vit_{size}_patch16_224_revit")
        plain = timm.create_model(f"vit_{size}_patch16_224")
    assert {edit.factor for edit in mlpreduce.history(dgmlp)[0].of(Scale)} == {0.707}
    saved = 6 * sum(parameter.numel() for parameter in plain.blocks[0].mlp.parameters())
    assert count(dgmlp) == count(plain) - saved
    widths = [block.mlp.fc1.out_features // width for block in revit.blocks]
    assert widths == [3, 3, 3, 6, 6, 6, 6, 6, 6, 3, 3, 3]
    assert [len(edit.units) for edit in mlpreduce.history(revit)[-1].of(Slice)] == [3 * width] * 6
    hidden = (sum(widths) - 4 * 12) * width
    assert count(revit) == count(plain) + hidden * (2 * width + 1)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# --- variants of the moving average -------------------------------------------------------------------------------------------


def averages(updates: int, **variant: Any) -> list[float]:
    """The average after each update of a weight that is 0, 1, 2, ..."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    ema = create_ema(model, 0.9, **variant)
    found = []
    for step in range(updates):
        nn.init.constant_(model.weight, float(step))
        ema.update(model, step=step + 1)
        found.append(ema.module.weight.item())
    return found


def test_warm_up_and_start_of_the_average() -> None:
    for start, warmup in itertools.product((0, 3), (False, True)):
        expected, average = [], 0.0
        for step in range(12):
            since = step - start  # updates since the first that averages; that one copies
            decay = 0.0 if since <= 0 else min(0.9, 1 - (1 + since) ** (-2 / 3)) if warmup else 0.9
            average = decay * average + (1 - decay) * step
            expected.append(average)
        assert averages(12, warmup=warmup, start=start) == pytest.approx(expected)
    assert averages(12) == pytest.approx(averages(12, warmup=False, start=0))
    with pytest.raises(ReductionError, match="create_ema: start is -1; it must be a whole number from 0"):
        create_ema(nn.Linear(1, 1), 0.9, start=-1)


def test_a_run_uses_the_variant(tmp_path: Path) -> None:
    late = {"ema_decay": 0.999, "epochs": 2, "ema_start": 10**6}
    fit(digits_run(tmp_path / "late", **late))
    found = state(tmp_path / "late")["state.pt"]
    assert all(torch.equal(found["ema"][name], tensor) for name, tensor in found["model"].items())
    run = digits_run(tmp_path / "warm", ema_decay=0.999, epochs=2, ema_warmup=True)
    fit(run)
    warm = state(tmp_path / "warm")["state.pt"]
    gaps = [(warm["ema"][name] - tensor).abs().max().item() for name, tensor in warm["model"].items() if tensor.numel()]
    assert max(gaps) > 0
    assert run.config_hash != digits_run(tmp_path / "warm", ema_decay=0.999, epochs=2).config_hash


def test_what_is_built_by_a_registered_name_is_saved(tmp_path: Path) -> None:
    """It is the architecture and its steps that are saved, and the name is needed no more."""
    for number, build in enumerate((timm.create_model, mlpreduce.create_model)):
        model = build("vit_tiny_patch16_224_dgmlp", depth=2, num_classes=3)
        mlpreduce.save(model, tmp_path / str(number))
        again = mlpreduce.load(tmp_path / str(number))
        assert again.state_dict().keys() == model.state_dict().keys()
        assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
