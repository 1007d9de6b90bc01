"""How much what a model gives hangs on each position of each example, at what an MLP gives there.

A fit that cannot be exact at all positions should be so where it counts: after the last block of a ViT that classifies by its
class token, no other token counts at all. The measure is the squared norm of the gradient of a random combination of what
the model gives (each example's divided by its norm, as a cosine looks at it) by what the MLP gives at the position, as a share
of the mean over all positions. So that none is forgotten, each weight is halfway between that and 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from mlpreduce.calibration import Batch, all_reduce
from mlpreduce.calibration.sums import live_rows
from mlpreduce.graph import module_at

__all__ = ["Place", "position_weights"]

Place = tuple[str, int, int]  # path of fc2, which call of it, and the dimension of features
_SEED = 0


def position_weights(
    tree: nn.Module,
    places: Sequence[Place],
    batches: Sequence[Batch],
    output: Callable[[Any, Batch], torch.Tensor],
) -> list[list[torch.Tensor]] | None:
    """Weights of the positions of each batch at each place, (examples, positions), in float64; 1 on average without padding.

    Args:
        tree: the whole model.
        places: where MLPs give something.
        batches: the examples.
        output: what a model gives for each example, (examples, values).

    Returns:
        By place and batch; None where the model has no derivative.
    """
    generator = torch.Generator().manual_seed(_SEED)
    found: list[list[torch.Tensor]] = [[] for _ in places]
    for batch in batches:
        with torch.enable_grad(), _probing(tree, places) as probes:
            given = output(batch.run(tree), batch)
            given = given / given.detach().norm(dim=1, keepdim=True).clamp(min=torch.finfo(given.dtype).tiny)
            along = torch.randn(given.shape, generator=generator, dtype=given.dtype, device="cpu").to(given.device)
            if not given.requires_grad:
                return None
            try:
                slopes = torch.autograd.grad((given * along).sum(), probes, materialize_grads=True)
            except (RuntimeError, NotImplementedError):  # an operation without a derivative: all positions count alike
                return None
        for some, slope, (_, _, dim) in zip(found, slopes, places, strict=True):
            rows = slope.double().movedim(dim, -1)
            some.append(rows.reshape(len(batch), -1, rows.shape[-1]).square().sum(-1))
    masks = [batch.mask for batch in batches]
    live = [[live_rows(v[..., None], mask) for v, mask in zip(some, masks, strict=True)] for some in found]
    sums = [[float(sum(v.sum() for v in some)), float(sum(v.numel() for v in some))] for some in live]
    sums = all_reduce(torch.tensor(sums, dtype=torch.float64)).tolist()
    return [
        [0.5 + 0.5 * value * count / total if total > 0 else torch.ones_like(value) for value in some]
        for some, (total, count) in zip(found, sums, strict=True)
    ]


@contextmanager
def _probing(tree: nn.Module, places: Sequence[Place]) -> Iterator[list[torch.Tensor]]:
    """Within, zeros that want gradients are added at the places, in their order."""
    probes: dict[int, torch.Tensor] = {}
    calls: dict[str, int] = dict.fromkeys((path for path, *_ in places), 0)
    numbers = {(path, call): number for number, (path, call, _) in enumerate(places)}
    found: list[torch.Tensor] = []
    with ExitStack() as stack:
        for path in calls:
            module = module_at(tree, path)
            assert module is not None

            def after(module: nn.Module, args: Any, given: torch.Tensor, path: str = path) -> torch.Tensor | None:
                number = numbers.get((path, calls[path]))
                calls[path] += 1
                if number is None:
                    return None
                probes[number] = torch.zeros_like(given, requires_grad=True)
                if len(probes) == len(places):
                    found[:] = [probes[n] for n in range(len(places))]
                return given + probes[number]

            stack.callback(module.register_forward_hook(after).remove)
        yield found
