"""Criteria that look at calibration data: their identities, that they leave no trace, and what they refuse."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers.kinds import KINDS, built
from helpers.two_processes import Together
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import mlpreduce
from mlpreduce import ReductionError, criteria
from mlpreduce.budget import Loss
from mlpreduce.calibration import (
    CHUNK,
    Samples,
    Taps,
    full_precision,
    measure,
    measure_gates,
    measure_scores,
    quiet_copy,
)
from mlpreduce.criteria import SITES, HiddenUnits, Ranking, Seen, choose, list_criteria, register_criterion
from mlpreduce.criteria.entropy_taylor import entropy
from mlpreduce.edits import Assign, Plan, Slice
from mlpreduce.graph import find_mlps
from mlpreduce.testing import tiny_vit

OF_DATA = [name for name in list_criteria() if choose(name).criterion.of_data]
# a criterion of a loss, and where it looks at units, if that is an option
SITED = [
    (name, site)
    for name in list_criteria()
    if choose(name).criterion.needs == "loss"
    for site in (SITES if "site" in choose(name).criterion.options else (None,))
]
OF_LOSS = [name for name in OF_DATA if choose(name).criterion.needs in ("loss", "gates")]


def examples(
    count: int = 40, *, channels: int = 3, side: int = 16, classes: int = 5
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return torch.randn(count, channels, side, side, generator=generator), torch.arange(count) % classes


def batches(size: int, count: int = 40, **kinds: int) -> list[Any]:
    return list(zip(*(tensor.split(size) for tensor in examples(count, **kinds)), strict=True))


def scores(model: nn.Module, criterion: Any, data: Any, **more: Any) -> dict[str, torch.Tensor]:
    return dict(measure_scores(model, find_mlps(model), choose(criterion), data, **more).scores)


def lively_vit(**kwargs: Any) -> nn.Module:
    """The tiny ViT in float64, with biases and weights large enough for the sites to differ."""
    model = tiny_vit(**kwargs).double().eval()
    generator = torch.Generator().manual_seed(3)
    for block in model.blocks:
        nn.init.normal_(block.mlp.fc1.bias, std=0.3, generator=generator)
        block.mlp.fc1.weight.data *= 10
        block.mlp.fc2.weight.data *= 10
    return model


# --- identities -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_changes_are_the_sums_over_weights(tied: bool) -> None:
    """sum of w dL/dw over a unit's fc1 row and bias, or its fc2 column, by automatic differentiation by the weights."""
    model = lively_vit()
    if tied:
        mlpreduce.apply(model, "grouped", group=2)
    images, labels = examples(6)
    of = {name: torch.zeros(128, dtype=torch.float64) for name in ("fc1", "fc2")}
    per_example: dict[str, list[torch.Tensor]] = {"fc1": [], "fc2": []}
    for image, label in zip(images.double(), labels, strict=True):
        model.zero_grad()
        cross_entropy(model(image[None]), label[None]).backward()
        mlp = model.blocks[0].mlp
        fc1 = (mlp.fc1.weight * mlp.fc1.weight.grad).sum(1) + mlp.fc1.bias * mlp.fc1.bias.grad
        fc2 = (mlp.fc2.weight * mlp.fc2.weight.grad).sum(0)
        for name, value in (("fc1", fc1), ("fc2", fc2)):
            per_example[name].append(value.detach())
    of = {name: torch.stack(values) for name, values in per_example.items()}
    of |= {"act": of["fc2"], "both": of["fc1"] + of["fc2"]}
    for site, change in of.items():
        for name, value in (("taylor", change.abs()), ("nvit", change.square())):
            found = scores(model, {"name": name, "site": site}, [(images, labels)])["blocks.0.mlp"]
            torch.testing.assert_close(found, value.mean(0), rtol=1e-10, atol=1e-14)
    fisher = scores(model, "fisher", [(images, labels)])["blocks.0.mlp"]
    torch.testing.assert_close(fisher, of["fc2"].square().mean(0) / 2, rtol=1e-10, atol=1e-14)


def test_sites_rank_differently() -> None:
    model, data = lively_vit(), batches(8)
    orders = {site: scores(model, {"name": "nvit", "site": site}, data)["blocks.1.mlp"].argsort() for site in SITES}
    assert torch.equal(orders["act"], orders["fc2"])
    for one, other in itertools.combinations(("fc1", "fc2", "both"), 2):
        assert not torch.equal(orders[one], orders[other])


