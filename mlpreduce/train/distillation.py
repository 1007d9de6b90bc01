"""Distillation: a reduced model learns from the unreduced one too, or from it alone, whose weights it started from.

With z_s and z_t the logits of student and teacher, y the targets, s the softmax, a `distill_alpha` and t `distill_tau`:

    soft: (1 - a) task(z_s, y) + a t^2 KL(s(z_t / t) || s(z_s / t))
    hard: (1 - a) task(z_s, y) + a CE(z_s, argmax z_t)

With f the features, their class token c and patch tokens p, the mean of squares over all elements, and no labels:

    features: distill_cls mean (c_s - c_t)^2 + distill_patches mean (p_s - p_t)^2

Source: G. Hinton, O. Vinyals and J. Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, whose factor t^2
keeps the size of the gradients; H. Touvron et al., "Training data-efficient image transformers & distillation through
attention" (DeiT), arXiv 2012.12877, equations 2 and 3. DeiT learns the teacher's part with a token and a head of its own;
here both parts act on the one head, so that the model keeps its structure. Features: "Diversity-Guided MLP Reduction for
Efficient Large Vision Transformers" (DGMR), arXiv 2506.08591.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mlpreduce.errors import ReductionError
from mlpreduce.graph import example_inputs, structural_copy
from mlpreduce.train.settings import Run, TrainSettings

__all__ = ["FeatureDistill", "Features", "as_teacher", "blend", "freeze_unreached", "teacher_part"]


def as_teacher(model: nn.Module, run: Run) -> nn.Module:
    """The model as a teacher, changed in place: in evaluation mode, without gradients, in the student's memory format.

    Raises:
        ReductionError: its head was not trained, as timm has pretrained weights for another number of classes.
    """
    classes = getattr(model, "num_classes", None)
    known = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes")
    if run.model.weights == "pretrained" and classes != known:
        raise ReductionError(
            f"train.distillation={run.train.distillation!r}: timm's pretrained weights of {run.model.name} have {known} "
            f"classes, the model has {classes}, so the teacher's head would be random; train the unreduced model first, and "
            f"give its run's folder as model.weights"
        )
    if run.train.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.eval().requires_grad_(False)


def blend(task: torch.Tensor, student: torch.Tensor, teacher: torch.Tensor, train: TrainSettings) -> torch.Tensor:
    """The loss that is minimised: (1 - alpha) of the task's and alpha of the teacher's part.

    Args:
        task: the loss of the task, a scalar.
        student: logits (batch, classes).
        teacher: logits (batch, classes) of the same images, without gradient.
        train: gives `distillation`, `distill_alpha` and `distill_tau`.

    Returns:
        A scalar in nats, the mean over the batch.
    """
    alpha = train.distill_alpha
    tau = train.distill_tau if train.distillation == "soft" else None
    return (1 - alpha) * task + alpha * teacher_part(student, teacher, tau)


def teacher_part(student: torch.Tensor, teacher: torch.Tensor, tau: float | None) -> torch.Tensor:
    """What the teacher adds, the mean over the batch, in float32 or wider.

    Args:
        student: logits (batch, classes).
        teacher: logits (batch, classes) of the same images.
        tau: temperature of soft distillation; None for hard distillation.

    Returns:
        A scalar in nats.

    Example:
        >>> logits = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
        >>> teacher_part(logits, logits, 2.0).item()
        0.0

    Source:
        arXiv 2012.12877, the second terms of equations 2 and 3.
    """
    wide = torch.promote_types(student.dtype, torch.float32)  # mixed precision has too few digits for a divergence
    student, teacher = student.to(wide), teacher.to(wide)
    if tau is None:
        return functional.cross_entropy(student, teacher.argmax(-1))
    ours, theirs = ((logits / tau).log_softmax(-1) for logits in (student, teacher))
    return tau**2 * functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)


@dataclass(frozen=True)
class FeatureDistill:
    """Loss of a student whose features are to be those of a teacher. No labels are needed.

    With c the class token and p the patch tokens of student (s) and teacher (t), and means over all elements:

        loss = cls * mean (c_s - c_t)^2 + patches * mean (p_s - p_t)^2

    The first prefix token is the class token, and other prefix tokens (registers) count nowhere. Without prefix tokens, c is
    the mean over all tokens, and all are patch tokens. A part of weight 0 is not looked at.

    Attributes:
        cls: weight of the class token's part.
        patches: weight of the patch tokens' part.

    Raises:
        ReductionError: a weight is negative or not finite, or both are 0.

    Example:
        >>> teacher = torch.zeros(2, 5, 8)  # images, 1 class token and 4 patch tokens, features
        >>> student = teacher.clone()
        >>> student[:, 0] = 3.0
        >>> FeatureDistill(cls=1.0, patches=1.0)(student, teacher, prefix_tokens=1).item()
        9.0

    Source:
        DGMR, arXiv 2506.08591: both weights are 1.
    """

    cls: float = 1.0
    patches: float = 1.0

    def __post_init__(self) -> None:
        weights = (self.cls, self.patches)
        numbers = all(isinstance(weight, (int, float)) and not isinstance(weight, bool) for weight in weights)
        if not numbers or not all(0 <= weight < math.inf for weight in weights) or not any(weights):
            raise ReductionError(
                f"FeatureDistill(cls={self.cls!r}, patches={self.patches!r}): they are weights of two parts of a loss; use "
                f"finite numbers from 0, and not 0 for both"
            )

    def __call__(self, student: torch.Tensor, teacher: torch.Tensor, prefix_tokens: int = 0) -> torch.Tensor:
        """The loss, in float32 or wider.

        Args:
            student: features (batch, tokens, channels), prefix tokens first. `Features(model)` gives them so.
            teacher: those of the same images, without gradient.
            prefix_tokens: tokens that are no patch: the class token and registers.

        Returns:
            A scalar, in squared units of a feature.

        Raises:
            ReductionError: the features are of other shapes, or have no patch token.
        """
        call = f"{self}(student {tuple(student.shape)}, teacher {tuple(teacher.shape)}, prefix_tokens={prefix_tokens})"
        if student.dim() != 3 or student.shape != teacher.shape:
            raise ReductionError(
                f"{call}: features are (batch, tokens, channels), alike for both; mlpreduce.train.distillation.Features(model) "
                f"makes them of what forward_features gives"
            )
        if isinstance(prefix_tokens, bool) or not isinstance(prefix_tokens, int) or prefix_tokens < 0:
            raise ReductionError(
                f"{call}: prefix_tokens is a whole number from 0; Features(model).prefix_tokens has it"
            )
        if self.patches and student.shape[1] <= prefix_tokens:
            raise ReductionError(f"{call}: there is no patch token; use patches=0 (train.distill_patches=0)")
        wide = torch.promote_types(student.dtype, torch.float32)  # squares of small differences vanish in less
        student, teacher = student.to(wide), teacher.to(wide)
        parts = []
        if self.cls:
            ours, theirs = (tokens[:, 0] if prefix_tokens else tokens.mean(1) for tokens in (student, teacher))
            parts.append(self.cls * functional.mse_loss(ours, theirs))
        if self.patches:
            parts.append(self.patches * functional.mse_loss(student[:, prefix_tokens:], teacher[:, prefix_tokens:]))
        return torch.stack(parts).sum()


class Features(nn.Module):
    """A model that gives its features in place of logits: what timm's `forward_features` gives, (batch, tokens, channels).

    Every position of a feature map is a token. Of a model with registers and no class token the registers are left out.
    The model is the only submodule, and stays as it is; DDP and torch.compile wrap this module in its place.

    Attributes:
        core: the model.
        prefix_tokens: how many of the tokens are no patch; the first one is then the class token.

    Args:
        core: a timm model.

    Raises:
        ReductionError: it has no `forward_features`.
    """

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        if not callable(getattr(core, "forward_features", None)):
            raise ReductionError(
                f'train.distillation="features": {type(core).__name__} has no forward_features, which timm\'s models give '
                f'their features by; use "soft" or "hard", which need logits only'
            )
        self.core = core
        has_class_token = getattr(core, "cls_token", None) is not None
        prefix = int(getattr(core, "num_prefix_tokens", has_class_token) or 0)
        self._left_out = 0 if has_class_token else prefix  # registers only
        self.prefix_tokens = prefix - self._left_out

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features (batch, tokens, channels) of images (batch, channels, height, width)."""
        found: Any = self.core.forward_features(images)  # type: ignore[operator]
        shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        if not isinstance(found, torch.Tensor) or found.dim() not in (3, 4):
            raise ReductionError(
                f'train.distillation="features": forward_features of {type(self.core).__name__} gives {shape}, and not tokens '
                f'(batch, tokens, channels) or a map of them; use "soft" or "hard"'
            )
        if found.dim() == 4:  # swin has the channels last, most others first
            return found.flatten(1, 2) if self._channels_last(found) else found.flatten(2).transpose(1, 2)
        return found[:, self._left_out :]

    def _channels_last(self, found: torch.Tensor) -> bool:
        channels = getattr(self.core, "num_features", None)
        if channels in found.shape[1::2] and found.shape[1] != found.shape[3]:
            return bool(found.shape[3] == channels)
        return str(getattr(self.core, "output_fmt", "")) == "NHWC"


def freeze_unreached(features: Features) -> list[str]:
    """Freeze the parameters that the features do not depend on, those of the head: they get no gradient.

    Without that, DDP would wait for their gradients. The optimizer leaves frozen ones alone, and decays none of them.

    Returns:
        Their names in the model.
    """
    tree = structural_copy(features.core, device="meta").eval()
    with torch.enable_grad():
        found = Features(tree)(example_inputs(tree, 2))
        named = [(name, parameter) for name, parameter in tree.named_parameters() if parameter.requires_grad]
        slopes = torch.autograd.grad(found.sum(), [parameter for _, parameter in named], allow_unused=True)
    unreached = [name for (name, _), slope in zip(named, slopes, strict=True) if slope is None]
    for name in unreached:
        features.core.get_parameter(name).requires_grad_(False)
    return unreached
