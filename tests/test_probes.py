"""What probes measure, against formulas written by hand; that they change nothing; where the numbers go."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from helpers.marks import slow_but
from helpers.records import cells, make_record, write
from helpers.runs import digits_run, interrupt_after, same, state
from helpers.stores import put_store
from helpers.two_processes import Together
from torch import nn
from torch.func import functional_call

import mlpreduce
from mlpreduce import recipe as recipes
from mlpreduce import report
from mlpreduce.errors import ReductionError
from mlpreduce.recipe.schema import differences
from mlpreduce.records import Recorder, read
from mlpreduce.testing import tiny_vit
from mlpreduce.train import Runtime, fit, loop
from mlpreduce.train import probes as module
from mlpreduce.train.events import EpochEnded, Event
from mlpreduce.train.probes import NAMES, gradient_norms, layer_similarity, linear_cka, measure, sharpness
from mlpreduce.train.setup import prepare

# SQLAlchemy about mlflow's own tables
pytestmark = [
    pytest.mark.filterwarnings("ignore:The ..noload.. loader strategy is deprecated:DeprecationWarning"),
    pytest.mark.usefixtures("one_thread"),
]

TINY = {"in_chans": 1, "patch_size": 8, "embed_dim": 4, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "num_classes": 3}


def tiny(group: int = 1, **changes: Any) -> nn.Module:
    """A ViT of a few hundred parameters, in float64."""
    model = tiny_vit(**{**TINY, **changes}).double()
    return mlpreduce.apply(model, "grouped", group=group) if group > 1 else model


def batch(count: int = 20, channels: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels; more than go through the model in one pass."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(count, channels, 16, 16, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 3, (count,), generator=generator)


def loss(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(images), labels)


# --- sharpness ------------------------------------------------------------------------------------------------------------


def eigenvalues(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """All of the Hessian's, ascending, from the whole matrix over the unique parameters."""
    named = dict(model.eval().named_parameters())

    def of(flat: torch.Tensor) -> torch.Tensor:
        parts = flat.split([parameter.numel() for parameter in named.values()])
        values = {name: part.view_as(named[name]) for name, part in zip(named, parts, strict=True)}
        return nn.functional.cross_entropy(functional_call(model, values, images, tie_weights=False), labels)

    flat = torch.cat([parameter.detach().flatten() for parameter in named.values()])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.linalg.eigvalsh(torch.autograd.functional.hessian(of, flat))


@pytest.mark.parametrize("group", slow_but([1, 2], 2))
def test_lambda_max_is_the_largest_eigenvalue_of_the_whole_hessian(group: int) -> None:
    model, (images, labels) = tiny(group), batch()
    expected = eigenvalues(model, images, labels)[-1].item()
    found = sharpness(model, images, labels, iterations=500, tolerance=1e-9)
    assert found["lambda_max"] == pytest.approx(expected, rel=1e-4)
    assert found["lambda_residual"] < 0.01 * expected


def test_the_residual_bounds_the_distance_to_an_eigenvalue() -> None:
    model, (images, labels) = tiny(), batch()
    every = eigenvalues(model, images, labels)
    for iterations in (1, 3, 10):
        found = sharpness(model, images, labels, iterations=iterations)
        assert (every - found["lambda_max"]).abs().min() <= found["lambda_residual"] * (1 + 1e-9)