@pytest.mark.parametrize(("criterion", "site"), SITED)
def test_a_unit_whose_column_is_zero_scores_zero(criterion: str, site: str | None) -> None:
    model = lively_vit()
    model.blocks[1].mlp.fc2.weight.data[:, 7] = 0
    chosen = {"name": criterion} | ({} if site is None else {"site": site})
    found = scores(model, chosen, batches(8))["blocks.1.mlp"]
    assert found[7] == 0
    assert (found != 0).sum() == 127


def test_a_plan_says_what_speaks_against_its_criterion() -> None:
    for criterion, told in (("hessian_diag", True), ("fisher", False)):
        notes = mlpreduce.plan(tiny_vit(), "shallow", criterion=criterion, data=batches(16)).notes
        assert any("too coarsely to order units" in note for note in notes) == told


def test_hessian_diag_is_the_second_derivative() -> None:
    """Over all patterns of signs the estimate is exact; here of an MLP of three units."""
    model = tiny_vit(mlp_ratio=3 / 32, depth=2).double().eval()
    for block in model.blocks:
        block.mlp.fc2.weight.data *= 30
    images, labels = examples(5)
    images = images.double()
    tree = quiet_copy(model)
    taps = Taps(tree, find_mlps(model), ("fc2",))
    keys = taps.places()

    def loss(flat: torch.Tensor) -> torch.Tensor:
        gates = {key: part[None] for key, part in zip(keys, flat.split(3), strict=True)}
        with taps.multiplying(gates):
            return cross_entropy(tree(images), labels)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        exact = torch.autograd.functional.hessian(loss, torch.ones(6, dtype=torch.float64)).diag() / 2
    patterns = list(itertools.product((-1.0, 1.0), repeat=6))
    signs = [{key: part[None] for key, part in zip(keys, torch.tensor(p).split(3), strict=True)} for p in patterns]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "_signs", lambda *given: signs)
        found = scores(model, "hessian_diag", [(images, labels)])
    torch.testing.assert_close(torch.cat([found[owner] for owner, _ in keys]), exact, rtol=1e-9, atol=1e-12)


def test_activation_statistics() -> None:
    model = lively_vit()
    images, _ = examples(20)
    kept: list[torch.Tensor] = []
    handle = model.blocks[2].mlp.fc2.register_forward_pre_hook(lambda module, args: kept.append(args[0].detach()))
    model(images.double())
    handle.remove()
    hidden = kept[0].flatten(0, 1)
    mean = scores(model, "activation", [images])["blocks.2.mlp"]
    torch.testing.assert_close(mean, hidden.abs().mean(0), rtol=1e-10, atol=0)
    often = scores(model, {"name": "activation", "statistic": "frequency", "threshold": 0.1}, [images])["blocks.2.mlp"]
    torch.testing.assert_close(often, (hidden > 0.1).double().mean(0), rtol=1e-10, atol=0)


def test_entropy_needs_no_labels_and_is_that_of_similarities() -> None:
    model = lively_vit()
    images = examples(6)[0].double()
    features = model(images).detach()
    cosine = nn.functional.cosine_similarity(features[:, None], features[None], dim=-1)
    shares = torch.softmax(15 * cosine, dim=1)
    assert entropy(model, images).item() == pytest.approx(-(shares * shares.log()).sum(1).mean().item(), rel=1e-10)
    assert scores(model, "entropy_taylor", [images])["blocks.0.mlp"].max() > 0


def test_gates_learn_what_matters() -> None:
    """Units without effect are pulled to zero by the penalty alone, by as much as Adam's steps go; those in use are not."""
    model = lively_vit()
    model.blocks[0].mlp.fc2.weight.data[:, ::2] = 0
    found = mlpreduce.calibration.measure_gates(
        model, find_mlps(model), choose({"name": "gate", "lr": 0.1, "epochs": 3}), batches(8)
    ).scores["blocks.0.mlp"]
    assert found[::2].max() < found[1::2].median()
    torch.testing.assert_close(found[::2], found[:1].expand(64))


def test_a_loss_of_the_user() -> None:
    model, data = lively_vit(), batches(8)
    own = scores(model, "taylor", data, loss=lambda output, labels: 3 * cross_entropy(output, labels))
    usual = scores(model, "taylor", data)
    torch.testing.assert_close(own["blocks.0.mlp"], 3 * usual["blocks.0.mlp"], rtol=1e-10, atol=0)
    with pytest.raises(
        ReductionError, match=r"loss gave a tensor \(16, 5\), not the mean over the examples as a scalar"
    ):
        scores(model, "taylor", data, loss=lambda output, labels: output)


