"""What is measured of a model while it trains: gradients of its MLPs, how alike they are, and how sharp the minimum is.

Nothing here changes a model: weights, `.grad`, modes and random states are afterwards as they were, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mlpreduce.errors import ReductionError, did_you_mean
from mlpreduce.graph import MLP, module_at
from mlpreduce.train.curvature import (
    Vector,
    gradient,
    hessian_product,
    length,
    power_iteration,
    sam_gap,
    undisturbed,
)
from mlpreduce.train.density import layer_density
from mlpreduce.train.similarity import layer_similarity, linear_cka, mlps_of

__all__ = ["NAMES", "gradient_norms", "layer_density", "layer_similarity", "linear_cka", "measure", "sharpness"]

NAMES = ("gradients", "similarity", "sharpness", "density")


def measure(model: nn.Module, images: torch.Tensor, targets: torch.Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Carry out some probes, in eval mode and without mixed precision.

    Args:
        model: maps images to logits (batch, classes).
        images: (batch, channels, height, width), on the model's device.
        targets: labels (batch,).
        names: which of `NAMES`.

    Returns:
        By name, what `gradient_norms`, `layer_similarity`, `sharpness` and `layer_density` give; None for a number that is not
        finite, which JSON does not have.

    Raises:
        ReductionError: an unknown name, or a probe that cannot be carried out.
    """
    for name in names:
        if name not in NAMES:
            raise ReductionError(f"measure(names={list(names)!r}): no probe {name!r}{did_you_mean(name, NAMES)}")
    probes: dict[str, Callable[[], Any]] = {
        "gradients": lambda: gradient_norms(model, images, targets),
        "similarity": lambda: layer_similarity(model, images),
        "sharpness": lambda: sharpness(model, images, targets),
        "density": lambda: layer_density(model, images),
    }
    return {name: _finite(probes[name]()) for name in dict.fromkeys(names)}


