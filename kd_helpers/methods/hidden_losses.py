"""Chapters 11 and 12: losses on masked tokens and hidden layers, and which layer learns from which.

From Sanh et al., "DistilBERT" (2019, arXiv 1910.01108) and Jiao et al., "TinyBERT" (2019, arXiv 1909.10351). Shapes:
B texts, L tokens of each, H the teacher's width, h the student's, V the vocabulary. A `mask` `[B, L]` is 1 (or True)
for the tokens that count; the values at other tokens, above all padding, have no effect. Every loss is a mean, computed
in float32 whatever the dtype of its inputs (a projection must be float32), and sends no gradient to the teacher. Where
no token counts it is 0.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from kd_helpers.config import require_temperature
from kd_helpers.losses import hard_loss, soft_loss

MAPPINGS = ("uniform", "top", "bottom")


def vocabulary_soft_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, mask: torch.Tensor, temperature: float
) -> torch.Tensor:
    """`T² · KL(p_T ‖ q_S)` over the vocabulary, mean over the tokens that count, in nats (1910.01108, section 2).

    Args:
        student_logits: `[B, L, V]`, or `[N, V]` of tokens that were picked before.
        teacher_logits: the same shape.
        mask: `[B, L]`, or `[N]`.
        temperature: T > 0.

    Raises:
        ValueError: shapes or vocabularies differ, or T is not a finite number above 0.
    """
    require_temperature(temperature)
    student, teacher = _tokens_that_count(student_logits, teacher_logits, mask)
    if len(student) == 0:
        return student.sum()
    return soft_loss(student, teacher, temperature)


def masked_language_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with the masked tokens, mean over the labels that are not −100, in nats.

    Args:
        logits: `[B, L, V]`, or `[N, V]`.
        labels: the ids of the tokens that were masked, −100 elsewhere, `[B, L]`, or `[N]`.

    Raises:
        ValueError: shapes do not fit, or a label is no id of the vocabulary.
    """
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)}, labels {tuple(labels.shape)}; give one label for each token."
        )
    return hard_loss(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))