# --- the data ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", OF_DATA)
def test_batches_do_not_matter(criterion: str) -> None:
    plans = [
        mlpreduce.plan(tiny_vit(), "shallow", ratio=0.25, criterion=criterion, data=batches(size))
        for size in (1, 7, 16, 40)
    ]
    assert len({plan.to_json() for plan in plans}) == 1
    assert plans[0].data is not None
    assert plans[0].data["samples"] == 40
    other = mlpreduce.plan(tiny_vit(), "shallow", ratio=0.25, criterion=criterion, data=batches(40)[:1] * 2)
    assert other.data is not None
    assert other.data["samples"] == 80
    assert other.data["fingerprint"] != plans[0].data["fingerprint"]


def test_forms_of_data() -> None:
    images, labels = examples()
    loader = DataLoader(TensorDataset(images, labels), batch_size=9)
    forms = [
        loader,
        [(images, labels)],
        [[images, labels, "a name"]],
        [{"pixel_values": images, "labels": labels}],
        iter(batches(3)),
        (pair for pair in batches(30)),
    ]
    found = [scores(tiny_vit(), "taylor", form)["blocks.0.mlp"] for form in forms]
    assert all(torch.equal(found[0], other) for other in found)
    alone = [images, [images], [(images,)], [{"image": images}], loader]
    found = [scores(tiny_vit(), "activation", form)["blocks.0.mlp"] for form in alone]
    assert all(torch.equal(found[0], other) for other in found)
    soft = nn.functional.one_hot(labels, 5).float()
    torch.testing.assert_close(
        scores(tiny_vit(), "taylor", [(images, soft)])["blocks.0.mlp"],
        scores(tiny_vit(), "taylor", loader)["blocks.0.mlp"],
    )


def test_chunks() -> None:
    found = [len(images) for images, _ in Samples(batches(7, 53), tiny_vit(), labels=True).chunks()]
    assert found == [CHUNK, CHUNK, CHUNK, 53 - 3 * CHUNK]
    for count, expected in {1: [1], 17: [17], 32: [16, 16], 33: [16, 17], 63: [16, 16, 31]}.items():
        samples = Samples(batches(7, count), tiny_vit(), labels=True, compared=True)
        assert [len(images) for images, _ in samples.chunks()] == expected


@pytest.mark.parametrize("criterion", [*OF_DATA, "repair", "gram_schmidt"])
def test_nothing_changes(criterion: str, unchanged: Callable[[nn.Module], Callable[[], None]]) -> None:
    model = tiny_vit(drop_path_rate=0.3, proj_drop_rate=0.2)
    model.set_grad_checkpointing(True)
    model.train()
    model.blocks[1].eval()
    calls: list[int] = []
    model.blocks[0].mlp.register_forward_hook(lambda *given: calls.append(1))
    model(examples(2)[0]).sum().backward()
    calls.clear()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    modes = [module.training for module in model.modules()]
    wanted = [p.requires_grad for p in model.parameters()]
    check = unchanged(model)
    loader = DataLoader(TensorDataset(*examples()), batch_size=8, shuffle=True)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    config = {"repair": "least_squares"} if criterion == "repair" else {"criterion": criterion}
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        mlpreduce.plan(model, "shallow", data=loader, **config)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[index]
    assert random.getstate() == states[2]
    check()
    assert calls == []
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(
        torch.equal(p.grad, g)
        for p, g in zip((p for p in model.parameters() if p.grad is not None), grads, strict=True)
    )
    assert model.blocks[0].mlp._forward_hooks
    assert not model.blocks[0].mlp.fc2._forward_pre_hooks


@pytest.mark.parametrize("criterion", OF_LOSS)
def test_a_frozen_model_is_as_good(criterion: str) -> None:
    frozen = tiny_vit().requires_grad_(False)
    plans = [mlpreduce.plan(m, "shallow", criterion=criterion, data=batches(8)) for m in (frozen, tiny_vit())]
    assert plans[0].edits == plans[1].edits
    model = tiny_vit()
    with torch.inference_mode():
        assert mlpreduce.plan(model, "shallow", data=batches(8), criterion=criterion).edits == plans[0].edits


def empty_loader() -> list[Any]:
    return []


