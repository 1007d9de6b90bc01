"""What is compared: ways to reduce a trained model to a part of its hidden units, ours and a peer's."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

import mlpreduce
from mlpreduce.bench.trained.subjects import Subject
from mlpreduce.criteria import choose, list_criteria
from mlpreduce.errors import optional
from mlpreduce.graph import find_mlps, module_at
from mlpreduce.words.values import Config

__all__ = ["ADVICE", "Row", "rows"]

# the call that README gives for a trained model, without its size and its data
ADVICE: Mapping[str, Any] = {"criterion": {"name": "reconstruction", "metric": "loss"}, "repair": "least_squares"}
REPAIRS = ("none", "parallel", "least_squares")
CRITERIA: tuple[Any, ...] = (
    *list_criteria(),
    {"name": "taylor", "site": "both"},
    {"name": "reconstruction", "metric": "loss"},
)
_ORDERS = ("first", "last", "random", "gram_schmidt")  # cannot be compared between MLPs
_PEERS = {
    "magnitude": "GroupMagnitudeImportance",
    "taylor": "GroupTaylorImportance",
    "hessian": "GroupHessianImportance",
}
_CORRECTED = {"group": 3, "scale": "none", "keep": "auto", "remainder": "own"}

Data = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Row:
    """One way to reduce a model.

    Attributes:
        name: in the table.
        kind: `criteria`, `sharing` or `peers`.
        repair: as of the transform.
        reduce: `(subject, width, data) -> model`, width a fraction of the hidden units.
    """

    name: str
    kind: str
    repair: str
    reduce: Callable[[Subject, float, Data], nn.Module]

    @property
    def key(self) -> str:
        """A name for files."""
        return "".join(c if c.isalnum() else "_" for c in f"{self.kind} {self.name} {self.repair}")


def rows(kinds: tuple[str, ...] = ("advice", "criteria", "sharing", "peers")) -> list[Row]:
    """All rows of these kinds."""
    found = [Row("README's advice", "advice", str(ADVICE["repair"]), partial(_sliced, ADVICE))]
    for criterion in CRITERIA:
        name = str(choose(criterion)).removesuffix("()")
        for repair in REPAIRS:
            config = {"criterion": criterion, "repair": repair}
            found.append(Row(name, "criteria", repair, partial(_sliced, config)))
    for extra, scope in (
        ({"name": "reconstruction", "swaps": 50}, "uniform"),
        ({"name": "reconstruction", "metric": "loss"}, "global"),
        ("taylor", "global"),
    ):
        config = {"criterion": extra, "scope": scope, "repair": "least_squares"}
        name = f"{str(choose(extra)).removesuffix('()')}, {scope}"
        found.append(Row(name, "criteria", "least_squares", partial(_sliced, config)))
    for repair in REPAIRS:
        for keep in ("first", "mean", "align_mean", "align_activations", "auto"):
            config = {"group": 2, "scale": "none", "keep": keep, "repair": repair, "remainder": "own"}
            found.append(Row(f"grouped(2, keep={keep})", "sharing", repair, partial(_shared, config)))
        for pattern in ("similarity", "cost"):
            config = {"group": 2, "pattern": pattern, "scale": "none", "keep": "auto", "repair": repair}
            found.append(Row(f"grouped(2, {pattern}, keep=auto)", "sharing", repair, partial(_shared, config)))
        for init in ("zero", "residual"):
            found.append(Row(f"grouped(3, lora {init})", "sharing", repair, partial(_corrected, init, repair)))
    found.append(Row("low_rank(data)", "sharing", "none", _factored))
    for name in _PEERS:
        found.append(Row(f"Torch-Pruning {name}", "peers", "none", partial(_peer, name)))
    return [row for row in found if row.kind in kinds]


def _sliced(config: Config, subject: Subject, width: float, data: Data) -> nn.Module:
    model = copy.deepcopy(subject.model)
    return mlpreduce.apply(model, "shallow", ratio=width, data=data, loss=subject.loss, **config)


def _shared(config: Config, subject: Subject, width: float, data: Data) -> nn.Module:
    return mlpreduce.apply(copy.deepcopy(subject.model), "grouped", data=data, **config)


def _corrected(init: str, repair: str, subject: Subject, width: float, data: Data) -> nn.Module:
    """Groups of three with corrections of the highest rank with which the model has no more than at half its width."""
    half = mlpreduce.apply(copy.deepcopy(subject.model), "shallow", ratio=width)
    most = sum(parameter.numel() for parameter in half.parameters())
    per_use = {"name": "lora", "init": init, "target_params": most}
    return _shared({**_CORRECTED, "per_use": per_use, "repair": repair}, subject, width, data)


def _factored(subject: Subject, width: float, data: Data) -> nn.Module:
    """Each layer by itself, with as many weights as of that part of the hidden units."""
    images = [some for some, _ in data]
    return mlpreduce.apply(copy.deepcopy(subject.model), "low_rank", ratio=width, init="data", data=images)


def _peer(name: str, subject: Subject, width: float, data: Data) -> nn.Module:
    """Torch-Pruning's importance of what depends on each unit of fc1, and its surgery, MLP by MLP."""
    pruning = optional("bench trained", "torch_pruning")
    model = copy.deepcopy(subject.model)
    importance = getattr(pruning.importance, _PEERS[name])()
    inputs = data[0][0][:1]
    with warnings.catch_warnings(action="ignore"):  # of tokens and positions, which are not pruned
        graph = pruning.DependencyGraph().build_dependency(model, example_inputs=inputs)
    if name != "magnitude":
        for some, labels in data:
            parts = [(some, labels)] if name == "taylor" else zip(some.split(1), labels.split(1), strict=True)
            for one, wanted in parts:
                loss = subject.loss(model(one), wanted)
                if name == "taylor":
                    (loss * len(one)).backward()
                else:
                    model.zero_grad()
                    loss.backward()
                    importance.accumulate_grad(model)
    for mlp in find_mlps(model, inputs):
        layer = module_at(model, mlp.leaf("fc1").path)
        group = graph.get_pruning_group(layer, pruning.prune_linear_out_channels, list(range(mlp.hidden_features)))
        scores = importance(group)
        gone = scores.argsort()[: mlp.hidden_features - int(width * mlp.hidden_features)].tolist()
        graph.get_pruning_group(layer, pruning.prune_linear_out_channels, gone).prune()
    model.zero_grad(set_to_none=True)
    return model
