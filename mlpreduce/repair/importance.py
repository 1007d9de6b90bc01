"""How much what a model gives hangs on each position of each example, at what an MLP gives there.

A fit that cannot be exact at all positions should be so where it counts: after the last block of a ViT that classifies by its
class token, no other token counts at all. The measure is the squared norm of the gradient of a random combination of what
the model gives (each example's divided by its norm, as a cosine looks at it) by what the MLP gives at the position, as a share
of the mean over all positions. So that none is forgotten, each weight is halfway between that and 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from mlpreduce.calibration import Batch, all_reduce, in_all
from mlpreduce.calibration.probing import probing
from mlpreduce.calibration.sums import halfway, live_rows
from mlpreduce.repair.streams import Place, stopping_at

__all__ = ["Call", "position_weights"]

Call = tuple[str, int, int]  # path of fc2, which call of it, and the dimension of features
_SEED = 0


def position_weights(
    tree: nn.Module,
    calls: Sequence[Call],
    batches: Sequence[Batch],
    output: Callable[[Any, Batch], torch.Tensor],
    places: Sequence[Place] = (),
) -> list[list[torch.Tensor]] | None:
    """Weights of the positions of each batch at each call, (examples, positions), in float64; 1 on average without padding.

    Args:
        tree: the whole model.
        calls: where MLPs give something.
        batches: the examples.
        output: what a model gives for each example, (examples, values).
        places: whose tensors are told to somebody in these runs, see `stopping_at`.

    Returns:
        By call and batch; None where the model has no derivative, in any process.
    """
    generator = torch.Generator().manual_seed(_SEED)
    found: list[list[torch.Tensor]] = [[] for _ in calls]
    sums = torch.zeros(len(calls) + 1, 2, dtype=torch.float64)  # of squares and positions; and who has no derivative
    with in_all(), stopping_at(tree, places, to_end=True) as run:
        for batch in batches:
            slopes = _slopes(tree, calls, batch, lambda some: output(run(some), some), generator)
            if slopes is None:
                sums[-1] += 1
                break
            for number, (slope, (_, _, dim)) in enumerate(zip(slopes, calls, strict=True)):
                rows = slope.double().movedim(dim, -1)
                value = rows.reshape(len(batch), -1, rows.shape[-1]).square().sum(-1)
                live = live_rows(value[..., None], batch.mask)
                sums[number] += torch.tensor([float(live.sum()), live.numel()], dtype=torch.float64)
                found[number].append(value)
    *totals, (missing, _) = all_reduce(sums).tolist()
    if missing:
        return None
    return [
        [halfway(value, value.new_tensor(total / max(count, 1))) for value in some]
        for some, (total, count) in zip(found, totals, strict=True)
    ]


def _slopes(
    tree: nn.Module,
    calls: Sequence[Call],
    batch: Batch,
    output: Callable[[Batch], torch.Tensor],
    generator: torch.Generator,
) -> list[torch.Tensor] | None:
    """Gradients of the combination at the outputs of MLPs, one for each call; None where the model has none."""
    with torch.enable_grad(), probing(tree, [path for path, *_ in calls]) as probes:
        try:
            given = output(batch)
            given = given / given.detach().norm(dim=1, keepdim=True).clamp(min=torch.finfo(given.dtype).tiny)
            along = torch.randn(given.shape, generator=generator, dtype=given.dtype, device="cpu").to(given.device)
            known = {(path, call): probe for path, call, probe in probes}
            wanted = [known[path, call] for path, call, _ in calls]
            return list(torch.autograd.grad((given * along).sum(), wanted, materialize_grads=True))
        except torch.OutOfMemoryError:
            raise
        except (
            RuntimeError,
            NotImplementedError,
        ):  # such as a forward without gradients, or one that goes through numpy
            return None