def with_nan() -> list[Any]:
    images, labels = examples()
    images[20, 1, 3, 3] = torch.nan
    return [(images, labels)]


FREQUENCY = {"name": "activation", "statistic": "frequency"}
REFUSED = {
    "none": (lambda: None, {}, r"needs calibration data; give data=, a loader of \(images, labels\)"),
    "empty": (empty_loader, {}, "data is empty: it gave 0 images"),
    "used up": (lambda: iter([]), {}, "data is empty"),
    "nan": (with_nan, {}, "an image that is not finite, within 40 examples"),
    "no labels": (lambda: [examples()[0]], {}, "no labels for 40 images, which the loss needs"),
    "too few labels": (lambda: [(examples()[0], torch.zeros(3).long())], {}, r"labels of shape \(3,\) for 40 images"),
    "one label": (lambda: [(examples()[0], torch.tensor(3))], {}, r"labels of shape \(\) for 40 images"),
    "no dimension": (lambda: [(torch.tensor(1.0), torch.zeros(1))], {}, r"a batch of shape \(\); its first dimension"),
    "unlike sizes": (lambda: [*batches(8, 8), *batches(8, 8, side=20)], {}, r"shapes \(3, 16, 16\) and \(3, 20, 20\)"),
    "one image": (lambda: examples(1)[0], {"name": "entropy_taylor"}, "compares images with each other, and was given 1"),
    "no difference": (lambda: batches(8), FREQUENCY | {"threshold": 99.0}, "all scores of 4 MLPs are 0"),
    "a list for a site": (lambda: batches(8), {"name": "taylor", "site": ["fc1"]}, r"site is \['fc1'\]"),
    "a text for a number": (lambda: batches(8), FREQUENCY | {"threshold": "0.1"}, "threshold is '0.1'"),
    "labels out of range": (lambda: [(examples()[0], torch.full((40,), 9))], {}, r"not run on labels .* from 9 to 9: Index"),
    "integers": (lambda: [(examples()[0].byte(), examples()[1])], {}, r"images of torch\.uint8; give them as the model takes"),
    "a string": (lambda: ["images"], {}, "data has a str for a batch"),
    "other keys": (lambda: [{"x": 1, "y": 2}], {}, "data has a dict with x, y for a batch; .* a dictionary with pixel_values"),
    "a number": (lambda: 3, {}, "data is a int; give a loader"),
    "another size": (lambda: batches(8, side=20), {}, r"does not run on images \(16, 3, 20, 20\)"),
    "another site": (lambda: batches(8), {"name": "taylor", "site": "fc3"}, r"site is 'fc3'; did you mean 'fc2'"),
    "another option": (lambda: batches(8), {"name": "taylor", "cite": "fc1"}, r"has no option 'cite'; did you mean 'site'"),
    "another statistic": (lambda: batches(8), {"name": "activation", "statistic": "meen"}, "did you mean 'mean'"),
    "no name": (lambda: batches(8), {"site": "fc1"}, "it must be a name, or a name with options"),
    "learning rate": (lambda: batches(8), {"name": "gate", "lr": 0.0}, r"lr is 0\.0; it must be a number above 0"),
    "another learning rate": (lambda: batches(8), {"name": "gate", "lr": "fast"}, "lr is 'fast'; it must be a number above 0"),
    "epochs": (lambda: batches(8), {"name": "gate", "epochs": 1.5}, r"epochs is 1\.5; it must be a whole number from 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_data(case: str, unchanged: Callable[[nn.Module], Callable[[], None]]) -> None:
    data, criterion, message = REFUSED[case]
    model = tiny_vit()
    check = unchanged(model)
    with pytest.raises(ReductionError, match=message) as raised:
        mlpreduce.apply(model, "shallow", criterion=criterion or "taylor", data=data())
    assert str(raised.value).startswith("shallow(criterion=")
    check()


@pytest.mark.parametrize(
    "config",
    [
        {"criterion": "l2", "repair": "least_squares"},  # the guard reads it too
        {"criterion": "taylor", "repair": "parallel"},
        {"criterion": {"name": "gate", "epochs": 2}},
        {"criterion": "reconstruction", "repair": "bias"},
    ],
)
def test_an_iterator_serves_as_a_list_does(config: dict[str, Any]) -> None:
    plans = [
        mlpreduce.plan(tiny_vit(), "shallow", ratio=0.5, data=data, **config)
        for data in (batches(8), iter(batches(8)), (batch for batch in batches(8)))
    ]
    for other in plans[1:]:
        assert other.to_json() == plans[0].to_json()


def test_what_reads_by_itself_refuses_an_iterator_that_is_needed_again() -> None:
    model = tiny_vit()
    with pytest.raises(ReductionError, match="the data can be read once only"):
        measure_gates(model, find_mlps(model), choose({"name": "gate", "epochs": 2}), iter(batches(8)))


@pytest.mark.parametrize("answer", [Ranking([0, 1], [1.0, 2.0]), Ranking(torch.rand(128), torch.rand(128))])  # type: ignore[arg-type]
def test_rankings_of_other_things_are_refused(answer: Ranking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criteria.registry, "_CRITERIA", dict(criteria.registry._CRITERIA))
    register_criterion("ranked")(lambda units: answer)
    with pytest.raises(
        ReductionError, match=r"criterion ranked\(\) gave a Ranking of .*; give the order as a tensor of whole"
    ):
        mlpreduce.plan(tiny_vit(), "shallow", ratio=0.5, criterion="ranked")


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (5, "loss is 5; give a function"),
        (lambda output, labels: output, r"loss gave a tensor \(16, 5\), not the mean over the examples"),
        (lambda output, labels: torch.tensor(1.0), "as a scalar tensor that depends on what the model gives"),
        (lambda output, labels: output.sum() * (1 / 0), r"the loss does not run on labels .*ZeroDivisionError"),
    ],
)
def test_refused_losses(loss: Any, message: str, unchanged: Callable[[nn.Module], Callable[[], None]]) -> None:
    model = tiny_vit()
    check = unchanged(model)
    for criterion in ("taylor", "gate"):
        with pytest.raises(ReductionError, match=message):
            mlpreduce.apply(model, "shallow", criterion=criterion, data=batches(8), loss=loss)
    check()


