"""How dense the activations of MLPs are: a loss that makes them sparse, and how many of them are not zero.

With a an activation, what a contracting layer is given of one hidden unit at one position, its density is counted as
a^2 / (a^2 + eps), which is 0 for 0 and goes to 1.

Source: DEFT (Runwal, Pedapati and Chen, "From PEFT to DEFT: Parameter Efficient Finetuning for Reducing Activation Density in
Transformers", arXiv 2402.01911), written from its formula.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from mlpreduce.calibration import Taps
from mlpreduce.errors import ReductionError, check_number
from mlpreduce.graph import Inputs, find_mlps, refuse_wrapped
from mlpreduce.train.curvature import CHUNK, undisturbed
from mlpreduce.train.settings import DENSITY_THRESHOLDS
from mlpreduce.train.similarity import mlps_of

__all__ = ["DensityLoss", "layer_density"]


class DensityLoss:
    """The mean density of the activations of all MLPs, to be added to a training loss.

    It is the mean over MLPs, a tied one once for each use, of the mean over images, positions and hidden units, in float32 or
    wider whatever the type of the activations.

    Args:
        model: the model that is trained; it is not changed.
        eps: the square of the activation that counts half; 1e-7 in the source.
        example_inputs: what the model is called with, as for `find_mlps`.

    Raises:
        ReductionError: the model has no MLP, is wrapped, or eps is not above 0.

    Example:
        >>> from mlpreduce.testing import tiny_vit
        >>> model = tiny_vit()
        >>> density = DensityLoss(model)
        >>> with density.watching() as found:
        ...     logits = model(torch.randn(2, 3, 16, 16))
        >>> loss = logits.square().mean() + 0.1 * found()
        >>> loss.backward()
        >>> 0 < found().item() < 1
        True
    """

    def __init__(self, model: nn.Module, *, eps: float = 1e-7, example_inputs: Inputs | None = None) -> None:
        call = f"DensityLoss({type(model).__name__}, eps={eps!r})"
        refuse_wrapped(model, call)
        check_number(f"{call}: eps", eps, above=True)
        mlps = find_mlps(model, example_inputs)
        if not mlps:
            raise ReductionError(f"{call}: found no MLP")
        self._eps, self._taps = eps, Taps(model, mlps, ("fc2",))

    @contextmanager
    def watching(self) -> Iterator[Callable[[], torch.Tensor]]:
        """Within, the model is to be run; what is given then tells the density of that, a scalar, then and later."""
        with self._taps.recording(1) as kept:
            yield lambda: self._mean([call for calls in kept.values() for call in calls])

    def _mean(self, calls: Sequence[torch.Tensor]) -> torch.Tensor:
        if not calls:
            raise ReductionError("DensityLoss: no MLP of the model was run while it was watched")
        means = []
        for hidden in calls:
            squares = hidden.to(torch.promote_types(hidden.dtype, torch.float32)).square()
            means.append((squares / (squares + self._eps)).mean())
        return torch.stack(means).mean()


def layer_density(
    model: nn.Module, images: torch.Tensor, thresholds: Sequence[float] = DENSITY_THRESHOLDS
) -> dict[str, list[float]]:
    """The share of activations whose magnitude is above each threshold, over images, positions and hidden units.

    Args:
        model: maps images to logits.
        images: (batch, channels, height, width), on the model's device.
        thresholds: of |a|; 0 counts what is not zero.

    Returns:
        A number in 0..1 for each threshold, by the name of an MLP in `find_mlps`; a tied MLP stands there once, under the name
        of its first use, with all uses together.

    Raises:
        ReductionError: no image, or no MLP.
    """
    if not len(images):
        raise ReductionError(f"layer_density: images {tuple(images.shape)}; give at least one")
    with undisturbed(model, images.device), torch.no_grad():
        mlps = mlps_of("layer_density", model, images)
        above = {mlp.owner: [0] * len(thresholds) for mlp in mlps}
        count = dict.fromkeys(above, 0)
        taps = Taps(model, mlps, ("fc2",))
        for some in images.split(CHUNK):
            with taps.recording(1) as kept:
                model(some)
            for owner, calls in kept.items():
                count[owner] += sum(call.numel() for call in calls)
                for index, threshold in enumerate(thresholds):
                    above[owner][index] += sum(int((call.abs() > threshold).sum()) for call in calls)
    return {owner: [found / max(count[owner], 1) for found in above[owner]] for owner in above}
