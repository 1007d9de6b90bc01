"""The repair in order of execution: what a loop written by hand gives, what it judges by, and that it never harms."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from helpers.kinds import KINDS, built
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

import mlpreduce
from mlpreduce.calibration import Batch, quiet_copy
from mlpreduce.edits import Assign
from mlpreduce.graph import find_mlps
from mlpreduce.repair import repaired
from mlpreduce.repair.fit import RIDGES
from mlpreduce.repair.judging import is_further, nearness
from mlpreduce.repair.sequential import _read, _split
from mlpreduce.repair.streams import Cut, Joints
from mlpreduce.repair.whole import Whole
from mlpreduce.testing import tiny_vit


def lively(**kwargs: Any) -> nn.Module:
    """A ViT in float64 whose MLPs matter and whose examples differ."""
    model = tiny_vit(**kwargs).double().eval()
    for name, parameter in model.named_parameters():
        if ".mlp." in name or "patch_embed" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def pictures(count: int, seed: int = 3, side: int = 16) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed)).double()


def streams(model: Any, images: torch.Tensor) -> list[torch.Tensor]:
    """The stream after each block."""
    x = model._pos_embed(model.patch_embed(images))
    found = []
    for block in model.blocks:
        x = block(x)
        found.append(x)
    return found


def by_importance(whole: Any, every: torch.Tensor, out: torch.Tensor) -> list[torch.Tensor]:
    """For each block, what the outputs hang on what its MLP gives at each token, (examples, tokens), halfway to 1."""
    generator = torch.Generator().manual_seed(0)
    found: list[list[torch.Tensor]] = [[] for _ in whole.blocks]
    with torch.enable_grad():
        for images in every.split(16):
            kept: list[torch.Tensor] = []
            handles = [
                block.mlp.fc2.register_forward_hook(lambda m, args, given, kept=kept: kept.append(given))
                for block in whole.blocks
            ]
            given = whole(images)
            for handle in handles:
                handle.remove()
            given = given / given.detach().norm(dim=1, keepdim=True)
            along = torch.randn(given.shape, generator=generator, dtype=torch.float64)
            for some, slope in zip(found, torch.autograd.grad((given * along).sum(), kept), strict=True):
                some.append(slope.square().sum(-1))
    fitted = [torch.cat(some)[~out] for some in found]
    return [0.5 + 0.5 * value / value.mean() for value in fitted]


def falls(wanted: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether cosine or alignment falls by more than two standard errors, which leave out a tenth of the examples each."""

    def changes(some: torch.Tensor) -> torch.Tensor:
        values = []
        for given in (before, after):
            x, y = (v[some] - v[some].mean(0) for v in (wanted, given))
            alignment = (x @ x.T * (y @ y.T)).sum() / (x @ x.T).norm() / (y @ y.T).norm()
            values.append(torch.stack([torch.cosine_similarity(wanted[some], given[some]).mean(), alignment]))
        return values[1] - values[0]

    every = torch.arange(len(wanted))
    count = min(10, len(wanted))
    parts = torch.stack([changes(every[every % 10 != part]) for part in range(count)])
    error = ((count - 1) / count * (parts - parts.mean(0)).square().sum(0)).sqrt()
    return bool((changes(every) < -1e-6 - 2 * error).any())