@pytest.mark.parametrize("repair", [True, False])
def test_refused_models(repair: bool, unchanged: Callable[[nn.Module], Callable[[], None]]) -> None:
    config: dict[str, Any] = {"repair": "least_squares"} if repair else {"criterion": "taylor"}
    for dtype in (torch.float16, torch.bfloat16):
        half = tiny_vit().to(dtype)
        check = unchanged(half)
        with pytest.raises(
            ReductionError, match=rf"cls_token is {dtype}, too coarse to measure with; use model\.float\(\)"
        ):
            mlpreduce.apply(half, "shallow", data=batches(8), **config)
        check()
    with torch.device("meta"):
        meta = timm.create_model("vit_tiny_patch16_224")
    with pytest.raises(ReductionError, match="on the meta device; give it weights first"):
        mlpreduce.plan(meta, "shallow", data=batches(8), **config)
    broken = tiny_vit()
    broken.blocks[1].attn.qkv.weight.data.fill_(torch.inf)
    with pytest.raises(ReductionError, match="not finite"):
        mlpreduce.plan(broken, "shallow", data=batches(8), **config)
    if repair:
        with pytest.raises(ReductionError, match=r"repair is 'least_square'; did you mean 'least_squares'"):
            mlpreduce.plan(tiny_vit(), "shallow", data=batches(8), repair="least_square")
        used = iter(batches(8))
        assert len(list(used)) == 5
        with pytest.raises(ReductionError, match=r"data is empty.*may be used up"):
            mlpreduce.plan(tiny_vit(), "shallow", criterion="taylor", data=used, repair="least_squares")


def test_unlike_widths_and_a_uniform_width() -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, window_size=7, depths=(1, 1, 1, 1))
    with pytest.raises(
        ReductionError, match=r"width=100 for MLPs of 384, 768, 1536, 3072 hidden units, which are unlike"
    ):
        mlpreduce.apply(model, "shallow", width=100)


