"""Life after the reduction: what people do with a model next works on a reduced one, or is refused in words."""

from __future__ import annotations

import copy
import importlib
import io
import json
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers.fresh import python
from helpers.marks import slow_but
from helpers.two_processes import Together
from safetensors.torch import load_file, load_model, save_file, save_model
from timm.layers import set_reentrant_ckpt
from timm.utils import CheckpointSaver, ModelEma, ModelEmaV2, ModelEmaV3
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

import mlpreduce
from mlpreduce import ReductionError
from mlpreduce.testing import tiny_vit

STEPS = {
    "tied": [("grouped", {"group": 2})],
    "sliced": [("shallow", {"ratio": 0.5})],
    "both": [("grouped", {"group": 4}), ("shallow", {"ratio": 0.5})],
    "own_per_use": [("grouped", {"group": 2, "per_use": {"name": "lora", "rank": 2}}), ("ssf", {"init": "released"})],
    "blocks": [("block_diagonal", {"cca": "covariance", "align": "all"}), ("block_gate", {})],
    "factors": [("low_rank", {}), ("ssf", {"sites": "all"})],
    "few_that_train": [("svft", {"pattern": "banded", "init": "normal"})],
}
KINDS = list(STEPS)
TIES = {"tied": 4, "sliced": 0, "both": 6, "own_per_use": 4, "blocks": 0, "factors": 0, "few_that_train": 0}


def reduced(kind: str, **kwargs: Any) -> nn.Module:
    model = tiny_vit(**kwargs)
    for transform, config in STEPS[kind]:
        mlpreduce.apply(model, transform, **config)
    return model.eval()


def assert_tied(model: nn.Module, kind: str) -> None:
    """Asserts that the model has the parameters and ties of its kind."""
    report = mlpreduce.verify(model)
    assert report.ok, report
    assert report.ties == TIES[kind]
    pairs = [0, 0, 2, 2]
    tied = {"tied": pairs, "both": [0, 0, 0, 0], "own_per_use": pairs}.get(kind, [0, 1, 2, 3])
    names = {"own_per_use": ("fc1.base.base", "fc2.base.base"), "blocks": ("base.fc1", "base.fc2.base")}
    for block, first in enumerate(tied):
        for name in names.get(kind, ("fc1", "fc2")):
            ours = model.get_submodule(f"blocks.{block}.mlp.{name}")
            assert ours is model.get_submodule(f"blocks.{first}.mlp.{name}")


def unique_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def storages(tensors: Any) -> int:
    return len({tensor.untyped_storage().data_ptr() for tensor in tensors})


def shifted(model: nn.Module) -> nn.Module:
    """The same model with other values, to be loaded into."""
    with torch.no_grad():
        for parameter in (other := copy.deepcopy(model)).parameters():
            parameter.add_(1)
    return other


def gradients(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(images).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


# --- copies and conversions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_conversions(kind: str, images: torch.Tensor) -> None:
    model = reduced(kind)
    before = model(images)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(copy.deepcopy(model)))):
        assert_tied(other, kind)
        assert torch.equal(other(images), before)
        assert mlpreduce.history(other) == mlpreduce.history(model)
        with torch.no_grad():
            next(other.blocks[0].mlp.parameters()).zero_()
        assert torch.equal(model(images), before)
    for convert in (nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.float64)):
        other = convert(copy.deepcopy(model))
        assert_tied(other, kind)
        other.load_state_dict(other.state_dict())
        assert other(images.to(other.head.weight.dtype)).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_built_on_meta(kind: str, images: torch.Tensor) -> None:
    model = reduced(kind)
    with torch.device("meta"):
        empty = reduced(kind)
    assert_tied(empty, kind)
    allocated = copy.deepcopy(empty).to_empty(device="cpu")
    assert_tied(allocated, kind)
    allocated.load_state_dict(model.state_dict())
    assert torch.equal(allocated(images), model(images))
    empty.load_state_dict(model.state_dict(), assign=True)
    assert_tied(empty, kind)
    assert torch.equal(empty(images), model(images))
    assert len(list(empty.parameters())) == len(list(model.parameters()))


# --- compile and export -------------------------------------------------------------------------------------------------

# seconds for each kind
TIED_FIRST = slow_but(KINDS, "tied")