def by_hand(whole: Any, part: Any, images: torch.Tensor, out: torch.Tensor) -> list[int]:
    """Repair `part` in place, block by block, as the formulas say; which blocks stay as they were."""
    left = []
    fit, held = images[~out], images[out]
    wanted = whole(held)

    def given(number: int) -> torch.Tensor:
        """By the whole model with the blocks up to this one from the other."""
        z = streams(part, held)[number]
        for block in whole.blocks[number + 1 :]:
            z = block(z)
        found: torch.Tensor = whole.forward_head(whole.norm(z))
        return found

    weights = by_importance(whole, images, out)
    for number, block in enumerate(part.blocks):
        kept: list[torch.Tensor] = []
        handle = block.mlp.fc2.register_forward_pre_hook(lambda module, args, kept=kept: kept.append(args[0]))
        missing = streams(whole, fit)[number] - streams(part, fit)[number]
        handle.remove()
        g = block.ls2.gamma if hasattr(block.ls2, "gamma") else torch.ones(missing.shape[-1]).double()
        halves = []
        for half in range(2):
            # 14 examples are left of a batch of 16, each of which is halved
            pick = torch.tensor([i for i in range(len(fit)) if i % 14 % 2 == half])
            halves.append(tuple(v[pick].flatten(0, 1) for v in (kept[0], missing, weights[number][..., None])))

        def change(
            a: torch.Tensor, e: torch.Tensor, w: torch.Tensor, share: float, g: torch.Tensor = g
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """Each output by a least squares of its own."""
            means = [(w * v).sum(0) / w.sum() for v in (a, e)]
            centred, wanted = w.sqrt() * (a - means[0]), w.sqrt() * (e - means[1])
            square = centred.T @ centred
            size = len(square)
            ridge = float(share * g.square().mean() * square.diagonal().mean())
            d = torch.zeros(len(g), size).double()
            if share < float("inf"):
                for i, factor in enumerate(g):
                    inner = factor**2 * square + ridge * torch.eye(size).double()
                    d[i] = torch.linalg.solve(inner, factor * centred.T @ wanted[:, i])
            return d, means[1] / g - d @ means[0]

        def error(d: Any, b: Any, a: torch.Tensor, e: torch.Tensor, w: torch.Tensor, g: torch.Tensor = g) -> float:
            return float((w * (e - g * (a @ d.T + b)).square()).sum())

        sums = []
        for share in RIDGES:
            one, two = change(*halves[0], share), change(*halves[1], share)
            sums.append(error(*one, *halves[1]) + error(*two, *halves[0]))
        rows = [torch.cat([half[i] for half in halves]) for i in range(3)]
        d, b = change(*rows, RIDGES[sums.index(min(sums))])
        old, without = copy.deepcopy(block.mlp.fc2.state_dict()), given(number)
        with torch.no_grad():
            if min(sums) < float((rows[2] * rows[1].square()).sum()):
                block.mlp.fc2.weight += d
                block.mlp.fc2.bias += b
        if falls(wanted, without, given(number)):
            block.mlp.fc2.load_state_dict(old)
            left.append(number)
    return left


@pytest.mark.parametrize("init_values", [None, 0.1])
def test_it_is_what_a_loop_by_hand_gives(init_values: float | None) -> None:
    model = lively(init_values=init_values)
    if init_values:
        for block in model.blocks:  # type: ignore[union-attr]
            nn.init.uniform_(block.ls2.gamma, 0.05, 0.4)  # type: ignore[union-attr]
    images = pictures(64)
    made = mlpreduce.plan(model, "shallow", ratio=0.5, data=[images], repair="least_squares", guard=False)
    part = mlpreduce.apply(copy.deepcopy(model), "shallow", ratio=0.5)
    out = torch.arange(64) % 8 == 7
    with torch.no_grad():
        left = by_hand(copy.deepcopy(model), part, images, out)
    values = {edit.tensor: edit.value for edit in made.of(Assign)}
    assert {int(path.split(".")[1]) for path in values} == {*range(4)} - {*left}
    for number in {*range(4)} - {*left}:
        for name in ("weight", "bias"):
            path = f"blocks.{number}.mlp.fc2.{name}"
            torch.testing.assert_close(values[path], part.get_parameter(path).detach(), rtol=1e-7, atol=1e-8)
    assert made.data is not None
    with torch.no_grad():
        near = torch.cosine_similarity(model(images[out]), part(images[out])).mean()
    assert made.data["cosine"][0] == pytest.approx(float(near), abs=1e-8)


@pytest.mark.slow
def test_it_comes_nearer_than_the_parallel_one_and_never_harms() -> None:
    model, images, fresh = lively(), pictures(256), pictures(64, seed=9)
    before = model(fresh).detach()
    for criterion in ("first", "taylor", "energy", "reconstruction"):
        near = {}
        for repair in ("none", "parallel", "least_squares"):
            data = [(images, torch.arange(256) % 5)]
            other = copy.deepcopy(model)
            mlpreduce.apply(other, "shallow", ratio=0.25, criterion=criterion, data=data, repair=repair)
            near[repair] = float(torch.cosine_similarity(other(fresh), before).mean().detach())
        assert near["least_squares"] >= near["none"] - 0.01, criterion
        if criterion != "first":  # whose examples are less alike to each other with a repair, so that it gets none
            assert near["least_squares"] > near["parallel"], criterion


def test_the_bias_takes_up_the_mean_of_what_goes() -> None:
    model, images = lively(depth=1), pictures(32)
    made = mlpreduce.plan(model, "shallow", ratio=0.5, data=[images], repair="bias", guard=False)
    (edit,) = made.of(Assign)
    assert edit.tensor == "blocks.0.mlp.fc2.bias"
    kept: list[torch.Tensor] = []
    fc2: Any = model.get_submodule("blocks.0.mlp.fc2")
    fc2.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    fit = images[torch.arange(32) % 8 != 7]
    with torch.no_grad():
        model(fit)
        mean = kept[0].flatten(0, 1).mean(0)
        expected = fc2.bias + fc2.weight[:, 64:] @ mean[64:]
    torch.testing.assert_close(edit.value, expected, rtol=1e-9, atol=1e-12)


KINDS_HERE = [kind for kind in KINDS if kind != "fused"]


@pytest.mark.filterwarnings("ignore:save cannot tell how")
@pytest.mark.parametrize("kind", KINDS_HERE)
def test_kinds_of_mlps_come_nearer(kind: str) -> None:
    name, kwargs = KINDS[kind]
    model = built(name, kwargs)
    images = pictures(32, side=kwargs.get("img_size", 64))
    before = model(images).detach()
    gaps = []
    for repair in ("none", "least_squares"):
        other = built(name, kwargs)
        made = mlpreduce.plan(other, "shallow", criterion="l1", data=[images], repair=repair, round_to=8)
        mlpreduce.apply(other, made)
        gaps.append((other(images) - before).norm().item())
    assert gaps[1] <= gaps[0]
    assert made.of(Assign)


DEIT = {"depth": 3, "img_size": 32, "embed_dim": 48, "num_heads": 2}
SWIN = {"img_size": 64, "depths": (2, 2), "embed_dim": 16, "num_heads": (2, 2), "window_size": 4}
STREAMS: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "vit": ("vit_tiny_patch16_224", {"depth": 3, "img_size": 32}, False),
    "layer scale": ("deit3_small_patch16_224", DEIT, False),
    "norm of the branch": ("swinv2_tiny_window8_256", SWIN, True),
    "1 x 1 convolutions": (*KINDS["1 x 1 convolutions"], False),
    "tokens": (*KINDS["tokens"], False),
}  # fmt: skip


