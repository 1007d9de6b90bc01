"""What a transform sees of a model: its MLPs in scope, their chains, their weights, and orders of their hidden units."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import fx, nn
from torch.func import functional_call

from mlpreduce.criteria import get_criterion, needs_weights, unit_weights
from mlpreduce.edits import Slice, as_units
from mlpreduce.errors import ReductionError
from mlpreduce.graph import MLP, Leaf, chains, module_at, structural_copy

__all__ = ["Parts"]


class Parts(Sequence[MLP]):
    """The MLPs in scope, in order of execution. A transform reads it and returns edits; it changes nothing.

    Attributes:
        chains: the MLPs that may share with each other, each chain in order of execution.
    """

    def __init__(self, model: nn.Module, mlps: Sequence[MLP], others: Sequence[MLP] = ()) -> None:
        self._model, self._mlps, self._others = model, list(mlps), list(others)
        self.chains = chains(self._mlps)

    def __getitem__(self, index: int) -> MLP:  # type: ignore[override]
        return self._mlps[index]

    def __len__(self) -> int:
        return len(self._mlps)

    def __iter__(self) -> Iterator[MLP]:
        return iter(self._mlps)

    def uses(self, mlp: MLP) -> list[MLP]:
        """All calls of the MLP's weights in the model, in scope or not; just itself unless it is tied."""
        return [other for other in [*self._mlps, *self._others] if other.owner == mlp.owner]

    def tensor(self, path: str) -> torch.Tensor:
        """The values of a parameter or buffer.

        Raises:
            ReductionError: the model is on the meta device and has no values.
        """
        parent, _, name = path.rpartition(".")
        value: torch.Tensor = getattr(module_at(self._model, parent), name)
        if value.is_meta:
            raise ReductionError(
                f"needs the values of {path}, but the model is on the meta device; give it weights first"
            )
        return value

    def output(self, mlp: MLP, inputs: torch.Tensor, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What an MLP makes of inputs `(batch, features)`, computed in their dtype, with other values of some tensors.

        Raises:
            ReductionError: it is no module of the MLP alone that takes one tensor, or the model is a graph, or on meta.
        """
        if isinstance(self._model, fx.GraphModule):
            raise ReductionError(
                f"{mlp.name} is part of a torch.fx graph and cannot be measured by itself; give the model"
            )
        module = module_at(self._model, mlp.name)
        leaves = tuple(f"{leaf.path}." for leaf in mlp.leaves)
        named = [] if module is None else [*module.named_parameters(), *module.named_buffers()]
        if module is None or not all(f"{mlp.name}.{name}".startswith(leaves) for name, _ in named):
            raise ReductionError(f"{mlp.name} is no module of the MLP alone, so it cannot be measured by itself")
        held = {}
        for name, _ in named:
            value = values.get(path := f"{mlp.name}.{name}")
            value = self.tensor(path) if value is None else value
            held[name] = value.detach().to(inputs) if value.is_floating_point() else value
        try:
            with torch.no_grad():
                output: torch.Tensor = functional_call(structural_copy(module).eval(), held, (inputs,))
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise ReductionError(
                f"{mlp.name} ({type(module).__name__}) cannot be measured on inputs of shape {tuple(inputs.shape)}: {error}"
            ) from error
        return output

    def tensors_of(self, leaf: Leaf) -> list[str]:
        """Paths of the floating-point parameters and buffers of a leaf."""
        module = module_at(self._model, leaf.path)
        named = [*module.named_parameters(), *module.named_buffers()] if module is not None else []
        return [f"{leaf.path}.{name}" for name, tensor in named if tensor.is_floating_point()]

    def order(self, mlp: MLP, criterion: str, seed: int = 0) -> list[int]:
        """Hidden units of an MLP by importance, the most important first.

        Raises:
            ReductionError: unknown criterion, or it needs weights and there are none.
        """
        function = get_criterion(criterion)
        if needs_weights(criterion):
            weights = unit_weights(mlp, self.tensor)
        else:
            weights = torch.empty(mlp.hidden_features, 0, device="cpu")
        index = next(i for i, other in enumerate(self._mlps) if other.name == mlp.name)
        order: list[int] = function(weights, seed + index).tolist()
        return order

    def slice(self, mlp: MLP, units: Sequence[int]) -> Slice:
        """The edit that keeps `units` of an MLP, in all tensors that its uses run through."""
        axes = list(mlp.axes)
        for other in self.uses(mlp):
            if other.name != mlp.name:  # what is tied is sliced once; norms of each depth are its own
                own = {leaf.path for leaf in other.leaves if not leaf.shareable}
                axes += [axis for axis in other.axes if axis.tensor.rpartition(".")[0] in own]
        return Slice(mlp.name, mlp.hidden_features, as_units(units), tuple(dict.fromkeys(axes)), mlp.settings)

    def keep(self, mlp: MLP, width: int, criterion: str, seed: int = 0) -> Slice:
        """The edit that keeps the most important units of an MLP; of one with groups, as many of each group.

        Raises:
            ReductionError: unknown criterion, no weights for it, or a width that its groups do not divide.
        """
        if width % mlp.groups:
            raise ReductionError(
                f"{mlp.name} has a convolution in {mlp.groups} groups and would keep {width} hidden units; the width must "
                f"be a multiple of {mlp.groups}"
            )
        order, size = self.order(mlp, criterion, seed), mlp.hidden_features // mlp.groups
        if mlp.groups == 1:
            return self.slice(mlp, order[:width])
        groups = [[unit for unit in order if unit // size == group] for group in range(mlp.groups)]
        return self.slice(mlp, [unit for units in groups for unit in units[: width // mlp.groups]])