def gradient_norms(model: nn.Module, images: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """L2 norm of the gradient of the mean cross entropy with respect to the parameters of each MLP.

    Args:
        model: maps images to logits (batch, classes).
        images: (batch, channels, height, width), on the model's device.
        targets: labels (batch,).

    Returns:
        Nats per unit of weight, by the MLP's name in `find_mlps`. A tied MLP stands there once, under the name of its first
        use, with the gradient of all uses. Of a layer that also computes something else only the MLP's part counts; frozen
        parameters count nothing.

    Raises:
        ReductionError: labels that do not fit, no trainable parameter, or no MLP.

    Source:
        Norms by layer as in Chen, Xie and He, "An Empirical Study of Training Self-Supervised Vision Transformers",
        arXiv 2104.02057, section 4.
    """
    _check("gradient_norms", images, targets)
    parameters = _trainable("gradient_norms", model)
    with undisturbed(model, images.device):
        mlps = mlps_of("gradient_norms", model, images)
        slopes = gradient(model, parameters, images, targets)
    known = {id(parameter): slope for parameter, slope in zip(parameters, slopes, strict=True)}
    parts: dict[str, dict[tuple[int, int], torch.Tensor]] = {}
    for mlp in mlps:
        mine = parts.setdefault(mlp.owner, {})
        for parameter, dim, positions in _tensors(model, mlp):
            if id(parameter) in known:
                slope = known[id(parameter)]
                mine[id(parameter), dim] = slope if dim < 0 else slope.index_select(dim, positions.to(slope.device))
    return {name: length(list(found.values())) for name, found in parts.items()}


def sharpness(
    model: nn.Module,
    images: torch.Tensor,
    targets: torch.Tensor,
    *,
    iterations: int = 20,
    rho: float = 0.05,
    tolerance: float = 1e-4,
) -> dict[str, float]:
    """How sharp the mean cross entropy L is at the weights w: over all trainable parameters, a tied one once.

    Args:
        model: maps images to logits (batch, classes).
        images: (batch, channels, height, width), on the model's device.
        targets: labels (batch,).
        iterations: most products with the Hessian in a power iteration. Where it ends at a negative eigenvalue, a second one
            looks for the largest.
        rho: length of SAM's step, in the unit of the weights.
        tolerance: relative change of the eigenvalue at which an iteration ends.

    Returns:
        `lambda_max`: largest eigenvalue of the Hessian, nats per squared unit of weight. `lambda_residual`: ||Hv - lambda v||
        of the unit vector v that was found; an eigenvalue lies within it. `sam_gap`: L(w + rho g / ||g||) - L(w) in nats, g
        the gradient and ||g|| its norm over all parameters.

    Raises:
        ReductionError: labels that do not fit, no trainable parameter, an option out of range, or an operation of the model
            that has no second derivative.

    Source:
        Power iteration on products with the Hessian: Yao et al., "PyHessian", arXiv 1912.07145. SAM: Foret et al.,
        arXiv 2010.01412, equation 2.
    """
    _check("sharpness", images, targets)
    if iterations < 1 or not 0 < rho < math.inf or not 0 <= tolerance < math.inf:
        raise ReductionError(
            f"sharpness(iterations={iterations}, rho={rho}, tolerance={tolerance}): use at least 1 iteration, a positive rho "
            f"and a tolerance of 0 or more"
        )
    parameters = _trainable("sharpness", model)
    generator = torch.Generator().manual_seed(0)  # on the CPU: the same start on every device
    start = [torch.randn(p.shape, generator=generator, dtype=p.dtype, device="cpu").to(p.device) for p in parameters]
    # the fused kernels of attention have no second derivative
    with undisturbed(model, images.device), sdpa_kernel(SDPBackend.MATH):
        hessian = partial(hessian_product, model, parameters, images, targets)
        value, residual = power_iteration(hessian, start, iterations, tolerance)
        if value < 0:  # the largest in magnitude; less it, all eigenvalues are positive, and the largest is the largest
            lowest = value

            def lifted(vector: Vector) -> Vector:
                return [h - lowest * v for h, v in zip(hessian(vector), vector, strict=True)]

            value, residual = power_iteration(lifted, start, iterations, tolerance)
            value += lowest
        slopes = gradient(model, parameters, images, targets)
        gap = sam_gap(model, parameters, images, targets, slopes, rho)
    return {"lambda_max": value, "lambda_residual": residual, "sam_gap": gap}


def _check(call: str, images: torch.Tensor, targets: torch.Tensor) -> None:
    if not len(images) or targets.shape != (len(images),):
        shapes = f"images {tuple(images.shape)}, targets {tuple(targets.shape)}"
        raise ReductionError(f"{call}: {shapes}; give at least one image, and one label for each")


def _trainable(call: str, model: nn.Module) -> Vector:
    found: Vector = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not found:
        raise ReductionError(f"{call}({type(model).__name__}): all parameters are frozen; set requires_grad of some")
    return found


def _tensors(model: nn.Module, mlp: MLP) -> Iterator[tuple[torch.Tensor, int, torch.Tensor]]:
    """The parameters of an MLP: whole (dim -1), or where its hidden units lie in one that is another's too."""
    for leaf in mlp.leaves:
        module = module_at(model, leaf.path)
        own = [] if module is None else list(module.parameters())
        if leaf.role != "param" and leaf.parameters == sum(parameter.numel() for parameter in own):
            yield from ((parameter, -1, torch.empty(0)) for parameter in own)
            continue
        for axis in mlp.axes:
            path, _, name = axis.tensor.rpartition(".")
            tensor = getattr(module, name, None) if path == leaf.path else None
            if isinstance(tensor, nn.Parameter):
                units = torch.arange(mlp.hidden_features)
                yield tensor, axis.dim, torch.cat([units + offset for offset in axis.offsets])


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return value if math.isfinite(value) else None