@pytest.mark.parametrize("kind", STREAMS)
def test_the_stream_is_found(kind: str) -> None:
    """A change of what fc2 gives moves the place by the factor times the change; nothing else is there to find."""
    name, kwargs, own = STREAMS[kind]
    model: Any = timm.create_model(name, **kwargs) if isinstance(name, str) else name(**kwargs)
    model = model.double().eval()
    for module in model.modules():
        if type(module).__name__.startswith("LayerScale"):
            nn.init.uniform_(module.gamma, 0.1, 0.9)
    tree = quiet_copy(model)
    with torch.no_grad():
        mlps = find_mlps(model)
        joints = Joints(tree, [mlp.block for mlp in mlps], Batch(pictures(2, side=kwargs.get("img_size", 64))))
        for mlp in mlps:
            joint = joints.find(mlp.leaf("fc2").call, 0, mlp.block, -1 if "conv" not in kind else 1)
            assert joint.followed, mlp.name
            assert (joint.order == (0, 2, 1)) == ("tokens" in mlp.name)  # an MLP over tokens gives them last
            scale = getattr(model.get_submodule(mlp.block), "ls2", None)
            if own:
                assert joint.place.startswith(mlp.block)  # the norm that only sees the branch
            elif hasattr(scale, "gamma"):
                torch.testing.assert_close(joint.factor, scale.gamma.detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("gamma", [1e-6, 1e-5, 1.0])
def test_a_layer_scale_that_is_nearly_shut_is_followed(gamma: float) -> None:
    """In single precision a change of what the MLP gives, times 1e-6, would be next to the rounding of the stream."""
    model: Any = timm.create_model("deit3_small_patch16_224", **DEIT).eval()
    for block in model.blocks:
        nn.init.constant_(block.ls2.gamma, gamma)
    mlps, tree = find_mlps(model), quiet_copy(model)
    with torch.no_grad():
        joints = Joints(tree, [mlp.block for mlp in mlps], Batch(pictures(2, side=32).float()))
        for mlp in mlps:
            joint = joints.find(mlp.leaf("fc2").call, 0, mlp.block, -1)
            assert joint.followed
            torch.testing.assert_close(joint.factor.mean(), torch.tensor(gamma).double(), rtol=1e-3, atol=0)


def test_where_no_stream_is_found_the_mlps_own_output_is_wanted() -> None:
    class Squared(nn.Module):
        """A block whose stream is bent at once."""

        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.fc2(self.act(self.fc1(x)))

    class Bent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Squared(), Squared()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x).relu()
            return x

    model = Bent().double().eval()
    data = [torch.randn(64, 5, 6).double()]
    mlp = find_mlps(model, data[0][:2])[0]
    with torch.no_grad():
        joints = Joints(quiet_copy(model), [mlp.name], Batch(data[0][:2]))
        assert not joints.find(mlp.leaf("fc2").call, 0, "", -1).followed
        assert joints.find(mlp.leaf("fc2").call, 0, mlp.name, -1).followed


