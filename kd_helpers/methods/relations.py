"""Chapter 15: what a teacher can hand over beside its logits: hidden features, and relations between examples.

Gou et al., "Knowledge Distillation: A Survey" (2020, arXiv 2006.05525), sort methods by what is handed over: responses
(see `losses` and `methods.responses`), features, and relations. Each function here is one published loss.
Shapes: N examples, c and C channels of the student's and the teacher's maps of H × W places, e and E numbers in their
embeddings. Every loss is a scalar, computed in float32 whatever the dtype of its inputs, and sends no gradient to the
teacher, unless it says so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from kd_helpers.config import require_temperature
from kd_helpers.losses import IGNORE_INDEX
from kd_helpers.runtime import autocast


def hint_loss(student_map: torch.Tensor, teacher_map: torch.Tensor, regressor: nn.Module) -> torch.Tensor:
    """Mean squared error between the teacher's features and what a regressor makes of the student's.

    From Romero et al., "FitNets: Hints for Thin Deep Nets" (2014, arXiv 1412.6550). The paper takes half of
    the squared distance, and trains on hints first and on the task afterwards. Here it is a mean over all elements, and
    one term of the loss beside others.

    Args:
        student_map: `[N, c, H, W]`, or embeddings `[N, e]`.
        teacher_map: `[N, C, H, W]`, or embeddings `[N, E]`.
        regressor: maps the first shape to the second, and is trained along with the student; for maps a convolution.

    Raises:
        ValueError: the regressor makes another shape.
    """
    guessed = regressor(student_map)
    if guessed.shape != teacher_map.shape:
        raise ValueError(
            f"the regressor makes {tuple(guessed.shape)} of the student's features, the teacher's have "
            f"{tuple(teacher_map.shape)}; give a regressor to that shape."
        )
    return F.mse_loss(guessed.float(), teacher_map.detach().float())


def attention_map(features: torch.Tensor) -> torch.Tensor:
    """Where a layer is active: the mean square over its channels at each place, scaled to length 1.

    From Zagoruyko and Komodakis, "Paying More Attention to Attention" (2016, arXiv 1612.03928), with p = 2.

    Args:
        features: `[N, C, H, W]`.

    Returns:
        `[N, H · W]`.
    """
    if features.ndim != 4:
        raise ValueError(f"the features have shape {tuple(features.shape)}; give maps [N, C, H, W].")
    return F.normalize(features.float().square().mean(dim=1).flatten(1), dim=1)


def attention_transfer_loss(student_maps: Sequence[torch.Tensor], teacher_maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean squared difference of attention maps, summed over layers (1612.03928, as its authors' code).

    Student and teacher may have different numbers of channels. The paper writes the distance without the square; the
    code squares it and takes the mean over examples and places.

    Args:
        student_maps: `[N, c, H, W]` of each layer.
        teacher_maps: `[N, C, H, W]` of as many layers, of the same size.

    Raises:
        ValueError: the layers can't be paired.
    """
    if not student_maps or len(student_maps) != len(teacher_maps):
        raise ValueError(
            f"there are maps of {len(student_maps)} layers of the student and of {len(teacher_maps)} of the teacher; "
            "give as many of both, at least one."
        )
    losses = []
    for student_map, teacher_map in zip(student_maps, teacher_maps, strict=True):
        student, teacher = attention_map(student_map), attention_map(teacher_map.detach())
        if (len(student), *student_map.shape[2:]) != (len(teacher), *teacher_map.shape[2:]):
            raise ValueError(
                f"the student's map has shape {tuple(student_map.shape)}, the teacher's {tuple(teacher_map.shape)}; "
                "give maps of as many examples and the same size, or resize one of them first."
            )
        losses.append(F.mse_loss(student, teacher))
    return torch.stack(losses).sum()


def similarity_loss(student_features: torch.Tensor, teacher_features: torch.Tensor) -> torch.Tensor:
    """How differently student and teacher see the similarity of the batch's examples.

    From Tung and Mori, "Similarity-Preserving Knowledge Distillation" (2019, arXiv 1907.09682). The
    dot products of all pairs of examples make a matrix `[N, N]`; each row is scaled to length 1, and the squared
    differences of both models' matrices are summed and divided by N².

    Args:
        student_features: `[N, …]`, any shape.
        teacher_features: `[N, …]`, any shape.

    Raises:
        ValueError: there are not as many examples of both, or fewer than two.
    """
    _require_same_examples(student_features, teacher_features)

    def similarities(features: torch.Tensor) -> torch.Tensor:
        rows = features.float().flatten(1)
        with autocast(rows.device, torch.float32):  # a product of large features overflows in half precision
            return F.normalize(rows @ rows.T, dim=1)

    return F.mse_loss(similarities(student_features), similarities(teacher_features.detach()))


