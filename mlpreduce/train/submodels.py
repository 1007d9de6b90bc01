"""Sub-models of a full model: the same weights, fewer units, shared MLPs; nothing is built or copied.

A sub-model is a view: for each tensor that it does not have as the full model does, which tensor of the full model it is,
and which positions of its axes. It is run by `torch.func.functional_call`, so gradients flow to the full model's weights:
narrower and wider MLPs, and tied and untied ones, are entangled by construction.

Source: weight entanglement is that of AutoFormer, M. Chen et al., "AutoFormer: Searching Transformers for Visual
Recognition", arXiv 2107.00651, section 3.2; there it is the first units and blocks, here whatever a plan keeps and ties.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import nn
from torch.func import functional_call

from mlpreduce.edits import Plan, Replace, Share, Slice, Units
from mlpreduce.errors import ReductionError, call_text
from mlpreduce.graph import MLP, Survey, example_inputs, mlps_or_raise, module_at, structural_copy, survey, tensors_in
from mlpreduce.reduction.planning import make_plan
from mlpreduce.surgery.operation import carry_out
from mlpreduce.train.settings import Step
from mlpreduce.transforms import is_construction
from mlpreduce.transforms.steps import needs_data

__all__ = ["Entangled", "Part", "Planner", "View", "check_views"]

_KEPT = 256  # structures after the first steps of several points
_NOISE = 0.05  # standard deviation
_TOLERANCE = 1e-2  # of the largest output; what reads a width differs by far more, rounding by far less


@dataclass(frozen=True)
class Part:
    """A tensor of a sub-model.

    Attributes:
        source: name of the full model's tensor that it is made of.
        cuts: axes of which only some positions are kept, one after the other.
    """

    source: str
    cuts: tuple[tuple[int, Units], ...] = ()


View = Mapping[str, Part]  # by name; what is missing is the full model's own tensor


@dataclass(frozen=True)
class _Structure:
    """A model after some steps: its tree on the meta device, what is in it, and what its tensors are."""

    tree: nn.Module
    found: Survey
    parts: dict[str, Part]


class Planner:
    """Makes views from steps. The full model is only looked at once.

    Args:
        model: the full model, on any device.
        call: for messages.

    Raises:
        ReductionError: it has no MLPs, or a BatchNorm, whose statistics would mix those of all sub-models.
    """

    def __init__(self, model: nn.Module, call: str) -> None:
        self._call = call
        for path, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                raise ReductionError(
                    f"{call}: {path} is a {type(module).__name__}, whose running statistics would mix those of all sub-models; "
                    f"a supernet needs a model without, as most Vision Transformers are"
                )
        tree = structural_copy(model, device="meta")
        found = replace(mlps_or_raise(tree, call), tree=None)
        self._holder = _holders(tree)
        first: dict[int, str] = {}  # of tensors that the full model has tied itself
        names = {name: first.setdefault(id(tensor), name) for name, tensor in _tensors(tree).items()}
        self._full = {name: Part(source) for name, source in names.items()}
        self._known: dict[str, _Structure] = {"[]": _Structure(tree, found, self._full)}

    @property
    def mlps(self) -> list[MLP]:
        """The MLPs of the full model, in order of execution."""
        return self._known["[]"].found.mlps

    def view(self, steps: Sequence[Step]) -> View:
        """What the tensors of a sub-model are. Values are learnt, so edits of values (`Scale`, `Assign`) are left out.

        Raises:
            ReductionError: the steps cannot be carried out, or not for any weights alike.
        """
        parts = self._full
        if steps:
            before = self._after(steps[:-1])
            parts = _changed(before.parts, self._plan(before, steps[-1]))
        return {name: part for name, part in parts.items() if part != self._full[name] and name in self._holder}

    def plans(self, steps: Sequence[Step]) -> list[Plan]:
        """The plans of all steps.

        Raises:
            ReductionError: as `view`.
        """
        return [self._plan(self._after(steps[:number]), step) for number, step in enumerate(steps)]

    def _after(self, steps: Sequence[Step]) -> _Structure:
        key = json.dumps(list(steps), sort_keys=True)
        if key not in self._known:
            before = self._after(steps[:-1])
            plan = self._plan(before, steps[-1])
            tree = structural_copy(before.tree)
            carry_out(tree, plan, weights=False)
            if len(self._known) >= _KEPT:
                self._known.pop(next(other for other in self._known if other != "[]"))
            found = replace(survey(tree), tree=None)
            self._known[key] = _Structure(tree, found, _changed(before.parts, plan))
        return self._known[key]

    def _plan(self, structure: _Structure, step: Step) -> Plan:
        config = {key: value for key, value in step.items() if key != "transform"}
        name = step["transform"]
        where = f"{self._call}: {call_text(name, config)}"
        if is_construction(name):
            raise ReductionError(
                f"{where}: {name} builds another model, and sub-models are parts of one; slice it with shallow instead"
            )
        try:
            plan, _ = make_plan(structure.tree, name, config, found=structure.found)
        except ReductionError as error:
            looks = needs_data(step) or "meta device" in str(error)
            why = '; a sub-model must be the same for any weights: choose units by "first" or "last"' if looks else ""
            raise ReductionError(f"{self._call}: {error}{why}") from error
        if plan.of(Replace):
            raise ReductionError(
                f"{where}: {name} puts new layers into the model, and sub-models are parts of one; search without it"
            )
        for edit in plan.of(Slice):
            for setting in edit.settings:
                raise ReductionError(
                    f"{where}: the forward of {setting.module} reads the hidden width from its {setting.name}, which all "
                    f"sub-models would have in common; leave {edit.mlp} as wide as it is"
                )
        return plan


@dataclass(frozen=True)
class Entangled:
    """A full model whose sub-models can be run.

    Attributes:
        model: the full model. Its tensors may change in place only.
        state: its tensors by name.
    """

    model: nn.Module
    state: dict[str, torch.Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> Entangled:
        """Of a model that stays where it is."""
        return cls(model, _tensors(model))

    def tensors(self, view: View) -> dict[str, torch.Tensor]:
        """The tensors of a sub-model that are not the full model's own, by name: slices of those."""
        made = {part: self._cut(part) for part in set(view.values())}
        return {name: made[part] for name, part in view.items()}

    def run(self, view: View, images: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes) of a sub-model, from images (batch, channels, height, width)."""
        logits: torch.Tensor = functional_call(self.model, self.tensors(view), (images,), tie_weights=False)
        return logits

    def _cut(self, part: Part) -> torch.Tensor:
        tensor = self.state[part.source]
        for dim, kept in part.cuts:
            if isinstance(kept, range):
                tensor = tensor.narrow(dim, kept.start, len(kept))
            else:
                tensor = tensor.index_select(dim, _index(kept, tensor.device))
        return tensor


def check_views(model: nn.Module, planner: Planner, points: Sequence[Sequence[Step]], call: str) -> list[View]:
    """The views of points, after a check that sub-models compute what the reduced models do.

    Both are run on the same random images wherever a point changes a tensor that no earlier one has changed, on a copy of the
    model with other weights: a new model may have a head of zeros, and give the same for all.

    Raises:
        ReductionError: a point cannot be a sub-model.
    """
    seen: set[tuple[str, str]] = set()
    views = []
    noisy: nn.Module | None = None
    for steps in points:
        view = planner.view(steps)
        views.append(view)
        changes = {(name, "cut") for name, part in view.items() if part.cuts}
        changes |= {(name, "tied") for name, part in view.items() if part.source != name}
        if not changes <= seen:
            seen |= changes
            noisy = _noisy(model) if noisy is None else noisy
            _compare(noisy, view, planner.plans(steps), call)
    return views


def _noisy(model: nn.Module) -> nn.Module:
    """A copy with noise on all weights, in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    noisy = copy.deepcopy(model).eval()
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=_NOISE)
    return noisy


