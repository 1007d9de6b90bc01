"""Scores of hidden units from what they do on calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mlpreduce.calibration.batches import Batch, described
from mlpreduce.calibration.quiet import check_twice_differentiable, quiet_copy, running
from mlpreduce.calibration.samples import Samples
from mlpreduce.calibration.sums import UnitSums, add_calls, empty_sums, shared, take_back
from mlpreduce.calibration.taps import Gates, Taps
from mlpreduce.calibration.watching import Watcher
from mlpreduce.criteria import Choice, Ranking, Seen, derived_seed
from mlpreduce.errors import ReductionError
from mlpreduce.graph import MLP, tensor_of

__all__ = ["Loss", "Measured", "measure_scores", "objective_of", "telling"]

Loss = Callable[[Any, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Measured:
    """Scores of the hidden units of each unique MLP.

    Attributes:
        scores: by owner, (hidden units,) in float64 on the CPU, the larger the more important.
        samples: examples they are of.
        fingerprint: of these examples.
        sums: of what the units did, by owner, where that was looked at.
    """

    scores: Mapping[str, torch.Tensor]
    samples: int
    fingerprint: str
    sums: Mapping[str, UnitSums] = field(default_factory=dict)


def measure_scores(
    model: nn.Module,
    mlps: Sequence[MLP],
    choice: Choice,
    data: Any,
    loss: Loss | None = None,
    seed: int = 0,
    watcher: Watcher | None = None,
) -> Measured:
    """Scores by a criterion that looks at data.

    Args:
        model: the model; it is not changed.
        mlps: its MLPs, all uses of each.
        choice: the criterion with its options.
        data: an iterable of images, or of (images, labels) for a criterion that needs a loss.
        loss: `(what the model gives, labels) -> scalar`, the mean over the examples; by default the cross entropy.
        seed: of random signs.
        watcher: looks on, where the model runs on the data as it is.

    Raises:
        ReductionError: the data is empty or not what is needed, or the model cannot be run on it.
    """
    criterion = choice.criterion
    own = criterion.objective is not None
    samples = Samples(data, model, labels=criterion.needs == "loss" and not own, compared=own)
    with running(samples.device, gradients=criterion.needs == "loss"), samples.shown(f"criterion {criterion.name}"):
        sums, units = _sums(model, mlps, choice, samples, loss, seed, Watcher() if own or not watcher else watcher)
    for owner, total in sums.items():
        if not total.isfinite().all():
            raise ReductionError(f"criterion {choice}: the scores of {owner} are not finite; is the loss?")
    if not any(total.any() for total in sums.values()):
        raise ReductionError(
            f"criterion {choice}: all scores of {len(sums)} MLPs are 0 on {samples.count} examples, so what units do makes no "
            f"difference there; give other data, or look at the loss"
        )
    scores = {owner: total / samples.count for owner, total in sums.items()}
    return Measured(scores, samples.count, samples.fingerprint, units)


def _sums(
    model: nn.Module,
    mlps: Sequence[MLP],
    choice: Choice,
    samples: Samples,
    loss: Loss | None,
    seed: int,
    watcher: Watcher,
) -> tuple[dict[str, torch.Tensor], dict[str, UnitSums]]:
    """Sums of a criterion's values over all examples, and of what the units did, by owner."""
    criterion = choice.criterion
    tree = quiet_copy(model)
    taps, given = Taps(tree, mlps, choice.sites), Taps(tree, mlps, ("fc2",))
    units = empty_sums(mlps, tree, pairs=False, slopes=False)
    signs = _signs(taps, criterion.probes, seed)
    sums = {mlp.owner: torch.zeros(mlp.hidden_features, dtype=torch.float64, device="cpu") for mlp in mlps}
    problem: Exception | None = None
    try:
        for number, (batch, labels) in enumerate(samples.chunks()):
            with telling(batch):
                if number == 0:
                    taps.check_examples(tree, batch)
                with watcher.over(tree, batch), given.recording(len(batch)) as kept:
                    if criterion.needs == "images":
                        batch.run(tree)
                        seen = {owner: Seen(torch.cat(calls, 1), {}, {}) for owner, calls in kept.items() if calls}
                    else:
                        objective = objective_of(choice, tree, batch, labels, loss)
                        seen = _changes(taps, objective, len(batch), samples.like, signs, criterion.name)
            add_calls(units, kept, samples.rank, batch.mask)
            for owner, what in seen.items():
                value = choice.values(what)
                if isinstance(value, Ranking):
                    raise ReductionError(f"criterion {choice} gave a Ranking for a few examples; give values of each")
                if tuple(value.shape) != (len(batch), len(sums[owner])):
                    raise ReductionError(
                        f"criterion {choice} gave values of shape {tuple(value.shape)} for {len(batch)} examples and "
                        f"{len(sums[owner])} hidden units of {owner}; give one for each of both"
                    )
                sums[owner] += value.detach().cpu().double().sum(0)
    except Exception as error:  # whatever the data raises, or the model: the other processes are told
        problem = error
    every = samples.finish({**sums, **shared(units)}, problem)
    watcher.end(samples)
    take_back(units, every, samples.count)
    return {owner: every[owner] for owner in sums}, units


