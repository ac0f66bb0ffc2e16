"""Chapter 08: a cascade. The student answers where it is sure of its answer, and the teacher answers the rest.

Shapes: N texts, C classes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy import stats

from kd_helpers.losses import require_same_shape


class Answers(NamedTuple):
    """What a cascade predicts for N texts: `classes` int64 `[N]`, and `asked` bool `[N]`: the teacher did."""

    classes: torch.Tensor
    asked: torch.Tensor


def confidence(logits: torch.Tensor) -> torch.Tensor:
    """The probability `[N]` that a model with logits `[N, C]` gives to the class that it predicts."""
    return F.softmax(logits.float(), dim=-1).max(dim=-1).values


def cascade(student_logits: torch.Tensor, teacher_logits: torch.Tensor, threshold: float) -> Answers:
    """The student's class where its confidence reaches the threshold, else the teacher's.

    Args:
        student_logits: `[N, C]`.
        teacher_logits: `[N, C]`, for the same texts in the same order. Only those of the texts where `asked` is true
            are used; the teacher need not read the others.
        threshold: from 0 (the student answers all) to infinity (the teacher does).

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(student_logits, teacher_logits)
    asked = ~(confidence(student_logits) >= threshold)  # also where it is no number
    return Answers(torch.where(asked, teacher_logits.argmax(dim=-1), student_logits.argmax(dim=-1)), asked)


def choose_threshold(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, *, target: float, certainty: float = 0.99
) -> float:
    """The lowest threshold at which a cascade agrees with its teacher on a share `target` of the texts.

    A cascade disagrees with the teacher only where the student answers and says something else, so a lower threshold
    never disagrees less. It is therefore lowered, from infinity on, while the upper bound on the share of
    disagreements (Clopper and Pearson's, for the given certainty) is at most 1 − target; no correction is needed for
    having tried many (Bates et al. 2021, arXiv 2101.02703).

    Args:
        student_logits: `[N, C]`, of texts that nothing was trained on. They need no labels.
        teacher_logits: `[N, C]`, for the same texts in the same order.
        target: share of texts on which the two must agree, in (0, 1).
        certainty: of the bound, in (0, 1).

    Returns:
        The threshold; infinity where there are too few texts to be certain of any.

    Raises:
        ValueError: target or certainty lies outside its range, or the shapes differ.
    """
    require_same_shape(student_logits, teacher_logits)
    for name, value in (("target", target), ("certainty", certainty)):
        if not 0 < value < 1:
            raise ValueError(f"{name} is {value}; give a share between 0 and 1, such as 0.97.")
    sure, order = confidence(student_logits).sort(descending=True)
    differs = (student_logits.argmax(dim=-1) != teacher_logits.argmax(dim=-1))[order].cumsum(dim=0)
    # The student answers the first i texts; of all of them it gets differs[i − 1] wrong, by the teacher.
    bound = stats.beta.ppf(certainty, differs.numpy() + 1, len(differs) - differs.numpy())
    allowed = torch.tensor(bound <= 1 - target)
    # Texts of the same confidence are answered together, so the last of them decides.
    last = torch.cat([sure[1:] != sure[:-1], torch.tensor([True])])
    fits = sure[allowed & last]
    return float(fits[-1]) if len(fits) else math.inf
