"""`LotteryTicket`: prune a part of the hidden units, rewind what is left to earlier weights, train, and again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from mlpreduce.calibration import Loss
from mlpreduce.during.units import entry, fraction, owners, part_of, same_settings, whole
from mlpreduce.edits import Plan, Slice
from mlpreduce.errors import ReductionError, call_text, did_you_mean, naming
from mlpreduce.graph import MLP, Inputs, mlps_or_raise, refuse_wrapped, select
from mlpreduce.reduction.applying import apply, history
from mlpreduce.reduction.planning import Globs, make_plan
from mlpreduce.surgery.operation import carry_out, rehearse
from mlpreduce.words.values import Config

__all__ = ["LotteryTicket"]

_REWINDS = ("remembered", "random", "none")


class LotteryTicket:
    """Finds structured lottery tickets: rounds of training, each followed by `next_round()`.

    A round takes `fraction` of the hidden units that are left of every MLP, those that matter least by the criterion on the
    trained weights, and sets all weights that stay to what was remembered of the same units, bit for bit. After k rounds
    (1 - fraction)^k of the units are left, rounded down, at least one; later tickets are part of earlier ones. Each round
    makes new Parameters: make a new optimizer, and a new schedule, for it, and wrap the model in DDP anew. Of several processes
    each remembers its own weights, so they must be equal when it is made.

    Remembered are the weights and buffers when it is made (step 0), or when `remember()` was called last (late rewinding).
    One round with criterion="first", rewound to step 0, is ShallowMLP. Controls: `criterion="random"` keeps random units, and
    `rewind="random"` keeps the units of the ticket but gives them newly drawn weights, those of `build()`. Tickets of single
    weights (unstructured masks) are not here: they make no model smaller.

    Args:
        model: the model, before it is trained; reduced in place.
        fraction: of the units that are left, taken in each round.
        criterion: which units stay, see `mlpreduce.list_criteria`; or a dictionary with its name and options.
        rewind: `remembered`, `random`, or `none`: trained on from the weights it has (iterative pruning and fine-tuning).
        build: builds the unreduced model anew, for `rewind="random"`; its random numbers are drawn from `seed`.
        seed: of the criterion `random` and of `build`; each round has another.
        include: glob or globs over MLP names; others stay whole.
        exclude: glob or globs over MLP names that stay whole.
        example_inputs: what the model is called with, as of `mlpreduce.find_mlps`.

    Raises:
        ReductionError: the model has no MLP in scope, or an argument is out of range.

    Example:
        >>> from mlpreduce.testing import tiny_vit
        >>> ticket = LotteryTicket(model := tiny_vit(), fraction=0.5, criterion="l1")
        >>> start = model.head.weight.detach().clone()
        >>> with torch.no_grad():
        ...     _ = model.head.weight.add_(1)  # stands for a round of training
        >>> _ = ticket.next_round()
        >>> model.blocks[0].mlp.fc1.out_features, torch.equal(model.head.weight, start)
        (64, True)

    Source: Frankle and Carbin, "The Lottery Ticket Hypothesis", arXiv 1803.03635, section 2, with hidden units in the place
    of weights and every MLP pruned by the same fraction; rewinding to a later step, Frankle et al., arXiv 1912.05671.
    """

    def __init__(
        self,
        model: nn.Module,
        fraction: float = 0.2,
        criterion: str | Config = "l1",
        *,
        rewind: str = "remembered",
        build: Callable[[], nn.Module] | None = None,
        seed: int = 0,
        include: Globs = None,
        exclude: Globs = None,
        example_inputs: Inputs | None = None,
    ) -> None:
        call = call_text("LotteryTicket", {"fraction": fraction, "criterion": criterion, "rewind": rewind})
        self.fraction, self.criterion, self.rewind = _below_one(fraction, call), criterion, rewind
        refuse_wrapped(model, call)
        if rewind not in _REWINDS:
            raise ReductionError(f"{call}: rewind is {rewind!r}{did_you_mean(str(rewind), _REWINDS)}")
        if (rewind == "random") != (build is not None) or not (build is None or callable(build)):
            raise ReductionError(
                f'{call}: rewind="random" and build, which builds the unreduced model anew, go together'
            )
        self._seed, self._build, self._scope = whole("seed", seed, call, least=0), build, (include, exclude)
        found = mlps_or_raise(model, call, example_inputs).mlps
        chosen, _ = select(found, include, exclude)
        self._mlps: list[MLP] = owners(chosen)
        if not self._mlps:
            raise ReductionError(
                f"{call}: none of {len(found)} MLPs in scope has weights of its own; include the first uses"
            )
        self._settings = {"fraction": self.fraction, "criterion": criterion, "rewind": rewind, "seed": self._seed}
        self._model, self._inputs = model, example_inputs
        self._before = len(history(model))
        self._units = {mlp.name: list(range(mlp.hidden_features)) for mlp in self._mlps}
        self._point = _copied(model)
        self.plans: list[Plan] = []

    @property
    def rounds(self) -> int:
        """How many rounds have been taken."""
        return len(self.plans)

    @property
    def units(self) -> dict[str, list[int]]:
        """The ticket: units of each MLP that are left, by their numbers in the unreduced model."""
        return {name: list(units) for name, units in self._units.items()}

    def remember(self) -> None:
        """Remember the weights as they are now, in the place of those remembered before."""
        self._point = _copied(self._model)

    def next_round(self, *, data: Any = None, loss: Loss | None = None) -> Plan:
        """Take the units that matter least, and rewind the rest; after a round of training.

        Args:
            data: calibration data, if the criterion looks at it, as of `mlpreduce.plan`.
            loss: as of `mlpreduce.plan`.

        Returns:
            What was taken, as the plan that the model's history now ends with.

        Raises:
            ReductionError: nothing is left to take, or as `mlpreduce.plan`. The model is as it was then.
        """
        call = f"LotteryTicket.next_round() of round {self.rounds + 1}"
        share = (1 - self.fraction) ** (self.rounds + 1)
        widths = {mlp.name: max(1, part_of(mlp.hidden_features, share)) for mlp in self._mlps}
        if all(widths[name] >= len(units) for name, units in self._units.items()):
            raise ReductionError(
                f"{call}: {share:.3g} of the units of every MLP, rounded down but at least one, is what is left already; a "
                f"larger fraction than {self.fraction} takes more"
            )
        made = self._planned(widths, data, loss, call)
        point = _copied(self._point)
        carry_out(point, made)
        shapes = {name: tuple(tensor.shape) for name, tensor in _tensors(point).items()}
        source = self._fresh(made, shapes, call) if self._build is not None else point
        rehearse(self._model, made)
        apply(self._model, made, example_inputs=self._inputs)
        if self.rewind != "none":
            _write(source, self._model)
        self._take(made, point)
        return made

    def state_dict(self) -> dict[str, Any]:
        """What it takes to go on, beside the model's own state: tensors, numbers and text."""
        tensors = {name: tensor.detach().clone() for name, tensor in _tensors(self._point).items()}
        return {"settings": self._settings, "plans": [made.to_json() for made in self.plans], "remembered": tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another left: slices the model, which is whole before, so that its own state can be loaded then.

        Raises:
            ReductionError: rounds were taken already, or the state is of another model or other settings. Nothing is changed
                then.
        """
        call = "LotteryTicket.load_state_dict"
        same_settings(self._settings, state, call)
        texts, given = entry(state, "plans", call), entry(state, "remembered", call)
        if not isinstance(texts, list) or not isinstance(given, Mapping):
            raise ReductionError(f"{call}: the state is damaged; give what state_dict() of this class returned")
        plans = [Plan.from_json(text) for text in texts]
        if self.plans:
            raise ReductionError(f"{call}: {self.rounds} rounds were taken already; make a new LotteryTicket")
        point, model = _copied(self._point), _copied(self._model)
        for made in plans:
            carry_out(point, made)
            carry_out(model, made)
        known = {name: tuple(tensor.shape) for name, tensor in _tensors(point).items()}
        if known != {name: tuple(tensor.shape) for name, tensor in given.items()}:
            raise ReductionError(
                f"{call}: the remembered tensors are of another model; build the one it was written for"
            )
        with torch.no_grad():
            for name, tensor in _tensors(point).items():
                tensor.copy_(given[name])
        for made in plans:
            apply(self._model, made, example_inputs=self._inputs)
            self._take(made, point)
        self._point = point

    def _planned(self, widths: dict[str, int], data: Any, loss: Loss | None, call: str) -> Plan:
        include, exclude = self._scope
        chosen = {"widths": widths, "criterion": self.criterion, "seed": self._seed + self.rounds}
        scope: dict[str, Any] = {"include": include, "exclude": exclude, "data": data, "loss": loss}
        with naming(call):
            return make_plan(self._model, "shallow", chosen, **scope, example_inputs=self._inputs)[0]

    def _fresh(self, made: Plan, shapes: Mapping[str, tuple[int, ...]], call: str) -> nn.Module:
        """A newly drawn model, with the units of the ticket, and tensors of these shapes."""
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self._seed + self.rounds)
            fresh: Any = self._build() if self._build is not None else None
        if not isinstance(fresh, nn.Module) or fresh is self._model:
            fact = "the model itself" if fresh is self._model else f"a {type(fresh).__name__}"
            raise ReductionError(f"{call}: build() gives {fact}; let it build the unreduced model anew")
        try:
            for past in [*history(self._model)[self._before :], made]:
                carry_out(fresh, past)
        except ReductionError as error:
            raise ReductionError(f"{call}: build() gives a model that cannot be reduced alike: {error}") from error
        theirs = {name: tuple(tensor.shape) for name, tensor in _tensors(fresh).items()}
        if theirs != shapes:
            name = next(name for name in {**shapes, **theirs} if shapes.get(name) != theirs.get(name))
            raise ReductionError(
                f"{call}: build() gives another model: {name} has shape {theirs.get(name)} in it and {shapes.get(name)} in the "
                f"ticket; let it build the unreduced model anew"
            )
        return fresh

    def _take(self, made: Plan, point: nn.Module) -> None:
        for edit in made.of(Slice):
            self._units[edit.mlp] = [self._units[edit.mlp][unit] for unit in edit.units]
        self.plans.append(made)
        self._point = point


def _below_one(value: Any, call: str) -> float:
    number = fraction("fraction", value, call)
    if 0 < number < 1:
        return number
    raise ReductionError(f"{call}: fraction is {value!r}; it must be above 0 and below 1")


def _copied(model: nn.Module) -> nn.Module:
    """A copy of a model without gradients."""
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.grad = None
    return copied


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers, each once; also buffers that no state dict has."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _write(source: nn.Module, model: nn.Module) -> None:
    theirs = _tensors(source)
    with torch.no_grad():
        for name, tensor in _tensors(model).items():
            tensor.copy_(theirs[name])