@contextmanager
def telling(batch: Batch) -> Iterator[None]:
    """Tell what the model was given where its own code raises."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
        if isinstance(error, ReductionError):
            raise
        raise ReductionError(
            f"the model does not run on {described(batch)} of the data: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no reason'}"
        ) from error


def objective_of(
    choice: Choice, tree: nn.Module, batch: Batch, labels: torch.Tensor | None, loss: Loss | None
) -> Callable[[], torch.Tensor]:
    """The mean loss of a few examples."""
    own = choice.criterion.objective
    if loss is not None and not callable(loss):
        raise ReductionError(f"loss is {loss!r}; give a function of what the model gives and labels")

    def value() -> torch.Tensor:
        if own is not None:
            return batch.seen_by(own, tree)
        output = batch.run(tree)
        try:
            found: Any = (loss or _cross_entropy)(output, labels)  # type: ignore[arg-type]
        except Exception as error:  # whatever a user's loss raises
            if isinstance(error, ReductionError):
                raise
            given = "" if labels is None else f" on labels {tuple(labels.shape)} from {labels.min()} to {labels.max()}"
            raise ReductionError(f"the loss does not run{given}: {type(error).__name__}: {error}") from error
        if not isinstance(found, torch.Tensor) or found.dim() or (torch.is_grad_enabled() and not found.requires_grad):
            what = f"a tensor {tuple(found.shape)}" if isinstance(found, torch.Tensor) else f"a {type(found).__name__}"
            raise ReductionError(
                f"loss gave {what}, not the mean over the examples as a scalar tensor that depends on what the model gives"
            )
        return found

    return value


def _cross_entropy(output: Any, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(tensor_of(output, ("logits",)), labels)


def _changes(
    taps: Taps, objective: Callable[[], torch.Tensor], count: int, like: torch.Tensor, signs: Sequence[Gates], name: str
) -> dict[str, Seen]:
    """Derivatives of the loss of each example by a factor on each unit, and along random signs the second ones."""
    gates = taps.gates(count, like)
    keys, values = list(gates), list(gates.values())
    with ExitStack() as stack:
        if signs:  # the fused kernels of attention have no second derivative
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(taps.multiplying(gates))
        total = objective() * count
        slopes = torch.autograd.grad(total, values, create_graph=bool(signs), allow_unused=True, materialize_grads=True)
        bend = {key: torch.zeros_like(value, requires_grad=False) for key, value in gates.items()}
        for sign in signs:
            along = torch.stack([(s * sign[key].to(s)).sum() for key, s in zip(keys, slopes, strict=True)]).sum()
            try:
                check_twice_differentiable(along)
                products = torch.autograd.grad(along, values, retain_graph=True, materialize_grads=True)
            except RuntimeError as error:
                raise ReductionError(
                    f"criterion {name}: an operation of the model has no second derivative ({str(error).splitlines()[0]})"
                ) from error
            for key, product in zip(keys, products, strict=True):
                bend[key] += product.detach() * sign[key].to(product) / len(signs)
    change = dict(zip(keys, (slope.detach() for slope in slopes), strict=True))
    return {
        owner: Seen(
            None,
            {site: value for (whose, site), value in change.items() if whose == owner},
            {site: value for (whose, site), value in bend.items() if whose == owner},
        )
        for owner in {owner: None for owner, _ in keys}
    }


def _signs(taps: Taps, count: int, seed: int) -> list[Gates]:
    """Random signs, (1, hidden units) for each key: the same for all examples, so that batches do not matter."""
    generator = torch.Generator().manual_seed(derived_seed(seed, "signs"))
    return [
        {
            (owner, site): torch.randint(0, 2, (1, taps.hidden[owner]), generator=generator, device="cpu") * 2.0 - 1
            for owner, site in taps.places()
        }
        for _ in range(count)
    ]
