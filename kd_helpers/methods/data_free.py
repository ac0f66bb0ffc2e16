"""Chapter 15: distillation without data. A generator makes pictures for which the teacher is sure of its answer.

From Chen et al., "Data-Free Learning of Student Networks" (DAFL; 2019, arXiv 1904.01186). Shapes: N pictures, C
classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F


class GeneratorLoss(NamedTuple):
    """The loss of a generator, and its three parts, scalars in float32."""

    total: torch.Tensor
    sure: torch.Tensor
    active: torch.Tensor
    balanced: torch.Tensor


def generator_loss(
    teacher_logits: torch.Tensor,
    teacher_features: torch.Tensor,
    *,
    active_weight: float = 0.1,
    balanced_weight: float = 2.17,
) -> GeneratorLoss:
    """What makes generated pictures resemble the teacher's own data (1904.01186).

    - `sure` (the paper's one-hot loss): cross-entropy of the teacher's logits with its own likeliest class;
    - `active` (activation loss): minus the mean absolute value of its features;
    - `balanced` (information entropy loss): minus the entropy, in nats, of its mean probabilities over the
      batch, so that all classes are made.

    Gradients go through the teacher to the generator, so freeze the teacher's weights first. The authors' code takes
    the logarithm to base 10 in `balanced`, and weighs it with 5, which is 2.17 here.

    Args:
        teacher_logits: `[N, C]` of generated pictures.
        teacher_features: `[N, …]` of the same pictures, before the last layer.
        active_weight: the paper's α.
        balanced_weight: the paper's β.

    Raises:
        ValueError: the logits are not `[N, C]`, or the features are of other pictures.
    """
    if teacher_logits.ndim != 2 or len(teacher_logits) == 0 or len(teacher_features) != len(teacher_logits):
        raise ValueError(
            f"the logits have shape {tuple(teacher_logits.shape)}, the features {tuple(teacher_features.shape)}; give "
            "[N, C] and the features of the same N pictures."
        )
    logits = teacher_logits.float()
    sure = F.cross_entropy(logits, logits.argmax(dim=1))
    active = -teacher_features.float().abs().mean()
    mean = logits.softmax(dim=1).mean(dim=0)
    balanced = (mean * mean.clamp(min=1e-12).log()).sum()
    return GeneratorLoss(sure + active_weight * active + balanced_weight * balanced, sure, active, balanced)