class Saddle(nn.Module):
    """Logits (10 a^2 + b, 0): at a = b = 0, label 0 has the Hessian diag(-10, 1/4)."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        a, b = self.weights
        return torch.stack([10 * a**2 + b, 0 * a]).expand(len(images), 2)


def test_the_largest_eigenvalue_is_found_beside_a_more_negative_one() -> None:
    images, labels = torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64)
    found = sharpness(Saddle(), images, labels, iterations=200, tolerance=0.0)
    assert found["lambda_max"] == pytest.approx(0.25, abs=1e-9)


@pytest.mark.parametrize("group", [1, 2])
def test_sam_gap_is_the_growth_of_the_loss_along_the_normalised_gradient(group: int) -> None:
    model, (images, labels) = tiny(group).eval(), batch()
    parameters = list(model.parameters())
    before = loss(model, images, labels)
    gradient = torch.autograd.grad(before, parameters)
    norm = torch.cat([part.flatten() for part in gradient]).norm()
    stepped = {n: p + 0.1 * g / norm for (n, p), g in zip(model.named_parameters(), gradient, strict=True)}
    after = nn.functional.cross_entropy(functional_call(model, stepped, images, tie_weights=False), labels)
    found = sharpness(model, images, labels, iterations=1, rho=0.1)["sam_gap"]
    assert found == pytest.approx((after - before).item(), rel=1e-9)
    assert found > 0.01


def test_an_operation_without_second_derivative_is_told() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, slope: torch.Tensor) -> torch.Tensor:
            return slope * 2

    model, (images, labels) = tiny(), batch()
    model.head.register_forward_hook(lambda module, args, output: Once.apply(output))
    with pytest.raises(ReductionError, match=r"no second derivative .*leave this probe out"):
        sharpness(model, images, labels)
    assert len(gradient_norms(model, images, labels)) == 2


# --- gradients ------------------------------------------------------------------------------------------------------------


def test_gradient_norms_are_those_of_autograd() -> None:
    model, (images, labels) = tiny().eval(), batch()
    found = gradient_norms(model, images, labels)
    assert list(found) == [mlp.name for mlp in mlpreduce.find_mlps(model)] == ["blocks.0.mlp", "blocks.1.mlp"]
    loss(model, images, labels).backward()
    for name, norm in found.items():
        slopes = [parameter.grad for parameter in model.get_submodule(name).parameters()]
        assert norm == pytest.approx(sum((slope**2).sum().item() for slope in slopes) ** 0.5, rel=1e-9)


def test_a_tied_mlp_has_one_norm_with_the_gradient_of_both_uses() -> None:
    model, (images, labels) = tiny(group=2, depth=4).eval(), batch()
    found = gradient_norms(model, images, labels)
    assert list(found) == ["blocks.0.mlp", "blocks.2.mlp"]
    copies = mlpreduce.untie(tiny(group=2, depth=4)).eval()
    loss(copies, images, labels).backward()
    for name, other in (("blocks.0.mlp", "blocks.1.mlp"), ("blocks.2.mlp", "blocks.3.mlp")):
        first, second = (list(copies.get_submodule(path).parameters()) for path in (name, other))
        sums = [p.grad + q.grad for p, q in zip(first, second, strict=True)]
        assert found[name] == pytest.approx(sum((slope**2).sum().item() for slope in sums) ** 0.5, rel=1e-9)


def test_of_a_fused_layer_only_the_part_of_the_mlp_counts() -> None:
    import timm

    torch.manual_seed(0)
    sizes = {
        "img_size": 16,
        "patch_size": 8,
        "in_chans": 1,
        "embed_dim": 8,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 3,
    }
    block = timm.models.vision_transformer.ParallelScalingBlock
    model = timm.models.vision_transformer.VisionTransformer(**sizes, block_fn=block).double().eval()
    images, labels = batch()
    found = gradient_norms(model, images, labels)
    loss(model, images, labels).backward()
    mlps = mlpreduce.find_mlps(model)
    assert [mlp.kind for mlp in mlps] == ["plain+fused"] * 2
    for number, mlp in enumerate(mlps):
        own = model.blocks[number]
        hidden = mlp.hidden_features  # timm puts the hidden units before queries, keys and values
        assert own.in_proj.weight.shape[0] == hidden + 3 * 8
        parts = [own.in_proj.weight.grad[:hidden], own.in_proj.bias.grad[:hidden]]
        slopes = [*parts, own.mlp_out_proj.weight.grad, own.mlp_out_proj.bias.grad]
        expected = sum((slope**2).sum().item() for slope in slopes) ** 0.5
        assert found[mlp.name] == pytest.approx(expected, rel=1e-9)


def test_frozen_parameters_count_nothing() -> None:
    model, (images, labels) = tiny(), batch()
    model.blocks[0].mlp.requires_grad_(False)
    found = gradient_norms(model, images, labels)
    assert found["blocks.0.mlp"] == 0 < found["blocks.1.mlp"]
    with pytest.raises(ReductionError, match="all parameters are frozen"):
        gradient_norms(model.requires_grad_(False), images, labels)


class Cached(nn.Module):
    """An MLP whose residual scale is kept in eval mode, as timm's layers keep attention biases by position."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(4))
        self.kept: torch.Tensor | None = None

    def train(self, mode: bool = True) -> nn.Module:
        if mode:
            self.kept = None
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kept is None or self.training:
            self.kept = self.scale * self.scale
        return self.head(x * self.kept + self.down(self.up(x).relu()))