# --- kinds ------------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:save cannot tell how")  # which is true of these builds
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_mlps(kind: str) -> None:
    """The changes at fc2 are those of its columns, whatever the MLP; and a slice by them, repaired, is no worse."""
    name, kwargs = KINDS[kind]
    model = built(name, kwargs)
    size = kwargs.get("img_size", 64)
    images, labels = examples(18, side=size)
    cross_entropy(model(images.double()), labels, reduction="sum").backward()
    found = {mlp.name: mlp for mlp in find_mlps(model)}
    tree = quiet_copy(model)
    taps = Taps(tree, list(found.values()), ("fc1", "fc2"))
    gates = taps.gates(1, images.double())
    with taps.multiplying(gates):
        total = cross_entropy(tree(images.double()), labels, reduction="sum")
    slopes = dict(zip(gates, torch.autograd.grad(total, list(gates.values())), strict=True))
    for mlp in found.values():
        fc2 = model.get_submodule(mlp.leaf("fc2").path)
        products = (fc2.weight * fc2.weight.grad).flatten(1).sum(0)
        offset = next(axis.offsets[0] for axis in mlp.axes if axis.tensor == f"{mlp.leaf('fc2').path}.weight")
        expected = products[offset : offset + mlp.hidden_features]
        torch.testing.assert_close(slopes[mlp.name, "fc2"][0], expected, rtol=1e-8, atol=1e-12)
        if mlp.kind in ("plain", "packed", "gated"):
            rows = torch.zeros(mlp.hidden_features, dtype=torch.float64)
            for leaf in (leaf for leaf in mlp.leaves if leaf.role == "fc1"):
                layer = model.get_submodule(leaf.path)
                products = (layer.weight * layer.weight.grad).flatten(1).sum(1)
                products += 0 if layer.bias is None else layer.bias * layer.bias.grad
                rows += products.unflatten(0, (-1, mlp.hidden_features)).sum(0)
            torch.testing.assert_close(slopes[mlp.name, "fc1"][0], rows.detach(), rtol=1e-8, atol=1e-12)
    data = [(images, labels)]
    if kind == "fused":
        with pytest.raises(ReductionError, match=r"repair='least_squares': blocks\.0\S* shares a layer with attention"):
            mlpreduce.plan(model, "shallow", criterion="taylor", data=data, repair="least_squares")
        assert mlpreduce.plan(model, "shallow", criterion="taylor", data=data).of(Slice)
        return
    before = model(images.double()).detach()
    gaps = []
    for repair in ("none", "least_squares"):
        other = built(name, kwargs)
        mlpreduce.apply(other, "shallow", criterion="taylor", data=data, repair=repair, round_to=8)
        gaps.append((other(images.double()) - before).norm().item())
    assert gaps[1] < gaps[0]


def test_images_that_are_not_along_the_first_dimension() -> None:
    class TokensFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.head = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.flatten(2).permute(2, 0, 1)  # (tokens, images, channels)
            return self.head((x + self.down(self.up(x).relu())).mean(0))

    model = TokensFirst()
    inputs = torch.zeros(2, 4, 4, 4)
    for count in (16, 24):
        data = batches(count, count, channels=4, side=4)
        with pytest.raises(ReductionError, match="does not have the examples one after the other"):
            mlpreduce.plan(model, "shallow", criterion="taylor", data=data, example_inputs=inputs)
    assert mlpreduce.plan(model, "shallow", criterion="l1", example_inputs=inputs).edits


# --- several processes --------------------------------------------------------------------------------------------------------


def _broken(data: list[Any]) -> Iterator[Any]:
    yield data[0]
    raise OSError("the disk is gone")


def _plans(rank: int, folder: str) -> None:
    images, labels = examples()
    mine = [(images[rank::2][:start], labels[rank::2][:start]) for start in (13 + rank,)]
    mine += [(images[rank::2][13 + rank :], labels[rank::2][13 + rank :])]
    for config in DISTRIBUTED:
        made = mlpreduce.plan(lively_vit(), "shallow", ratio=0.25, data=mine, **config)
        made.save(Path(folder) / f"{DISTRIBUTED.index(config)}-{rank}.json")
    for config in ({"criterion": "taylor"}, {"criterion": "gate"}, {"repair": "least_squares"}):
        with pytest.raises(ReductionError if rank == 0 else OSError, match="disk is gone"):
            mlpreduce.plan(lively_vit(), "shallow", data=mine if rank == 0 else _broken(mine), **config)
        with pytest.raises(ReductionError, match="process 1: needs calibration data"):
            mlpreduce.plan(lively_vit(), "shallow", data=None if rank else mine, **config)
    with pytest.raises(ReductionError if rank == 0 else OSError, match="disk is gone"):
        Loss().widths(lively_vit(), mine if rank == 0 else _broken(mine))
    bad = mine if rank == 0 else [(images.fill_(torch.nan), labels)]
    for config in ({"criterion": "taylor"}, {"criterion": "gate"}, {"repair": "least_squares"}):
        with pytest.raises(ReductionError, match="process 1: data has an image that is not finite"):
            mlpreduce.plan(lively_vit(), "shallow", data=bad, **config)
    with pytest.raises(ReductionError, match="and one is empty, with 1 in all"):
        mlpreduce.plan(lively_vit(), "shallow", repair="least_squares", data=[examples()[0][: 1 - rank]])
    made = mlpreduce.plan(lively_vit(), "shallow", repair="least_squares", data=[examples()[0][rank : rank + 1]])
    assert made.data is not None
    assert made.data["samples"] == 2
    few = [] if rank else mine
    for config in ({"criterion": "gate"}, {"repair": "least_squares"}):
        made = mlpreduce.plan(lively_vit(), "shallow", data=few, **config)
        assert made.data is not None
        assert made.data["samples"] == 20


