"""What researchers write: found and reduced exactly, or refused; never half right."""

from __future__ import annotations

import math
import threading
import types
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mlpreduce
from mlpreduce import ReductionError, find_mlps
from mlpreduce.budget import measure
from mlpreduce.coverage.proofs import sliced_against_masked
from mlpreduce.graph.recording import read
from mlpreduce.graph.rules import operation

D, H, N = 12, 40, 7


class Block(nn.Module):
    """A plain MLP block; `hidden` is what others change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.act, self.fc2 = nn.LayerNorm(D), nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.fc1(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(self.hidden(self.norm(x)))


class Net(nn.Module):
    def __init__(self, make: Callable[[], nn.Module], depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(make() for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Function(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class Written(Block):
    """GELU written out."""

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        h = self.fc1(x)
        return h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))


class Adaptive(Block):
    """adaLN-Zero, as in DiT."""

    def __init__(self) -> None:
        super().__init__()
        self.ada = nn.Linear(D, 3 * D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shift, scale, gate = self.ada(F.silu(x.mean(1))).unsqueeze(1).chunk(3, -1)
        return x + gate * self.fc2(self.hidden(self.norm(x) * (1 + scale) + shift))


class Recurrent(nn.Module):
    """One MLP with a BatchNorm, called in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.bn, self.fc2 = nn.Conv2d(D, H, 1), nn.BatchNorm2d(H), nn.Conv2d(H, D, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = x + self.fc2(torch.relu(self.bn(self.fc1(x))))
        return x


@pytest.mark.parametrize(
    ("make", "shape", "count"),
    [
        (lambda: Net(Written), (2, N, D), 2),
        (lambda: Net(Adaptive), (2, N, D), 2),
        (Recurrent, (2, D, 4, 4), 2),
    ],
    ids=["written out", "adaptive", "recurrent"],
)
def test_ordinary_models_are_reduced_exactly(make: Callable[[], nn.Module], shape: tuple[int, ...], count: int) -> None:
    torch.manual_seed(0)
    model, x = make().double().eval(), torch.randn(shape, dtype=torch.float64)
    mlps = find_mlps(model, x)
    assert (len(mlps), {mlp.kind.partition("+")[0] for mlp in mlps}) == (count, {"plain"})
    gap, effect = sliced_against_masked(model, x)
    assert gap < 1e-12 < effect


class SoftMax(Block):
    def __init__(self) -> None:
        super().__init__()
        self.act = Function(lambda x: x.softmax(-1))


class Gelu(Block):
    def __init__(self) -> None:
        super().__init__()
        self.act = Function(F.gelu)


class AcrossChannels(nn.Module):
    """A nonlinearity that looks across channels, which are not the last dimension here."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv1d(D, H, 1), nn.Conv1d(H, D, 1)
        self.act = Function(lambda x: F.gelu(x) / (1 + x.norm(dim=-2, keepdim=True)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(self.act(self.fc1(x)))


class Shuffling(nn.Module):
    """A depthwise convolution with a forward of its own."""

    class Conv(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.channel_shuffle(super().forward(x), 2)

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(D, H, 1), nn.Conv2d(H, D, 1)
        self.mlp = self.Conv(H, H, 3, padding=1, groups=H)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(F.gelu(self.mlp(self.fc1(x))))


class OwnForward(Block):
    """A layer whose forward was replaced on the instance."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1.forward = types.MethodType(
            lambda self, x: F.normalize(F.linear(x, self.weight, self.bias), dim=-1), self.fc1
        )


class BoundedByAnother(Block):
    """A second tensor of the hidden width where a bound is expected."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(D, H)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        return torch.clamp(F.gelu(self.fc1(x)), max=self.other(x))


class AlongTokens(Block):
    """Two expanding layers, concatenated along the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(D, H)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([F.gelu(self.first(x[:, :1])), F.gelu(self.fc1(x[:, 1:]))], 1)