def test_runs_that_begin_at_a_block_give_the_same() -> None:
    model, images = lively(), pictures(4)
    tree = quiet_copy(model)
    calls: list[int] = []
    for number, block in enumerate(tree.blocks):  # type: ignore[union-attr, arg-type]
        block.attn.register_forward_hook(lambda module, args, output, number=number: calls.append(number))
    cut = Cut(tree, [f"blocks.{i}" for i in range(4)], ["blocks"] * 4)
    with torch.no_grad(), cut.at(0, 3):
        whole = tree(images)
    cut.end(3)
    for most in (2, 3):
        cut.begin(most)
        calls.clear()
        with torch.no_grad(), cut.at(0, 4):
            again = tree(images)
        assert calls == list(range(most, 4))
        assert torch.equal(again, whole)
        cut.end(3)
    assert "forward" not in vars(tree.get_submodule("blocks.0"))


def test_alignment_and_cosine() -> None:
    from mlpreduce.calibration.similarity import linear_cka

    x, y = torch.randn(20, 6).double(), torch.randn(20, 6).double()
    assert nearness(x, x) == pytest.approx((1.0, 1.0))
    assert nearness(x, 3 * x)[0] == pytest.approx(1.0)
    cosine, alignment = nearness(x, x + 5)
    assert alignment == pytest.approx(1.0)
    assert cosine < 0.9
    assert nearness(x, y)[1] == pytest.approx(linear_cka(x, y))


def test_only_what_is_more_than_chance_counts() -> None:
    x = torch.randn(60, 8).double()
    noise = torch.randn(60, 8).double()
    near, alike, far = x + 0.3 * noise, x + 0.3 * noise.flip(0), x + 2 * noise
    assert is_further(x, near, far)
    assert not is_further(x, far, near)
    assert not is_further(x, near, alike)
    assert not is_further(x, near, near)
    turned = torch.cat([x[:30], 3 * x[30:]])  # the cosine stays, and how alike examples are does not
    assert nearness(x, turned)[0] == pytest.approx(1.0)
    assert is_further(x, x, turned)