def test_what_a_module_keeps_in_eval_mode_is_not_used_for_other_weights() -> None:
    model = Cached().double().eval()
    x, labels = torch.randn(20, 4, dtype=torch.float64), torch.randint(0, 3, (20,))
    with torch.no_grad():
        output = model(x)  # fills it, without a graph
    found = sharpness(model, x, labels, iterations=500, tolerance=1e-9)
    with torch.no_grad():
        assert torch.equal(model(x), output)
    fresh = Cached().double().train()  # computes it each time
    fresh.load_state_dict(model.state_dict())
    parameters = list(fresh.parameters())
    before = loss(fresh, x, labels)
    gradient = torch.autograd.grad(before, parameters)
    norm = torch.cat([part.flatten() for part in gradient]).norm()
    stepped = {n: p + 0.05 * g / norm for (n, p), g in zip(fresh.named_parameters(), gradient, strict=True)}
    after = nn.functional.cross_entropy(functional_call(fresh, stepped, x), labels)
    assert found["sam_gap"] == pytest.approx((after - before).item(), rel=1e-9)
    assert gradient_norms(model, x, labels)


# --- similarity -----------------------------------------------------------------------------------------------------------


def hsic(kernel: torch.Tensor, other: torch.Tensor) -> float:
    """The Hilbert-Schmidt independence criterion, but for a factor: tr(K H L H), H = I - 1/n."""
    n = len(kernel)
    centring = torch.eye(n, dtype=torch.float64) - 1 / n
    return torch.trace(kernel @ centring @ other @ centring).item()


def cka(x: torch.Tensor, y: torch.Tensor) -> float:
    kernel, other = x @ x.T, y @ y.T
    return hsic(kernel, other) / math.sqrt(hsic(kernel, kernel) * hsic(other, other))


def test_cka_is_the_formula_and_has_its_invariances() -> None:
    x, y = torch.randn(50, 6, dtype=torch.float64) + 3, torch.randn(50, 9, dtype=torch.float64) - 1
    y[:, :6] += x
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    assert linear_cka(x, y) == pytest.approx(cka(x, y), abs=1e-12)
    assert 0.1 < linear_cka(x, y) < 0.9
    assert linear_cka(x, x) == pytest.approx(1, abs=1e-12)
    assert linear_cka(x @ rotation, y) == pytest.approx(linear_cka(x, y), abs=1e-12)
    assert linear_cka(-7.0 * x, y) == pytest.approx(linear_cka(x, y), abs=1e-12)
    assert linear_cka(x + 100.0, y) == pytest.approx(linear_cka(x, y), abs=1e-9)
    skewed = x * torch.tensor([100.0, 1, 1, 1, 1, 1], dtype=torch.float64)
    assert abs(linear_cka(skewed, y) - linear_cka(x, y)) > 0.01  # an invertible map is no rotation
    assert linear_cka(x.float(), y.float()) == pytest.approx(cka(x.float().double(), y.float().double()), abs=1e-12)
    assert math.isnan(linear_cka(torch.full((50, 2), 0.1), y))
    with pytest.raises(ReductionError, match=r"\(50, 6\) and \(49, 9\)"):
        linear_cka(x, y[1:])


def outputs(model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """What each block's MLP gives, in order: (images, tokens, features)."""
    found: list[torch.Tensor] = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda module, args, output: found.append(output.detach()))
    model.eval()(images)
    return found


@pytest.mark.parametrize("group", [1, 2])
def test_similarity_has_a_row_for_each_use_in_order(group: int) -> None:
    images, _ = batch()
    found = layer_similarity(tiny(group, depth=4), images)
    rows = [output.flatten(0, 1) for output in outputs(tiny(group, depth=4), images)]
    assert len(rows) == len(found) == 4
    for i, x in enumerate(rows):
        for j, y in enumerate(rows):
            assert found[i][j] == pytest.approx(cka(x, y), abs=1e-9)
    assert len({round(value, 6) for value in found[0]}) == 4  # the uses of a tied MLP differ, as their inputs do


def test_many_tokens_are_thinned_out_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlpreduce.train import similarity

    monkeypatch.setattr(similarity, "_EXAMPLES", 59)
    images, _ = batch()
    found = layer_similarity(tiny(), images)
    first, second = (
        output[:, [0, 2]].flatten(0, 1) for output in outputs(tiny(), images)
    )  # 2 of 5 tokens of 20 images
    assert found[0][1] == pytest.approx(cka(first, second), abs=1e-9)