def _compare(model: nn.Module, view: View, plans: Sequence[Plan], call: str) -> None:
    made = ", ".join(call_text(plan.transform, plan.config) for plan in plans)
    reduced = structural_copy(model)
    for plan in plans:
        carry_out(reduced, plan, weights=False)
    (zeros,) = tensors_in(example_inputs(model, 2))
    images = torch.randn(zeros.shape, generator=torch.Generator().manual_seed(0)).to(zeros)
    problem = ""
    with torch.no_grad():
        expected = reduced(images)
        try:
            gap = (Entangled.of(model).run(view, images) - expected).abs().max().item()
        except (
            RuntimeError,
            ValueError,
            TypeError,
            IndexError,
        ) as error:  # whatever layers raise whose widths are stored
            problem = f"does not run ({str(error).splitlines()[0]})"
        else:
            if not gap <= _TOLERANCE * expected.abs().max().item():
                problem = f"computes something else than the reduced model (logits differ by {gap:.3g})"
    if problem:
        paths = dict.fromkeys(name.rpartition(".")[0] for name, part in view.items() if part.cuts)
        leaves = {path: module_at(model, path) for path in paths}
        odd = [f"{path}, a {type(leaf).__name__}" for path, leaf in leaves.items() if type(leaf) is not nn.Linear]
        raise ReductionError(
            f"{call}: {made}: as a sub-model it {problem}: a forward reads a stored width"
            f"{' (' + odd[0] + ')' if odd else ''}, which all sub-models have in common; leave these MLPs as wide as they are"
        )


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers under each of their names."""
    parameters = model.named_parameters(remove_duplicate=False)
    return dict(parameters) | dict(model.named_buffers(remove_duplicate=False))


def _holders(model: nn.Module) -> set[str]:
    """One name for each tensor of each module: of a module that has several names, those below the first."""
    first = {id(module): path for path, module in reversed(list(model.named_modules(remove_duplicate=False)))}
    kept = set(first.values())
    return {name for name in _tensors(model) if name.rpartition(".")[0] in kept}


def _changed(parts: dict[str, Part], plan: Plan) -> dict[str, Part]:
    """What the tensors are after a plan. Names with equal parts are one tensor, and change together."""
    result = dict(parts)
    names: dict[Part, list[str]] = {}
    for name, part in parts.items():
        names.setdefault(part, []).append(name)

    def put(old: Part, new: Part) -> None:
        moved = names.pop(old)
        names.setdefault(new, []).extend(moved)
        result.update(dict.fromkeys(moved, new))

    for edit in plan.of(Slice):
        for axis in edit.axes:
            old = result[axis.tensor]
            put(old, Part(old.source, (*old.cuts, (axis.dim, axis.positions(edit.hidden, edit.units)))))
    if shares := plan.of(Share):
        below: dict[str, list[str]] = {}
        for name in parts:
            below.setdefault(name.rpartition(".")[0], []).append(name)
        for share in shares:
            for name in below.get(share.target, ()):
                put(result[name], result[share.source + name.removeprefix(share.target)])
    return result


@lru_cache(maxsize=4096)
def _index(positions: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(positions, dtype=torch.long, device=device)
