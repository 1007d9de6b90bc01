"""`PruneAndGrow`: training under a mask of hidden units that moves, and a slice at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mlpreduce.calibration import Loss
from mlpreduce.during.moving import Masked, check_alone, mask_of, moved_mask, tensor_of
from mlpreduce.during.units import (
    average_of,
    entry,
    fraction,
    parameter,
    same_settings,
    unit_norms,
    whole,
    with_units,
)
from mlpreduce.edits import Slice
from mlpreduce.errors import ReductionError, did_you_mean, naming
from mlpreduce.graph import Inputs
from mlpreduce.reduction.applying import apply
from mlpreduce.reduction.planning import Globs, make_plan
from mlpreduce.surgery.operation import rehearse
from mlpreduce.words.values import Config

__all__ = ["PruneAndGrow"]

_SITES = ("fc2", "both")
_WHEN = (
    ", and units grow by them; call it after optimizer.step() and before optimizer.zero_grad(), and let fc1 and fc2 be "
    "trained"
)


class PruneAndGrow:
    """Trains a model in which part of the hidden units of every MLP is masked, and moves the mask as it learns.

    At first a random choice of units is active. After every `interval` updates the active units with the least
    ||W1 row||_1 + ||W2 column||_1 are dropped, and as many of the others with the largest ||dL/dW1 row||_1 +
    ||dL/dW2 column||_1 are grown; a unit just dropped comes back if its gradient ranks. Call `step()` once an update, after
    `optimizer.step()` and before `optimizer.zero_grad()`: it looks at the gradients, whose scale does not matter, and
    masks again what momentum and weight decay have moved. At the end `finalize()` slices the masked units out, and the
    model computes what it did.

    A unit is masked by a zero fc2 column: what it computes reaches nothing. With `site="both"`, as published, its fc1 rows
    are zero too; then its gradient is that of its fc2 column times act(b1), so where the activation of a bias of 0 is 0
    none but units just dropped can grow, and the mask hardly moves. By default the fc1 rows of a masked unit stay as they
    are, so that its gradient tells what it would be worth. Masked weights lie aside and come back when the unit grows.

    It works with gradient accumulation (one call an update), with a GradScaler (where the gradient is not finite, the
    move waits for the next update), under DDP (give the model itself, after it is wrapped: all processes have equal weights
    then, and equal gradients move all masks alike) and with a moving average (`apply_to`). Compile with
    `torch.compile(model)`, not in place. Sharded models are refused. A tied MLP has one mask. Slicing makes new Parameters:
    to train on after `finalize()`, make a new optimizer.

    Args:
        model: the model; masked in place.
        density: fraction of the hidden units of each MLP that is active: int(density * hidden).
        interval: updates between two moves of the mask.
        total_updates: of the whole training.
        stop: fraction of them after which the mask stays.
        drop: fraction of the active units that is dropped, at first and at the end; a cosine lies between.
        site: `fc2` or `both`: where masked units are zero.
        criterion: which units are active at first, see `mlpreduce.list_criteria`.
        seed: of the criterion `random`.
        include: glob or globs over MLP names; others are left out.
        exclude: glob or globs over MLP names to leave out.
        data: calibration data, if the criterion looks at it, as of `mlpreduce.plan`.
        loss: as of `mlpreduce.plan`.
        example_inputs: what the model is called with, as of `mlpreduce.find_mlps`.

    Raises:
        ReductionError: a number out of range, no MLP to mask, or one with a norm over its hidden units, which would see the
            masked ones too.

    Example:
        >>> from mlpreduce.testing import tiny_vit
        >>> model = tiny_vit()
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> masks = PruneAndGrow(model, 0.25, interval=2, total_updates=4)
        >>> for _ in range(4):
        ...     model(torch.randn(2, 3, 16, 16)).square().mean().backward()
        ...     optimizer.step()
        ...     masks.step()
        ...     optimizer.zero_grad()
        >>> masks.finalize().blocks[0].mlp.fc1
        Linear(in_features=32, out_features=32, bias=True)

    Source: S2ViTE, Chen et al., "Chasing Sparsity in Vision Transformers", arXiv 2106.04533, section 3.2; the cosine is that
    of Evci et al., arXiv 1911.11134. That of attention heads is not here.
    """

    def __init__(
        self,
        model: nn.Module,
        density: float = 0.5,
        *,
        interval: int,
        total_updates: int,
        stop: float = 0.8,
        drop: tuple[float, float] = (0.5, 0.005),
        site: str = "fc2",
        criterion: str | Config = "random",
        seed: int = 0,
        include: Globs = None,
        exclude: Globs = None,
        data: Any = None,
        loss: Loss | None = None,
        example_inputs: Inputs | None = None,
    ) -> None:
        call = "PruneAndGrow"
        self.interval, self.total_updates = (
            whole("interval", interval, call),
            whole("total_updates", total_updates, call),
        )
        self.stop = fraction("stop", stop, call)
        fraction("density", density, call)
        if self.interval > self.stop * self.total_updates:
            raise ReductionError(
                f"{call}: interval={interval} is more than {self.stop:g} of total_updates={total_updates}, after which the "
                f"mask stays, so it would never move; use a shorter interval"
            )
        if not isinstance(drop, (tuple, list)) or len(drop) != 2:
            raise ReductionError(
                f"{call}: drop is {drop!r}; it must be two fractions, that at first and that at the end"
            )
        self.drop = (fraction("drop[0]", drop[0], call), fraction("drop[1]", drop[1], call))
        if site not in _SITES:
            raise ReductionError(f"{call}: site is {site!r}{did_you_mean(str(site), _SITES)}")
        chosen = {"ratio": density, "criterion": criterion, "seed": seed}
        scope: dict[str, Any] = {"include": include, "exclude": exclude, "data": data, "loss": loss}
        with naming(f"{call}(density={density!r})"):
            made, found = make_plan(model, "shallow", chosen, **scope, example_inputs=example_inputs)
        self._config: dict[str, Any] = {
            "density": density,
            "interval": interval,
            "total_updates": total_updates,
            "stop": stop,
        }
        self._config |= {"drop": list(drop), "site": site, "criterion": made.config["criterion"], "seed": seed}
        self._model, self._plan, self._inputs = model, made, example_inputs
        self._masks: dict[str, Masked] = {}
        mlps = {mlp.name: mlp for mlp in found.mlps}
        for edit in made.of(Slice):
            check_alone(model, mlps[edit.mlp], call)
            self._masks[edit.mlp] = mask_of(mlps[edit.mlp], edit, site)
        self.updates = 0
        self.moved = 0
        self._pending, self._closed = False, False
        for mask in self._masks.values():
            mask.cover(model)

    @property
    def active(self) -> dict[str, list[int]]:
        """The active units of each MLP, by its name; of a tied one by that of its first use."""
        return {name: torch.nonzero(mask.active).flatten().tolist() for name, mask in self._masks.items()}

    def rate(self, update: int) -> float:
        """The fraction of the active units that a move after so many updates drops."""
        first, last = self.drop
        end = self.stop * self.total_updates
        passed = min(update / end, 1.0) if end else 1.0
        return last + (first - last) * (1 + math.cos(math.pi * passed)) / 2

    def step(self) -> None:
        """Mask again what the optimizer has moved and, where it is time, move the mask. `moved` tells how many units grew.

        Raises:
            ReductionError: it is the first update, or time to move, and there are no gradients; or `finalize` was called.
        """
        call = "PruneAndGrow.step()"
        self._check_open(call)
        if not self.updates:
            self._gradients(call)
        count = self.updates + 1
        due = self._pending or (count % self.interval == 0 and count <= self.stop * self.total_updates)
        moves = self._moves(self.rate(count), call) if due else {}
        self.updates, self._pending = count, due and moves is None
        for mask in self._masks.values():
            mask.hold(self._model)
        if not moves:
            return
        self.moved = sum(int((new & ~self._masks[name].active).sum()) for name, new in moves.items())
        for name, new in moves.items():
            mask = self._masks[name]
            mask.uncover(self._model)
            mask.choose(new)
            mask.cover(self._model)

    def apply_to(self, model: nn.Module) -> None:
        """Mask another model of the same structure in place, such as a moving average before it is evaluated.

        Args:
            model: the model, or what holds it as `.module`.

        Raises:
            ReductionError: it has no such tensors.
        """
        call = "PruneAndGrow.apply_to"
        self._check_open(call)
        other = average_of(self._model, model, call)
        if other is None:
            raise ReductionError(f"{call}: there is no model; give a copy of the one that trains")
        for mask in self._masks.values():
            mask.hold(other, held=False)

    def finalize(self, ema: Any = None) -> nn.Module:
        """Slice the masked units out, in place, and return the model; it computes what it did under the mask.

        Args:
            ema: a moving average of the model, or what holds it as `.module`; it is sliced to the same units.

        Raises:
            ReductionError: `finalize` was called before, or a model is no longer what it was. Nothing has changed then.
        """
        call = "PruneAndGrow.finalize()"
        self._check_open(call)
        made = with_units(self._plan, "prune_and_grow", self._config, self.active)
        other = average_of(self._model, ema, call)
        if other is not None:
            rehearse(other, made)
        for mask in self._masks.values():
            mask.hold(self._model)
        apply(self._model, made, example_inputs=self._inputs)
        if other is not None:
            apply(other, made, example_inputs=self._inputs)
        self._closed, model = True, self._model
        self._masks.clear()
        del self._model
        return model

    def state_dict(self) -> dict[str, Any]:
        """What it takes to go on to the same bits, beside the model's own state: tensors and numbers."""
        masks = {
            name: {"active": mask.active.clone(), "aside": {path: t.clone() for path, t in mask.aside.items()}}
            for name, mask in self._masks.items()
        }
        numbers = {"updates": self.updates, "moved": self.moved, "pending": self._pending}
        return {"settings": self._config, **numbers, "masks": masks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another left; before or after the model's own state is loaded.

        Raises:
            ReductionError: the state is of other MLPs, widths or a density; nothing is changed then.
        """
        call = "PruneAndGrow.load_state_dict"
        self._check_open(call)
        later = {
            key: value for key, value in self._config.items() if key not in ("criterion", "seed")
        }  # the first mask's
        same_settings(later, state, call)
        masks, numbers = (
            entry(state, "masks", call),
            [entry(state, key, call) for key in ("updates", "moved", "pending")],
        )
        if not isinstance(masks, Mapping) or not all(isinstance(number, int) for number in numbers):
            raise ReductionError(f"{call}: the state is damaged; give what state_dict() of this class returned")
        if masks.keys() != self._masks.keys():
            names = sorted(masks.keys() ^ self._masks.keys())
            raise ReductionError(
                f"{call}: {names[0]} is masked in the state or in the model alone; give the same model"
            )
        for name, mask in self._masks.items():
            given, aside = entry(masks[name], "active", call), entry(masks[name], "aside", call)
            if not isinstance(given, torch.Tensor) or not isinstance(aside, Mapping):
                raise ReductionError(
                    f"{call}: the state of {name} is damaged; give what state_dict() of this class returned"
                )
            count, known = int(given.sum()), int(mask.active.sum())
            shapes = {a.tensor: mask.shape(parameter(self._model, a.tensor, call), a) for a in mask.axes}
            if (
                given.shape != mask.active.shape
                or count != known
                or {p: tuple(t.shape) for p, t in aside.items()} != shapes
            ):
                raise ReductionError(
                    f"{call}: {name} has {known} of {mask.hidden} units active with site={self._config['site']!r}, and the "
                    f"state {count} of {given.numel()}; give the density and site it was written with"
                )
        self.updates, self.moved, self._pending = int(numbers[0]), int(numbers[1]), bool(numbers[2])
        for name, mask in self._masks.items():
            mask.uncover_zeros(self._model)
            mask.choose(masks[name]["active"].detach().to("cpu", torch.bool, copy=True))
            devices = {axis.tensor: parameter(self._model, axis.tensor, call).device for axis in mask.axes}
            mask.aside = {path: t.detach().to(devices[path], copy=True) for path, t in masks[name]["aside"].items()}
            mask.hold(self._model)

    def _check_open(self, call: str) -> None:
        if self._closed:
            raise ReductionError(f"{call}: finalize() has sliced the model, which has no mask any more; make a new one")

    def _moves(self, rate: float, call: str) -> dict[str, torch.Tensor] | None:
        """The next mask of each MLP; None where a gradient is not finite, as after an overflow of float16."""
        moves, gradients = {}, self._gradients(call)
        for name, mask in self._masks.items():
            weights, slopes = torch.zeros(mask.hidden), torch.zeros(mask.hidden)
            for axis in mask.axes:
                weights = weights + unit_norms(tensor_of(self._model, axis), axis, mask.hidden)
                slopes = slopes + unit_norms(gradients[axis.tensor], axis, mask.hidden)
            if not bool(slopes.isfinite().all()):
                return None
            if not bool(slopes.any()):
                raise ReductionError(f"{call}: all gradients of {name} are 0 at update {self.updates + 1}{_WHEN}")
            moves[name] = moved_mask(mask.active, weights, slopes, rate)
        return moves

    def _gradients(self, call: str) -> dict[str, torch.Tensor]:
        """The gradients by which units grow, by the path of their tensor."""
        found = {}
        for mask in self._masks.values():
            for axis in mask.axes:
                gradient = tensor_of(self._model, axis).grad
                if gradient is None:
                    raise ReductionError(f"{call}: {axis.tensor} has no gradient at update {self.updates + 1}{_WHEN}")
                found[axis.tensor] = gradient
        return found
