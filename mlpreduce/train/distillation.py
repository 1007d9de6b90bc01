"""Distillation: a reduced model learns from the unreduced one too, whose weights it started from.

With z_s and z_t the logits of student and teacher, y the targets, s the softmax, a `distill_alpha` and t `distill_tau`:

    soft: (1 - a) task(z_s, y) + a t^2 KL(s(z_t / t) || s(z_s / t))
    hard: (1 - a) task(z_s, y) + a CE(z_s, argmax z_t)

Source: G. Hinton, O. Vinyals and J. Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, whose factor t^2
keeps the size of the gradients; H. Touvron et al., "Training data-efficient image transformers & distillation through
attention" (DeiT), arXiv 2012.12877, equations 2 and 3. DeiT learns the teacher's part with a token and a head of its own;
here both parts act on the one head, so that the model keeps its structure.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from mlpreduce.errors import ReductionError
from mlpreduce.train.settings import Run, TrainSettings

__all__ = ["as_teacher", "blend", "teacher_part"]


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
