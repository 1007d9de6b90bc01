"""What the library does with one timm architecture, on the meta device: found, grouped, sliced, costs as planned."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from mlpreduce.budget import Cost, measure
from mlpreduce.errors import ReductionError
from mlpreduce.graph import structural_copy, survey
from mlpreduce.reduction.planning import make_plan
from mlpreduce.registry import origin
from mlpreduce.surgery.operation import carry_out

__all__ = ["Entry", "architectures", "build", "examine", "family_of"]

SETTINGS: dict[str, dict[str, Any]] = {"grouped": {"group": 2, "remainder": "own"}, "shallow": {"ratio": 0.5}}


@dataclass(frozen=True)
class Entry:
    """One architecture.

    Attributes:
        architecture: its name in timm.
        family: the timm module that defines it.
        params: parameters.
        mlps: calls of MLPs found.
        kinds: how many of each kind.
        grouped: parameters after `grouped(group=2, remainder="own")`; None if it is refused.
        shallow: parameters after `shallow(ratio=0.5)`; None if it is refused.
        left_out: why MLPs are not grouped, and how many for each reason.
        reason: why it is not reduced, or not grouped; empty if it is.
        failure: what does not hold; empty if all does.
    """

    architecture: str
    family: str
    params: int = 0
    mlps: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    grouped: int | None = None
    shallow: int | None = None
    left_out: dict[str, int] = field(default_factory=dict)
    reason: str = ""
    failure: str = ""


def architectures() -> list[str]:
    """Names of all architectures of timm, and of those of plug-ins, without those that other packages have registered."""
    return [name for name in timm.list_models() if _is_own(name) or _module(name).startswith("timm.")]


def family_of(architecture: str) -> str:
    """The timm module that defines an architecture; of one of a plug-in, the file's name."""
    source = origin("model", architecture)
    if source is not None and _is_own(architecture):
        return Path(source.name).stem
    return _module(architecture).rpartition(".")[2]


def _is_own(architecture: str) -> bool:
    source = origin("model", architecture)
    return source is not None and source.kind == "plug-in"


def _module(architecture: str) -> str:
    return timm.model_entrypoint(architecture).__module__


def build(architecture: str, device: str = "meta", **kwargs: Any) -> nn.Module:
    """The architecture without pretrained weights, in eval mode; on a real device seeded by 0."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        model: nn.Module = timm.create_model(architecture, **kwargs)
    return model.eval()


def examine(architecture: str) -> Entry:
    """Build, find, group and slice an architecture, and compare counted costs with planned ones.

    After each transform the model is run on the meta device, and its parameters and MACs, counted by dispatch, must be
    those that the plan's formulas gave before. Nothing is raised: what fails is in the entry.
    """
    family = family_of(architecture)
    try:
        model = build(architecture)
        found = survey(model)
        params = sum(parameter.numel() for parameter in model.parameters())
        if not found.mlps:
            return Entry(architecture, family, params, reason=_why_none(model, found.others))
        base = measure(model, mlps=found.mlps)
        after: dict[str, int | None] = {}
        left_out: dict[str, int] = {}
        reason = ""
        for transform, config in SETTINGS.items():
            copy = structural_copy(model, device="meta")
            try:
                made, _ = make_plan(copy, transform, config, found=found)
            except ReductionError as error:
                after[transform], reason = None, f"{transform}: {error}"
                continue
            carry_out(copy, made)
            cost = measure(copy, mlps=()).cost
            planned = base.after(made)
            if _counted(cost) != _counted(planned):
                return Entry(architecture, family, params, failure=f"{transform}: planned {planned}, counted {cost}")
            after[transform] = cost.params
            left_out = dict(Counter(made.left_out.values())) or left_out
    except Exception as error:  # one architecture must not end the table; it is reported as failed
        return Entry(architecture, family, failure=f"{type(error).__name__}: {error}")
    kinds = dict(sorted(Counter(mlp.kind for mlp in found.mlps).items()))
    return Entry(
        architecture, family, params, len(found.mlps), kinds, after["grouped"], after["shallow"], left_out, reason
    )


def _counted(cost: Cost) -> tuple[int, ...]:
    return cost.params, cost.macs_linear, cost.macs, cost.macs_with_attention


def _why_none(model: nn.Module, others: dict[str, str]) -> str:
    """Why a model has no MLP, from what it is made of."""
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    spatial = sum(max(m.kernel_size) > 1 for m in convolutions)
    linear = sum(isinstance(m, nn.Linear) for m in model.modules())
    made_of = f"{len(convolutions)} convolutions ({spatial} larger than 1 x 1), {linear} Linear"
    if others:
        made_of += f"; {len(others)} inverted residuals or separable convolutions, which are none"
    return f"no MLP: {made_of}"
