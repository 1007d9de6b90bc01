"""Models that are reduced when they are built: `create_model`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mlpreduce.calibration import Loss
from mlpreduce.edits import Plan
from mlpreduce.errors import ReductionError, call_text, naming
from mlpreduce.graph import mlps_or_raise
from mlpreduce.reduction.applying import apply, remember
from mlpreduce.reduction.builds import NOT_RECORDED, made_by_timm
from mlpreduce.reduction.planning import plain
from mlpreduce.transforms import Transform, get_transform
from mlpreduce.words.values import Config

__all__ = ["create_model"]


def create_model(
    name: str,
    transform: str | None = None,
    *,
    pretrained: bool = False,
    data: Any = None,
    loss: Loss | None = None,
    **kwargs: Any,
) -> nn.Module:
    """`timm.create_model` and a transform, in one call; the model remembers how it was built.

    Args:
        name: a timm architecture.
        transform: a name of `list_transforms`, those that act at construction (`thin`) too; None for none.
        pretrained: whether timm loads its weights, before anything is reduced.
        data: calibration data, as of `plan`.
        loss: as of `plan`.
        **kwargs: keyword parameters of the transform, and of `timm.create_model`.

    Raises:
        ReductionError: as `apply`; the architecture has no such construction argument; pretrained weights for a
            model that is built with other shapes.

    Example:
        >>> vit = create_model("vit_tiny_patch16_224", "thin", mlp_ratio=2.0, depth=2)
        >>> vit.blocks[0].mlp.fc1.out_features
        384
    """
    entry = get_transform(transform) if transform is not None else None
    config = {key: kwargs.pop(key) for key in list(kwargs) if entry is not None and key in entry.parameters}
    given = dict(kwargs)
    if entry is not None and entry.construction:
        given |= _construction(entry, name, pretrained, kwargs, config)
    call = f"create_model({name!r}{f', {transform!r}' if transform is not None else ''})"
    model = made_by_timm(name, {**given, "pretrained": pretrained}, call, _known(entry))
    recorded = {key: value for key, value in given.items() if key not in NOT_RECORDED}
    if not hasattr(model, "mlpreduce_build"):  # a registered name has said what it is a reduction of
        model.mlpreduce_build = {"name": name, "kwargs": recorded}  # type: ignore[assignment]
    if entry is not None and entry.construction:
        remember(model, Plan(entry.name, {key: plain(value, entry.name) for key, value in config.items()}, ()))
    elif entry is not None:
        apply(model, entry.name, data=data, loss=loss, **config)
    return model


def _known(entry: Transform | None) -> str:
    own = f"{entry.name} has {', '.join(entry.parameters)}; " if entry is not None else ""
    return f"{own}all other arguments are timm's"


def _construction(
    entry: Transform, name: str, pretrained: bool, kwargs: dict[str, Any], config: Config
) -> dict[str, Any]:
    """Construction arguments, after a look at what they do to the architecture on the meta device."""
    call = f"create_model({name!r}, {call_text(entry.name, config)})"
    with naming(call):
        arguments: dict[str, Any] = entry.function(**config)
    if pretrained:
        raise ReductionError(
            f"{call}: pretrained weights do not fit a model built with {call_text('', arguments).strip('()')}; slice "
            f'trained weights with mlpreduce.create_model({name!r}, "shallow", pretrained=True)'
        )

    def widths(more: dict[str, Any], hint: str) -> list[int]:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = made_by_timm(name, kwargs | more, call, hint)
        return [mlp.hidden_features for mlp in mlps_or_raise(model, call).mlps]

    usual = widths({}, _known(entry))
    built = widths(arguments, "slice it with shallow instead")
    if built == usual and config:
        raise ReductionError(f"{call}: {name} takes the argument, but its MLPs keep their width; slice it with shallow")
    return arguments