def test_a_gain_by_cosine_makes_up_for_a_small_loss_of_alignment_and_no_more() -> None:
    x, noise = torch.randn(60, 8).double(), torch.randn(60, 8).double()
    moved, near, far = x + 2, x + 0.2 * noise, x + 2 * noise
    assert nearness(x, moved) == pytest.approx((0.5, 1.0), abs=0.2)
    assert 0.9 < nearness(x, near)[1] < 1
    assert not is_further(x, moved, near)
    assert is_further(x, near, moved)
    assert is_further(x, moved, far)
    turned = torch.cat([x[:30], 9 * x[30:]])  # of a gain of alignment the cosine must not pay
    assert sum(nearness(x, x + 0.3)) > sum(nearness(x, turned))
    assert is_further(x, turned, x + 0.3)


def test_tied_mlps_are_fitted_at_their_last_use() -> None:
    model, images = lively(), pictures(64)
    before = model(images).detach()
    near = []
    for repair in ("none", "least_squares"):
        other = mlpreduce.apply(copy.deepcopy(model), "grouped", group=2, scale="none", data=[images], repair=repair)
        assert other.blocks[0].mlp.fc2 is other.blocks[1].mlp.fc2  # type: ignore[union-attr, index]
        near.append(float(torch.cosine_similarity(other(images), before).mean().detach()))
    assert near[1] > near[0]


def test_few_examples_are_fitted_and_judged_by_all() -> None:
    from mlpreduce.calibration import Samples

    model = tiny_vit()

    def counts(number: int) -> list[list[int]]:
        data = Samples([pictures(number).float()], model, labels=False)
        return [[int(which.sum()) for _, which in some] for some in _split(_read(data, "bias"))]

    assert counts(5) == [[5], [5]]
    assert counts(40) == [[14, 14, 7], [2, 2, 1]]


def test_blocks_that_are_shared_as_a_whole() -> None:
    """Their norms are one; their outputs are not."""
    model, images = lively(), pictures(64)
    before = model(images).detach()
    near = []
    for repair in ("none", "least_squares"):
        other = copy.deepcopy(model)
        made = mlpreduce.plan(other, "grouped", group=2, share="block", scale="none", data=[images], repair=repair)
        mlpreduce.apply(other, made)
        near.append(float(torch.cosine_similarity(other(images), before).mean().detach()))
    assert near[1] > near[0]
    assert not any("no stream" in note for note in made.notes)


def test_a_reduced_model_is_reduced_further() -> None:
    model, images = lively(), pictures(256)
    mlpreduce.apply(model, "grouped", group=2, scale="none")
    before = model(images).detach()
    near = []
    for repair in ("none", "least_squares"):
        other = copy.deepcopy(model)
        mlpreduce.apply(other, "shallow", ratio=0.5, criterion="reconstruction", data=[images], repair=repair)
        near.append(float(torch.cosine_similarity(other(images), before).mean().detach()))
    assert near[1] > near[0]


def test_mlps_that_need_no_repair_are_passed_by() -> None:
    model, images = lively(), pictures(64)
    before = model(images).detach()
    with torch.no_grad():
        for number in range(3):
            model.get_submodule(f"blocks.{number}.mlp.fc2").weight[:, 64:] = 0  # type: ignore[operator]
    whole = model(images).detach()
    assert not torch.equal(before, whole)
    made = mlpreduce.plan(model, "shallow", ratio=0.5, data=[images], repair="least_squares", guard=False)
    assert len(made.of(Assign)) < 8
    mlpreduce.apply(model, made)
    assert made.data is not None
    assert made.data["cosine"][0] >= made.data["cosine_before"][0]


