"""What a transform sees of a model: its MLPs in scope, their chains, their weights, and orders of their hidden units."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.func import functional_call

from mlpreduce.budget import Baseline, counted, measure
from mlpreduce.calibration import Answers, Loss, Watcher
from mlpreduce.criteria import Choice, Moments, Ranking, as_order, choose, guard_notes, guarded
from mlpreduce.edits import Edit, Slice
from mlpreduce.errors import ReductionError
from mlpreduce.graph import (
    MLP,
    Inputs,
    Leaf,
    block_leaves,
    chains,
    first_units,
    is_leaf,
    module_at,
    slice_edit,
    structural_copy,
    token_grid,
    whole_module,
)
from mlpreduce.repair import distances, refitted
from mlpreduce.words.values import Config

__all__ = ["Parts"]

Key = TypeVar("Key")


class Parts(Sequence[MLP]):
    """The MLPs in scope, in order of execution. A transform reads it and returns edits; it changes nothing.

    Attributes:
        chains: the MLPs that may share with each other, each chain in order of execution.
        notes: what the transform wants to be printed with its plan.

    Args:
        model: the model.
        mlps: its MLPs in scope.
        every: all its MLPs, in order of execution; by default those in scope.
        data: calibration data, for criteria that look at it.
        loss: of what the model gives and labels; by default the cross entropy.
        example_inputs: what the model is called with, to count MACs.
        refitted: whether what stays is refitted, so that the bias of fc2 takes up the means of what goes.
        watcher: looks on when the model runs over the data.
        answers: what is known of all its MLPs and this data already.
    """

    def __init__(
        self,
        model: nn.Module,
        mlps: Sequence[MLP],
        every: Sequence[MLP] = (),
        *,
        data: Any = None,
        loss: Loss | None = None,
        example_inputs: Inputs | None = None,
        refitted: bool = False,
        watcher: Watcher | None = None,
        answers: Answers | None = None,
    ) -> None:
        self._model, self._mlps, self._every = model, list(mlps), list(every or mlps)
        self._answers = answers or Answers(model, self._every, data, loss, refitted=refitted, watcher=watcher)
        self._inputs = example_inputs
        self.chains = chains(self._mlps)
        self.notes: list[str] = []
        self._paired: Choice | None = None
        self._strong: dict[str, list[str]] = {"stay": [], "go": []}  # units, as notes name them

    def __getitem__(self, index: int) -> MLP:  # type: ignore[override]
        return self._mlps[index]

    def __len__(self) -> int:
        return len(self._mlps)

    def __iter__(self) -> Iterator[MLP]:
        return iter(self._mlps)

    @property
    def number(self) -> int:
        """How many MLPs the model has, in scope or not."""
        return len(self._every)

    def uses(self, mlp: MLP) -> list[MLP]:
        """All calls of the MLP's weights in the model, in scope or not; just itself unless it is tied."""
        return [other for other in self._every if other.owner == mlp.owner]

    def tensor(self, path: str) -> torch.Tensor:
        """The values of a parameter or buffer.

        Raises:
            ReductionError: the model is on the meta device and has no values.
        """
        return self._answers.tensor(path)

    def module(self, path: str) -> nn.Module:
        """The module at a path, to read.

        Raises:
            ReductionError: there is none.
        """
        module = module_at(self._model, path)
        if module is None:
            raise ReductionError(f"{type(self._model).__name__} has no module {path!r}")
        return module

    def whole(self, mlp: MLP) -> nn.Module:
        """The module that is the MLP, and nothing else.

        Raises:
            ReductionError: there is none, or the model is a graph.
        """
        return whole_module(self._model, mlp)

    def grid(self, mlp: MLP) -> list[int] | None:
        """Number of tokens before the others, height and width of those; None where an MLP is given a grid.

        Raises:
            ReductionError: the model does not say, drops some of its patches, or the MLP is given something else.
        """
        return token_grid(self._model, mlp)

    def outside(self) -> list[tuple[str, nn.Module]]:
        """Leaf modules with parameters that lie in no block of an MLP, such as the patch embedding and the last norm."""
        blocks = tuple(f"{mlp.block}." for mlp in self._every)
        named = self._model.named_modules()
        return [(path, m) for path, m in named if m._parameters and is_leaf(m) and not path.startswith(blocks)]

    def moments(self, leaf: Leaf) -> torch.Tensor:
        """Sums of x x^T, x what an expanding or contracting layer is given on the calibration data, and a 1.

        They are (inputs + 1, inputs + 1), in float64; padding is left out.

        Raises:
            ReductionError: no calibration data was given, or the model cannot be run on it.
        """
        return self._answers.moments()[leaf.path]

    def output(self, mlp: MLP, inputs: torch.Tensor, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What an MLP makes of inputs `(batch, features)`, computed in their dtype, with other values of some tensors.

        Raises:
            ReductionError: it is no module of the MLP alone that takes one tensor, or the model is a graph, or on meta.
        """
        module = self.whole(mlp)
        held = {}
        for name, _ in [*module.named_parameters(), *module.named_buffers()]:
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

    def beside(self, mlp: MLP) -> list[Leaf]:
        """Leaf modules in the block of an MLP that belong to no MLP, of role `attention` or `other`: see `block_leaves`."""
        return block_leaves(self._model, mlp.block, self._every)

    def tensors_of(self, leaf: Leaf) -> list[str]:
        """Paths of the floating-point parameters and buffers of a leaf."""
        module = module_at(self._model, leaf.path)
        named = [*module.named_parameters(), *module.named_buffers()] if module is not None else []
        return [f"{leaf.path}.{name}" for name, tensor in named if tensor.is_floating_point()]

    @cached_property
    def counts(self) -> Baseline:
        """The parameters of the model as it is, and no MACs."""
        return counted(self._model, self._every)

    @cached_property
    def baseline(self) -> Baseline:
        """What the model costs as it is.

        Raises:
            ReductionError: what it is called with is not known.
        """
        return measure(structural_copy(self._model, device="meta"), self._inputs, self._every)

    @property
    def data(self) -> dict[str, Any] | None:
        """Number and fingerprint of the examples that were looked at, if any were."""
        return self._answers.data

    @property
    def unused(self) -> list[str]:
        """Which of `data` and `loss` were given, and nothing has looked at."""
        return self._answers.unused

    def similarity(self) -> dict[tuple[str, str], float]:
        """How alike MLPs are by what they give on the calibration data: linear CKA in 0..1, for each pair of names in scope.

        Raises:
            ReductionError: no calibration data was given, or the model cannot be run on it.
        """
        names = {mlp.name for mlp in self._mlps}
        return {pair: value for pair, value in self._answers.similarity().items() if names.issuperset(pair)}

    def relate(self, pairs: Sequence[tuple[MLP, MLP]]) -> None:
        """Read the data once for the correlations of all these pairs of MLPs.

        Raises:
            ReductionError: no calibration data was given, or the model cannot be run on it.
        """
        self._answers.relate(pairs)

    def correlations(self, one: MLP, other: MLP) -> torch.Tensor:
        """How the units of two MLPs go together at the same positions of the calibration data: (units of one, of the other).

        Raises:
            ReductionError: no calibration data was given, or the model cannot be run on it.
        """
        return self._answers.correlations(one, other)

    def refits(self, edits: Sequence[Edit]) -> dict[str, torch.Tensor]:
        """Values of fc2, by tensor path, with which each MLP by itself best gives what it gave before these edits.

        Raises:
            ReductionError: there is no data, or an fc2 that cannot be refitted.
        """
        return self._answers.read_by("refits", lambda data: refitted(self._model, self._every, edits, data)).values

    def distances(self, trials: Mapping[Key, Sequence[Edit]]) -> dict[Key, float]:
        """How far what the model gives moves with each of some sets of edits, on the calibration data: 1 minus the mean cosine.

        Raises:
            ReductionError: no calibration data was given, or the model cannot be run on it.
        """
        return self._answers.read_by("distances", lambda data: distances(self._model, trials, data))

    def scores(self, mlp: MLP, criterion: str | Config, seed: int = 0) -> torch.Tensor:
        """Scores of the hidden units of an MLP, (hidden units,), which can be compared between MLPs.

        Raises:
            ReductionError: as `order`; the criterion gives an order alone.
        """
        answer = self._answers.of(mlp, choose(criterion), seed)
        if isinstance(answer, Ranking):
            answer = answer.scores
        if not answer.is_floating_point():
            raise ReductionError(
                f"criterion {choose(criterion)} orders the units of each MLP, and gives no scores to compare MLPs by; use "
                f'scope="uniform", or a criterion such as "l2" or "taylor"'
            )
        return answer.detach().cpu().double()

    def order(self, mlp: MLP, criterion: str | Config, seed: int = 0, wanted: int | None = None) -> list[int]:
        """Hidden units of an MLP by importance, the most important first.

        Args:
            mlp: the MLP.
            criterion: its name, or a dictionary with `name` and options.
            seed: for criteria that draw random numbers.
            wanted: how many of the order matter.

        Raises:
            ReductionError: unknown criterion, or it needs weights or data and there are none.
        """
        return as_order(self._answers.of(mlp, choose(criterion), seed, wanted))

    def slice(self, mlp: MLP, units: Sequence[int]) -> Slice:
        """The edit that keeps `units` of an MLP, in all tensors that its uses run through."""
        return slice_edit(mlp, self.uses(mlp), units)

    def keep(
        self,
        mlp: MLP,
        width: int,
        criterion: str | Config,
        seed: int = 0,
        guard: str | float = False,
    ) -> Slice:
        """The edit that keeps the most important units of an MLP; of one with groups, as many of each group.

        Args:
            mlp: the MLP.
            width: how many units stay.
            criterion: its name, or a dictionary with `name` and options.
            seed: for criteria that draw random numbers.
            guard: whether the units that carry most of the output stay first, where there is data: see `criteria.guarded`.

        Raises:
            ReductionError: unknown criterion, no weights or data for it, or a width that its groups do not divide.
        """
        if width % mlp.groups:
            raise ReductionError(
                f"{mlp.name} has a convolution in {mlp.groups} groups and would keep {width} hidden units; the width must "
                f"be a multiple of {mlp.groups}"
            )
        wanted = width if mlp.groups == 1 else None
        choice = choose(criterion)
        answer = self._answers.of(mlp, choice, seed, wanted)
        prices = choice.criterion.needs == "pairs"  # what a unit carries, itself
        if prices:
            self._paired = choice
        order = as_order(answer)
        shares = None if prices else self._answers.shares(mlp, read=guard is not False)
        if shares is not None:
            found = guarded(order, shares.tolist(), width, mlp.groups, guard)
            order = found.order
            for what, units in (("stay", found.stay), ("go", found.go)):
                self._strong[what] += [f"{mlp.name} {unit} ({shares[unit]:.1%})" for unit in units]
        units = first_units(mlp, order, width)
        if isinstance(answer, Ranking) and answer.refine is not None:
            units = answer.refine(units)
        return self.slice(mlp, units)

    @property
    def pairs(self) -> Callable[[MLP], Moments] | None:
        """Moments with pairs of what fc2 of an MLP is given, where the criterion by which units stay has looked at them."""
        return None if self._paired is None else partial(self._answers.pairs, choice=self._paired)

    def criterion_notes(self, criterion: str | Config) -> list[str]:
        """What became of the units that carry most of what their MLP gives, and what speaks against the criterion."""
        choice = choose(criterion)
        doubt = [f"{choice}: {choice.criterion.doubt}"] if choice.criterion.doubt else []
        return guard_notes(str(choice), self._strong["stay"], self._strong["go"]) + doubt
