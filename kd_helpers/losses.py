"""Chapter 03: the distillation loss of a classifier.

    total = alpha · T² · KL(softmax(z_T / T) ‖ softmax(z_S / T)) + (1 − alpha) · CE(z_S, y)

z_S and z_T are the logits of student and teacher, y the labels, T the temperature, and **alpha weights
the soft loss**. From Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015,
arXiv 1503.02531), section 2. Shapes: N examples, C classes. Logits for every token of a text, `[B, L, V]`, need a mask
and another mean, so they are refused here; `methods.hidden_losses` has the losses for them.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F

from kd_helpers.config import require_alpha, require_temperature

IGNORE_INDEX = -100  # the label of a text that has none (the convention of PyTorch's cross-entropy)


class DistillationLoss(NamedTuple):
    """The loss and its two parts, scalars in float32. Only `total` is weighted by alpha."""

    total: torch.Tensor
    soft: torch.Tensor
    hard: torch.Tensor


def soft_targets(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Probabilities `softmax(z / T)`, shape `[..., C]` as the logits (1503.02531, equation 1).

    T = 1 gives the model's own probabilities; a higher T moves them towards the uniform distribution.

    Raises:
        ValueError: T is not a finite number above 0.
    """
    require_temperature(temperature)
    return F.softmax(logits.float() / temperature, dim=-1)


def soft_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """`T² · KL(p_T ‖ q_S)`, mean over the N examples, in nats; logits `[N, C]`, result a scalar.

    The factor T² keeps the size of the gradient while T changes: it shrinks like 1/T² without it
    (1503.02531, section 2). No gradient reaches `teacher_logits`.

    Raises:
        ValueError: the logits are not `[N, C]`, the shapes differ, or T is not a finite number above 0.
    """
    require_temperature(temperature)
    _require_rows_of_classes(student_logits)
    _require_same_shape(student_logits, teacher_logits)
    for whose, logits in (("student", student_logits), ("teacher", teacher_logits)):
        if are_probabilities(logits):
            warnings.warn(
                f"the {whose}'s logits look like probabilities (every row sums to 1); the loss takes the outputs "
                "before the softmax.",
                stacklevel=2,
            )
    log_p = F.log_softmax(teacher_logits.detach().float() / temperature, dim=-1)
    log_q = F.log_softmax(student_logits.float() / temperature, dim=-1)
    # batchmean, not mean: mean would divide by N · C and so weaken the soft loss C times.
    return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def hard_loss(student_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with the labels, mean over the examples that have one; logits `[N, C]`, labels `[N]`.

    Label −100 means "no label". A batch without any label gives exactly 0, with a gradient of 0.

    Raises:
        ValueError: the logits are not `[N, C]`, a label is neither −100 nor in 0 … C − 1, or there is not one whole
            number for each row.
    """
    _require_rows_of_classes(student_logits)
    if labels.shape != student_logits.shape[:-1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and type {labels.dtype}, the logits shape "
            f"{tuple(student_logits.shape)}; give a whole number for each row."
        )
    _require_labels_in_range(labels, classes=student_logits.shape[-1])
    labelled = (labels != IGNORE_INDEX).sum().clamp(min=1)
    summed = F.cross_entropy(student_logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return summed / labelled


def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    temperature: float,
    alpha: float,
) -> DistillationLoss:
    """`alpha · soft + (1 − alpha) · hard`, computed in float32 whatever the dtype of the logits.

    Args:
        student_logits: `[N, C]`.
        teacher_logits: `[N, C]`, or None when alpha is 0; the soft loss is then reported as 0.
        labels: `[N]`, −100 where a text has no label.
        temperature: T > 0.
        alpha: weight of the soft loss in [0, 1].

    Raises:
        ValueError: a value or shape does not fit; one sentence says which.
    """
    require_alpha(alpha)
    hard = hard_loss(student_logits, labels)
    if teacher_logits is None:
        if alpha > 0:
            raise ValueError(f"alpha is {alpha} but there are no teacher logits; give them, or set alpha=0.")
        soft = torch.zeros_like(hard)
    else:
        soft = soft_loss(student_logits, teacher_logits, temperature)
    # A part of weight 0 is left out rather than multiplied by 0: 0 · inf would poison the total.
    if alpha == 0:
        return DistillationLoss(hard, soft.detach(), hard)
    if alpha == 1:
        return DistillationLoss(soft, soft, hard.detach())
    return DistillationLoss(alpha * soft + (1 - alpha) * hard, soft, hard)


def are_probabilities(logits: torch.Tensor) -> bool:
    """Whether every one of N ≥ 2 rows `[N, C]` is a distribution, which real logits are not by accident.

    It is checked on a CPU only: on a GPU every step would have to wait for the result.
    """
    if logits.device.type != "cpu" or logits.ndim != 2 or len(logits) < 2:
        return False
    values = logits.detach().float()
    return bool((values >= 0).all()) and bool(((values.sum(dim=-1) - 1).abs() < 0.01).all())


def _require_rows_of_classes(logits: torch.Tensor) -> None:
    """With a third dimension the soft loss would be L times too large, and the hard loss wrong where L = C."""
    if logits.ndim != 2:
        raise ValueError(
            f"the logits have shape {tuple(logits.shape)}; this loss takes one row of class logits for each example, "
            "[N, C]. For the logits of tokens, [B, L, V], use the token losses vocabulary_soft_loss and "
            "masked_language_loss of kd_helpers.methods.hidden_losses, which take a mask."
        )


def _require_same_shape(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> None:
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student logits have shape {tuple(student_logits.shape)} but teacher logits "
            f"{tuple(teacher_logits.shape)}; both need the same examples and the same classes."
        )


def _require_labels_in_range(labels: torch.Tensor, *, classes: int) -> None:
    # On a GPU this check would make every step wait for the device; cross_entropy asserts there itself.
    if labels.device.type != "cpu" or labels.numel() == 0:
        return
    allowed = (labels == IGNORE_INDEX) | ((labels >= 0) & (labels < classes))
    if not bool(allowed.all()):
        wrong = int(labels[~allowed][0])
        raise ValueError(f"label {wrong} is out of range; labels run from 0 to {classes - 1}, or −100 for none.")