class SharedParameter(Block):
    """A scale of the hidden units that also serves elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.aux = nn.Parameter(torch.ones(H)), nn.Linear(D, H)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.fc2(self.act(self.fc1(x)) * self.scale)
        return x + (self.aux(x) * self.scale).sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (SoftMax, (2, N, D)),
        (AcrossChannels, (2, D, 9)),
        (Shuffling, (2, D, 4, 4)),
        (OwnForward, (2, N, D)),
        (BoundedByAnother, (2, N, D)),
        (AlongTokens, (2, N, D)),
        (SharedParameter, (2, N, D)),
    ],
)
def test_what_would_be_wrong_is_refused(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert find_mlps(Net(make), x) == []
    assert find_mlps(Net(make)) == []


def test_what_one_instance_does_says_nothing_of_another() -> None:
    x = torch.randn(2, N, D)
    for _ in range(2):
        assert [mlp.name for mlp in find_mlps(nn.Sequential(SoftMax(), Gelu()), x)] == ["1"]
        assert [mlp.name for mlp in find_mlps(nn.Sequential(Gelu(), SoftMax()), x)] == ["0"]


def test_a_width_in_figures_is_refused_before_anything_changes(unchanged) -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(D, 2 * H), nn.Linear(H, D)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b = self.fc1(x).split(H, dim=-1)
            return x + self.fc2(F.silu(a) * b)

    class View(Block):
        def hidden(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(self.fc1(x).view(x.shape[0] * x.shape[1], H)).view(*x.shape[:2], H)

    for make in (Split, View):
        model, x = Net(make), torch.randn(2, N, D)
        check = unchanged(model)
        with pytest.raises(
            ReductionError, match=r"sliced, the model does not run .* its forward has a hidden width in figures"
        ):
            mlpreduce.apply(model, "shallow", example_inputs=x)
        check()
        mlpreduce.apply(model, "grouped", example_inputs=x)(x)


def test_a_layer_of_two_mlps_is_not_sliced_for_one() -> None:
    model, x = Net(Block), torch.randn(2, N, D)
    model.blocks[1].fc1 = model.blocks[0].fc1
    for scope in ({}, {"include": "blocks.0*"}):
        with pytest.raises(
            ReductionError, match=r"blocks.1.fc1.weight is part of blocks.0 and blocks.1, which are not tied"
        ):
            mlpreduce.apply(model, "shallow", example_inputs=x, **scope)


def test_hooks_that_may_know_the_width(unchanged) -> None:
    model = Net(Block)
    model.blocks[0].fc1.register_forward_hook(lambda module, args, output: output * torch.ones(H))
    check = unchanged(model)
    with pytest.raises(ReductionError, match=r"blocks.0.fc1 has forward hooks, which may know its old width"):
        mlpreduce.apply(model, "shallow")
    check()


@pytest.mark.parametrize("towers", [nn.ModuleList, nn.Sequential])
def test_towers_are_apart(towers: type[nn.Module]) -> None:
    class Attending(Block):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(D, D)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x + self.mix(x).softmax(1))

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            nets = [Net(Attending, 4), Net(Attending, 4)]
            self.towers = towers(nets) if towers is nn.ModuleList else towers(*nets)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.towers[0](x) + self.towers[1](x)

    owners = {row.mlp: row.owner for row in mlpreduce.plan(Both(), "grouped").rows}
    assert owners["towers.0.blocks.1"] == "towers.0.blocks.0"
    assert owners["towers.1.blocks.3"] == "towers.1.blocks.2"


def test_overlapping_searches_leave_torch_as_it_was() -> None:
    together = threading.Barrier(3, timeout=60)

    class Meeting(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            together.wait()  # every search is in the middle of its run when another is
            return super().forward(x)

    call, x = nn.Module.__call__, torch.randn(2, N, D)
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(len(find_mlps(Net(Meeting), x)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [2, 2, 2]
    assert nn.Module.__call__ is call

    class Random(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x + torch.rand(x.shape, device=x.device) * 0)

    model = Net(Random)
    state = torch.random.get_rng_state()
    find_mlps(model, x)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all("forward" not in vars(module) for module in model.modules())


def test_inputs_in_lists_and_without_dimensions() -> None:
    class Crops(Net):
        def forward(self, crops: list[torch.Tensor], scale: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return torch.cat([super(Crops, self).forward(crop * scale) for crop in crops], 1)

    inputs = ([torch.randn(2, N, D), torch.randn(2, 3, D)], torch.tensor(0.5))
    assert len(find_mlps(Crops(Block), inputs)) == 4
    assert str(mlpreduce.plan(Crops(Block), "shallow", example_inputs=inputs))
    assert measure(Crops(Block), inputs).cost.unique_mlps == 2


def test_lazy_layers_are_to_be_run_first() -> None:
    model = Net(Block)
    model.head = nn.LazyLinear(4)
    with pytest.raises(ReductionError, match=r"head.weight has no shape yet; run the model once"):
        mlpreduce.apply(model, "shallow")


def test_many_paths_are_walked_once() -> None:
    class Woven(Block):
        def hidden(self, x: torch.Tensor) -> torch.Tensor:
            h = self.fc1(x)
            for _ in range(30):  # 2**30 paths
                h = torch.tanh(h) + torch.sigmoid(h)
            return h

    model, x = Net(Woven, 1).double(), torch.randn(2, N, D, dtype=torch.float64)
    gap, effect = sliced_against_masked(model, x)
    assert gap < 1e-12 < effect


def test_a_leaf_may_make_tensors_where_its_input_is() -> None:
    class Embedding(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with x.device:
                return x + torch.arange(x.shape[1])[:, None]

    class Positioned(Block):
        def __init__(self) -> None:
            super().__init__()
            self.positions = Embedding()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(self.positions(x))

    assert len(find_mlps(Net(Positioned), torch.randn(2, N, D))) == 2


@pytest.mark.parametrize("cls", [nn.Identity, nn.Dropout])
def test_a_leaf_that_should_do_nothing_and_does_is_seen(cls: type[nn.Module]) -> None:
    class Tapped(Block):
        def __init__(self) -> None:
            super().__init__()
            self.tap = cls()

        def hidden(self, x: torch.Tensor) -> torch.Tensor:
            return self.tap(super().hidden(x))

    model, x = Net(Tapped), torch.randn(2, N, D)
    assert len(find_mlps(model, x)) == 2
    for block in model.blocks:
        block.tap.forward = lambda h: h.softmax(-1)
    assert find_mlps(model, x) == []


def test_rates_of_dropout_do_not_tell_mlps_apart() -> None:
    class Dropped(Block):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(torch.rand(()).item())

        def hidden(self, x: torch.Tensor) -> torch.Tensor:
            return self.drop(super().hidden(x))

    traced = mlpreduce.to_graph(Net(Dropped))
    for model, inputs in ((Net(Dropped), torch.randn(2, N, D)), (Net(Dropped), None), (traced, None)):
        mlpreduce.apply(model, "grouped", example_inputs=inputs)
        first, second = (model.get_submodule(f"blocks.{depth}") for depth in range(2))
        assert first.fc1 is getattr(second, "fc1", first.fc1)
        assert first.drop.p != second.drop.p


def test_a_recorded_graph_has_the_calls_of_the_model_and_no_others() -> None:
    _, graph, _ = read(Net(Block), torch.randn(2, N, D))
    assert [node.target for node in graph.nodes if node.op == "call_module"] == [
        f"blocks.{depth}.{leaf}" for depth in range(2) for leaf in ("norm", "fc1", "act", "fc2")
    ]
    assert [operation(node) for node in graph.nodes if node.op == "call_function"] == ["add", "add"]
