"""What must hold for any model: random small ones, of blocks as people write them, under random reductions."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import mlpreduce
from mlpreduce import MLP, Plan, ReductionError
from mlpreduce.edits import Assign, Edit, Scale, Share, Slice
from mlpreduce.graph import chains

SIDE = 4  # of the square inputs
PROFILE = {"deadline": None, "derandomize": True, "database": None}


class Block(nn.Module):
    """A residual block of one MLP. `hidden` says by hand which dimension of each tensor the hidden units lie on."""

    hidden: ClassVar[dict[str, int]] = {"fc1.weight": 0, "fc1.bias": 0, "fc2.weight": 1}
    halves = 1  # times that each unit lies on the axis of an expanding layer
    image = False  # takes (batch, width, height, width) instead of (batch, tokens, width)

    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, self.halves * hidden, bias), nn.Linear(hidden, width, bias)
        self.further(width, hidden, bias)

    def further(self, width: int, hidden: int, bias: bool) -> None:
        """Layers of this kind of block."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.branch(x)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class Plain(Block):
    def further(self, width: int, hidden: int, bias: bool) -> None:
        self.norm, self.act = nn.LayerNorm(width), nn.GELU()

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(self.norm(x))))


class Functional(Block):
    def branch(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.silu(self.fc1(x)))


class PostNorm(Plain):
    def branch(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.fc2(self.act(self.fc1(x))))


class HiddenNorm(Block):
    hidden = Block.hidden | {"norm.weight": 0, "norm.bias": 0}

    def further(self, width: int, hidden: int, bias: bool) -> None:
        self.norm = nn.LayerNorm(hidden)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.norm(F.gelu(self.fc1(x))))


class Gate(Block):
    hidden = Block.hidden | {"gate.weight": 0, "gate.bias": 0}

    def further(self, width: int, hidden: int, bias: bool) -> None:
        self.gate = nn.Linear(width, hidden, bias)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.silu(self.gate(x)) * self.fc1(x))


class GateFirst(Block):
    halves = 2

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


class GateLast(Block):
    halves = 2

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(value * gate.sigmoid())


class Tokens(Block):
    """An MLP over positions, as in a mixer."""

    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__(SIDE * SIDE, hidden, bias)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x.transpose(1, 2)))).transpose(1, 2)


class Convolution(Block):
    hidden = Block.hidden | {f"norm.{name}": 0 for name in ("weight", "bias", "running_mean", "running_var")}
    image = True

    def further(self, width: int, hidden: int, bias: bool) -> None:
        self.fc1, self.fc2 = nn.Conv2d(width, hidden, 1, bias=bias), nn.Conv2d(hidden, width, 1, bias=bias)
        self.norm = nn.BatchNorm2d(hidden)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.relu(self.norm(self.fc1(x))))


class Depthwise(Block):
    """Its MLP is a module of its own, as only the name tells it from an inverted residual."""

    hidden = {f"mlp.{name}": dim for name, dim in Block.hidden.items()} | {"mlp.conv.weight": 0, "mlp.conv.bias": 0}
    image = True

    class Inner(Block):
        def further(self, width: int, hidden: int, bias: bool) -> None:
            self.fc1, self.fc2 = nn.Conv2d(width, hidden, 1, bias=bias), nn.Conv2d(hidden, width, 1, bias=bias)
            self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc2(F.gelu(self.conv(self.fc1(x))))

    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        nn.Module.__init__(self)
        self.mlp = self.Inner(width, hidden, bias)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x)


IMAGE = [Convolution, Depthwise]
SEQUENCE = [Plain, Functional, PostNorm, HiddenNorm, Gate, GateFirst, GateLast, Tokens]


@dataclass(frozen=True)
class Stage:
    """Like blocks in a row; `widths` are their hidden widths, equal where MLPs are to share."""

    kind: type[Block]
    widths: tuple[int, ...]
    bias: bool