def test_stages_are_compared_by_the_mean_over_tokens() -> None:
    import timm

    sizes = {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 1), "num_classes": 3}
    model = timm.create_model("swin_tiny_patch4_window7_224", **sizes).eval()
    images = torch.randn(20, 3, 32, 32)
    table = layer_similarity(model, images)
    found: list[torch.Tensor] = []
    for stage in model.layers:
        stage.blocks[0].mlp.register_forward_hook(lambda module, args, output: found.append(output.detach().mean(1)))
    model(images)
    assert table[0][1] == pytest.approx(cka(*(output.double() for output in found)), abs=1e-9)


# --- nothing is changed ---------------------------------------------------------------------------------------------------


def test_a_probe_leaves_the_model_and_all_random_states_as_they_were(unchanged: Any) -> None:
    model = mlpreduce.apply(tiny_vit(drop_path_rate=0.2, proj_drop_rate=0.2), "grouped", group=2).train()
    model.blocks[1].eval()
    model.set_grad_checkpointing(True)
    model.register_forward_pre_hook(lambda module, args: [torch.rand(1), None][1])  # one that draws in eval mode too
    images, labels = batch(channels=3)
    images = images.float()
    loss(model, images, labels).backward()
    check = unchanged(model)
    slopes = {name: (id(p.grad), p.grad.clone()) for name, p in model.named_parameters()}
    modes = [one.training for one in model.modules()]
    hooks = [len(one._forward_hooks) for one in model.modules()]
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(5)
    torch.set_float32_matmul_precision("high")
    before = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    try:
        found = measure(model, images, labels, NAMES)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), repr(np.random.get_state())) == before[1:]
    check()
    for name, parameter in model.named_parameters():
        assert (id(parameter.grad), parameter.requires_grad) == (slopes[name][0], True)
        assert torch.equal(parameter.grad, slopes[name][1])
        assert torch.equal(parameter.view(torch.int32), weights[name].view(torch.int32))  # signs of zeros too
    assert [one.training for one in model.modules()] == modes
    assert [len(one._forward_hooks) for one in model.modules()] == hooks
    assert model.grad_checkpointing
    assert measure(model, images, labels, NAMES) == found  # nor do they depend on chance
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert measure(model, images, labels, NAMES) == found


