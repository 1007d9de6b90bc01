"""A projection whose weight is block diagonal: each group of outputs sees one group of inputs.

Source: the MLPs of SCHEME (arXiv 2312.00412), whose fc1 and fc2 have g equal blocks.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from mlpreduce.errors import ReductionError, check_whole
from mlpreduce.layers.linear import linear_of, place_of, undisturbed, weight_of
from mlpreduce.layers.wrapper import Axes, StandIn

__all__ = ["BlockDiagonalLinear"]


class BlockDiagonalLinear(StandIn):
    """y = W x + b, where W has `groups` equal blocks on its diagonal and is 0 elsewhere.

    A group of inputs or outputs need not lie together: `inputs_order` and `outputs_order` say which features are, in order,
    those of the first group, of the second, and so on.

    Attributes:
        weight: (outputs, inputs / groups), the blocks one below the other.
        bias: (outputs,), or None.
        inputs_order: (inputs,), positions; None: as they are.
        outputs_order: (outputs,), positions; None: as they are.

    Args:
        in_features: inputs.
        out_features: outputs.
        groups: blocks; they divide both.
        bias: whether there is one.
        inputs_order: which inputs are those of the first group, and so on: a channel shuffle.
        outputs_order: the same of the outputs.
        device: where the weights lie.
        dtype: their type.

    Raises:
        ReductionError: the groups do not divide the features, or an order is none.
    """

    inputs_order: torch.Tensor | None
    outputs_order: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        groups: int,
        bias: bool = True,
        *,
        inputs_order: torch.Tensor | None = None,
        outputs_order: torch.Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        call = f"BlockDiagonalLinear({in_features}, {out_features}, {groups})"
        for name, value in (("in_features", in_features), ("out_features", out_features), ("groups", groups)):
            check_whole(f"{call}: {name}", value)
        if in_features % groups or out_features % groups:
            common = math.gcd(in_features, out_features)
            raise ReductionError(f"{call}: groups must divide both widths; it may be a divisor of {common}")
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(out_features, in_features // groups, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        for name, order, size in (
            ("inputs_order", inputs_order, in_features),
            ("outputs_order", outputs_order, out_features),
        ):
            if order is not None and sorted(order.tolist()) != list(range(size)):
                raise ReductionError(f"{call}: {name} must have each position from 0 to {size - 1} once")
            self.register_buffer(name, None if order is None else order.to(device=device, dtype=torch.long))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """New values, uniform within 1 / sqrt(inputs of a block), as those of `torch.nn.Linear`."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    @property
    def in_features(self) -> int:
        """Inputs."""
        return self.weight.shape[1] * self.groups

    @property
    def out_features(self) -> int:
        """Outputs."""
        return self.weight.shape[0]

    @classmethod
    def in_place_of(
        cls, module: nn.Module, groups: int, inputs_order: bool = False, outputs_order: bool = False
    ) -> BlockDiagonalLinear:
        """A new layer of the widths of a `Linear`, its type and place, with room for orders where they are asked for."""
        outputs, inputs = weight_of(module, "BlockDiagonalLinear.in_place_of").shape
        return cls(
            inputs,
            outputs,
            groups,
            inputs_order=torch.arange(inputs, device="cpu") if inputs_order else None,
            outputs_order=torch.arange(outputs, device="cpu") if outputs_order else None,
            **place_of(module),
        )

    @property
    def macs(self) -> tuple[int, int]:
        """Multiply-accumulates for each position, and once for each call."""
        return self.weight.numel(), 0

    @property
    def outputs(self) -> Axes:
        """Axes of its tensors that its outputs lie on, if they are in order."""
        return (("weight", 0), ("bias", 0)) if self.outputs_order is None else ()

    @property
    def inputs(self) -> Axes:
        """Axes of its tensors that its inputs lie on, if they are in order: those of one block, for each block of rows."""
        return (("weight", 1),) if self.inputs_order is None else ()

    @classmethod
    def from_linear(
        cls,
        layer: nn.Linear,
        groups: int,
        *,
        inputs_order: torch.Tensor | None = None,
        outputs_order: torch.Tensor | None = None,
    ) -> BlockDiagonalLinear:
        """The blocks of a dense layer; what lies outside of them is lost.

        Raises:
            ReductionError: as of the class; the layer is no `Linear`.
        """
        weight = weight_of(layer, "BlockDiagonalLinear.from_linear")
        outputs, inputs = weight.shape
        place = place_of(layer)
        with undisturbed(weight):
            made = cls(inputs, outputs, groups, inputs_order=inputs_order, outputs_order=outputs_order, **place)
        values, bias = weight, layer.bias
        if made.inputs_order is not None:
            values = values[:, made.inputs_order]
        if made.outputs_order is not None:
            values = values[made.outputs_order]
        blocks = (
            values.unflatten(1, (groups, -1)).unflatten(0, (groups, -1)).diagonal(dim1=0, dim2=2)
        )  # rows, columns, groups
        with torch.no_grad():
            made.weight.copy_(blocks.permute(2, 0, 1).flatten(0, 1))
            if made.bias is not None and bias is not None:
                made.bias.copy_(bias)
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., inputs) to (..., outputs)."""
        if self.inputs_order is not None:
            x = x.index_select(-1, self.inputs_order)
        groups = self.groups
        tokens = x.reshape(-1, groups, x.shape[-1] // groups).transpose(0, 1)  # groups, tokens, inputs of a block
        blocks = self.weight.unflatten(0, (groups, -1)).transpose(1, 2)
        if self.bias is None:
            y = torch.bmm(tokens, blocks).transpose(0, 1).reshape(*x.shape[:-1], self.out_features)
        else:
            bias = self.bias if self.outputs_order is None else self.bias.index_select(0, self.outputs_order)
            bias = bias.view(groups, 1, -1)
            if self._can_write(x):  # where outputs belong, which spares a copy of them
                y = x.new_empty(*x.shape[:-1], self.weight.shape[0])
                torch.baddbmm(bias, tokens, blocks, out=y.view(-1, groups, bias.shape[-1]).transpose(0, 1))
            else:
                y = torch.baddbmm(bias, tokens, blocks).transpose(0, 1).reshape(*x.shape[:-1], self.out_features)
        return y if self.outputs_order is None else y.index_select(-1, self.outputs_order.argsort())

    def _can_write(self, x: torch.Tensor) -> bool:
        """Whether a product may be written into memory that is there: eagerly on a CPU, without gradients and autocast."""
        eager = not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))
        if not eager or torch._C._is_tracing() or torch._C._functorch.is_functorch_wrapped_tensor(x):
            return False
        return x.device.type == "cpu" and x.dtype == self.weight.dtype

    def merged(self) -> nn.Linear:
        """The dense layer that computes the same, with zeros outside of the blocks."""
        weight = torch.block_diag(*self.weight.detach().unflatten(0, (self.groups, -1)))
        if self.inputs_order is not None:
            weight = weight[:, self.inputs_order.argsort()]
        if self.outputs_order is not None:
            weight = weight[self.outputs_order.argsort()]
        return linear_of(weight, self.bias)

    def extra_repr(self) -> str:
        """Widths, blocks and whether there is a bias."""
        return f"{self.in_features}, {self.out_features}, groups={self.groups}, bias={self.bias is not None}"
