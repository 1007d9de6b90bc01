"""How much what a model gives hangs on each position of each example, at what an MLP gives there.

A fit that cannot be exact at all positions should be so where it counts: after the last block of a ViT that classifies by its
class token, no other token counts at all. The measure is the squared norm of the gradient of a random combination of what
the model gives (each example's divided by its norm, as a cosine looks at it) by what the MLP gives at the position, as a share
of the mean over all positions. So that none is forgotten, each weight is halfway between that and 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mlpreduce.calibration import all_reduce
from mlpreduce.calibration.sums import halfway, live_rows

__all__ = ["position_weights", "squared_slopes"]


def squared_slopes(
    given: torch.Tensor, places: Sequence[tuple[torch.Tensor, int]], generator: torch.Generator
) -> list[torch.Tensor] | None:
    """Squared norms of the gradient of a random combination of outputs, (examples, positions) for each place, in float64.

    Args:
        given: what a model gives for each example, (examples, values).
        places: zeros that were added to what MLPs give, and the dimension of features there.
        generator: draws the combination.

    Returns:
        None where there is no gradient.
    """
    with torch.enable_grad():
        given = given / given.detach().norm(dim=1, keepdim=True).clamp(min=torch.finfo(given.dtype).tiny)
        along = torch.randn(given.shape, generator=generator, dtype=given.dtype, device="cpu").to(given.device)
        try:
            slopes = torch.autograd.grad(
                (given * along).sum(), [probe for probe, _ in places], retain_graph=True, materialize_grads=True
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # such as a forward that switches gradients off
            return None
    rows = [slope.movedim(dim, -1) for slope, (_, dim) in zip(slopes, places, strict=True)]
    return [row.double().reshape(len(given), -1, row.shape[-1]).square().sum(-1) for row in rows]


def position_weights(
    squares: Sequence[Sequence[torch.Tensor]], masks: Sequence[torch.Tensor | None]
) -> list[list[torch.Tensor]]:
    """Weights of positions by their squared gradients; 1 on average over all processes, without padding.

    Args:
        squares: (examples, positions), by place and batch.
        masks: which positions of a batch are no padding.

    Returns:
        (examples, positions), by place and batch.
    """
    sums = torch.zeros(len(squares), 2, dtype=torch.float64, device="cpu")
    for number, some in enumerate(squares):
        for value, mask in zip(some, masks, strict=True):
            live = live_rows(value[..., None], mask)
            sums[number] += torch.tensor([float(live.sum()), live.numel()], dtype=torch.float64)
    return [
        [halfway(value, value.new_tensor(total / max(count, 1))) for value in some]
        for some, (total, count) in zip(squares, all_reduce(sums).tolist(), strict=True)
    ]