@pytest.mark.parametrize("kind", TIED_FIRST)
def test_compile_is_one_graph_and_equal(kind: str, images: torch.Tensor) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = reduced(kind)
    expected = gradients(model, images)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images))
    found = gradients(compiled, images)
    close({name.removeprefix("_orig_mod."): grad for name, grad in found.items()}, expected, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
    other = torch.compile(shifted(model), backend="eager")
    other.load_state_dict(compiled.state_dict())
    assert torch.equal(other._orig_mod(images), model(images))


@pytest.mark.parametrize("kind", TIED_FIRST)
def test_export(kind: str, images: torch.Tensor) -> None:
    model = reduced(kind, embed_dim=96)
    exported = torch.export.export(model, (images,))
    unique = len([*model.parameters(), *model.buffers()])
    assert storages(exported.state_dict.values()) == unique
    file = io.BytesIO()
    torch.export.save(exported, file)
    assert unique_bytes(model) < len(file.getvalue()) < unique_bytes(model) + 500_000
    again = torch.export.load(io.BytesIO(file.getvalue()))
    assert storages(again.state_dict.values()) == unique
    assert torch.equal(again.module()(images), model(images))


@pytest.mark.parametrize("kind", TIED_FIRST)
def test_onnx_has_a_tied_weight_once(kind: str, images: torch.Tensor, tmp_path: Path) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = reduced(kind, embed_dim=96)
    path = tmp_path / "model.onnx"
    assert mlpreduce.to_onnx(model.train(), path, images, external_data=False) == path
    assert model.training
    model.eval()
    weights = sum(len(tensor.raw_data) for tensor in onnx.load(path).graph.initializer)
    assert (
        0.9 < weights / unique_bytes(model) < 1.02
    )  # small tensors are folded; the untied model has 1.5 times as many
    assert path.stat().st_size < unique_bytes(model) + 400_000
    session = runtime.InferenceSession(path)
    (output,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), model(images), rtol=1e-4, atol=1e-5)