def cosine_loss(student_hidden: torch.Tensor, teacher_hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """1 − cos of the angle between the two hidden states of a token, mean over tokens (1910.01108, section 2).

    It compares the directions of the two states, not their lengths.

    Args:
        student_hidden: `[B, L, H]`.
        teacher_hidden: `[B, L, H]`.
        mask: `[B, L]`.

    Raises:
        ValueError: shapes differ.
    """
    student, teacher = _tokens_that_count(student_hidden, teacher_hidden, mask)
    if len(student) == 0:
        return student.sum()
    return (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()


def hidden_loss(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    mask: torch.Tensor,
    projection: nn.Linear | None = None,
) -> torch.Tensor:
    """Mean squared error between hidden states, over tokens and features (1909.10351, equations 8 and 9).

    It serves layers and embeddings alike: both are `[B, L, width]`.

    Args:
        student_hidden: `[B, L, h]`.
        teacher_hidden: `[B, L, H]`.
        mask: `[B, L]`.
        projection: a learned `nn.Linear(h, H, bias=False)` that maps the student's states to the teacher's width, the
            paper's W; needed where h and H differ.

    Raises:
        ValueError: shapes or widths do not fit.
    """
    h, width = student_hidden.shape[-1], teacher_hidden.shape[-1]
    if projection is None and h != width:
        raise ValueError(
            f"the student's states are {h} wide, the teacher's {width}; "
            f"give a projection, nn.Linear({h}, {width}, bias=False), and train it along."
        )
    if projection is not None and (projection.in_features, projection.out_features) != (h, width):
        raise ValueError(
            f"the projection goes from {projection.in_features} to {projection.out_features}, the states need one from "
            f"{h} to {width}."
        )
    student, teacher = _tokens_that_count(student_hidden, teacher_hidden, mask, same_width=False)
    if projection is not None:
        student = projection(student)
    if len(student) == 0:
        return student.sum()
    return F.mse_loss(student, teacher)


def attention_loss(student_scores: torch.Tensor, teacher_scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean squared error between attention scores before the softmax (1909.10351, equation 7).

    The mean is over heads and over pairs of tokens that both count. Head i learns from head i. Where the models have
    different numbers of heads there is no such pairing, and each model's mean over its heads is compared.

    Args:
        student_scores: `[B, heads, L, L]`, as `attention_scores` collects them: query by row, key by column.
        teacher_scores: `[B, heads, L, L]`; only the number of heads may differ.
        mask: `[B, L]`.

    Raises:
        ValueError: shapes do not fit.
    """
    batch, length = mask.shape
    for whose, scores in (("student", student_scores), ("teacher", teacher_scores)):
        if scores.ndim != 4 or (scores.shape[0], *scores.shape[2:]) != (batch, length, length):
            raise ValueError(
                f"the {whose}'s scores have shape {tuple(scores.shape)}, the mask {tuple(mask.shape)}; "
                f"give scores [{batch}, heads, {length}, {length}]."
            )
    student, teacher = student_scores.float(), teacher_scores.detach().float()
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(dim=1, keepdim=True), teacher.mean(dim=1, keepdim=True)
    counts = mask.bool()
    pairs = counts[:, None, :, None] & counts[:, None, None, :]
    # Filled, not multiplied by 0: values at padding may be infinite.
    squares = (student - teacher).masked_fill(~pairs, 0).square()
    return squares.sum() / (student.shape[1] * pairs.sum()).clamp(min=1)


@contextlib.contextmanager
def attention_scores(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Collect `q·kᵀ / √d` of every layer while the model runs.

    They are made of what each layer's `query` and `key` put out, so they are there whatever computes the attention
    (`sdpa` never forms them), and carry gradients. They are not masked: leave padding out with `attention_loss`.

        with attention_scores(model) as scores:
            model(**batch)
        scores[0]  # of the lowest layer, [B, heads, L, L]

    Another pass within the same block starts the list anew.

    Raises:
        ValueError: the model is no BERT, or checkpoints its activations: then its first pass has no gradient.
    """
    if model.config.model_type != "bert":
        raise ValueError(f"attention scores are collected from a BERT, this model is a {model.config.model_type}.")
    if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError(
            "gradient checkpointing is on, and with it attention scores have no gradient; call "
            "gradient_checkpointing_disable() on the model."
        )
    scores: list[torch.Tensor] = []
    heads = model.config.num_attention_heads
    queries: list[torch.Tensor] = []

    def split(states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, heads, L, d]

    def keep_query(_module: nn.Module, _inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        queries.append(split(output))

    def keep_scores(_module: nn.Module, _inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        query, key = queries.pop(), split(output)
        scores.append(query @ key.transpose(-1, -2) / math.sqrt(key.shape[-1]))

    def forget(_module: nn.Module, _inputs: tuple[torch.Tensor, ...]) -> None:
        scores.clear()
        queries.clear()

    handles = [model.base_model.register_forward_pre_hook(forget)]
    for layer in model.base_model.encoder.layer:
        own = layer.attention.self
        handles += [own.query.register_forward_hook(keep_query), own.key.register_forward_hook(keep_scores)]
    try:
        yield scores
    finally:
        for handle in handles:
            handle.remove()


def layer_mapping(student_layers: int, teacher_layers: int, how: str = "uniform") -> list[int]:
    """For each student layer, lowest first, the teacher layer it learns from; both counted from 0.

    Args:
        student_layers: M, how many the student has.
        teacher_layers: N, how many the teacher has.
        how: "uniform" takes every N/M-th layer up to the last (1909.10351: g(m) = m · N/M, counted from 1), "top" the
            last M layers, "bottom" the first M.

    Raises:
        ValueError: the student is deeper, N/M is no whole number ("uniform"), or `how` is none of these.
    """
    if how not in MAPPINGS:
        raise ValueError(f"how is {how!r}; choose one of {', '.join(MAPPINGS)}.")
    if not 1 <= student_layers <= teacher_layers:
        raise ValueError(
            f"the student has {student_layers} layers and the teacher {teacher_layers}; it must have at least one and "
            "no more than its teacher."
        )
    if how == "top":
        return list(range(teacher_layers - student_layers, teacher_layers))
    if how == "bottom":
        return list(range(student_layers))
    if teacher_layers % student_layers:
        raise ValueError(
            f"{teacher_layers} teacher layers can't be dealt evenly to {student_layers}; choose a depth that divides "
            f"{teacher_layers}, or how='top' or 'bottom'."
        )
    step = teacher_layers // student_layers
    return list(range(step - 1, teacher_layers, step))


def every_second_layer(teacher_layers: int) -> list[int]:
    """Half of a teacher's layers, evenly spread, the first and the last among them; counted from 0.

    Of 2 or 3 layers it is the first alone.

    12 give 0, 2, 4, 7, 9, 11, which is what DistilBERT's authors copied; 6 give 0, 2, 5, the course's student.

    Raises:
        ValueError: there are fewer than two layers.
    """
    if teacher_layers < 2:
        raise ValueError(f"the teacher's depth is {teacher_layers}; give one of at least 2 to halve.")
    half = teacher_layers // 2
    return [round(index * (teacher_layers - 1) / max(half - 1, 1)) for index in range(half)]


def _tokens_that_count(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, *, same_width: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows `[N, width]` of both where the mask is set, in float32, the teacher's without its graph."""
    shapes = [tuple(tensor.shape) for tensor in (student, teacher)]
    if shapes[0][:-1] != shapes[1][:-1] or (same_width and shapes[0] != shapes[1]):
        raise ValueError(
            f"the student's shape is {shapes[0]}, the teacher's {shapes[1]}; both need the same texts"
            f"{', tokens and width' if same_width else ' and tokens'}."
        )
    if tuple(mask.shape) != shapes[0][:-1]:
        raise ValueError(
            f"the mask has shape {tuple(mask.shape)}; give one number for each of the tokens {shapes[0][:-1]}."
        )
    chosen = mask.bool()
    return student[chosen].float(), teacher.detach()[chosen].float()