DISTRIBUTED: list[dict[str, Any]] = [
    *({"criterion": name} for name in OF_DATA),
    {"criterion": {"name": "reconstruction", "ridge": 1e-2}},
    {"criterion": "l1", "repair": "parallel"},
    {"criterion": "l1", "repair": "least_squares"},
]
# what is looked at together, or which half or part of the examples an image is in, matters to these
SHARED = ({"criterion": "entropy_taylor"}, {"criterion": "gate"}, {"criterion": "reconstruction"}, DISTRIBUTED[-1])


@pytest.mark.processes
def test_two_processes_make_the_plan_of_one(together: Together, tmp_path: Path) -> None:
    together(_plans, str(tmp_path))
    for index, config in enumerate(DISTRIBUTED):
        one, other = (Plan.load(tmp_path / f"{index}-{rank}.json") for rank in range(2))
        assert one.to_json() == other.to_json()
        assert one.data is not None
        assert one.data["samples"] == 40
        if config not in SHARED:
            alone = mlpreduce.plan(lively_vit(), "shallow", ratio=0.25, data=batches(8), **config)
            assert alone.of(Slice) == one.of(Slice)
            for mine, theirs in zip(alone.of(Assign), one.of(Assign), strict=True):
                torch.testing.assert_close(mine.value, theirs.value, rtol=1e-8, atol=1e-10)


def test_what_a_criterion_gives_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criteria.registry, "_CRITERIA", dict(criteria.registry._CRITERIA))

    @register_criterion("without_examples", needs="images")
    def without_examples(seen: Seen) -> torch.Tensor:
        return seen.hidden.mean((0, 1))  # type: ignore[union-attr]

    @register_criterion("no_order")
    def no_order(units: HiddenUnits) -> torch.Tensor:
        return torch.ones(len(units), dtype=torch.long)

    @register_criterion("a_list")
    def a_list(units: HiddenUnits) -> Any:
        return list(range(len(units)))

    @register_criterion("misspelt")
    def misspelt(units: HiddenUnits) -> torch.Tensor:
        return units.weights("fc2.wieght").sum(1)

    @register_criterion("raises", needs="images")
    def raises(seen: Seen) -> torch.Tensor:
        raise KeyError("what it wants")

    with pytest.raises(ReductionError, match=r"criterion a_list\(\) gave a list; give a tensor"):
        mlpreduce.plan(tiny_vit(), "shallow", criterion="a_list")
    with pytest.raises(ReductionError, match=r"has none of fc2\.wieght on its hidden axis; did you mean 'fc2\.weight'"):
        mlpreduce.plan(tiny_vit(), "shallow", criterion="misspelt")
    with pytest.raises(ReductionError, match=r"criterion raises\(\) raised KeyError: 'what it wants'"):
        mlpreduce.plan(tiny_vit(), "shallow", criterion="raises", data=batches(8))
    with pytest.raises(ReductionError, match=r"needs is 'los'; did you mean 'loss'"):
        register_criterion("another", needs="los")(lambda seen: seen)  # type: ignore[arg-type]
    with pytest.raises(ReductionError, match="gates are learned with coefficient, lr, epochs; add the option 'lr'"):
        register_criterion("another", needs="gates")(lambda gates, *, coefficient=1.0: gates)
    with pytest.raises(ReductionError, match=r"values of shape \(128,\) for 16 examples and 128 hidden units"):
        mlpreduce.plan(tiny_vit(), "shallow", criterion="without_examples", data=batches(8))
    with pytest.raises(ReductionError, match="are no order of its 128 hidden units"):
        mlpreduce.plan(tiny_vit(), "shallow", criterion="no_order")


