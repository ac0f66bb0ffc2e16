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
    """What makes generated pictures resemble the teacher's own data (1904.01186, equations 2 to 5).

    - `sure`: cross-entropy of the teacher's logits with its own likeliest class;
    - `active`: minus the mean absolute value of its features;
    - `balanced`: minus the entropy, in nats, of its mean probabilities over the batch, so that all classes are made.

    Gradients go through the teacher to the generator. The teacher's weights are frozen. The authors' code takes the
    logarithm to base 10 in `balanced`, and weighs it with 5, which is 2.17 here.

    Args:
        teacher_logits: `[N, C]` of generated pictures.
        teacher_features: `[N, …]` of the same pictures, before the last layer.
        active_weight: the paper's α.
        balanced_weight: the paper's β.
    """
    logits = teacher_logits.float()
    sure = F.cross_entropy(logits, logits.argmax(dim=1))
    active = -teacher_features.float().abs().mean()
    mean = logits.softmax(dim=1).mean(dim=0)
    balanced = (mean * mean.clamp(min=1e-12).log()).sum()
    return GeneratorLoss(sure + active_weight * active + balanced_weight * balanced, sure, active, balanced)
