"""What a plan costs, before anything is changed: parameters and MACs from the costs of single hidden units.

The model is measured once, on the meta device; every plan is then a matter of sums. A tied tensor counts once, and an
MLP's MACs once for each use.

Three conventions of multiply-accumulates for one image:

- `macs_linear`: Linear and Conv (and nothing else);
- `macs`: the same and LayerNorm at 5 per element, as fvcore counts when attention is fused; the figures of
  arXiv 2512.01059, which calls them GFLOPs;
- `macs_with_attention`: the same and the two products of attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, get_type_hints

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mlpreduce.edits import Plan, Share, Slice
from mlpreduce.errors import ReductionError
from mlpreduce.graph import (
    MLP,
    Inputs,
    call_with,
    example_inputs,
    find_mlps,
    leaf_parameters,
    map_tensors,
    module_at,
    projection,
    structural_copy,
    tensors_in,
)
from mlpreduce.layers import BlockDiagonalLinear
from mlpreduce.words.values import short

__all__ = ["COSTS", "Baseline", "Cost", "TimedCost", "cost_from", "counted", "measure", "outcome"]

LAYER_NORM_MACS = 5  # fvcore's per-element cost
_LINEAR = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution}
_NORM = torch.ops.aten.native_layer_norm


@dataclass(frozen=True)
class Cost:
    """Cost of a model: parameters, and multiply-accumulates for one image.

    Attributes:
        params: parameters, a tied tensor once.
        mlp_params: those of its MLPs.
        unique_mlps: MLPs with weights of their own.
        macs_linear: multiply-accumulates of Linear and Conv.
        macs: the same and LayerNorm at 5 per element (the convention of arXiv 2512.01059).
        macs_with_attention: the same and the two products of attention.
    """

    params: Annotated[int, "parameters"]
    mlp_params: Annotated[int, "MLP parameters"]
    unique_mlps: Annotated[int, "unique MLPs"]
    macs_linear: Annotated[int, "MACs without LayerNorm"]
    macs: Annotated[int, "MACs"]
    macs_with_attention: Annotated[int, "MACs with attention"]

    def macs_text(self, after: Cost | None = None) -> str:
        """The MACs with their convention, for tables; with another cost, before and after in one unit."""

        def told(name: str) -> str:
            was, now = getattr(self, name), getattr(after or self, name)
            return short(was) + (f" -> {short(now, like=was)}" if now != was else "")

        macs = f"{told('macs')} MACs of Linear, Conv and LayerNorm ({told('macs_with_attention')} with attention)"
        return macs + (", unchanged" if after is not None and after.macs == self.macs else "")


# the exact counts, which are known before anything is trained: name -> what people read
COSTS: dict[str, str] = {
    name: found.__metadata__[0] for name, found in get_type_hints(Cost, include_extras=True).items()
}


@dataclass(frozen=True)
class TimedCost(Cost):
    """The cost of a model whose latency is known too.

    Attributes:
        latency: milliseconds for a batch.
    """

    latency: float


def cost_from(document: Mapping[str, Any]) -> Cost:
    """The cost whose fields these are."""
    return TimedCost(**document) if "latency" in document else Cost(**document)


@dataclass(frozen=True)
class Baseline:
    """A measured model.

    Attributes:
        cost: of the model as it is.
        mlps: its MLPs.
        positions: for each of them, the tokens it acts on in one image.
        leaves: parameters of every leaf module by path, of a tied one under its first path only.
    """

    cost: Cost
    mlps: tuple[MLP, ...]
    positions: tuple[int, ...]
    leaves: Mapping[str, int]

    def after(self, plan: Plan) -> Cost:
        """Exact cost of the model after a plan; nothing is changed."""
        of_mlps = {leaf.path for mlp in self.mlps for leaf in mlp.leaves}
        beside = {share.target for share in plan.of(Share)} - of_mlps
        cost = self._cost(outcome(self.mlps, plan))
        return replace(cost, params=cost.params - sum(self.leaves.get(path, 0) for path in beside))

    def with_widths(self, widths: Mapping[str, int]) -> Cost:
        """Exact cost of the model with other hidden widths, by owner; those that are not given stay."""
        return self._cost({m.name: (widths.get(m.owner, m.hidden_features), m.owner) for m in self.mlps})

    def macs_gone(self, mlp: MLP, positions: int, hidden: int) -> int:
        """What one use of an MLP, acting on that many positions, saves of `Cost.macs` with this width."""
        norms = (mlp.hidden_features - hidden) * mlp.norms_per_unit * LAYER_NORM_MACS
        return positions * (mlp.macs_gone(hidden) + norms)

    def _cost(self, result: Mapping[str, tuple[int, str]]) -> Cost:
        """The cost for a width and an owner of each MLP."""
        params, linear, norms = 0, 0, 0
        for mlp, positions in zip(self.mlps, self.positions, strict=True):
            hidden, owner = result[mlp.name]
            params += mlp.params(hidden, owned=owner == mlp.name)
            linear += positions * mlp.macs_gone(hidden)
            norms += self.macs_gone(mlp, positions, hidden) - positions * mlp.macs_gone(hidden)
        return Cost(
            params=self.cost.params - self.cost.mlp_params + params,
            mlp_params=params,
            unique_mlps=len({owner for _, owner in result.values()}),
            macs_linear=self.cost.macs_linear - linear,
            macs=self.cost.macs - linear - norms,
            macs_with_attention=self.cost.macs_with_attention - linear - norms,
        )


def outcome(mlps: Sequence[MLP], plan: Plan) -> dict[str, tuple[int, str]]:
    """Hidden width and owner of each MLP after a plan, by name. The owner is the first in order of execution."""
    widths = {edit.mlp: len(edit.units) for edit in plan.of(Slice)}
    source = {share.target: share.source for share in plan.of(Share)}
    by_leaf = {mlp.leaf("fc2").path: mlp.owner for mlp in mlps}
    owners: dict[str, str] = {}
    result = {}
    for mlp in mlps:
        key = by_leaf[source.get(mlp.leaf("fc2").path, mlp.leaf("fc2").path)]
        owner = owners.setdefault(key, mlp.name)
        result[mlp.name] = (widths.get(mlp.owner, mlp.hidden_features), owner)
    return result


def counted(model: nn.Module, mlps: Sequence[MLP]) -> Baseline:
    """Parameters alone, without running the model: its MACs are 0."""
    cost = Cost(
        params=sum(parameter.numel() for parameter in model.parameters()),
        mlp_params=sum(mlp.params(owned=mlp.owner == mlp.name) for mlp in mlps),
        unique_mlps=len({mlp.owner for mlp in mlps}),
        macs_linear=0,
        macs=0,
        macs_with_attention=0,
    )
    return Baseline(cost, tuple(mlps), (0,) * len(mlps), leaf_parameters(model))


def measure(
    model: nn.Module,
    inputs: Inputs | None = None,
    mlps: Sequence[MLP] | None = None,
    tokens_per_block: Sequence[int] | None = None,
) -> Baseline:
    """Count parameters and MACs by dispatching one image on the meta device. Takes no memory and changes nothing.

    Args:
        model: the model.
        inputs: a batch (images, channels, height, width), or arguments of another kind, of which the shapes matter;
            by default what the model says it takes.
        mlps: its MLPs, if known.
        tokens_per_block: the tokens that go into each block, class token included, as where tokens are pruned; by default
            those that the model makes of its input.

    Raises:
        ReductionError: the input size is not known, or the model does not run on the meta device.
    """
    mlps = find_mlps(model, inputs) if mlps is None else list(mlps)
    image = map_tensors(example_inputs(model) if inputs is None else inputs, _one_on_meta)
    copy = structural_copy(model, device="meta").eval().requires_grad_(False)
    calls: dict[int, list[int]] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        calls.setdefault(id(module), []).append(given.numel() // features[id(module)])

    contracts = [module_at(copy, mlp.leaf("fc2").call) for mlp in mlps]
    features: dict[int, int] = {}
    for leaf in contracts:
        layer = projection(leaf)
        if leaf is not None and layer is not None:
            features[id(leaf)] = layer.in_features
    for leaf in {id(leaf): leaf for leaf in contracts if leaf is not None}.values():
        leaf.register_forward_hook(record, with_kwargs=True)
    for name, tokens in _tokens_of_blocks(mlps, tokens_per_block).items():
        module_at(copy, name).register_forward_pre_hook(partial(_with_tokens, name, tokens))  # type: ignore[union-attr]
    counter = FlopCounterMode(display=False, custom_mapping={_NORM: _norm_elements})
    try:
        with torch.no_grad(), counter:
            call_with(copy, image)
    except ReductionError:
        raise
    except Exception as error:  # whatever a foreign forward raises
        raise ReductionError(
            f"measure({type(model).__name__}): it does not run on one input ({_shapes(image)}): "
            f"{type(error).__name__}: {error}; if the shape is wrong, give inputs="
        ) from error
    counts = counter.get_flop_counts()
    flops = counts["Global"]
    blocks = {  # a tied one goes by one of its names
        f"{type(copy).__name__}.{path}"
        for path, module in copy.named_modules(remove_duplicate=False)
        if isinstance(module, BlockDiagonalLinear)
    }
    in_blocks = sum(sum(counts[name].values()) for name in blocks & counts.keys()) // 2
    linear = sum(count for op, count in flops.items() if op in _LINEAR) // 2 + in_blocks
    norms = flops.get(_NORM, 0) * LAYER_NORM_MACS
    attention = sum(count for op, count in flops.items() if op not in _LINEAR and op is not _NORM) // 2 - in_blocks
    known = counted(model, mlps)
    cost = replace(
        known.cost,
        macs_linear=linear,
        macs=linear + norms,
        macs_with_attention=linear + norms + attention,
    )
    return replace(known, cost=cost, positions=tuple(calls[id(leaf)].pop(0) for leaf in contracts))


def _tokens_of_blocks(mlps: Sequence[MLP], tokens: Sequence[int] | None) -> dict[str, int]:
    """Tokens that go into each block, by its path."""
    if tokens is None:
        return {}
    if not isinstance(tokens, Sequence):
        raise ReductionError(f"tokens_per_block={tokens!r}: give a list with a number for each block")
    blocks = list(dict.fromkeys(mlp.block for mlp in mlps))
    whole = all(isinstance(count, int) and not isinstance(count, bool) and count > 0 for count in tokens)
    if len(tokens) != len(blocks) or not whole:
        raise ReductionError(
            f"tokens_per_block={list(tokens)}: give a whole number above 0 for each of {len(blocks)} blocks, {blocks[0]} to "
            f"{blocks[-1]}"
        )
    return dict(zip(blocks, tokens, strict=True))


def _with_tokens(name: str, tokens: int, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a block is called with, with another number of tokens."""
    if not args or not isinstance(args[0], torch.Tensor) or args[0].dim() != 3:
        what = tuple(args[0].shape) if args and isinstance(args[0], torch.Tensor) else "no tensor"
        raise ReductionError(f"tokens_per_block: {name} is not given tokens (images, tokens, features) but {what}")
    return args[0].new_empty((args[0].shape[0], tokens, args[0].shape[2])), *args[1:]


def _one_on_meta(batch: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(batch[:1] if batch.dim() else batch, device="meta")


def _shapes(inputs: Inputs) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(inputs))


def _norm_elements(input_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    return int(torch.Size(input_shape).numel())
