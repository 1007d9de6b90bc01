"""`GateL1`: a gate for each hidden unit, learned with the weights under an L1 penalty, then folded and sliced."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from mlpreduce.during.units import average_of, fraction, owners, part_of, projections, whole, with_units
from mlpreduce.edits import Axis, Plan
from mlpreduce.errors import ReductionError, call_text, did_you_mean
from mlpreduce.graph import MLP, Inputs, first_units, mlps_or_raise, module_at, refuse_wrapped, select
from mlpreduce.reduction.applying import apply
from mlpreduce.reduction.planning import Globs, make_plan
from mlpreduce.surgery.operation import rehearse
from mlpreduce.words.values import Config

__all__ = ["GateL1"]

_SCOPES = ("global", "uniform")
_LARGEST = torch.finfo(torch.float32).max


class _Gate(nn.Module):
    """Multiplies the columns of an fc2 weight that belong to hidden units."""

    def __init__(self, weight: torch.Tensor, axis: Axis, hidden: int) -> None:
        super().__init__()
        wide = torch.promote_types(weight.dtype, torch.float32)  # a gate near 1 in bfloat16 would not see small steps
        self.gate = nn.Parameter(torch.ones(hidden, dtype=wide, device=weight.device))
        self.dim, self.size, self.start = axis.dim, axis.size, axis.offsets[0]

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        factors: torch.Tensor = self.gate
        if self.size > len(factors):  # the other columns of a fused layer
            rest = factors.new_ones(self.size - len(factors))
            factors = torch.cat([rest[: self.start], factors, rest[self.start :]])
        factors = factors.reshape([-1 if dim == self.dim else 1 for dim in range(weight.dim())])
        return (weight * factors).to(weight.dtype)


@dataclass(frozen=True)
class _Place:
    """Where the gate of an MLP is: the layer, and the order of its parameters before it had one."""

    mlp: MLP
    layer: str
    names: tuple[str, ...]

    def find(self, model: nn.Module, call: str) -> tuple[nn.Module, _Gate]:
        """The layer and its gate.

        Raises:
            ReductionError: there is none in this model, or the weight has another parametrization too.
        """
        layer = module_at(model, self.layer)
        parts = getattr(layer, "parametrizations", {})
        held = list(parts["weight"]) if list(parts) == ["weight"] else []
        if layer is None or len(held) != 1 or not isinstance(held[0], _Gate):
            raise ReductionError(f"{call}: {self.layer} has no gate, or more than one; give the model, or a copy of it")
        return layer, held[0]


class GateL1:
    """Learns which hidden units a model can do without: a gate m of each, 1 at first, multiplies what fc2 is given of it.

    The gates train with the weights. `after_backward()` adds coefficient * sign(m) to their gradients, which is that of
    the penalty coefficient * sum |m|, 0 at m = 0. `finalize()` folds them, W2 <- W2 diag(m), which changes no output,
    and slices the units with the least |m| out: train on after it, with a new optimizer, as slicing makes new Parameters. A
    norm over the hidden units, as eva02 has, counts what is sliced in its statistics, so there even units of gate 0 matter.

    Make it before optimizer, moving average and DDP, whose parameters the gates must be among. The gates multiply the
    columns of the fc2 weight, which is the same function at the cost of one product of that weight. Until they are folded
    the weight is `parametrizations.weight.original` in the state dict, and the gates are in it too, so training goes on
    from the model's own state. A tied MLP has one gate a unit for all its uses.

    Args:
        model: the model; changed in place.
        coefficient: of the penalty.
        include: glob or globs over MLP names; others have no gates.
        exclude: glob or globs over MLP names without gates.
        example_inputs: what the model is called with, as of `mlpreduce.find_mlps`.

    Raises:
        ReductionError: the coefficient is out of range, no MLP is in scope, one is tied to another that is not, or the model
            has gates already.

    Example:
        >>> from mlpreduce.testing import tiny_vit
        >>> gates = GateL1(model := tiny_vit(), coefficient=1e-2)
        >>> optimizer = torch.optim.AdamW(gates.parameter_groups(lr=1e-2, weight_decay=0.05))
        >>> for _ in range(3):
        ...     model(torch.randn(2, 3, 16, 16)).square().mean().backward()
        ...     gates.after_backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> model = gates.finalize(quantile=0.25, scope="uniform")
        >>> model.blocks[0].mlp.fc2
        Linear(in_features=96, out_features=32, bias=True)

    Source: VTP, Zhu, Tang and Han, "Vision Transformer Pruning", arXiv 2104.08500, section 3; its gates of attention are not
    here. Its coefficient is 1e-4.
    """

    def __init__(
        self,
        model: nn.Module,
        coefficient: float = 1e-4,
        *,
        include: Globs = None,
        exclude: Globs = None,
        example_inputs: Inputs | None = None,
    ) -> None:
        call = call_text("GateL1", {"coefficient": coefficient})
        self.coefficient = fraction("coefficient", coefficient, call, most=_LARGEST)
        refuse_wrapped(model, call)
        if any(isinstance(module, _Gate) for module in model.modules()):
            raise ReductionError(f"{call}: the model has gates already; finalize them first")
        found = mlps_or_raise(model, call, example_inputs).mlps
        chosen, _ = select(found, include, exclude)
        names = {mlp.name for mlp in chosen}
        for mlp in found:
            if mlp.owner != mlp.name and (mlp.name in names) != (mlp.owner in names):
                raise ReductionError(
                    f"{call}: {mlp.owner} is tied to {mlp.name}, of which one has no gates; include both"
                )
        self._places = [_placed(model, mlp, call) for mlp in owners(chosen)]
        self._model: nn.Module | None = model
        self._inputs = example_inputs
        for place in self._places:
            layer = cast(nn.Module, module_at(model, place.layer))
            axis = projections(place.mlp)[1]
            gate = _Gate(layer.get_parameter("weight"), axis, place.mlp.hidden_features)
            parametrize.register_parametrization(layer, "weight", gate)

    @property
    def gates(self) -> dict[str, nn.Parameter]:
        """The gates of each MLP by its name, (hidden units,); of a tied one by that of its first use."""
        model = self._open("GateL1.gates")
        return {place.mlp.name: place.find(model, "GateL1.gates")[1].gate for place in self._places}

    def gate_parameters(self) -> list[nn.Parameter]:
        """The gates, for an optimizer that is made by hand; they must not decay."""
        return list(self.gates.values())

    def parameter_groups(self, lr: float, weight_decay: float, gate_lr: float | None = None) -> list[dict[str, Any]]:
        """Groups for an optimizer of all that trains in the model: matrices decay; biases, norms and gates do not.

        Args:
            lr: learning rate.
            weight_decay: of parameters with two or more dimensions.
            gate_lr: learning rate of the gates; `lr` by default.
        """
        gates = self.gate_parameters()
        known = {id(gate) for gate in gates}
        others = [p for p in self._open("GateL1").parameters() if p.requires_grad and id(p) not in known]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in others if p.dim() > 1], "lr": lr, "weight_decay": weight_decay},
            {"params": [p for p in others if p.dim() <= 1], "lr": lr, "weight_decay": 0.0},
            {"params": gates, "lr": lr if gate_lr is None else gate_lr, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def after_backward(self, scale: float = 1.0) -> None:
        """Add the gradient of the penalty. Once an update: after the last backward pass, before the gradients are clipped.

        Args:
            scale: what the gradients are multiplied by: with a GradScaler call it after `scaler.unscale_(optimizer)`, or give
                `scaler.get_scale()`.

        Raises:
            ReductionError: `finalize` was called.
        """
        fraction("scale", scale, "GateL1.after_backward()", most=_LARGEST)
        with torch.no_grad():
            for gate in self.gates.values():
                slope = gate.sign().mul_(self.coefficient * scale)
                gate.grad = slope if gate.grad is None else gate.grad.add_(slope)

    def fold(self, ema: Any = None) -> nn.Module:
        """Fold the gates into the weights in place, and return the model, plain again. Exact: no output changes.

        Args:
            ema: a moving average of the model, or what holds it as `.module`; folded too.

        Raises:
            ReductionError: `finalize` or `fold` was called before, or a model is no longer what it was.
        """
        call = "GateL1.fold()"
        model = self._open(call)
        _fold(self._all(model, ema, call), self._places, call)
        self._model = None
        return model

    def finalize(
        self, quantile: float = 0.3, *, scope: str = "global", round_to: int = 1, ema: Any = None
    ) -> nn.Module:
        """Fold the gates, slice the units with the least |m| out, in place, and return the model, plain again.

        Args:
            quantile: fraction of the hidden units to slice out, of equal gates those with the lower number last.
            scope: `global`: one threshold on |m| for all MLPs; `uniform`: one for each.
            round_to: what is left of an MLP is rounded up to a multiple of this, so that no unit above the threshold goes; at
                least one multiple stays.
            ema: a moving average of the model, or what holds it as `.module`; folded by its own gates, and sliced to the
                same units.

        Raises:
            ReductionError: an argument out of range, `finalize` was called before, or a model is no longer what it was. Nothing
                has changed then.
        """
        config = {"quantile": quantile, "scope": scope, "round_to": round_to}
        call = call_text("GateL1.finalize", config)
        model = self._open(call)
        fraction("quantile", quantile, call)
        whole("round_to", round_to, call)
        if scope not in _SCOPES:
            raise ReductionError(f"{call}: scope is {scope!r}{did_you_mean(str(scope), _SCOPES)}")
        units = self._chosen(quantile, scope, round_to, call)
        models = self._all(model, ema, call)
        undo = _fold(models, self._places, call)
        try:
            made = self._plan(model, units, {"coefficient": self.coefficient} | config)
            if made is not None:
                for each in models:
                    rehearse(each, made)
                apply(model, made, example_inputs=self._inputs)
        except BaseException:
            undo()
            raise
        if made is not None and ema is not None:
            apply(models[1], made, example_inputs=self._inputs)
        self._model = None
        return model

    def _open(self, call: str) -> nn.Module:
        if self._model is None:
            raise ReductionError(f"{call}: the gates are folded already; make new ones")
        return self._model

    def _all(self, model: nn.Module, ema: Any, call: str) -> list[nn.Module]:
        other = average_of(model, ema, call)
        models = [model] if other is None else [model, other]
        for each in models:
            for place in self._places:
                place.find(each, call)
        return models

    def _chosen(self, quantile: float, scope: str, round_to: int, call: str) -> dict[str, list[int]]:
        """The units that stay of each MLP."""
        sizes = {name: gate.detach().abs().cpu() for name, gate in self.gates.items()}
        if not all(bool(size.isfinite().all()) for size in sizes.values()):
            raise ReductionError(f"{call}: there are gates that are not finite; a lower learning rate would help")
        if quantile and all(bool((size == 1).all()) for size in sizes.values()):
            raise ReductionError(
                f"{call}: every gate is 1 as at first, so no unit matters less than another; make the optimizer after GateL1, "
                f"of its parameter_groups(), and call after_backward() before each of its steps"
            )
        if scope == "global":
            counts = _split([*sizes.values()], quantile)
        else:
            counts = [len(size) - part_of(len(size), quantile) for size in sizes.values()]
        kept = {}
        for place, count in zip(self._places, counts, strict=True):
            mlp = place.mlp
            step, hidden = math.lcm(round_to, mlp.groups), mlp.hidden_features
            order = torch.sort(sizes[mlp.name], descending=True, stable=True).indices.tolist()
            width = min(max(math.ceil(count / step), 1) * step, hidden)
            kept[mlp.name] = first_units(mlp, order, width)
        return kept

    def _plan(self, model: nn.Module, units: dict[str, list[int]], config: Config) -> Plan | None:
        """The plan that keeps these units of a model without gates; None where all stay."""
        widths = {name: len(kept) for name, kept in units.items()}
        if all(widths[place.mlp.name] == place.mlp.hidden_features for place in self._places):
            return None
        made, _ = make_plan(model, "shallow", {"widths": widths}, example_inputs=self._inputs)
        return with_units(made, "gate_l1", config, units)


def _placed(model: nn.Module, mlp: MLP, call: str) -> _Place:
    projections(mlp)  # which says why, if it has none
    layer = mlp.leaf("fc2").path
    module = cast(nn.Module, module_at(model, layer))
    if module.get_parameter("weight").is_floating_point():
        return _Place(mlp, layer, tuple(module._parameters))
    raise ReductionError(
        f"{call}: the weight of {layer} is {module.weight.dtype}; only floating-point weights have gates"
    )


def _split(sizes: Sequence[torch.Tensor], quantile: float) -> list[int]:
    """How many units of each MLP lie above one threshold for all."""
    joined = torch.cat(list(sizes))
    order = torch.sort(joined, descending=True, stable=True).indices
    above = torch.zeros(len(joined), dtype=torch.bool)
    above[order[: len(joined) - part_of(len(joined), quantile)]] = True
    return [int(part.sum()) for part in above.split([len(size) for size in sizes])]


def _fold(models: Sequence[nn.Module], places: Sequence[_Place], call: str) -> Any:
    """Fold the gates of models; returns what puts them back."""
    found = [(place, *place.find(model, call)) for model in models for place in places]
    before: list[tuple[nn.Module, _Gate, nn.Parameter, torch.Tensor]] = []
    for place, layer, gate in found:
        # torch's own remove_parametrizations takes the weight off the class, which a deep copy of the layer shares
        weight = cast(nn.Parameter, layer.parametrizations["weight"].original)  # type: ignore[index, union-attr]
        folded = gate(weight).detach()
        before.append((layer, gate, weight, weight.detach().clone()))
        with torch.no_grad():
            weight.copy_(folded)
        del layer._modules["parametrizations"]
        layer.__class__ = type(layer).__mro__[1]
        held = {**layer._parameters, "weight": weight}
        layer._parameters.clear()
        layer._parameters.update({name: held[name] for name in place.names})

    def undo() -> None:
        for layer, gate, weight, values in before:
            with torch.no_grad():
                weight.copy_(values)
            parametrize.register_parametrization(layer, "weight", gate)

    return undo
