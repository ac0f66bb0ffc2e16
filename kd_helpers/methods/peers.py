"""Chapter 15: models that learn together (online distillation), and a model that is its own teacher.

Shapes: N examples, C classes. Losses are scalars, computed in float32. The models of one loss are trained in one loop,
`loop.fit([one, other], …)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from kd_helpers.losses import distillation_loss, hard_loss, soft_loss


class MutualLoss(NamedTuple):
    """The loss of models that learn together, and its two parts, each a sum over the models."""

    total: torch.Tensor
    hard: torch.Tensor
    peers: torch.Tensor


def mutual_loss(logits: Sequence[torch.Tensor], labels: torch.Tensor) -> MutualLoss:
    """Each model learns the labels and the probabilities of its peers.

    From Zhang et al., "Deep Mutual Learning" (2017, arXiv 1706.00384): model k has the loss
    `CE + mean over its peers of KL(p_peer ‖ p_k)`, at temperature 1. The peers' probabilities are targets, no gradient
    goes through them. The paper updates one model after the other; here all of them take a step at the same time, on
    the same batch.

    Args:
        logits: `[N, C]` of each model, two or more.
        labels: `[N]`, −100 where an example has none.

    Raises:
        ValueError: there are fewer than two models.
    """
    if len(logits) < 2:
        raise ValueError(f"mutual learning needs two models or more, and there are logits of {len(logits)}.")
    hard = torch.stack([hard_loss(own, labels) for own in logits]).sum()
    peers = torch.stack([_divergence_from_peers(logits, k) for k in range(len(logits))]).sum()
    return MutualLoss(hard + peers, hard, peers)


def _divergence_from_peers(logits: Sequence[torch.Tensor], k: int) -> torch.Tensor:
    """Mean over the peers of model k of KL(p_peer ‖ p_k)."""
    peers = [other for j, other in enumerate(logits) if j != k]
    return torch.stack([soft_loss(logits[k], peer, 1.0) for peer in peers]).mean()


class OwnTeacherLoss(NamedTuple):
    """The loss of a model whose deepest exit teaches the others, and its three parts, each a sum over exits."""

    total: torch.Tensor
    hard: torch.Tensor
    soft: torch.Tensor
    hint: torch.Tensor


def own_teacher_loss(
    logits: Sequence[torch.Tensor],
    features: Sequence[torch.Tensor],
    labels: torch.Tensor,
    *,
    temperature: float = 3.0,
    alpha: float = 0.1,
    hint_weight: float = 0.03,
) -> OwnTeacherLoss:
    """Exits after earlier layers learn from the labels, from the deepest exit's soft targets, and from its features.

    From Zhang et al., "Be Your Own Teacher" (2019, arXiv 1905.08094): the deepest exit learns the
    labels alone, each other one `(1 − α) · CE + α · T² · KL + λ · ‖difference of features‖²`. The defaults
    are put together from codes in circulation, and need to be chosen anew. The squared distance is a mean over all
    elements here.

    Args:
        logits: `[N, C]` of each exit, the deepest one last.
        features: `[N, E]` in front of each exit, of one width.
        labels: `[N]`, −100 where an example has none.
        temperature: T.
        alpha: weight of the soft loss.
        hint_weight: λ.

    Raises:
        ValueError: there are fewer than two exits, or the features are not one of the same shape for each of them.
    """
    if len(logits) < 2 or len(features) != len(logits):
        raise ValueError(f"there are {len(logits)} exits and {len(features)} features; give two or more of both.")
    if len({tuple(own.shape) for own in features}) > 1:
        raise ValueError(
            f"the features have shapes {[tuple(own.shape) for own in features]}; map those of all exits to one shape."
        )
    *shallow, deepest = logits
    exits = [distillation_loss(own, deepest, labels, temperature=temperature, alpha=alpha) for own in shallow]
    hint = torch.stack([F.mse_loss(own.float(), features[-1].detach().float()) for own in features[:-1]]).sum()
    own = hard_loss(deepest, labels)
    soft = torch.stack([loss.soft for loss in exits]).sum()
    hard = torch.stack([loss.hard for loss in exits]).sum() + own
    total = torch.stack([loss.total for loss in exits]).sum() + own + hint_weight * hint
    return OwnTeacherLoss(total, hard, soft, hint)
