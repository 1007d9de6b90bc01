"""Hidden widths that are learned while the model trains, under a budget: a primal-dual method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mlpreduce.budget.costs import counted, measure
from mlpreduce.budget.solve import Slot, budget_of, filled, price_of
from mlpreduce.errors import ReductionError, check_number, check_whole, naming
from mlpreduce.graph import MLP, Inputs, find_mlps, module_at, projection, refuse_wrapped, structural_copy

__all__ = ["PrimalDual"]


class PrimalDual:
    """How many hidden units each MLP loses, learned beside the weights.

    With s the number of units that an MLP is to lose, c(s) what the model then costs, B the budget, and n(s) the sum of the s
    least squared norms of its fc2 columns, it seeks the saddle point of

        loss + sum over MLPs of y n(s) + z (c(s) - B) / B,   y, z >= 0

    After each update of the weights, `after_update` shrinks the s least columns by the proximal step 1 / (1 + 2 lr y), moves s
    down the slope, by rounding it down as if that had slope 1, and y and z up theirs. `widths` gives the widths in the end, for
    `shallow` with `widths=` and a criterion of fc2.

    Args:
        model: the model that is trained; its fc2 weights are changed in place.
        target_params: the most parameters; at most 1: a fraction.
        target_macs: the most multiply-accumulates; at most 1: a fraction. Give one of both.
        lr_width: step of s, in parts of the hidden features.
        lr_norm: step of y.
        lr_budget: step of z.
        round_to: widths are multiples of this.
        example_inputs: what the model is called with, to count MACs.

    Raises:
        ReductionError: no or two targets, or one that cannot be reached; the model has no MLP, or no weights; a rate or
            `round_to` is out of range.

    Source:
        UVC (Yu et al., "Unified Visual Transformer Compression", arXiv 2203.08243), over the widths of MLPs alone: it also
        learns heads and which blocks are skipped.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        target_params: float | None = None,
        target_macs: float | None = None,
        lr_width: float = 0.02,
        lr_norm: float = 1e-3,
        lr_budget: float = 0.5,
        round_to: int = 1,
        example_inputs: Inputs | None = None,
    ) -> None:
        given = {"target_params": target_params, "target_macs": target_macs}
        call = f"PrimalDual({', '.join(f'{k}={v!r}' for k, v in given.items() if v is not None)})"
        refuse_wrapped(model, call)
        if (target_params is None) == (target_macs is None):
            raise ReductionError(f"{call}: give one of target_params and target_macs")
        for name, rate in {"lr_width": lr_width, "lr_norm": lr_norm, "lr_budget": lr_budget}.items():
            check_number(f"{call}: {name}", rate)
        check_whole(f"{call}: round_to", round_to)
        mlps = find_mlps(model, example_inputs)
        owners = [mlp for mlp in mlps if mlp.owner == mlp.name]
        if not owners:
            raise ReductionError(f"{call}: found no MLP")
        unit = "parameters" if target_macs is None else "MACs"
        if target_macs is None:
            known, present = counted(model, mlps), float(counted(model, mlps).cost.params)
        else:
            known = measure(structural_copy(model, device="meta"), example_inputs, mlps)
            present = float(known.cost.macs)
        name, target = ("target_params", target_params) if target_macs is None else ("target_macs", target_macs)
        self._model, self._mlps = model, owners
        with naming(call):
            slots = [Slot.of(mlp, round_to, price_of(known, mlp.name, unit)) for mlp in owners]
            self._budget = budget_of(slots, present, name, target, unit)
            self._budget.check()
            for mlp in owners:
                self._weight(mlp)
        self._rates = lr_width, lr_norm, lr_budget
        self._gone = torch.zeros(len(owners), dtype=torch.float64)
        self._norm_duals = torch.zeros(len(owners), dtype=torch.float64)
        self._budget_dual = 0.0

    @torch.no_grad()
    def after_update(self, lr: float) -> None:
        """One step of widths and duals, and of the proximal shrinking of columns. Call it after the optimizer's.

        Args:
            lr: the learning rate of the weights in this update.
        """
        check_number("PrimalDual.after_update: lr", lr)
        width_rate, norm_rate, budget_rate = self._rates
        excess = self.cost() / self._budget.target - 1
        for index, (mlp, slot) in enumerate(zip(self._mlps, self._budget.slots, strict=True)):
            weight = self._weight(mlp)
            columns = weight.square().sum(0)
            order = columns.argsort()
            gone, dual = int(self._gone[index]), float(self._norm_duals[index])
            least = order[:gone]
            shrink = weight.new_ones(len(columns))
            shrink[least] = 1 / (1 + 2 * lr * dual)
            weight.mul_(shrink)
            self._norm_duals[index] = max(0.0, dual + norm_rate * float(columns[least].sum()))
            following = float(columns[order[min(gone, slot.hidden - 1)]]) / float(columns.mean().clamp(min=1e-30))
            saved = (slot.price(slot.hidden) - slot.price(slot.step)) / self._budget.target
            slope = dual * following - self._budget_dual * saved
            moved = float(self._gone[index]) - width_rate * slot.hidden * slope
            self._gone[index] = min(max(moved, 0.0), slot.hidden - slot.step)
        self._budget_dual = max(0.0, self._budget_dual + budget_rate * excess)

    def cost(self) -> float:
        """What the model costs with the widths as they are now, before `widths` makes them fit."""
        return self._budget.cost(self._now(0.0))

    def widths(self) -> dict[str, int]:
        """The width of each MLP: as learned, and then as many more or less of all, in parts, as the budget leaves."""
        low, high = -1.0, 1.0  # further part of all hidden units that goes
        for _ in range(60):
            middle = (low + high) / 2
            if self._budget.cost(self._now(middle)) <= self._budget.target:
                high = middle
            else:
                low = middle
        slots = []
        for mlp, slot in zip(self._mlps, self._budget.slots, strict=True):
            columns = self._weight(mlp).detach().square().sum(0).double().cpu()
            slots.append(replace(slot, scores=columns.sort(descending=True).values))
        return filled(replace(self._budget, slots=slots), self._now(high))

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers, to go on with."""
        return {"gone": self._gone.clone(), "norm_duals": self._norm_duals.clone(), "budget_dual": self._budget_dual}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set it as `state_dict` was.

        Raises:
            ReductionError: it is of another number of MLPs.
        """
        missing = [key for key in self.state_dict() if not isinstance(state, Mapping) or key not in state]
        if missing:
            raise ReductionError(f"PrimalDual: the state has no {missing[0]!r}; give what state_dict() returned")
        if len(state["gone"]) != len(self._gone):
            raise ReductionError(
                f"PrimalDual: the state is of {len(state['gone'])} MLPs, the model has {len(self._gone)}"
            )
        self._gone, self._norm_duals = state["gone"].clone(), state["norm_duals"].clone()
        self._budget_dual = float(state["budget_dual"])

    def _now(self, more: float) -> dict[str, int]:
        """Widths when a further part of all units goes, the number of them rounded down."""
        return {
            slot.owner: slot.rounded(slot.hidden - int(min(max(float(gone) + more * slot.hidden, 0), slot.hidden)))
            for slot, gone in zip(self._budget.slots, self._gone, strict=True)
        }

    def _weight(self, mlp: MLP) -> torch.Tensor:
        """fc2's weight as (outputs, hidden units), in its memory."""
        path = mlp.leaf("fc2").call
        module = module_at(self._model, path)
        layer = projection(module)
        axes = [axis for axis in mlp.axes if axis.tensor == f"{path}.weight"]
        if module is None or layer is None or not layer.dense or not axes:
            raise ReductionError(f"{path} is no linear layer or 1 x 1 convolution with a weight of its own")
        weight = module.get_parameter("weight").detach()
        if weight.is_meta:
            raise ReductionError(f"{path} is on the meta device; give the model weights first")
        flat = weight.flatten(1)  # a view: what follows the first two dimensions is 1 x 1
        columns = flat if layer.inputs == (("weight", 1, 1),) else flat.T
        return columns.narrow(1, axes[0].offsets[0], mlp.hidden_features)  # beside attention's, where layers are fused