def distance_loss(student_embeddings: torch.Tensor, teacher_embeddings: torch.Tensor) -> torch.Tensor:
    """How differently student and teacher see the distances between the batch's examples.

    From Park et al., "Relational Knowledge Distillation" (2019, arXiv 1904.05068). The distances of
    all pairs are divided by their mean, so that only their proportions matter. Each pair's difference is taken by the
    Huber loss, and the loss is the mean over all N² pairs, as in the authors' code; the paper has the sum.

    Args:
        student_embeddings: `[N, e]`.
        teacher_embeddings: `[N, E]`.

    Raises:
        ValueError: the shapes are others, or there are fewer than two examples.
    """
    _require_embeddings(student_embeddings, teacher_embeddings)

    def distances(embeddings: torch.Tensor) -> torch.Tensor:
        rows = embeddings.float()
        others = ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        between = torch.zeros_like(others, dtype=rows.dtype)
        # The root has no slope at 0, so a row is not compared with itself, and copies count as a tiny distance apart.
        squares = (rows[:, None] - rows[None, :]).square().sum(dim=-1)
        between[others] = squares[others].clamp(min=1e-12).sqrt()
        return between / between[others].mean()

    return F.smooth_l1_loss(distances(student_embeddings), distances(teacher_embeddings.detach()))


def angle_loss(student_embeddings: torch.Tensor, teacher_embeddings: torch.Tensor) -> torch.Tensor:
    """How differently student and teacher see the angles that three of the batch's examples make.

    From Park et al. (2019, arXiv 1904.05068): for all triples (i, j, k) the cosine of the angle at
    j, compared by the Huber loss, mean over all N³ as in the authors' code. It takes memory for N³ numbers and for N²
    differences.

    Args:
        student_embeddings: `[N, e]`.
        teacher_embeddings: `[N, E]`.

    Raises:
        ValueError: the shapes are others, or there are fewer than two examples.
    """
    _require_embeddings(student_embeddings, teacher_embeddings)

    def cosines(embeddings: torch.Tensor) -> torch.Tensor:
        rows = embeddings.float()
        between = rows[None, :] - rows[:, None]  # [j, i, e]: from j to i
        same = (between == 0).all(dim=2, keepdim=True)
        # Two examples on one spot have no direction, and the gradient of one would be without bounds.
        directions = F.normalize(between.masked_fill(same, 0), dim=2)
        with autocast(rows.device, torch.float32):
            return directions @ directions.transpose(1, 2)  # [j, i, k]

    return F.smooth_l1_loss(cosines(student_embeddings), cosines(teacher_embeddings.detach()))


def contrastive_loss(
    student_embeddings: torch.Tensor,
    teacher_embeddings: torch.Tensor,
    *,
    temperature: float = 0.1,
    labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Find the teacher's embedding of an example among those of the batch by the student's.

    This is the idea of Tian et al., "Contrastive Representation Distillation" (2019, arXiv 1910.10699), in its in-batch
    form (InfoNCE): cross-entropy over the cosines of the student's embedding with all teacher embeddings of the batch.
    The paper's own loss decides "same example or not" one pair at a time (noise contrastive estimation), against 16,384
    embeddings from a memory bank.

    Args:
        student_embeddings: `[N, D]`, what a trained linear map makes of the student's embedding.
        teacher_embeddings: `[N, D]`, the same of the teacher's; its map is trained, too, so gradients do reach it.
        temperature: the cosines are divided by it.
        labels: `[N]`; if given, other examples of the same class are not among those to tell apart, as in the
            authors' code. −100 means that an example has none.

    Raises:
        ValueError: the shapes differ, or the temperature is not a finite number above 0.
    """
    require_temperature(temperature)
    if student_embeddings.shape != teacher_embeddings.shape or student_embeddings.ndim != 2:
        raise ValueError(
            f"the embeddings have shapes {tuple(student_embeddings.shape)} and {tuple(teacher_embeddings.shape)}; map "
            "both to the same [N, D]."
        )
    student = F.normalize(student_embeddings.float(), dim=1)
    teacher = F.normalize(teacher_embeddings.float(), dim=1)
    with autocast(student.device, torch.float32):
        scores = student @ teacher.T / temperature
    own = torch.arange(len(scores), device=scores.device)
    if labels is not None:
        if labels.shape != own.shape:
            raise ValueError(f"labels have shape {tuple(labels.shape)}; give one for each of {len(own)} examples.")
        same = (labels[:, None] == labels[None, :]) & (labels != IGNORE_INDEX)
        same[own, own] = False
        scores = scores.masked_fill(same, -torch.inf)
    return F.cross_entropy(scores, own)


def _require_same_examples(student: torch.Tensor, teacher: torch.Tensor) -> None:
    """Refuse features of different batches, and a batch that has no relations."""
    if len(student) != len(teacher):
        raise ValueError(f"the student has {len(student)} examples, the teacher {len(teacher)}; give the same ones.")
    if len(student) < 2:
        raise ValueError(
            f"there is a batch of {len(student)}, and relations are between two examples or more; leave it out."
        )


def _require_embeddings(student: torch.Tensor, teacher: torch.Tensor) -> None:
    """Refuse what is no row of numbers for each of the same examples."""
    if student.ndim != 2 or teacher.ndim != 2:
        raise ValueError(
            f"the embeddings have shapes {tuple(student.shape)} and {tuple(teacher.shape)}; give [N, e] and [N, E], "
            "and flatten maps first."
        )
    _require_same_examples(student, teacher)
