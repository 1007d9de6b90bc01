"""`verify`: what would silently go wrong with a reduced model, its optimizer or its EMA."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mlpreduce.errors import ReductionError
from mlpreduce.graph import PLAIN, Inputs, below, module_through, refuse_wrapped, survey, unwrapped
from mlpreduce.reduction.applying import broken_ties
from mlpreduce.surgery.ties import distinct_parts, is_guarded, plans_of, reduced_parts, shares_of, tangled_parts, tied
from mlpreduce.words.markup import html_list, html_table

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
        found = "ok" if self.ok else _counted(count, "problem")
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


def verify(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    ema: Any = None,
    example_inputs: Inputs | None = None,
) -> Report:
    """Check ties, counts, the optimizer's coverage and the EMA of a model.

    The reduced model may lie inside of wrappers (DDP, FSDP, `torch.compile`, adapters) or of a larger model; it is known by its
    history.

    Args:
        model: the model, or what holds it.
        optimizer: the optimizer that is to train it.
        ema: its EMA: a module, or a timm or torch wrapper with the averaged model in `.module`.
        example_inputs: what the model is called with, as for `find_mlps`. Without, MLPs that are found with inputs alone are
            counted as the history tells.

    Returns:
        A report; `report.ok` is False if training or saving would silently go wrong.

    Raises:
        ReductionError: the model is not a module, passes on the history of one that is not among its modules, or is not
            reduced and cannot be traced; `example_inputs` do not fit it; `optimizer` is not an optimizer, or `ema` is not a
            module and has none.

    Example:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=4)
        >>> print(verify(torch.compile(vit)))
        2,158,504 parameters, 4 MLPs of which 4 unique, 0 ties
        problem: none
    """
    if not isinstance(model, nn.Module):
        raise ReductionError(f"verify: needs a torch.nn.Module, got {type(model).__name__}")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise ReductionError(f"verify: optimizer is a {type(optimizer).__name__}; give a torch.optim.Optimizer")
    parts = reduced_parts(model)
    if not parts and getattr(model, "mlpreduce_history", None):
        raise ReductionError(
            f"verify: {type(model).__name__} passes on the history of a model that is not among its modules; give that model"
        )
    mlps, unique = _count(model, parts, example_inputs)
    problems = [
        f"{tie} is no longer tied to {source}" for path, part in parts.items() for tie, source in _broken(path, part)
    ]
    problems += [
        f"{outer or 'the model'} and its {inner} were both reduced, in an order that is not known: it cannot be saved"
        for outer, inner in tangled_parts(model)
    ]
    problems += _holder_problems(model)
    if any(tied(part) and not is_guarded(part) for part in parts.values()):
        problems.append(
            "The state dict repeats each tied tensor, because its hooks were removed. If the copies differ, loading silently "
            "keeps the last one."
        )
    distinct = distinct_parts(model).values()
    for part in distinct:
        problems += [problem for problem in [reentrant_problem(part)] if problem is not None]
    if optimizer is not None:
        problems += _optimizer_problems(model, optimizer)
    if ema is not None:
        problems += _ema_problems(model, parts, ema)
    params = sum(parameter.numel() for parameter in model.parameters())
    ties = sum(len(shares_of(plans_of(part))) for part in distinct)
    return Report(params, mlps, unique, ties, tuple(problems))


def _broken(path: str, part: nn.Module, tree: nn.Module | None = None) -> list[tuple[str, str]]:
    """Ties of a part that do not hold, by the paths in the whole model."""
    return [(below(path, share.target), below(path, share.source)) for share in broken_ties(part, tree)]


def _count(model: nn.Module, parts: dict[str, nn.Module], inputs: Inputs | None) -> tuple[int, int]:
    """Calls of MLPs, and MLPs with weights of their own, as the graph shows or, if it shows fewer, as the history tells."""
    told = [_told(path, part) for path, part in parts.items()]
    known = sum(len(owners) for owners in told), sum(len(set(owners.values())) for owners in told)
    inside = unwrapped(model)
    if not parts:
        refuse_wrapped(inside, "verify")
    try:
        found = survey(inside, inputs).mlps
    except ReductionError:
        if inputs is not None or not parts:
            raise
        found = []
    except Exception as error:  # whatever reading a foreign model raises
        if inputs is not None or not parts:
            raise ReductionError(
                f"verify: the graph of {type(inside).__name__} cannot be read: {type(error).__name__}: {error}"
            ) from error
        found = []
    return (len(found), len({mlp.owner for mlp in found})) if len(found) >= known[0] else known


def _told(path: str, part: nn.Module) -> dict[str, str]:
    """The MLPs of a part that its plans have listed and that are still there, and the owner of each."""
    owners: dict[str, str] = {}
    for made in plans_of(part):
        for name in made.left_out:
            owners.setdefault(name, name)
        for row in made.rows:
            owners[row.mlp] = row.owner
            if row.hidden == 0:  # it was dropped
                del owners[row.mlp]
    shared = bool(shares_of(plans_of(part)))  # after untie they are not, though the rows tell of it
    return {
        f"{path}.{name}": f"{path}.{owner if shared else name}"
        for name, owner in owners.items()
        if module_through(part, name.partition("@")[0]) is not None
    }


def _holder_problems(model: nn.Module) -> list[str]:
    """Parameters that several modules hold, and tensors that are none."""
    holders: dict[int, list[str]] = {}
    plain: list[str] = []
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            place = below(path, name)
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(place)
            if parameter is not None and not isinstance(parameter, nn.Parameter):
                plain.append(place)
    problems = [
        f"{' and '.join(names)} are one Parameter in several modules; .to() on the meta device or assign=True unties it"
        for names in holders.values()
        if len(names) > 1
    ]
    if plain:
        more = f" (and {_counted(len(plain) - 1, 'other')})" if plain[1:] else ""
        problems.append(f"{plain[0]}{more} {PLAIN}")
    return problems


def _ema_problems(model: nn.Module, parts: dict[str, nn.Module], ema: Any) -> list[str]:
    averaged = ema if type(ema) is type(model) else getattr(ema, "module", getattr(ema, "ema", ema))
    if not isinstance(averaged, nn.Module):
        raise ReductionError(f"verify: ema is a {type(ema).__name__}; give a module, or what has one in .module")
    theirs = reduced_parts(averaged)
    inside = list(theirs.values()) if len(theirs) == len(parts) else []
    problems = []
    for number, (path, part) in enumerate(parts.items()):
        tree = theirs.get(path) or (inside[number] if inside else module_through(averaged, path)) or averaged
        problems += [
            f"in the EMA {target} is not tied to {source}; make it after apply"
            for target, source in _broken(path, part, tree)
        ]
    return problems


def _optimizer_problems(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    held = Counter(id(parameter) for group in optimizer.param_groups for parameter in group["params"])
    ours = {id(parameter): name for name, parameter in model.named_parameters()}
    missing = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) not in held
    ]
    foreign = sum(times for number, times in held.items() if number not in ours)
    twice = sorted(ours[number] for number, times in held.items() if times > 1 and number in ours)
    problems = []
    if missing:
        problems.append(f"the optimizer does not update {_named(missing)}; build it after apply")
    if foreign:
        tensors = f"{_counted(foreign, 'tensor')} that {'is' if foreign == 1 else 'are'} not the model's"
        problems.append(f"the optimizer holds {tensors}; build it after apply")
    if twice:
        problems.append(f"the optimizer updates {_named(twice)} more than once a step")
    return problems


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _named(names: list[str]) -> str:
    """How many parameters there are, and the name of one."""
    first = names[0] if len(names) == 1 else f"such as {names[0]}"
    return f"{_counted(len(names), 'parameter')} ({first})"


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
            f"{path or 'the model'} checkpoints reentrantly: DDP sees the gradient of a tied tensor once for each block that "
            f"uses it, and the backward pass fails; {remedy}"
        )
    return None