class _Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({}, r"torch cannot export it: GuardOnDataDependentSymNode: Could not guard on data-dependent expression"),
        ({"dynamic_shape": {}}, "torch.onnx.export has no option 'dynamic_shape'; did you mean 'dynamic_shapes'"),
        ({"f": "elsewhere.onnx"}, "f= is not an option; give model, path and example_inputs"),
        ({"path": "no/such/model.onnx"}, "there is no folder 'no/such' for model.onnx; make it first"),
        ({"path": "."}, "'.' is a folder; name a file in it"),
    ],
)
def test_onnx_says_why_it_cannot_be(
    options: dict[str, Any], fact: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    model = nn.Identity() if options else _Branches()
    with pytest.raises(ReductionError, match=fact) as caught:
        mlpreduce.to_onnx(model, **{"path": "model.onnx", "example_inputs": torch.ones(1, 2), **options})
    assert "\x1b" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
def test_functional_call_needs_tie_weights_false(images: torch.Tensor) -> None:
    model = reduced("tied")
    before, held = model(images), [id(parameter) for parameter in model.parameters()]
    doubled = {name: 2 * parameter.detach() for name, parameter in model.named_parameters()}
    expected = copy.deepcopy(model)
    expected.load_state_dict(doubled)
    assert torch.equal(functional_call(model, doubled, (images,), tie_weights=False), expected(images))
    assert [id(parameter) for parameter in model.parameters()] == held
    assert torch.equal(model(images), before)
    batched = torch.func.vmap(
        lambda state, x: functional_call(model, state, (x,), tie_weights=False), in_dims=(0, None)
    )
    pair = {name: torch.stack([parameter.detach(), doubled[name]]) for name, parameter in model.named_parameters()}
    both = batched(pair, images)
    torch.testing.assert_close(both, torch.stack([before, expected(images)]), rtol=1e-4, atol=1e-5)
    assert [id(parameter) for parameter in model.parameters()] == held
    other = copy.deepcopy(model)
    assert torch.equal(functional_call(other, doubled, (images,)), expected(images))  # right, but upstream leaves
    assert any(not isinstance(block.mlp.fc1.weight, nn.Parameter) for block in other.blocks)  # its tensors behind


# --- several processes ----------------------------------------------------------------------------------------------------


def _batch() -> torch.Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _expected() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Output and gradients of one process."""
    model = reduced("tied").double()
    model(_batch()).square().mean().backward()
    return model(_batch()).detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def _checkpointing(rank: int, folder: str) -> None:
    for name, options in {
        "plain": {},
        "static": {"static_graph": True},
        "unused": {"find_unused_parameters": True},
    }.items():
        model = reduced("tied").double()
        model.set_grad_checkpointing()
        assert mlpreduce.verify(model).ok
        wrapped = DistributedDataParallel(model, **options)
        wrapped(_batch().chunk(2)[rank]).square().mean().backward()
        torch.save({n: p.grad for n, p in model.named_parameters()}, f"{folder}/{name}{rank}.pt")
    set_reentrant_ckpt(True)
    try:
        model = reduced("tied").double()
        model.set_grad_checkpointing()
        assert "checkpoints reentrantly" in str(mlpreduce.verify(model))
        wrapped = DistributedDataParallel(model)
        with pytest.raises(RuntimeError, match="mark a variable ready only once"):
            wrapped(_batch().chunk(2)[rank]).square().mean().backward()
    finally:
        set_reentrant_ckpt(False)


@pytest.mark.processes
def test_checkpointing_in_two_processes(together: Together, tmp_path: Path) -> None:
    together(_checkpointing, str(tmp_path))
    _, expected = _expected()
    for name in ("plain", "static", "unused"):
        for rank in range(2):
            close(torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True), expected, rtol=0, atol=1e-12)


FULL = StateDictOptions(full_state_dict=True)
FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def _wrap_root(model: nn.Module) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model)


def _wrap_groups(model: nn.Module) -> None:  # as docs/life.md says
    from torch.distributed.fsdp import fully_shard

    groups = defaultdict(list)
    for mlp in mlpreduce.find_mlps(model):
        groups[mlp.owner].append(model.get_submodule(mlp.block))
    for blocks in groups.values():
        fully_shard(blocks)
    fully_shard(model)


def _sharding(rank: int, folder: str) -> None:
    for name, wrap in {"root": _wrap_root, "groups": _wrap_groups}.items():
        model = reduced("tied").double()
        wrap(model)
        output = model(_batch().chunk(2)[rank])
        output.square().mean().backward()
        found = {n: p.grad.full_tensor() for n, p in model.named_parameters()}  # type: ignore[union-attr,operator]
        torch.save((output.detach(), found), f"{folder}/{name}{rank}.pt")
        with pytest.raises(ReductionError, match=r"is sharded \(DTensor\); reduce the model, then call fully_shard"):
            mlpreduce.apply(model, "shallow")
        # its state dict, gathered, goes into another sharded model: given to each process, or to the first alone
        state = get_model_state_dict(model, options=FULL)
        for options, given in ((FULL, state), (FROM_FIRST, state if rank == 0 else {})):
            other = shifted(reduced("tied").double())
            wrap(other)
            set_model_state_dict(other, dict(given), options=options)
            assert torch.equal(other(_batch()), model(_batch()))
        other = shifted(reduced("tied").double())
        wrap(other)
        other.load_state_dict(model.state_dict())  # of shards
        assert torch.equal(other(_batch()), model(_batch()))
        torch.save(state, f"{folder}/state_{name}{rank}.pt")


@pytest.mark.processes
def test_fully_shard_in_two_processes(together: Together, tmp_path: Path) -> None:
    together(_sharding, str(tmp_path))
    output, expected = _expected()
    for name in ("root", "groups"):
        for rank in range(2):
            half, found = torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True)
            torch.testing.assert_close(half, output.chunk(2)[rank], rtol=0, atol=1e-12)
            close(found, expected, rtol=0, atol=1e-12)
            model = shifted(reduced("tied").double())
            model.load_state_dict(torch.load(tmp_path / f"state_{name}{rank}.pt", weights_only=True))
            assert torch.equal(model(_batch()), output)


# --- gradient checkpointing ---------------------------------------------------------------------------------------------


# the tracer calls the blocks through the checkpointing; a proxy has no gradient
QUIET = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")


@pytest.fixture
def reentrant() -> Iterator[None]:
    set_reentrant_ckpt(True)
    yield
    set_reentrant_ckpt(False)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_gives_the_same_gradients(kind: str, images: torch.Tensor) -> None:
    model = reduced(kind)
    expected = gradients(model, images)
    model.set_grad_checkpointing()
    assert mlpreduce.verify(model).ok
    close(gradients(model, images), expected, rtol=1e-5, atol=1e-6)


@QUIET
@pytest.mark.usefixtures("reentrant")
def test_reentrant_checkpointing_is_reported() -> None:
    model = reduced("tied")
    assert mlpreduce.verify(model).ok
    model.set_grad_checkpointing()
    (problem,) = mlpreduce.verify(model).problems
    assert problem.startswith("the model checkpoints reentrantly: DDP sees")
    assert "timm.layers.set_reentrant_ckpt(False)" in problem
    sliced = reduced("sliced")
    sliced.set_grad_checkpointing()
    assert mlpreduce.verify(sliced).ok


def test_reentrant_checkpointing_of_transformers_is_reported() -> None:
    from functools import partial

    from torch.utils.checkpoint import checkpoint

    model = reduced("tied")
    model.blocks.gradient_checkpointing = True  # as transformers marks a module
    model.blocks._gradient_checkpointing_func = partial(checkpoint, use_reentrant=True)
    assert "blocks checkpoints reentrantly" in str(mlpreduce.verify(model))
    model.blocks._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    assert mlpreduce.verify(model).ok


@QUIET
@pytest.mark.usefixtures("reentrant")
def test_our_training_refuses_reentrant_checkpointing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlpreduce.train import Run, Runtime, setup

    def build(run: Run, **more: object) -> nn.Module:
        model = reduced("tied", img_size=8, in_chans=1, num_classes=10)
        model.set_grad_checkpointing()
        return model

    monkeypatch.setattr(setup, "build_model", build)
    run = Run(
        recipe="test",
        variant="grouped",
        data={"name": "digits", "image_size": 8},  # type: ignore[arg-type]
        train={"batch_size": 64, "epochs": 1},  # type: ignore[arg-type]
        workers=2,
        directory=str(tmp_path),
    )
    with pytest.raises(
        ReductionError, match=r"fit\(test, variant grouped.*checkpoints reentrantly.*set_reentrant_ckpt"
    ):
        setup.prepare(run, Runtime(world=2), None)


# --- timm's own calls ---------------------------------------------------------------------------------------------------


def test_layer_decay_puts_a_tied_mlp_in_the_group_of_its_first_block() -> None:
    from timm.optim import create_optimizer_v2

    model, plain = reduced("tied"), tiny_vit()
    optimizer = create_optimizer_v2(model, "sgd", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    assert mlpreduce.verify(model, optimizer).ok
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    usual = create_optimizer_v2(plain, "sgd", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    there = {id(p): group["lr_scale"] for group in usual.param_groups for p in group["params"]}
    for block in range(4):
        for name in ("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "attn.qkv.weight"):
            owner = block - block % 2 if "mlp" in name else block
            expected = there[id(plain.blocks[owner].get_parameter(name))]
            assert scales[id(model.blocks[block].get_parameter(name))] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_timm_methods(kind: str, images: torch.Tensor) -> None:
    model = reduced(kind)
    features, levels = model.forward_intermediates(images, indices=[1, 3])
    assert torch.equal(model.forward_head(features), model(images))
    assert [tuple(level.shape) for level in levels] == [(2, 32, 4, 4)] * 2
    assert model.get_classifier() is model.head
    model.reset_classifier(3)
    assert model(images).shape == (2, 3)
    model.set_input_size(img_size=32)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    assert_tied(model, kind)
    other = shifted(model)
    other.load_state_dict(model.state_dict())
    large = torch.randn(1, 3, 32, 32)
    assert torch.equal(other(large), model(large))


def test_pruned_blocks_leave_the_other_ties(images: torch.Tensor) -> None:
    model = reduced("tied")
    model.prune_intermediate_layers([1])
    assert len(model.blocks) == 2
    other = shifted(model)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.forward_features(images), model.forward_features(images))
    assert other.blocks[1].mlp.fc1 is other.blocks[0].mlp.fc1


# --- state dicts ----------------------------------------------------------------------------------------------------------


def data(state: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, tensor in state.items() if tensor.numel()]


@pytest.mark.parametrize("kind", ["tied", "sliced", "both"])
def test_a_tied_tensor_lies_in_the_state_dict_once(kind: str, images: torch.Tensor) -> None:
    model = reduced(kind)
    state = model.state_dict()
    assert list(state) == list(tiny_vit().state_dict())
    assert data(state) == [name for name, _ in model.named_parameters()]
    assert sum(tensor.numel() for tensor in state.values()) == sum(p.numel() for p in model.parameters())
    assert (state["blocks.1.mlp.fc1.weight"].numel() == 0) == (kind != "sliced")
    for given in (
        state,
        {name: state[name] for name in data(state)},
        dict(model.named_parameters(remove_duplicate=False)),
    ):
        other = shifted(model)
        assert not torch.equal(other(images), model(images))
        assert str(other.load_state_dict(given)) == "<All keys matched successfully>"
        assert torch.equal(other(images), model(images))
        assert_tied(other, kind)
    if kind == "tied":
        one = {"blocks.1.mlp.fc1.bias": torch.full((128,), 7.0)}  # by its other name, and alone
        other.load_state_dict(one, strict=False)
        assert other.blocks[0].mlp.fc1.bias.mean() == 7


def test_keep_last_too_has_its_data_under_the_first_name(images: torch.Tensor) -> None:
    model = mlpreduce.apply(tiny_vit().eval(), "grouped", group=2, keep="last")
    assert data(model.state_dict()) == [name for name, _ in model.named_parameters()]
    other = shifted(model)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images), model(images))


def test_a_dict_that_unties_is_refused(images: torch.Tensor) -> None:
    model, plain = reduced("tied"), tiny_vit()
    before = model(images)
    with pytest.raises(
        ReductionError,
        match=r"load_state_dict\(VisionTransformer\): blocks.0.mlp.fc1.weight and blocks.1.mlp.fc1.weight differ, but they "
        r"are tied in this model \(4 such names\).*then reduce it with mlpreduce.apply",
    ):
        model.load_state_dict(plain.state_dict())
    assert torch.equal(model(images), before)
    with pytest.raises(ReductionError, match="differ, but they are tied"):
        model.load_state_dict(plain.state_dict(), strict=False)
    for wrapped, prefix in (
        (nn.ModuleDict({"net": model}), "net."),
        (torch.compile(model, backend="eager"), "_orig_mod."),
    ):
        with pytest.raises(ReductionError, match=rf": {prefix}blocks.0.mlp.fc1.weight and {prefix}blocks.1"):
            wrapped.load_state_dict({prefix + name: tensor for name, tensor in plain.state_dict().items()})
    state = {name: tensor.clone() for name, tensor in mlpreduce.untie(copy.deepcopy(model)).state_dict().items()}
    state["blocks.1.mlp.fc1.weight"][0, 0] = state["blocks.0.mlp.fc1.weight"][0, 0] = torch.nan
    model.load_state_dict(state)  # equal bit for bit, a NaN too
    state["blocks.1.mlp.fc1.weight"] = state["blocks.1.mlp.fc1.weight"].double()
    with pytest.raises(ReductionError, match=r"\(1 such names\)"):
        model.load_state_dict(state)


def test_a_reduced_dict_does_not_fit_a_plain_model(tmp_path: Path) -> None:
    state, plain = reduced("tied").state_dict(), tiny_vit()
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"size mismatch for blocks.1.mlp.fc1.weight"):
            plain.load_state_dict(state, strict=strict)
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks.1.mlp.fc1.weight"):
        plain.load_state_dict({name: state[name] for name in data(state)})
    other = mlpreduce.apply(tiny_vit(), "grouped", pattern=[[0, 2], [1, 3]])
    with pytest.raises((RuntimeError, ReductionError), match=r"blocks.1.mlp.fc1.weight|blocks.2.mlp.fc1.weight"):
        other.load_state_dict(state)
    # timm loads with strict=False when the number of classes is another
    save_file(state, tmp_path / "reduced.safetensors")
    settings = tiny_vit().mlpreduce_build["kwargs"] | {"num_classes": 7}
    with pytest.raises(RuntimeError, match=r"size mismatch for blocks.1.mlp.fc1.weight"):
        timm.create_model(
            "vit_tiny_patch16_224",
            pretrained=True,
            pretrained_cfg_overlay={"file": str(tmp_path / "reduced.safetensors"), "num_classes": 5},
            **settings,
        )


def test_state_dicts_below_a_parent(images: torch.Tensor) -> None:
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.net, self.head = nn.Identity(), reduced("both"), nn.Linear(5, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.net(self.stem(x)))

    model = Parent()
    state = model.state_dict()
    assert data(state) == [name for name, _ in model.named_parameters()]
    other = shifted(model)
    other.load_state_dict(state)
    assert torch.equal(other(images), model(images))
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = shifted(model)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(images), model(images))


def test_hooks_are_put_on_once_and_taken_off() -> None:
    model = tiny_vit(depth=6)

    def hooks() -> int:
        return len(model._state_dict_hooks) + len(model._load_state_dict_pre_hooks)

    mlpreduce.apply(model, "shallow", width=64)
    assert hooks() == 0
    mlpreduce.apply(model, "grouped", group=2, include="blocks.[01].*")
    mlpreduce.apply(model, "grouped", group=2, include="blocks.[23].*")
    mlpreduce.apply(model, "shallow", width=32)
    assert hooks() == 2
    model.register_state_dict_post_hook(lambda *_: None)
    mlpreduce.untie(model)
    assert hooks() == 1
    assert data(model.state_dict()) == list(tiny_vit(depth=6).state_dict())
    tied = reduced("tied")
    tied._state_dict_hooks.clear()
    assert "its hooks were removed" in str(mlpreduce.verify(tied))


def test_a_broken_tie_is_written_as_it_is() -> None:
    model = reduced("tied")
    model.blocks[1] = copy.deepcopy(model.blocks[1])
    state = model.state_dict()
    assert state["blocks.1.mlp.fc1.weight"].shape == (128, 32)
    assert state["blocks.3.mlp.fc1.weight"].numel() == 0
    assert "no longer tied" in str(mlpreduce.verify(model))


def test_names_in_another_order(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self, names: str) -> None:
            super().__init__()
            self.blocks = nn.ModuleList()
            for name in names:
                self.blocks.add_module(name, nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for name in "01":
                x = x + self.blocks.get_submodule(name)(x)
            return x

    x, model = torch.randn(3, 4), mlpreduce.apply(Own("01"), "grouped")
    other = mlpreduce.apply(Own("10"), "grouped")
    assert data(model.state_dict())[0] == "blocks.0.0.weight"
    assert data(other.state_dict())[0] == "blocks.1.0.weight"
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    mlpreduce.save(model, tmp_path)
    assert torch.equal(mlpreduce.load(tmp_path, model=Own("10"))(x), model(x))


def test_safetensors(tmp_path: Path, images: torch.Tensor) -> None:
    model = reduced("tied")
    save_file(model.state_dict(), tmp_path / "file.safetensors")
    save_model(model, str(tmp_path / "model.safetensors"))
    for name in ("file", "model"):
        path = tmp_path / f"{name}.safetensors"
        assert path.stat().st_size < unique_bytes(model) + 10_000
        other = shifted(model)
        other.load_state_dict(load_file(path))
        assert torch.equal(other(images), model(images))
        other = shifted(model)
        assert load_model(other, path) == (set(), [])
        assert torch.equal(other(images), model(images))


def test_distributed_state_dicts_in_one_process(images: torch.Tensor) -> None:
    model = reduced("both")
    other = shifted(model)
    set_model_state_dict(other, get_model_state_dict(model))
    assert torch.equal(other(images), model(images))


@pytest.mark.parametrize(
    "make",
    [
        lambda model: ModelEma(model, decay=0.9),
        lambda model: ModelEmaV2(model, decay=0.9),
        lambda model: ModelEmaV3(model, decay=0.9),
        lambda model: ModelEmaV3(model, decay=0.9, foreach=False),
        lambda model: ModelEmaV3(model, decay=0.9, exclude_buffers=True),
    ],
    ids=["v1", "v2", "v3", "v3-loop", "v3-no-buffers"],
)
def test_timms_moving_averages_decay_a_tied_tensor_once(make: Callable[[nn.Module], Any]) -> None:
    def moved(model: nn.Module) -> set[float]:
        ema = make(model)
        averaged = getattr(ema, "module", getattr(ema, "ema", None))
        with torch.no_grad():
            for ours, theirs in zip(averaged.parameters(), model.parameters(), strict=True):
                ours.fill_(1.0)
                theirs.fill_(0.0)
        ema.update(model)
        assert mlpreduce.verify(model, ema=ema).ok
        return {round(tensor.min().item(), 5) for tensor in averaged.parameters()}

    assert moved(reduced("both")) == {0.9}


def test_a_moving_average_made_too_early_is_reported() -> None:
    model = tiny_vit()
    for ema in (ModelEma(model), ModelEmaV3(model)):
        tied = mlpreduce.apply(copy.deepcopy(model), "grouped")
        assert "in the EMA blocks.1.mlp.fc1 is not tied to blocks.0.mlp.fc1" in str(mlpreduce.verify(tied, ema=ema))


def test_timm_checkpoints(tmp_path: Path, images: torch.Tensor, unchanged: Callable) -> None:
    from timm.models import load_checkpoint, resume_checkpoint

    model = reduced("tied")
    optimizer = torch.optim.AdamW(model.parameters())
    ema = ModelEmaV3(model)
    saver = CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=1.0)
    path = str(tmp_path / "last.pth.tar")
    for load in (lambda m: load_checkpoint(m, path), lambda m: resume_checkpoint(m, path, log_info=False)):
        other = shifted(model)
        load(other)
        assert torch.equal(other(images), model(images))
    with pytest.raises(RuntimeError, match=r"size mismatch for blocks.1.mlp.fc1.weight"):
        load_checkpoint(tiny_vit(), path)
    plain, check = tmp_path / "plain.pth", unchanged(model)
    torch.save(tiny_vit().state_dict(), plain)
    with pytest.raises(ReductionError, match="differ, but they are tied"):
        load_checkpoint(model, str(plain))
    check()
    with pytest.raises(RuntimeError, match=r"size mismatch for blocks.0.mlp.fc1.weight"):
        load_checkpoint(reduced("sliced"), str(plain))


# --- back to a plain model ------------------------------------------------------------------------------------------------


def test_merge_is_exact_and_fits_the_plain_model(images: torch.Tensor) -> None:
    model = reduced("tied")
    before, build = model(images), model.mlpreduce_build["kwargs"]
    assert mlpreduce.merge(model) is model
    assert torch.equal(model(images), before)
    plain = timm.create_model("vit_tiny_patch16_224", **build).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(images), before)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())
    assert mlpreduce.verify(model).ok


def test_merge_with_nothing_to_merge(images: torch.Tensor, unchanged: Callable) -> None:
    for model in (tiny_vit(), reduced("sliced"), mlpreduce.merge(reduced("tied"))):
        check, plans = unchanged(model), mlpreduce.history(model)
        assert mlpreduce.merge(model) is model
        check()
        assert mlpreduce.history(model) == plans
    both = mlpreduce.merge(reduced("both"))
    narrow = timm.create_model("vit_tiny_patch16_224", **both.mlpreduce_build["kwargs"], mlp_ratio=2).eval()
    narrow.load_state_dict(both.state_dict())
    assert torch.equal(narrow(images), both(images))
    with pytest.raises(ReductionError, match="merge: the model is wrapped in DataParallel"):
        mlpreduce.merge(nn.DataParallel(reduced("tied")))
    broken = reduced("tied")
    broken.blocks[1] = copy.deepcopy(broken.blocks[1])
    with pytest.raises(ReductionError, match=r"blocks.1.mlp.fc1 is no longer tied to blocks.0.mlp.fc1"):
        mlpreduce.merge(broken)


# --- names for timm ---------------------------------------------------------------------------------------------------------


SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}


@pytest.fixture(scope="module", autouse=True)
def _names() -> None:
    for kind, steps in STEPS.items():
        if not timm.is_model(f"test_life_{kind}"):
            mlpreduce.register_model(f"test_life_{kind}", "vit_tiny_patch16_224", steps)
            mlpreduce.register_model(
                f"test_life_thin_{kind}", "vit_tiny_patch16_224", [("thin", {"mlp_ratio": 2.0}), *steps]
            )


@pytest.mark.parametrize(
    "kind", slow_but(KINDS, "tied", "sliced", "factors") if {"tied", "sliced", "factors"} <= {*KINDS} else KINDS
)
def test_registered_names_build_reduced_models(kind: str, images: torch.Tensor) -> None:
    torch.manual_seed(3)
    model = timm.create_model(f"test_life_{kind}", **SMALL).eval()
    torch.manual_seed(3)
    by_hand = timm.create_model("vit_tiny_patch16_224", **SMALL).eval()
    for transform, config in STEPS[kind]:
        mlpreduce.apply(by_hand, transform, **config)
    assert torch.equal(model(images), by_hand(images))
    assert_tied(model, kind)
    assert model.pretrained_cfg["architecture"] == f"test_life_{kind}"
    assert by_hand.pretrained_cfg["architecture"] == "vit_tiny_patch16_224"
    assert (
        timm.get_pretrained_cfg(f"test_life_{kind}").hf_hub_id
        == timm.get_pretrained_cfg("vit_tiny_patch16_224").hf_hub_id
    )
    thin = timm.create_model(f"test_life_thin_{kind}", **SMALL)
    assert mlpreduce.find_mlps(thin)[0].hidden_features == (32 if kind in ("sliced", "both") else 64)
    assert not timm.models.is_model_pretrained(f"test_life_thin_{kind}")
    from timm.models import resolve_model_input_args

    arguments = resolve_model_input_args(f"test_life_{kind}", {"img_size": 32}, num_classes=9)  # as timm's train.py
    assert timm.create_model(**arguments)(torch.randn(1, 3, 32, 32)).shape == (1, 9)


def test_pretrained_weights_come_before_the_reduction(tmp_path: Path, images: torch.Tensor) -> None:
    plain = tiny_vit().eval()
    torch.save(plain.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 5}
    model = timm.create_model("test_life_both", pretrained=True, pretrained_cfg_overlay=overlay, **SMALL).eval()
    for transform, config in STEPS["both"]:
        mlpreduce.apply(plain, transform, **config)
    assert torch.equal(model(images), plain(images))
    with pytest.raises(ReductionError, match=r"pretrained weights do not fit a model built with mlp_ratio=2.0"):
        timm.create_model("test_life_thin_tied", pretrained=True, pretrained_cfg_overlay=overlay, **SMALL)


@pytest.mark.parametrize("name", [*(f"test_life_{kind}" for kind in KINDS), "test_life_thin_tied"])
def test_timms_export_comes_back_by_its_name(name: str, tmp_path: Path, images: torch.Tensor) -> None:
    model = timm.create_model(name, **SMALL).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    assert (tmp_path / "model.safetensors").stat().st_size < unique_bytes(model) + 10_000
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(images), model(images))
    assert mlpreduce.verify(again).ok
    mlpreduce.save(again, tmp_path / "ours")
    assert torch.equal(mlpreduce.load(tmp_path / "ours").eval()(images), model(images))
    tuned = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3, img_size=32)
    assert torch.equal(next(tuned.blocks[3].mlp.parameters()), next(model.blocks[3].mlp.parameters()))
    assert tuned(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    for classes in (5, 3) if name.endswith(("tied", "sliced", "both")) else ():  # of other names timm warns alone
        config = json.loads((tmp_path / "config.json").read_text())
        config["architecture"] = "vit_tiny_patch16_224"
        config["model_args"].pop("mlp_ratio", None)
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(RuntimeError, match="size mismatch for blocks"):
            timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=classes)


@pytest.mark.processes
@pytest.mark.usefixtures("one_thread")  # with more, the order of sums may differ between processes
def test_the_papers_names_in_a_fresh_process(tmp_path: Path, images: torch.Tensor) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, timm, torch, mlpreduce\n"
        "torch.set_num_threads(1)\n"
        "images = torch.load('images.pt', weights_only=True)\n"
        "for kind in ('grouped', 'shallow', 'thin'):\n"
        "    model = timm.create_model(sys.argv[1] + kind, img_size=16, patch_size=4, depth=2).eval()\n"
        "    timm.models.save_for_hf(model, kind, safe_serialization=True)\n"
        "    mlpreduce.save(model, kind + '_ours')\n"
        "    torch.save((model(images).detach(), sum(p.numel() for p in model.parameters())), kind + '.pt')\n"
    )
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import sys; sys.argv = ['train.py', 'vit_base_patch16_224_']\n"
        "import mlpreduce.timm_models, runpy; runpy.run_path('train.py', run_name='__main__')"
    )
    python("-c", code, cwd=tmp_path).check_returncode()
    importlib.import_module("mlpreduce.timm_models")
    for kind in ("grouped", "shallow", "thin"):
        output, count = torch.load(tmp_path / f"{kind}.pt", weights_only=True)
        for again in (
            timm.create_model(f"local-dir:{tmp_path / kind}", pretrained=True),
            mlpreduce.load(tmp_path / f"{kind}_ours"),
        ):
            assert torch.equal(again.eval()(images), output)
            assert sum(p.numel() for p in again.parameters()) == count
    with torch.device("meta"):
        counts = [
            sum(p.numel() for p in timm.create_model(f"vit_base_patch16_224_{kind}").parameters())
            for kind in ("grouped", "shallow", "thin")
        ]
    assert counts == [58_233_064, 58_237_672, 58_237_672]


@pytest.mark.parametrize(
    ("name", "architecture", "steps", "message"),
    [
        ("vit_base_patch16_224", "vit_tiny_patch16_224", STEPS["tied"], "there is a model or function of this name"),
        ("test_life_tied", "vit_tiny_patch16_224", STEPS["tied"], "there is a model or function of this name"),
        ("create_model", "vit_tiny_patch16_224", STEPS["tied"], "there is a model or function of this name"),
        ("a.b", "vit_tiny_patch16_224", STEPS["tied"], "a name is letters, digits and _"),
        (
            "unused",
            "vit_tiny_patch16_22",
            STEPS["tied"],
            "timm has no architecture 'vit_tiny_patch16_22'; did you mean",
        ),
        ("unused", "vit_tiny_patch16_224", [], r"steps is \[\]; it must be like \[\(\"grouped\""),
        ("unused", "vit_tiny_patch16_224", ["grouped"], "step 0 is 'grouped'; steps must be like"),
        ("unused", "vit_tiny_patch16_224", [("grouped", None)], r"step 0 is \('grouped', None\)"),
        ("unused", "vit_tiny_patch16_224", [("groupped", {})], "unknown transform 'groupped'; did you mean 'grouped'"),
        ("unused", "vit_tiny_patch16_224", [("grouped", {"size": 2})], r"grouped\(size=2\): unknown argument 'size'"),
        (
            "unused",
            "vit_tiny_patch16_224",
            [("shallow", {}), ("thin", {})],
            "thin acts when the model is built; let it be",
        ),
    ],
)
def test_bad_registrations(name: str, architecture: str, steps: Any, message: str) -> None:
    before = set(timm.list_models())
    with pytest.raises(ReductionError, match=message):
        mlpreduce.register_model(name, architecture, steps)
    assert set(timm.list_models()) == before


def test_bad_builds_of_a_registered_name() -> None:
    with pytest.raises(ReductionError, match=r"mlp_ratio=3, but the name stands for 2.0"):
        timm.create_model("test_life_thin_tied", mlp_ratio=3)
    with pytest.raises(ReductionError, match=r"features_only is not built by this name; use forward_intermediates"):
        timm.create_model("test_life_tied", features_only=True)
    with pytest.raises(ReductionError, match=r"3 MLPs do not split"):
        timm.create_model("test_life_tied", **SMALL | {"depth": 3})