@pytest.mark.parametrize("criterion", ["taylor", "activation", {"name": "energy", "about": "mean"}])
def test_what_a_criterion_reads_is_not_read_again(criterion: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is the same, to the bit, as where the whole model runs once more for the repair."""
    model, data = lively(), [(pictures(40), torch.arange(40) % 5), (pictures(24, seed=4), torch.arange(24) % 5)]
    config: dict[str, Any] = {"ratio": 0.5, "criterion": criterion, "guard": False}
    chosen = mlpreduce.plan(model, "shallow", data=data, **config, repair="none")
    runs: list[Batch] = []
    monkeypatch.setattr(
        Whole, "over", lambda self, tree, batch, over=Whole.over: (runs.append(batch), over(self, tree, batch))[1]
    )
    after = repaired(
        model, find_mlps(model), replace(chosen, config={**chosen.config, "repair": "least_squares"}), data
    )
    assert len(runs) == 4
    at_once = mlpreduce.plan(model, "shallow", data=data, **config, repair="least_squares")
    assert len(runs) == 8  # and not 12
    values = [{edit.tensor: edit.value for edit in made.of(Assign)} for made in (after, at_once)]
    assert values[0].keys() == values[1].keys()
    assert values[0]
    assert all(torch.equal(values[0][path], values[1][path]) for path in values[0])


def test_data_in_another_order_is_read_again() -> None:
    model, images = lively(), pictures(64)

    class Shuffled(list[torch.Tensor]):
        def __iter__(self) -> Any:
            self.reverse()
            return super().__iter__()

    near = [
        mlpreduce.plan(
            model, "shallow", ratio=0.5, criterion="activation", data=data, repair="least_squares", guard=False
        ).data
        for data in (Shuffled(images.split(16)), [*images.split(16)])
    ]
    assert all(found is not None and found["cosine"][0] > found["cosine_before"][0] for found in near)


def test_a_graph_is_judged_as_its_model_is() -> None:
    model, images = lively(), pictures(96)
    graph = mlpreduce.to_graph(copy.deepcopy(model))
    plans = [
        mlpreduce.plan(each, "shallow", ratio=0.25, criterion="l1", data=[images], repair="least_squares")
        for each in (model, graph)
    ]
    assert plans[0].data is not None
    assert plans[1].data is not None
    assert plans[0].data["cosine"] == plans[1].data["cosine"]
    values = [{edit.tensor: edit.value for edit in plan.of(Assign)} for plan in plans]
    assert values[0].keys() == values[1].keys()
    assert all(torch.equal(values[0][path], values[1][path]) for path in values[0])


class Wrapped(nn.Module):
    """A ViT that gives what `form` makes of its logits."""

    def __init__(self, model: nn.Module, form: Any) -> None:
        super().__init__()
        self.model, self.form = model, form

    def forward(self, images: torch.Tensor) -> Any:
        return self.form(self.model(images))


@pytest.mark.parametrize(
    "form",
    [
        lambda x: {"scores": x, "count": torch.arange(3)},
        lambda x: (x, x.mean()),
        lambda x: {"logits": x, "others": 9 * x.flip(0)},
        lambda x: BaseModelOutputWithPooling(last_hidden_state=x[:, None], pooler_output=x),
    ],
)
def test_any_output_can_be_judged(form: Any) -> None:
    model, images = lively(), pictures(64)
    plans = [
        mlpreduce.plan(each, "shallow", ratio=0.5, data=[images], repair="least_squares", example_inputs=images[:2])
        for each in (model, Wrapped(model, form))
    ]
    assert plans[0].data is not None
    assert plans[1].data is not None
    assert plans[1].data["cosine"] == pytest.approx(plans[0].data["cosine"])


def test_outputs_that_say_nothing_of_each_image_are_refused() -> None:
    model, images = Wrapped(lively(), lambda x: {"loss": x.mean()}), pictures(32)
    with pytest.raises(
        mlpreduce.ReductionError, match=r"gives a dict without a tensor of \d+ examples.*repair='parallel' does without"
    ):
        mlpreduce.plan(model, "shallow", ratio=0.5, data=[images], repair="least_squares", example_inputs=images[:2])
    made = mlpreduce.plan(model, "shallow", ratio=0.5, data=[images], repair="parallel", example_inputs=images[:2])
    assert made.of(Assign)


def test_what_is_not_finite_is_further() -> None:
    x = torch.randn(40, 6).double()
    broken = x.clone()
    broken[3] = torch.nan
    assert is_further(x, 0.1 * x + torch.randn(40, 6).double(), broken)
    assert not is_further(x[:1], x[:1], x[:1])
