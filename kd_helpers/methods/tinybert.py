"""Chapter 12: a student that learns from its teacher's layers.

TinyBERT (Jiao et al. 2020, arXiv 1909.10351) compares embeddings, attention scores and hidden states of both models,
layer by layer, before it compares their logits; first with the pre-trained teacher on texts of any kind (general
distillation), then with the fine-tuned teacher on texts of the task (task distillation).

Shapes: B texts of L tokens, h and H the widths of student and teacher, A heads, M and N their layers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import datasets
import torch
from torch import nn
from transformers import PreTrainedModel

from kd_helpers.config import DistillConfig, require_whole
from kd_helpers.data import training_batches
from kd_helpers.loop import fit, recipe
from kd_helpers.methods.hidden_losses import attention_loss, attention_scores, hidden_loss, layer_mapping
from kd_helpers.models import (
    Batch,
    copy_layers,
    load_teacher,
    model_inputs,
    random_like,
    require_eval_mode,
    require_teacher_and_student,
)
from kd_helpers.resolve import Setup

# Of the losses, all 1 in the paper's experiments (λ in equation 11).
WEIGHTS: Mapping[str, float] = {"embedding": 1.0, "attention": 1.0, "hidden": 1.0}


def narrow_shape(teacher: PreTrainedModel, *, layers: int, width: int) -> PreTrainedModel:
    """A model like the teacher, with fewer and narrower layers, that has no weights yet (`random_like` draws them).

    It has as many heads as the teacher, since the attention loss compares them one to one; they are narrower instead.

    Raises:
        ValueError: `layers` or `width` is larger than the teacher's, or the width is not a multiple of the heads.
    """
    config = copy.deepcopy(teacher.config)
    heads = config.num_attention_heads
    require_whole("layers", layers, minimum=1, maximum=config.num_hidden_layers)
    require_whole("width", width, minimum=heads, maximum=config.hidden_size)
    if width % heads:
        raise ValueError(f"width is {width}, which {heads} heads can't share evenly; give a multiple of {heads}.")
    config.intermediate_size = config.intermediate_size * width // config.hidden_size
    config.num_hidden_layers, config.hidden_size = layers, width
    with torch.device("meta"):
        return type(teacher)(config)


def narrow_student(config: DistillConfig, label_names: Sequence[str]) -> PreTrainedModel:
    """Half the teacher's layers at half its width, random weights drawn from `config.seed`."""
    teacher = load_teacher(config, label_names)
    heads, width = teacher.config.num_attention_heads, teacher.config.hidden_size
    layers = max(1, teacher.config.num_hidden_layers // 2)
    shape = narrow_shape(teacher, layers=layers, width=heads * max(1, width // heads // 2))
    return random_like(shape, seed=config.seed)


def half_student(config: DistillConfig, label_names: Sequence[str]) -> PreTrainedModel:
    """Half the teacher's layers at its full width, copies of those that they are compared with."""
    teacher = load_teacher(config, label_names)
    depth = teacher.config.num_hidden_layers
    return copy_layers(teacher, layer_mapping(max(1, depth // 2), depth), seed=config.seed)


STUDENTS = {"narrow": narrow_student, "half": half_student}


class Layers(NamedTuple):
    """What a model computes inside, for one batch.

    Attributes:
        embedding: output of the embedding layer, `[B, L, h]`.
        attention: of each layer the scores before the softmax, `[B, A, L, L]`.
        hidden: of each layer the output, `[B, L, h]`.
    """

    embedding: torch.Tensor
    attention: tuple[torch.Tensor, ...]
    hidden: tuple[torch.Tensor, ...]


def look_inside(model: PreTrainedModel, batch: Batch) -> Layers:
    """Run the encoder of a BERT on a batch and keep what its layers compute."""
    encoder = model.base_model
    with attention_scores(model) as scores:
        states = encoder(**model_inputs(encoder, batch), output_hidden_states=True).hidden_states
    return Layers(states[0], tuple(scores), tuple(states[1:]))


class Projections(nn.Module):
    """The learned maps from the student's width to the teacher's: W_e for embeddings, W_h for every hidden state.

    They belong to the loss, not to the student: nothing of them is saved with it. Models of one width need none.
    """

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        needed = student_width != teacher_width
        self.embedding = nn.Linear(student_width, teacher_width, bias=False) if needed else None
        self.hidden = nn.Linear(student_width, teacher_width, bias=False) if needed else None


class LayerLosses(NamedTuple):
    """The sum that is trained, and its parts before they are weighted: scalars, or `[steps]`.

    Attention and hidden loss are summed over the student's layers.
    """

    total: torch.Tensor
    embedding: torch.Tensor
    attention: torch.Tensor
    hidden: torch.Tensor


def layer_losses(
    student: Layers,
    teacher: Layers,
    mask: torch.Tensor,
    mapping: Sequence[int],
    projections: Projections,
    weights: Mapping[str, float] = WEIGHTS,
) -> LayerLosses:
    """Equations 7 to 9 of the paper, each with its weight, and their sum over layers (equation 6 with λ of 1).

    Args:
        student: of the student.
        teacher: the same batch inside the teacher.
        mask: `[B, L]`, 1 for tokens and 0 for padding.
        mapping: for each of the student's layers the teacher's layer that it is compared with, 0 the lowest.
        projections: from the student's width to the teacher's.
        weights: of the three; one that is left out has weight 0 and is reported all the same.
    """
    found = {
        "embedding": hidden_loss(student.embedding, teacher.embedding, mask, projections.embedding),
        "attention": sum(
            attention_loss(student.attention[m], teacher.attention[n], mask) for m, n in enumerate(mapping)
        ),
        "hidden": sum(
            hidden_loss(student.hidden[m], teacher.hidden[n], mask, projections.hidden) for m, n in enumerate(mapping)
        ),
    }
    return LayerLosses(sum(weight * found[part] for part, weight in weights.items()), **found)


def distill_layers(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    projections: Projections,
    texts: datasets.Dataset,
    setup: Setup,
    *,
    steps: int,
    weights: Mapping[str, float] = WEIGHTS,
) -> LayerLosses:
    """Train the student's layers to resemble the teacher's; its head learns nothing here.

    Args:
        student: learns, in place.
        teacher: frozen. It runs at every step: what it computes inside for all texts would fill a disk.
        projections: from the student's width to the teacher's; they learn as well, in place. A second stage goes on
            with those of the first, to which the student has been fitted.
        texts: tokenized; labels are not used.
        setup: the teacher's tokenizer, learning rate, warm-up, weight decay, clipping, batch size and seed.
        steps: optimiser steps.
        weights: of the losses; one that is left out has weight 0.

    Returns:
        The losses of every step, `[steps]`.

    Raises:
        ValueError: `weights` names an unknown loss, or none has a weight above 0; the teacher is in train mode; the
            two models cannot be teacher and student.
        DivergedError: a loss or a gradient is not finite.
    """
    require_whole("steps", steps, minimum=1)
    if not set(weights) <= set(WEIGHTS) or min(weights.values(), default=0) < 0 or not any(weights.values()):
        raise ValueError(
            f"weights are {dict(weights)}; give numbers of at least 0 to {', '.join(WEIGHTS)}, one of them above 0."
        )
    require_teacher_and_student(teacher, student)
    require_eval_mode(teacher)
    config, tokenizer = setup.config, setup.tokenizers.teacher
    mapping = layer_mapping(student.config.num_hidden_layers, teacher.config.num_hidden_layers, "uniform")

    def loss_of(batch: Batch) -> LayerLosses:
        with torch.no_grad():
            shown = look_inside(teacher, batch)
        mask = batch["attention_mask"].to(setup.device)
        return layer_losses(look_inside(student, batch), shown, mask, mapping, projections, weights)

    progress = fit(
        [student, projections],
        training_batches(texts, tokenizer, config.batch_size, seed=config.seed),
        loss_of,
        steps=steps,
        **recipe(config, steps),
        precision=setup.precision,
        lean=config.lean,
        description="Distilling layers",
    )
    return LayerLosses(*(progress.curve(name) for name in LayerLosses._fields))
