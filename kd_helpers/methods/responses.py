"""Chapter 15: other losses on a teacher's logits than Hinton's.

Shapes: N examples, C classes, K teachers. Every loss is a scalar, computed in float32 whatever the dtype of its inputs,
and sends no gradient to the teacher.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kd_helpers.config import require_temperature
from kd_helpers.losses import IGNORE_INDEX


def decoupled_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float = 4.0,
    label_weight: float = 1.0,
    others_weight: float = 8.0,
) -> torch.Tensor:
    """The soft loss in two parts: how sure the teacher is of the label, and how it weighs the other classes.

    From Zhao et al., "Decoupled Knowledge Distillation" (2022, arXiv 2203.08679), with T² as in the authors'
    code. The paper calls the parts TCKD (of the target class) and NCKD (of the other classes). The soft loss is TCKD
    plus NCKD times 1 − p, where p is what the teacher gives the label, so a sure teacher silences what it knows about
    the other classes. Here both have weights of their own (the paper's α and β, which its authors chose anew for each
    pair of models).

    Args:
        student_logits: `[N, C]`.
        teacher_logits: `[N, C]`.
        labels: `[N]`, of every example.
        temperature: T.
        label_weight: of the first part.
        others_weight: of the second part.

    Raises:
        ValueError: the shapes differ, an example has no label, or T is not a finite number above 0.
    """
    require_temperature(temperature)
    _require_same_shape(student_logits, teacher_logits)
    _require_labels(labels, student_logits.shape)
    is_label = F.one_hot(labels.long(), student_logits.shape[1]).bool()

    def parts(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logarithms of the probabilities: of label and rest `[N, 2]`, and among the others `[N, C − 1]`."""
        log_p = F.log_softmax(logits.float() / temperature, dim=1)
        others = log_p[~is_label].view(len(log_p), -1)
        rest = others.logsumexp(dim=1)
        return torch.stack([log_p[is_label], rest], dim=1), others - rest[:, None]

    student, teacher = parts(student_logits), parts(teacher_logits.detach())
    of_label, of_others = (
        F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        for log_q, log_p in zip(student, teacher, strict=True)
    )
    return temperature**2 * (label_weight * of_label + others_weight * of_others)


def standardised(logits: torch.Tensor) -> torch.Tensor:
    """Logits `[N, C]` with mean 0 and standard deviation 1 in each row.

    From Sun et al., "Logit Standardization in Knowledge Distillation" (2024, arXiv 2403.01427), as in the authors' code
    (the standard deviation divides by C − 1): the soft loss of standardised logits asks a student for the teacher's
    proportions, and leaves it free in how large its logits are.
    """
    logits = logits.float()
    return (logits - logits.mean(dim=1, keepdim=True)) / (logits.std(dim=1, keepdim=True) + 1e-7)


def correlation_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, *, temperature: float = 1.0
) -> torch.Tensor:
    """One minus the correlation with the teacher's probabilities, for each example and for each class.

    From Huang et al., "Knowledge Distillation from A Stronger Teacher" (DIST; 2022, arXiv 2205.10536), with T² as in
    the authors' code: the sum of the mean over examples (correlation over the classes) and the mean over classes
    (correlation over the batch's examples). It asks for the same order and proportions, not for the same probabilities.
    It is T² · 4 at most, and 0 where they are equal, unless a row or a column is constant, or nearly so: a class to
    which every example gives less than about 1e-8 counts as not correlated.

    Args:
        student_logits: `[N, C]`.
        teacher_logits: `[N, C]`.
        temperature: T.

    Raises:
        ValueError: the shapes differ, or T is not a finite number above 0.
    """
    require_temperature(temperature)
    _require_same_shape(student_logits, teacher_logits)
    if len(student_logits) < 2:
        raise ValueError("there is a batch of 1, and its classes are correlated over examples; leave it out.")
    student, teacher = (
        F.softmax(logits.float() / temperature, dim=1) for logits in (student_logits, teacher_logits.detach())
    )
    return temperature**2 * (_uncorrelated(student, teacher) + _uncorrelated(student.T, teacher.T))


