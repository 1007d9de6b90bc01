"""How near what one model gives is to what another gives for the same examples, and whether a change took it further off."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mlpreduce.calibration.samples import together

__all__ = ["Nearness", "gathered", "is_further", "nearness"]

Nearness = tuple[float, float]  # mean cosine, and centred kernel alignment

_PARTS = 10  # that are left out in turn, to tell chance from change
_ERRORS = 2.0  # standard errors of a change that are chance
_ROUNDING = 1e-6


def gathered(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """What a model gave, (examples, values), of all processes, in float64 on the CPU."""
    own = (
        torch.cat([output.double() for output in outputs]).cpu() if outputs else torch.empty(0, 0, dtype=torch.float64)
    )
    return torch.cat([part for part in together(own) if part.numel()])


def nearness(wanted: torch.Tensor, given: torch.Tensor) -> Nearness:
    """The mean cosine of both, and how alike the examples are among themselves in either.

    Source of the alignment: linear centred kernel alignment, Kornblith et al., arXiv 1905.00414, from kernels of the examples.
    """
    return float(torch.cosine_similarity(wanted, given, dim=1).mean()), _alignment(wanted @ wanted.T, given @ given.T)


def is_further(wanted: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether the cosine falls by more than chance, or the alignment does and the cosine does not make up for it.

    Chance is two standard errors of the change, by a jackknife over tenths. A fall of the alignment is made up for where the
    sum of both is no less than before: of outputs that came from .90 to .97 by cosine, an alignment of .872 after .878 does not
    say that they are further off. What is not finite is further.
    """
    every = torch.arange(len(wanted))
    parts = [every[every % _PARTS != part] for part in range(min(_PARTS, len(wanted)))] if len(wanted) > 1 else [every]
    kernels = [features @ features.T for features in (wanted, before, after)]
    cosines = [torch.cosine_similarity(wanted, given, dim=1) for given in (before, after)]

    def changes(some: torch.Tensor) -> tuple[float, float]:
        mine = [kernel[some][:, some] for kernel in kernels]
        gain = cosines[1][some].mean() - cosines[0][some].mean()
        return float(gain), _alignment(mine[0], mine[2]) - _alignment(mine[0], mine[1])

    left_out = torch.tensor([changes(some) for some in parts], dtype=torch.float64)
    count = len(parts)
    error = (left_out.var(0, correction=0) * (count - 1)).sqrt()
    bounds = -_ROUNDING - _ERRORS * error
    cosine, alignment = (not change >= bound for change, bound in zip(changes(every), bounds.tolist(), strict=True))
    return cosine or (alignment and not sum(nearness(wanted, after)) >= sum(nearness(wanted, before)))


def _alignment(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of two kernels (examples, examples); 1 where the examples of one are all alike."""
    centred = [k - k.mean(0) - k.mean(1, keepdim=True) + k.mean() for k in (one, other)]
    norms = [float(k.norm()) for k in centred]
    return float((centred[0] * centred[1]).sum()) / (norms[0] * norms[1]) if all(norms) else 1.0