def test_entropy_of_tokens_is_that_of_their_mean() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(4, 5, 8)
    means = tokens.mean(1)
    assert torch.allclose(entropy(nn.Identity(), tokens), entropy(nn.Identity(), means))
    maps = tokens.transpose(1, 2).unflatten(2, (1, 5))
    assert torch.allclose(entropy(nn.Identity(), maps), entropy(nn.Identity(), means))


@pytest.mark.parametrize("kind", ["tuple", "dictionary", "hidden states", "pooled"])
def test_entropy_of_what_models_give(kind: str) -> None:
    torch.manual_seed(0)
    tokens, pooled = torch.randn(4, 5, 8), torch.randn(4, 8)

    class Model(nn.Module):
        def forward(self, images: torch.Tensor) -> Any:
            return {
                "tuple": (pooled, tokens),
                "dictionary": {"logits": pooled},
                "hidden states": SimpleNamespace(last_hidden_state=tokens, pooler_output=None),
                "pooled": SimpleNamespace(last_hidden_state=tokens, pooler_output=pooled),
            }[kind]

    plain = tokens if kind == "hidden states" else pooled
    assert torch.equal(entropy(Model(), images=torch.zeros(4, 3)), entropy(nn.Identity(), plain))


def test_random_choices_have_nothing_in_common() -> None:
    """Not for two MLPs, nor for two seeds; and which other MLPs are in scope makes no difference."""
    found = {}
    for seed in (0, 1):
        for edit in mlpreduce.plan(tiny_vit(), "shallow", criterion="random", seed=seed).of(Slice):
            found[seed, edit.mlp] = tuple(edit.units)
    assert len(set(found.values())) == 8
    alone = mlpreduce.plan(tiny_vit(), "shallow", criterion="random", include="blocks.2.*").of(Slice)
    assert tuple(alone[0].units) == found[0, "blocks.2.mlp"]
    huge = mlpreduce.plan(tiny_vit(), "shallow", criterion="random", seed=2**70).of(Slice)
    assert tuple(huge[0].units) not in found.values()


def test_weights_alone_count_for_l1_and_l2() -> None:
    """What a batch norm has seen is no weight of a unit, nor is the factor of a norm."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, scale_mlp_norm=True)
    plans = [mlpreduce.plan(model, "shallow", criterion=name) for name in ("l1", "l2")]
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.norm.weight.copy_(torch.linspace(-9, 9, len(block.mlp.norm.weight)))
    assert [mlpreduce.plan(model, "shallow", criterion=name).edits for name in ("l1", "l2")] == [p.edits for p in plans]
    mlp = find_mlps(model)[0]
    rows = torch.cat(
        [model.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.bias[:, None], model.blocks[0].mlp.fc2.weight.T], 1
    )
    assert torch.equal(criteria.unit_weights(mlp, model.state_dict().__getitem__), rows.detach())


def test_what_is_not_looked_at_is_told() -> None:
    text = str(mlpreduce.plan(tiny_vit(), "shallow", criterion="l1", data=batches(8), loss=cross_entropy))
    assert "note: loss made no difference: nothing here looks at it" in text  # the guard looks at the data
    text = str(mlpreduce.plan(tiny_vit(), "shallow", criterion="activation", data=batches(8), loss=cross_entropy))
    assert "loss made no difference" in text
    for config in ({"criterion": "taylor"}, {"repair": "least_squares"}):
        assert "made no difference" not in str(mlpreduce.plan(tiny_vit(), "shallow", data=batches(8), **config))


def test_settings_of_precision_are_as_before() -> None:
    """Those of PyTorch's newer names, which raise where the older ones are used beside them."""
    place = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = mlpreduce.plan(tiny_vit(), "shallow", criterion="taylor", data=batches(8)).edits
    found = place.fp32_precision  # of what ran before
    place.fp32_precision = "bf16"
    try:
        assert mlpreduce.plan(tiny_vit(), "shallow", criterion="taylor", data=batches(8)).edits == before
        assert place.fp32_precision == "bf16"
        with full_precision(torch.device("cpu")):
            assert place.fp32_precision == "ieee"
    finally:
        place.fp32_precision = "none"
    torch.backends.fp32_precision = "tf32"
    try:
        with full_precision(torch.device("cpu")):
            assert place.fp32_precision == "ieee"
        torch.backends.fp32_precision = "ieee"
        assert place.fp32_precision == "ieee"  # it follows what is set for all, as before
    finally:
        torch.backends.fp32_precision = "none"
        place.fp32_precision = found
    assert torch.get_float32_matmul_precision() == "highest"
