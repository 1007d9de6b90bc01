"""Gates of the hidden units, learned on calibration data while all weights stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mlpreduce.calibration.measure import Loss, Measured, objective_of, telling
from mlpreduce.calibration.quiet import quiet_copy, running
from mlpreduce.calibration.samples import Samples, all_reduce
from mlpreduce.calibration.taps import Taps
from mlpreduce.criteria import Choice, Ranking
from mlpreduce.errors import ReductionError, check_number, check_whole
from mlpreduce.graph import MLP

__all__ = ["measure_gates"]


def measure_gates(
    model: nn.Module, mlps: Sequence[MLP], choice: Choice, data: Any, loss: Loss | None = None
) -> Measured:
    """Scores by a criterion of learned gates: factors on what each unit puts out, 1 at first.

    Their gradient is that of the loss plus `coefficient` times their sign; steps are Adam's, one for each few examples.

    Args:
        model: the model; it is not changed.
        mlps: its MLPs, all uses of each.
        choice: the criterion, whose options are `coefficient`, `lr` and `epochs`.
        data: an iterable of (images, labels).
        loss: as of `measure_scores`.

    Raises:
        ReductionError: as `measure_scores`; an option is out of range.
    """
    options = choice.settings
    coefficient, lr, epochs = (options[key] for key in ("coefficient", "lr", "epochs"))
    check_number(f"criterion {choice}: coefficient", coefficient)
    check_number(f"criterion {choice}: lr", lr, above=True)
    check_whole(f"criterion {choice}: epochs", epochs)
    samples = Samples(data, model, labels=True)
    problem: Exception | None = None
    with running(samples.device, gradients=True), samples.shown(f"criterion {choice.criterion.name}", epochs):
        tree = quiet_copy(model)
        taps = Taps(tree, mlps, ("fc2",))
        gates = {key: gate[:1] for key, gate in taps.gates(1, samples.like).items()}
        gates = {key: nn.Parameter(gate.detach()) for key, gate in gates.items()}
        optimizer = torch.optim.Adam(gates.values(), lr=lr)
        for _ in range(epochs):
            batches = samples.chunks()
            while True:
                flat = torch.zeros(sum(gate.numel() for gate in gates.values()) + 2, dtype=torch.float64)
                try:
                    if problem is None and (batch := next(batches, None)) is not None:
                        inputs, labels = batch
                        with telling(inputs), taps.multiplying(gates):
                            total = objective_of(choice, tree, inputs, labels, loss)() * len(inputs)
                        slopes = torch.autograd.grad(
                            total, list(gates.values()), allow_unused=True, materialize_grads=True
                        )
                        flat = torch.cat(
                            [*(s.flatten().cpu().double() for s in slopes), flat.new_tensor([len(inputs), 0])]
                        )
                except Exception as error:  # whatever the data raises, or the model: the other processes are told
                    problem = error
                    flat[-1] = 1
                flat = all_reduce(flat)
                if flat[-1] or not flat[-2]:
                    break
                parts = (flat[:-2] / flat[-2]).split([gate.numel() for gate in gates.values()])
                for gate, part in zip(gates.values(), parts, strict=True):
                    gate.grad = part.to(gate).reshape(gate.shape) + coefficient * gate.detach().sign()
                optimizer.step()
        samples.finish({}, problem)
    scores = {}
    for (owner, _), gate in gates.items():
        answer = choice.values(gate.detach()[0])
        if isinstance(answer, Ranking):
            raise ReductionError(f"criterion {choice} gave a Ranking of gates; give a score of each")
        scores[owner] = answer.cpu().double()
        if tuple(scores[owner].shape) != (gate.shape[1],) or not scores[owner].isfinite().all():
            raise ReductionError(
                f"criterion {choice}: the scores of {owner} are {tuple(scores[owner].shape)} for {gate.shape[1]} units, or not "
                f"all finite; if gates are not, a lower lr would help"
            )
    return Measured(scores, samples.count, samples.fingerprint)
