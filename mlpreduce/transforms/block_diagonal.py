"""`block_diagonal`: let each group of hidden units see one group of features, and give to one.

Source: SCHEME (arXiv 2312.00412): both projections of an MLP become block diagonal with g equal blocks, and while training a
branch of the covariance of channels lets the groups see each other. An MLP of d features and h units has 2 d h / g + h + d
parameters, and 2 d h / g multiply-accumulates for each token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from mlpreduce.criteria import derived_seed
from mlpreduce.edits import Assign, Edit
from mlpreduce.errors import ReductionError, check_one_of, check_whole
from mlpreduce.graph import MLP
from mlpreduce.layers import BlockDiagonalLinear, BlockOrders, ChannelCovariance, block_orders, layer_of
from mlpreduce.transforms.layers import check_seed, linears, replacing
from mlpreduce.transforms.parts import Parts
from mlpreduce.transforms.registry import register

ALIGN = ("hidden", "all", "none")


@register(
    "block_diagonal",
    draws=lambda config: config.get("init") == "new" or config.get("cca", "none") != "none",
)
def block_diagonal(
    parts: Parts,
    *,
    groups: int = 4,
    align: str = "hidden",
    init: str = "weights",
    layers: str = "both",
    shuffle: bool = False,
    cca: str = "none",
    seed: int = 0,
) -> Iterator[Edit]:
    """Make MLP projections block diagonal: each group of hidden units sees one group of features, and gives to one.

    A tied MLP is changed once, for all its uses. SCHEME widens its MLPs first: build the model with `mlp_ratio=8`.

    Args:
        parts: the MLPs in scope.
        groups: blocks; they divide the widths.
        align: which features and units are put in groups so that the blocks keep most of the energy of given weights: `hidden`
            (units, which costs nothing when the model runs), `all` (also what goes in and out, which is then put in order at
            each call), `none`. With `layers="fc2"` that is by fc2 alone, and with `shuffle` all stay as they are.
        init: `weights` (the blocks of the given weights), or `new`, for training from scratch.
        layers: `both`, or `fc2`: the expanding layer stays dense.
        shuffle: whether fc2's groups take every n-th unit of all groups of fc1, n the number of groups.
        cca: the branch of channel covariance while training: `none`, `covariance`, or `as_released`; see
            `mlpreduce.layers.ChannelCovariance`. `merge` drops it.
        seed: of new values, and of the branch's share.

    Raises:
        ReductionError: an option is out of range, groups that do not divide the widths, or a layer is no `Linear`.
    """
    check_whole("groups", groups, least=2)
    check_one_of("align", align, ALIGN)
    check_one_of("init", init, ("weights", "new"))
    check_one_of("layers", layers, ("both", "fc2"))
    check_one_of("cca", cca, ("none", "covariance", "as_released"))
    if not isinstance(shuffle, bool):
        raise ReductionError(f"shuffle is {shuffle!r}; it must be True or False")
    check_seed(seed)
    if align == "all" and (shuffle or layers == "fc2"):
        raise ReductionError('align="all" is of both layers without a shuffle; use align="hidden" or "none"')
    found: dict[str, tuple[MLP, dict[str, nn.Linear]]] = {}
    for mlp, leaf, layer in linears(parts, "block diagonal"):
        found.setdefault(mlp.name, (mlp, {}))[1][leaf.path] = layer
    kept = []
    for mlp, given in found.values():
        _check(mlp, given, groups)
        *expand, contract = given
        weightless = given[contract].weight.is_meta
        orders = None
        changed = given if layers == "both" else {contract: given[contract]}
        if init == "weights" and align != "none" and not weightless and not shuffle:
            weights = [given[path].weight if path in changed else given[path].weight.new_zeros(()) for path in expand]
            weights = [weight.expand_as(given[expand[0]].weight) for weight in weights]
            orders = block_orders(weights, given[contract].weight, groups, features=align == "all")
            kept.append((orders.kept_before, orders.kept))
            yield from _reordered(parts, mlp, changed, orders.hidden)
        everything = align == "all" and init == "weights"
        for path in changed:
            yield _replaced(path, given[path], groups, path == contract, orders, everything, shuffle, init, seed)
    for mlp in parts if cca != "none" else ():
        yield _branch(parts, mlp, cca, seed)
    if kept:
        before, after = (sum(shares) / len(shares) for shares in zip(*kept, strict=True))
        parts.notes.append(
            f"{groups} blocks keep {after:.1%} of the squares of the weights, {before:.1%} without an order"
        )


def _check(mlp: MLP, given: dict[str, nn.Linear], groups: int) -> None:
    """Whether an MLP can be divided."""
    if any(axis.size != mlp.hidden_features for axis in mlp.axes):
        raise ReductionError(f"{mlp.name} is {mlp.kind}, whose layers do more than hold its hidden units; exclude it")
    for path, layer in given.items():
        if layer.in_features % groups or layer.out_features % groups:
            raise ReductionError(
                f"groups={groups} do not divide {layer.in_features} inputs and {layer.out_features} outputs of {path}"
            )


def _reordered(parts: Parts, mlp: MLP, changed: dict[str, nn.Linear], order: torch.Tensor) -> Iterator[Edit]:
    """What lies on the hidden axis beside the layers that are changed, in the new order of the units."""
    seen = {id(layer) for layer in changed.values()}
    for axis in dict.fromkeys(axis for use in parts.uses(mlp) for axis in use.axes):
        value = parts.tensor(axis.tensor)
        if id(parts.module(axis.tensor.rpartition(".")[0])) not in seen and id(value) not in seen:
            seen.add(id(value))
            yield Assign(axis.tensor, value.detach().index_select(axis.dim, order.to(value.device)))


def _replaced(
    path: str,
    layer: nn.Linear,
    groups: int,
    contracts: bool,
    orders: BlockOrders | None,
    everything: bool,
    shuffle: bool,
    init: str,
    seed: int,
) -> Edit:
    """The edit of one layer. The order of hidden units is in the weights, that of features in the layer."""
    ordered = "outputs_order" if contracts else "inputs_order"
    config = {"groups": groups} | ({ordered: True} if everything else {})
    if shuffle and contracts:
        config["inputs_order"] = True
    made = layer_of(BlockDiagonalLinear, layer, config)
    if layer.weight.is_meta:
        return replacing(path, "block_diagonal", config, made)
    mixed = torch.arange(layer.in_features).reshape(groups, -1).T.flatten() if shuffle and contracts else None
    if init == "new":
        generator = torch.Generator().manual_seed(derived_seed(seed, path))
        bound = made.weight.shape[1] ** -0.5
        with torch.no_grad():
            made.weight.copy_((2 * torch.rand(made.weight.shape, generator=generator, device="cpu") - 1) * bound)
            if made.bias is not None:
                made.bias.copy_(layer.bias)
            if mixed is not None and made.inputs_order is not None:
                made.inputs_order.copy_(mixed)
        return replacing(path, "block_diagonal", config, made)
    dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    weight: torch.Tensor = layer.weight
    bias: torch.Tensor | None = layer.bias
    if orders is not None:
        order = orders.hidden.to(weight.device)
        weight = weight[:, order] if contracts else weight[order]
        bias = bias if contracts or bias is None else bias[order]
    dense.weight = nn.Parameter(weight.detach())
    if bias is not None:
        dense.bias = nn.Parameter(bias.detach())
    given = (
        {ordered: getattr(orders, "outputs" if contracts else "inputs")} if everything and orders is not None else {}
    )
    if mixed is not None:
        given["inputs_order"] = mixed
    return replacing(path, "block_diagonal", config, BlockDiagonalLinear.from_linear(dense, groups, **given))


def _branch(parts: Parts, mlp: MLP, variant: str, seed: int) -> Edit:
    """The edit that puts the branch of channel covariance around an MLP."""
    module = parts.whole(mlp)
    if mlp.in_features != mlp.out_features or mlp.acts_on != "tokens":
        raise ReductionError(
            f"cca={variant!r}: {mlp.name} gives {mlp.out_features} features for {mlp.in_features}, or acts on {mlp.acts_on}; "
            f"exclude it"
        )
    config = {"hidden": mlp.hidden_features, "variant": variant}
    generator = torch.Generator().manual_seed(derived_seed(seed, f"{mlp.name} branch"))
    made = layer_of(ChannelCovariance, module, config)
    if not made.mix.is_meta:
        with torch.no_grad():
            made.mix.copy_(torch.randn(2, generator=generator, device="cpu"))
    return replacing(mlp.name, "channel_covariance", config, made)