def test_weights_come_back_after_an_error(unchanged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (images, labels) = tiny().train(), batch()
    check = unchanged(model)
    weight = model.blocks[0].mlp.fc1.weight
    start = weight.detach().clone()

    def fail(one: nn.Module, args: Any) -> None:
        if not torch.equal(weight, start):
            raise torch.OutOfMemoryError("out of memory")

    handle = model.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        sharpness(model, images, labels, iterations=1)
    handle.remove()
    check()
    assert model.training


def test_wrong_calls_are_told() -> None:
    model, (images, labels) = tiny(), batch()
    with pytest.raises(ReductionError, match="no probe 'gradient'; did you mean 'gradients'"):
        measure(model, images, labels, ["gradient"])
    with pytest.raises(ReductionError, match=r"targets \(3,\); give at least one image, and one label for each"):
        gradient_norms(model, images, labels[:3])
    with pytest.raises(ReductionError, match="iterations=0"):
        sharpness(model, images, labels, iterations=0)
    with pytest.raises(ReductionError, match="0 MLPs"):
        layer_similarity(nn.Conv2d(1, 3, 3).double(), images)


def test_numbers_that_are_not_finite_are_none() -> None:
    model, (images, labels) = tiny(), batch()
    nn.init.zeros_(model.blocks[0].mlp.fc2.weight)
    found = measure(model, images, labels, ["similarity"])
    assert found["similarity"][0] == [None, None]
    assert found["similarity"][1][1] == pytest.approx(1)
    nn.init.constant_(model.head.weight, math.nan)
    found = measure(model, images, labels, ["sharpness", "gradients"])
    assert list(found) == ["sharpness", "gradients"]
    assert set(found["sharpness"].values()) == set(found["gradients"].values()) == {None}


# --- in training ----------------------------------------------------------------------------------------------------------


def without_probes(left: Any) -> Any:
    left["state.pt"]["history"] = [
        {key: value for key, value in entry.items() if key != "probes"} for entry in left["state.pt"]["history"]
    ]
    return left


@pytest.mark.parametrize("amp", slow_but(["none", "bfloat16"], "none"))
@pytest.mark.slow
def test_a_run_with_probes_ends_with_the_weights_of_one_without(tmp_path: Path, amp: str) -> None:
    settings = {"grad_checkpointing": True, "amp": amp, "accum_steps": 2}
    plain = digits_run(tmp_path / "plain", **settings)
    probed = digits_run(tmp_path / "probed", **settings, probes=NAMES, probe_every=2, probe_images=20)
    fit(plain)
    history = fit(probed)
    assert ["probes" in entry for entry in history] == [False, True, True]
    same(state(tmp_path / "plain"), without_probes(state(tmp_path / "probed")))
    assert probed.config_hash == plain.config_hash


def test_a_probe_in_a_run_is_of_the_trained_weights_on_the_first_images_of_validation(tmp_path: Path) -> None:
    from mlpreduce.data import load
    from mlpreduce.train import build_model

    run = digits_run(tmp_path, epochs=1, warmup_epochs=0, probes=["sharpness"], probe_images=70)
    run = run.model_copy(update={"data": run.data.model_copy(update={"eval_batch_size": 32})})
    (entry,) = fit(run)
    model = build_model(run)
    model.load_state_dict(state(tmp_path)["state.pt"]["model"])
    batches = list(load(run.data, run.train, micro_batch=64).val)
    images, labels = (torch.cat(tensors)[:70] for tensors in zip(*batches, strict=True))
    assert entry["probes"] == {"sharpness": sharpness(model, images, labels)}


def test_a_resumed_run_probes_the_same_images(tmp_path: Path) -> None:
    whole = digits_run(tmp_path / "whole", epochs=2, probes=["gradients"], probe_every=1)
    history = fit(whole)
    parted = digits_run(tmp_path / "parted", epochs=2)
    interrupt_after(parted, 1)
    resumed = fit(digits_run(tmp_path / "parted", epochs=2, probes=["gradients"], probe_every=1))  # may be added
    assert "probes" not in resumed[0]
    assert resumed[1]["probes"] == history[1]["probes"]


def _fit_probed(rank: int, folder: str) -> None:
    for name, names in (("plain", ()), ("probed", NAMES)):
        run = digits_run(Path(folder) / name, epochs=2, probes=names, probe_every=1, probe_images=20)
        fit(run.model_copy(update={"workers": 2}), Runtime(rank=rank, world=2, threads=1))


@pytest.mark.processes
def test_of_two_workers_the_first_probes_and_both_go_on(together: Together, tmp_path: Path) -> None:
    together(_fit_probed, str(tmp_path))
    probed = state(tmp_path / "probed")
    assert all(set(entry["probes"]) == set(NAMES) for entry in probed["state.pt"]["history"])
    same(state(tmp_path / "plain"), without_probes(probed))


def test_a_probe_out_of_memory_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(module, "sharpness", full)
    with pytest.raises(
        ReductionError, match=r"probes sharpness of 64 images .*2.00 GiB.*train.probe_images=8 takes less"
    ):
        fit(digits_run(tmp_path, epochs=1, warmup_epochs=0, probes=["sharpness"]))


def test_worker_0_without_a_validation_image_is_told(tmp_path: Path) -> None:
    parts = prepare(digits_run(tmp_path, probes=["gradients"]), Runtime(), None)
    with pytest.raises(ReductionError, match=r"worker 0 has no validation image for train\.probes; leave it out"):
        loop._probe(parts)


def test_probes_do_not_ask_for_the_default_device() -> None:
    model, (images, labels) = tiny(), batch()
    with torch.device("meta"):
        found = sharpness(model, images, labels, iterations=2)
    assert found == sharpness(model, images, labels, iterations=2)


def test_the_keys_may_differ_when_a_run_goes_on() -> None:
    now = recipes.load("digits_tiny", ['train.probes=["gradients","sharpness"]', "train.probe_every=2"])
    assert now.train.probes == ("gradients", "sharpness")
    before = recipes.load("digits_tiny")
    assert before.train.probes == ()
    assert differences(before.model_dump(mode="json"), now.model_dump(mode="json")) == []
    with pytest.raises(ReductionError, match=r"train\.probes.*'gradients', 'similarity', 'sharpness', 'density'"):
        recipes.load("digits_tiny", ['train.probes=["norms"]'])


# --- records and report ---------------------------------------------------------------------------------------------------

PROBES: dict[str, Any] = {
    "gradients": {"blocks.0.mlp": 0.5, "blocks.1.mlp@1": 0.25, "blocks.9.mlp": None},
    "similarity": [[1.0, 0.5, 0.1], [0.5, 1.0, 0.7], [0.1, 0.7, 1.0]],
    "density": {"blocks.0.mlp": [1.0, 0.9, 0.75], "blocks.1.mlp": [1.0, 0.5, 0.25]},
    "sharpness": {"lambda_max": 12.5, "lambda_residual": 0.5, "sam_gap": 0.03},
}


def test_records_have_the_probes_and_mlflow_their_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = digits_run(tmp_path / "grouped" / "seed42", epochs=2, probes=NAMES, probe_images=8)
    recorder = Recorder(put_store(tmp_path), {"name": "toy"}, [run])
    fit(run, Runtime(report=recorder.handle))
    (record,) = read(tmp_path)
    assert not record.epochs[0].probes
    found = record.epochs[1].probes
    assert set(found) == set(NAMES)
    assert [len(row) for row in found["similarity"]] == [4] * 4
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    metrics = client.get_run(record.mlflow_run_id).data.metrics
    expected = {f"probe/{name}": value for name, value in found["sharpness"].items()}
    expected |= {f"probe/gradient_norm/{name}": value for name, value in found["gradients"].items()}
    for number, name in enumerate(("0", "0.001", "0.01")):
        expected[f"probe/density_above_{name}"] = fmean(row[number] for row in found["density"].values())
    assert set(expected) >= {"probe/lambda_max", "probe/sam_gap", "probe/gradient_norm/blocks.0.mlp"}
    assert {name: value for name, value in metrics.items() if name.startswith("probe/")} == pytest.approx(expected)
    assert [m.step for m in client.get_metric_history(record.mlflow_run_id, "probe/sam_gap")] == [2]
    # a name that MLflow refuses, and a number that JSON does not have
    odd = {**record.epochs[1].as_json(), "epoch": 3, "probes": PROBES}
    recorder.handle(Event("grouped", 42, 2, EpochEnded(odd)))
    metrics = client.get_run(record.mlflow_run_id).data.metrics
    assert metrics["probe/gradient_norm/blocks.1.mlp_1"] == 0.25
    assert "probe/gradient_norm/blocks.9.mlp" not in metrics
    json.dumps([found.as_json() for found in read(tmp_path)], allow_nan=False)


def write_probed(directory: Path, variant: str, seed: int, order: int, probes: dict[str, Any] | None) -> None:
    record = make_record(variant, seed, [50.0, 60.0], order)
    if probes is not None:
        record["epochs"][-1]["probes"] = probes
    write(directory, record)


def test_the_report_has_a_table_of_the_last_probes(tmp_path: Path) -> None:
    place = tmp_path / "run"
    other = {**PROBES, "sharpness": {"lambda_max": 13.5, "lambda_residual": 0.1, "sam_gap": None}}
    write_probed(place, "baseline", 0, 0, PROBES)
    write_probed(place, "baseline", 1, 1, other)
    write_probed(place, "grouped", 0, 2, {"similarity": [[None, None], [None, 1.0]]})
    write_probed(place, "shallow", 0, 3, None)
    report.build(place)
    rows = cells((place / "report.md").read_text(), "Probes at the last epoch")
    assert [variant for variant, _ in rows] == ["baseline", "grouped", "shallow"]
    assert list(rows["baseline", "run"].values())[2:] == ["13", "0.03", "0.25", "0.5", "0.6", "0.5"]
    assert list(rows["grouped", "run"].values())[2:] == ["not measured"] * 4 + ["not finite", "not measured"]
    assert set(list(rows["shallow", "run"].values())[2:]) == {"not measured"}
    assert "docs/probes.md" in (place / "report.html").read_text()
    assert "Probes at the last epoch" in (place / "report.html").read_text()


def test_without_probes_there_is_no_such_table(tmp_path: Path) -> None:
    write_probed(tmp_path / "run", "baseline", 0, 0, None)
    report.build(tmp_path / "run")
    assert "robe" not in (tmp_path / "run" / "report.md").read_text()