def _uncorrelated(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """One minus Pearson's correlation of each row, mean over rows."""
    centred = (rows - rows.mean(dim=1, keepdim=True) for rows in (student, teacher))
    return 1 - F.cosine_similarity(*centred, dim=1).mean()


def several_teachers_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    temperature: float,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """The soft loss with several teachers, weighted for each example, mean over the batch.

    With equal weights the student gets the same gradient as from the mean of the teachers' soft targets, which is what
    Hinton et al. (2015, arXiv 1503.02531) use for an ensemble.

    Args:
        student_logits: `[N, C]`.
        teacher_logits: `[K, N, C]`.
        temperature: T.
        weights: `[K, N]`, see `confidence_weights`; equal ones when left out.

    Raises:
        ValueError: the shapes don't fit, or T is not a finite number above 0.
    """
    require_temperature(temperature)
    if teacher_logits.ndim != 3 or teacher_logits.shape[1:] != student_logits.shape:
        raise ValueError(
            f"the student's logits have shape {tuple(student_logits.shape)}, the teachers' "
            f"{tuple(teacher_logits.shape)}; give [N, C] and [K, N, C]."
        )
    if weights is None:
        weights = torch.full(teacher_logits.shape[:2], 1 / len(teacher_logits), device=teacher_logits.device)
    if weights.shape != teacher_logits.shape[:2]:
        raise ValueError(
            f"the weights have shape {tuple(weights.shape)}; give one for each teacher and example, "
            f"{tuple(teacher_logits.shape[:2])}."
        )
    log_q = F.log_softmax(student_logits.float() / temperature, dim=1)
    log_p = F.log_softmax(teacher_logits.detach().float() / temperature, dim=2)
    divergences = (log_p.exp() * (log_p - log_q)).sum(dim=2)  # [K, N]
    return temperature**2 * (weights.detach().float() * divergences).sum(dim=0).mean()


def confidence_weights(teacher_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How much each teacher counts for each example: more where it is surer of the label.

    From Zhang et al., "Confidence-Aware Multi-Teacher Knowledge Distillation" (2021, arXiv 2201.00007):
    `(1 − softmax over teachers of their cross-entropies) / (K − 1)`. The weights of an example sum to 1.

    Args:
        teacher_logits: `[K, N, C]` of at least two teachers.
        labels: `[N]`, of every example.

    Returns:
        `[K, N]`.

    Raises:
        ValueError: there are fewer than two teachers, or an example has no label.
    """
    teachers = len(teacher_logits)
    if teacher_logits.ndim != 3 or teachers < 2:
        raise ValueError(
            f"the teachers' logits have shape {tuple(teacher_logits.shape)}; give [K, N, C] of two teachers or more."
        )
    _require_labels(labels, teacher_logits.shape[1:])
    losses = torch.stack(
        [F.cross_entropy(logits.float(), labels.long(), reduction="none") for logits in teacher_logits.detach()]
    )
    return (1 - losses.softmax(dim=0)) / (teachers - 1)


def _require_labels(labels: torch.Tensor, shape: tuple[int, int]) -> None:
    """Refuse labels that are not one class for each of the examples, whose logits have this shape."""
    examples, classes = shape
    if labels.shape != (examples,) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and type {labels.dtype}; give a whole number for each of "
            f"{examples} examples."
        )
    if unlabelled := int((labels == IGNORE_INDEX).sum()):
        has = "has" if unlabelled == 1 else "have"
        raise ValueError(f"{unlabelled} of {len(labels)} examples {has} no label; this loss needs one for each.")
    if bool(((labels < 0) | (labels >= classes)).any()):
        raise ValueError(f"a label is out of range; labels run from 0 to {classes - 1}.")


def _require_same_shape(student: torch.Tensor, teacher: torch.Tensor) -> None:
    if student.shape != teacher.shape or student.ndim != 2 or student.shape[1] < 2 or len(student) == 0:
        raise ValueError(
            f"the student's logits have shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}; give "
            "[N, C] for both, with one example or more and two classes or more."
        )
