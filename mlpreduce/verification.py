"""`verify`: what would silently go wrong with a reduced model, its optimizer or its EMA."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mlpreduce.errors import ReductionError
from mlpreduce.graph import find_mlps, refuse_wrapped
from mlpreduce.markup import html_list, html_table
from mlpreduce.reduction import broken_ties, history
from mlpreduce.ties import is_guarded, shares_of, tied

__all__ = ["Report", "reentrant_problem", "verify"]


@dataclass(frozen=True)
class Report:
    """What `verify` found.

    Attributes:
        params: parameters of the model, a tied tensor once.
        mlps: calls of MLPs.
        unique_mlps: MLPs with weights of their own.
        ties: leaf modules that share, as recorded in the history.
        problems: what is wrong, one sentence each.
    """

    params: int
    mlps: int
    unique_mlps: int
    ties: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def __repr__(self) -> str:
        count = len(self.problems)
        found = "ok" if self.ok else f"{count} problem{'' if count == 1 else 's'}"
        return f"<Report: {found}; {self.params:,} parameters, {self._mlps()}>"

    def _repr_html_(self) -> str:
        """Write the report as an HTML table for notebooks, and the problems below it."""
        rows = [["parameters", f"{self.params:,}"], ["MLPs", self._mlps()]]
        table = html_table(("what", "found"), [["verdict", "ok" if self.ok else "something is wrong"], *rows])
        return table + html_list(self.problems)

    def _mlps(self) -> str:
        return f"{self.mlps} MLPs of which {self.unique_mlps} unique, {self.ties} ties"

    def __str__(self) -> str:
        head = f"{self.params:,} parameters, {self._mlps()}"
        return "\n".join([head, *(f"problem: {problem}" for problem in self.problems or ["none"])])


def verify(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, ema: Any = None) -> Report:
    """Check ties, counts, the optimizer's coverage and the EMA of a model.

    Args:
        model: the model.
        optimizer: the optimizer that is to train it.
        ema: its EMA: a module, or a timm or torch wrapper with the averaged model in `.module`.

    Returns:
        A report; `report.ok` is False if training or saving would silently go wrong.

    Raises:
        ReductionError: the model is wrapped, or cannot be traced.
    """
    refuse_wrapped(model, "verify")
    mlps = find_mlps(model)
    shares = shares_of(history(model))
    problems = [f"{share.target} is no longer tied to {share.source}" for share in broken_ties(model)]
    holders: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(f"{path}.{name}")
    problems += [
        f"{' and '.join(names)} are one Parameter in several modules; .to() on the meta device or assign=True unties it"
        for names in holders.values()
        if len(names) > 1
    ]
    if tied(model) and not is_guarded(model):
        problems.append(
            "the state dict has a tied tensor once a use, as its hooks are gone; loading keeps the last value silently"
        )
    problems += [problem for problem in [reentrant_problem(model)] if problem is not None]
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise ReductionError(f"verify: optimizer is a {type(optimizer).__name__}; give a torch.optim.Optimizer")
    if optimizer is not None:
        problems += _optimizer_problems(model, optimizer)
    if ema is not None:
        averaged = ema if type(ema) is type(model) else getattr(ema, "module", getattr(ema, "ema", ema))
        problems += [
            f"in the EMA {share.target} is not tied to {share.source}; make it after apply"
            for share in broken_ties(model, averaged)
        ]
    params = sum(parameter.numel() for parameter in model.parameters())
    return Report(params, len(mlps), len({mlp.owner for mlp in mlps}), len(shares), tuple(problems))


def _optimizer_problems(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    ours = {id(parameter): name for name, parameter in model.named_parameters()}
    ids = [id(parameter) for parameter in held]
    missing = [n for n, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) not in ids]
    foreign = sum(number not in ours for number in ids)
    twice = sorted({ours[number] for number in ids if ids.count(number) > 1 and number in ours})
    problems = []
    if missing:
        problems.append(
            f"the optimizer does not update {len(missing)} parameters, such as {missing[0]}; build it after apply"
        )
    if foreign:
        problems.append(f"the optimizer holds {foreign} tensors that are not the model's; build it after apply")
    if twice:
        problems.append(f"the optimizer updates {len(twice)} parameters more than once a step, such as {twice[0]}")
    return problems


def reentrant_problem(model: nn.Module) -> str | None:
    """What is wrong with the gradient checkpointing of a tied model: the reentrant kind, which DDP cannot train."""
    if not tied(model):
        return None
    timm_layers = sys.modules.get("timm.layers")  # a model of timm cannot exist without
    for path, module in model.named_modules():
        function = getattr(module, "_gradient_checkpointing_func", None)  # of transformers: a partial
        if getattr(module, "gradient_checkpointing", False) and getattr(function, "keywords", {}).get("use_reentrant"):
            remedy = 'gradient_checkpointing_enable({"use_reentrant": False})'
        elif getattr(module, "grad_checkpointing", False) and timm_layers and timm_layers.use_reentrant_ckpt():
            remedy = "timm.layers.set_reentrant_ckpt(False), or unset TIMM_REENTRANT_CKPT"
        else:
            continue
        return (
            f"{path or 'the model'} checkpoints reentrantly: in DDP the gradient of a tied tensor is ready once a use, and "
            f"the backward pass fails; {remedy}"
        )
    return None