@dataclass(frozen=True)
class Architecture:
    """A model: stages of image blocks, then of token blocks."""

    stages: tuple[Stage, ...]
    width: int
    seed: int
    dtype: torch.dtype

    def build(self) -> Net:
        """The model in eval mode, its norms with random weights and statistics."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = Net(self)
            for name, tensor in model.state_dict().items():
                if "norm" in name and tensor.is_floating_point():
                    tensor.uniform_(0.5, 1.5)
        return model.to(self.dtype).eval()

    @property
    def images(self) -> torch.Tensor:
        """A batch of inputs."""
        random = torch.Generator().manual_seed(self.seed)
        return torch.randn(2, self.width, SIDE, SIDE, generator=random, dtype=torch.float64).to(self.dtype)

    @property
    def tolerance(self) -> float:
        """Largest difference between two ways to compute one output."""
        return 1e-5 if self.dtype == torch.float32 else 1e-12


class Net(nn.Module):
    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        stages = sorted(architecture.stages, key=lambda stage: not stage.kind.image)
        self.stages = nn.ModuleList(
            nn.Sequential(*(stage.kind(architecture.width, hidden, stage.bias) for hidden in stage.widths))
            for stage in stages
        )
        self.images = sum(stage.kind.image for stage in stages)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self.stages[: self.images]:
            x = stage(x)
        x = x.flatten(2).transpose(1, 2)
        for stage in self.stages[self.images :]:
            x = stage(x)
        return x

    def blocks(self) -> dict[str, Block]:
        """Blocks by path, in order of execution."""
        return {
            f"stages.{number}.{position}": block
            for number, stage in enumerate(self.stages)
            for position, block in enumerate(stage)
        }


@st.composite
def architectures(draw: st.DrawFn, *, alike: bool = False, dtype: torch.dtype | None = None) -> Architecture:
    """Two to five blocks; with `alike`, the first stage has several that may share."""
    first = draw(st.integers(2 if alike else 1, 5))
    lengths = [first, *draw(st.lists(st.integers(1, 2), min_size=first < 2, max_size=2))]
    while sum(lengths) > 5:
        lengths.pop()
    stages = []
    for length in lengths:
        widths = draw(st.lists(st.integers(2, 12), min_size=1 if alike else length, max_size=1 if alike else length))
        kind = draw(st.sampled_from([*IMAGE, *SEQUENCE]))
        stages.append(Stage(kind, tuple(widths * length)[:length], draw(st.booleans())))
    chosen = dtype or draw(st.sampled_from([torch.float32, torch.float64]))
    return Architecture(tuple(stages), draw(st.integers(2, 7)), draw(st.integers(0, 99)), chosen)


@st.composite
def groupings(draw: st.DrawFn, model: nn.Module, images: torch.Tensor) -> dict[str, Any]:
    """Arguments of `grouped`, by a name of a pattern or by lists of rows."""
    pattern = draw(st.sampled_from(["sequence", "cycle", "cycle_reverse", "lists"]))
    if pattern != "lists":
        remainder = draw(st.sampled_from(["own", "merge"]))
        return {"group": draw(st.integers(2, 5)), "pattern": pattern, "remainder": remainder}
    rows = [mlp for chain in chains(mlpreduce.find_mlps(model, images)) if len(chain) > 1 for mlp in chain]
    order = [mlp.name for mlp in mlpreduce.find_mlps(model, images)]
    rows.sort(key=lambda mlp: order.index(mlp.name))
    groups: dict[tuple[object, int], list[int]] = {}
    for row, mlp in enumerate(rows):
        groups.setdefault((mlp.chain, draw(st.integers(0, 2))), []).append(row)
    assume(any(len(members) > 1 for members in groups.values()))
    return {"pattern": list(groups.values())}


def output(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(images)


def assert_close(architecture: Architecture, one: torch.Tensor, other: torch.Tensor) -> None:
    gap = (one - other).abs().max().item() / max(1.0, other.abs().max().item())
    assert gap <= architecture.tolerance


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer under each of its names; a state dict has a tied one under the first only."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: t.detach() for name, t in [*parameters, *model.named_buffers(remove_duplicate=False)]}


def same_values(model: nn.Module, other: nn.Module) -> bool:
    one, two = tensors(model), tensors(other)
    return list(one) == list(two) and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def block_of(model: Net, mlp: str) -> tuple[str, Block]:
    return next((path, block) for path, block in model.blocks().items() if f"{mlp}.".startswith(f"{path}."))


def kept_positions(block: Block, name: str, hidden: int, units: list[int]) -> list[int]:
    times = block.halves if name.rpartition(".")[0] == "fc1" else 1
    return [half * hidden + unit for half in range(times) for unit in units]


def narrowed(architecture: Architecture, model: Net, edits: list[Slice]) -> Net:
    """The model built anew in its narrower widths, with the weights of the units kept."""
    widths = {block_of(model, edit.mlp)[0]: len(edit.units) for edit in edits}
    state = dict(model.state_dict())
    for edit in edits:
        path, block = block_of(model, edit.mlp)
        for name, dim in block.hidden.items():
            if f"{path}.{name}" in state:
                index = torch.tensor(kept_positions(block, name, edit.hidden, list(edit.units)))
                state[f"{path}.{name}"] = state[f"{path}.{name}"].index_select(dim, index)
    ordered = sorted(architecture.stages, key=lambda stage: not stage.kind.image)
    stages = [
        replace(stage, widths=tuple(widths.get(f"stages.{n}.{i}", w) for i, w in enumerate(stage.widths)))
        for n, stage in enumerate(ordered)
    ]
    narrow = replace(architecture, stages=tuple(stages)).build()
    narrow.load_state_dict(state)
    return narrow


def masked(model: Net, edits: list[Slice]) -> Net:
    """The model with the columns of the units that go set to zero in every contracting layer."""
    model = copy.deepcopy(model)
    for edit in edits:
        path, block = block_of(model, edit.mlp)
        name = next(name for name in block.hidden if name.endswith("fc2.weight"))
        with torch.no_grad():
            gone = [unit for unit in range(edit.hidden) if unit not in edit.units]
            model.get_parameter(f"{path}.{name}")[:, gone] = 0
    return model


@pytest.mark.parametrize("kind", [*IMAGE, *SEQUENCE], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("bias", [False, True])
def test_every_kind_of_block_is_found_with_all_its_tensors(kind: type[Block], bias: bool) -> None:
    architecture = Architecture((Stage(kind, (6, 6), bias),), 3, 0, torch.float32)
    model = architecture.build()
    state = model.state_dict()
    expected = [
        {f"{path}.{name}" for name in block.hidden if f"{path}.{name}" in state}
        for path, block in model.blocks().items()
    ]
    found = mlpreduce.find_mlps(model, architecture.images)
    assert [{axis.tensor for axis in mlp.axes} for mlp in found] == expected
    if kind is not Tokens:  # which dimension they lie on shows in shapes only
        assert [{axis.tensor for axis in mlp.axes} for mlp in mlpreduce.find_mlps(model)] == expected


@settings(max_examples=50, **PROFILE)
@given(architecture=architectures(), data=st.data())
def test_sliced_equals_masked_and_built_narrower(architecture: Architecture, data: st.DataObject) -> None:
    model, images = architecture.build(), architecture.images
    before = copy.deepcopy(model)
    smallest = min(min(stage.widths) for stage in architecture.stages)
    config = {
        "ratio": data.draw(st.floats(1 / smallest, 0.95)),
        "criterion": data.draw(st.sampled_from(["first", "last", "random", "l2"])),
        "seed": data.draw(st.integers(0, 9)),
    }
    made = mlpreduce.plan(model, "shallow", example_inputs=images, **config)
    assert len(made.of(Slice)) == len(before.blocks())
    mlpreduce.apply(model, made, example_inputs=images)
    narrow = narrowed(architecture, before, made.of(Slice))
    assert same_values(model, narrow)
    assert_close(architecture, output(model, images), output(narrow, images))
    if all(stage.kind is not HiddenNorm for stage in architecture.stages):  # whose mean is that of the units left
        assert_close(architecture, output(model, images), output(masked(before, made.of(Slice)), images))


@settings(max_examples=50, **PROFILE)
@given(architecture=architectures(alike=True), data=st.data())
def test_grouped_equals_copying_the_keeper(architecture: Architecture, data: st.DataObject) -> None:
    model, images = architecture.build(), architecture.images
    copied = copy.deepcopy(model)
    config = data.draw(groupings(model, images)) | {"keep": data.draw(st.sampled_from(["first", "last"]))}
    mlps = {mlp.name: mlp for mlp in mlpreduce.find_mlps(model, images)}
    made = mlpreduce.plan(model, "grouped", scale="none", example_inputs=images, **config)
    mlpreduce.apply(model, made, example_inputs=images)
    groups: dict[str, list[MLP]] = {}
    for row in made.rows:
        groups.setdefault(row.owner, []).append(mlps[row.mlp])
    if isinstance(config["pattern"], list):
        names = [[made.rows[row].mlp for row in members] for members in config["pattern"]]
        assert sorted(names) == sorted([mlp.name for mlp in members] for members in groups.values())
    for members in groups.values():
        keeper = members[-1 if config["keep"] == "last" else 0]
        for member in members:
            for source, target in zip(keeper.leaves, member.leaves, strict=True):
                if source.shareable:
                    copied.get_submodule(target.path).load_state_dict(copied.get_submodule(source.path).state_dict())
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in copied.parameters())
    assert same_values(model, copied)
    assert torch.equal(output(model, images), output(copied, images))


@settings(max_examples=30, **PROFILE)
@given(architecture=architectures(alike=True), data=st.data())
def test_what_undoes_ties_changes_no_output(architecture: Architecture, data: st.DataObject) -> None:
    model, images = architecture.build(), architecture.images
    parameters = sum(p.numel() for p in model.parameters())
    config = data.draw(groupings(model, images)) | {"scale": data.draw(st.sampled_from(["none", "inv_sqrt", 0.3]))}
    mlpreduce.apply(model, "grouped", example_inputs=images, **config)
    before = output(model, images)
    undo = data.draw(
        st.sampled_from([getattr(mlpreduce, name) for name in ("untie", "merge") if name in dir(mlpreduce)])
    )
    undo(model)
    assert torch.equal(output(model, images), before)
    assert sum(p.numel() for p in model.parameters()) == parameters


@settings(max_examples=40, **PROFILE)
@given(architecture=architectures(), seed=st.integers(0, 99))
def test_the_order_of_hidden_units_changes_no_output(architecture: Architecture, seed: int) -> None:
    model, images = architecture.build(), architecture.images
    before, random = output(model, images), torch.Generator().manual_seed(seed)
    mlps = mlpreduce.find_mlps(model, images)
    assert len(mlps) == len(model.blocks())
    state = model.state_dict()
    for mlp in mlps:
        order = torch.randperm(mlp.hidden_features, generator=random)
        for axis in mlp.axes:
            position = torch.arange(axis.size)
            for offset in axis.offsets:
                position[offset : offset + mlp.hidden_features] = offset + order
            state[axis.tensor].copy_(state[axis.tensor].index_select(axis.dim, position))
    assert_close(architecture, output(model, images), before)


def narrowest(model: nn.Module, images: torch.Tensor) -> dict[str, int]:
    return {mlp.name: 1 for mlp in mlpreduce.find_mlps(model, images) if mlp.owner == mlp.name}


@settings(max_examples=40, **PROFILE)
@given(architecture=architectures(alike=True), data=st.data())
def test_a_plan_survives_json(architecture: Architecture, data: st.DataObject) -> None:
    model, images = architecture.build(), architecture.images
    if data.draw(st.booleans()):
        name, config = (
            "shallow",
            {
                "widths": narrowest(model, images),
                "criterion": data.draw(st.sampled_from(["first", "last", "random", "l2"])),
            },
        )
        assume(any(width > 1 for stage in architecture.stages for width in stage.widths))
    else:
        name = "grouped"
        config = data.draw(groupings(model, images)) | {"keep": data.draw(st.sampled_from(["first", "last", "mean"]))}
    made = mlpreduce.plan(model, name, example_inputs=images, **config)
    again = Plan.from_json(made.to_json(), {edit.tensor: edit.value for edit in made.of(Assign)})
    assert again == made
    assert again.to_json() == made.to_json()
    other = mlpreduce.apply(copy.deepcopy(model), again, example_inputs=images)
    mlpreduce.apply(model, made, example_inputs=images)
    assert same_values(model, other)
    assert torch.equal(output(model, images), output(other, images))
    assert mlpreduce.history(model) == mlpreduce.history(other)


def remembered(model: nn.Module, *, identities: bool = True) -> tuple[object, ...]:
    """Every module, tensor, value, hook and attribute of a model, to be compared."""

    def tensor(t: torch.Tensor) -> tuple[object, ...]:
        values = [None if v is None else v.detach().numpy().tobytes() for v in (t, t.grad)]
        return id(t) if identities else type(t), t.requires_grad, vars(t).copy(), values

    modules = model.named_modules(remove_duplicate=False)
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return (
        [(path, id(module), repr(module), module.training) for path, module in modules],
        [(path, tensor(t)) for path, t in named],
        {name: len(value) if "_hooks" in name else 0 for name, value in model.__dict__.items()},
    )


def spoiled(edit: Edit) -> list[Edit]:
    """What an edit could be by mistake."""
    if isinstance(edit, Slice):
        first, *rest = edit.axes
        gone = replace(first, tensor=f"{first.tensor}s")
        longer = replace(first, size=first.size + 1)
        no_dim = replace(first, dim=9)
        return [
            *(replace(edit, axes=(axis, *rest)) for axis in (gone, longer, no_dim)),
            replace(edit, axes=(*edit.axes, first)),
            replace(edit, units=()),
            replace(edit, units=(0, edit.hidden)),
        ]
    if isinstance(edit, Share):
        return [replace(edit, target=path) for path in ("", "stages.9", edit.source, "stages.0", "stages.0.0")]
    return [replace(edit, tensor=path) for path in ("", "stages.9.weight", f"{edit.tensor}s")] + (
        [replace(edit, value=torch.zeros(99)), replace(edit, value=None)] if isinstance(edit, Assign) else []
    )


@settings(max_examples=25, **PROFILE)
@given(architecture=architectures(alike=True, dtype=torch.float32), data=st.data())
def test_one_bad_edit_anywhere_changes_nothing(architecture: Architecture, data: st.DataObject) -> None:
    model, images = architecture.build(), architecture.images
    config = data.draw(groupings(model, images)) | {"keep": data.draw(st.sampled_from(["first", "mean"]))}
    edits = list(mlpreduce.plan(model, "grouped", example_inputs=images, **config).edits)
    if min(width for stage in architecture.stages for width in stage.widths) > 1:
        edits += mlpreduce.plan(model, "shallow", widths=narrowest(model, images), example_inputs=images).edits
        edits = [edit for edit in edits if not isinstance(edit, Assign)]  # of the wide shapes
    mlpreduce.apply(copy.deepcopy(model), Plan("by_hand", {}, tuple(edits)))
    before = remembered(model)
    for position, edit in enumerate(edits):
        for wrong in spoiled(edit):
            with pytest.raises(ReductionError):
                mlpreduce.apply(model, Plan("by_hand", {}, (*edits[:position], wrong, *edits[position + 1 :])))
            assert remembered(model) == before


class Failing(TorchDispatchMode):
    """Lets the k-th step on tensors fail, on the meta device or on the real one, before it is done."""

    def __init__(self, position: float, *, meta: bool) -> None:
        super().__init__()
        self.position, self.meta = position, meta
        self.steps: list[int] = []  # bytes of the new tensors of each

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [value for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)]
        views = any(
            returned.alias_info is not None and not returned.alias_info.is_write for returned in func._schema.returns
        )
        mine = not views and any(tensor.is_meta == self.meta for tensor in given)
        if mine and len(self.steps) == self.position:
            self.position = -1
            raise MemoryError("injected")
        result = func(*args, **(kwargs or {}))
        if mine:
            made = [value for value in tree_iter(result) if isinstance(value, torch.Tensor)]
            self.steps.append(0 if func._schema.is_mutable else sum(tensor.nbytes for tensor in made))
        return result


def reduction(model: nn.Module, images: torch.Tensor, values: type[Edit] = Scale) -> Plan:
    """Slices, ties and new values in one plan."""
    tied = mlpreduce.plan(model, "grouped", group=2, pattern="cycle", example_inputs=images).edits
    sliced = mlpreduce.plan(model, "shallow", criterion="l2", ratio=0.7, example_inputs=images).edits
    new = [Assign("stages.0.0.fc2.bias", torch.ones(images.shape[1]))]
    edits = [*sliced, *new, *tied]
    return Plan("by_hand", {}, tuple(edit for edit in edits if isinstance(edit, (Slice, Share, values))))


MIXED = Architecture(
    (
        Stage(Convolution, (12, 12), True),
        Stage(Depthwise, (6,), True),
        Stage(GateFirst, (11,), True),
        Stage(HiddenNorm, (5, 5), True),
    ),
    7,
    0,
    torch.float32,
)


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("values", [Assign, Scale])
@pytest.mark.parametrize("meta", [True, False])
def test_a_failure_at_any_step_changes_nothing(meta: bool, values: type[Edit], held: bool) -> None:
    """In the rehearsal and in the change itself, up to the first new value; whether or not the user holds the tensors."""
    model, images = MIXED.build(), MIXED.images
    model(images).sum().backward()
    made = reduction(model, images, values)
    copied = copy.deepcopy(model)
    with Failing(math.inf, meta=meta) as run:
        mlpreduce.apply(copied, made)
    assert len(run.steps) > 3 * len(made.of(Slice))
    kept = [*model.parameters(), *model.buffers()] if held else []
    before = remembered(model, identities=held)
    later = 0 if meta else len(made.of(values)) - 1  # written in place, which takes no memory: not undone
    for position in range(len(run.steps) - later):
        with pytest.raises(MemoryError, match="injected"), Failing(position, meta=meta):
            mlpreduce.apply(model, made)
        assert remembered(model, identities=held) == before
    assert all(new is old for new, old in zip([*model.parameters(), *model.buffers()], kept, strict=False))
    mlpreduce.apply(model, made)


def test_the_largest_tensors_are_sliced_first() -> None:
    model, images = MIXED.build(), MIXED.images
    made = reduction(model, images)
    sizes = {axis.tensor: dict(model.state_dict())[axis.tensor].nbytes for edit in made.of(Slice) for axis in edit.axes}
    with Failing(math.inf, meta=False) as run:
        mlpreduce.apply(model, made)
    parts = [size for size in run.steps if size]
    cut = [kept + gone for kept, gone in zip(parts[::2], parts[1::2], strict=True)]
    assert cut[0] == max(sizes.values())
    assert sorted(cut) == sorted(sizes.values())
