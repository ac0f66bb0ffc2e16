"""Chapter 11: a student that is distilled before it is fine-tuned for a task.

DistilBERT (Sanh et al. 2019, arXiv 1910.01108): a student made of every second layer of a masked language model learns
from that model on texts without labels, with three losses together,

    total = w_soft · T² · KL(p_T ‖ q_S) + w_language · CE(q_S, masked tokens) + w_cosine · (1 − cos(h_S, h_T)),

and is fine-tuned for a task afterwards. Shapes: B texts, L tokens of each, N masked tokens in the batch, V the
vocabulary, H the width.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import BertForMaskedLM, DataCollatorForLanguageModeling, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from kd_helpers import artifacts
from kd_helpers.checkpoints import checkpoints_dir
from kd_helpers.config import DistillConfig, require_whole
from kd_helpers.data import (
    PAD_TO_MULTIPLE_OF,
    BucketBatchSampler,
    dataset_digest,
    tokenize,
    training_batches,
)
from kd_helpers.loop import fit, recipe, train_classifier
from kd_helpers.losses import IGNORE_INDEX, soft_targets
from kd_helpers.methods.hidden_losses import (
    cosine_loss,
    every_second_layer,
    masked_language_loss,
    vocabulary_soft_loss,
)
from kd_helpers.models import (
    Batch,
    checkpoint_path,
    checkpoint_version,
    copy_layers,
    copy_out_of_file,
    freeze,
    load_config,
    load_teacher,
    model_inputs,
    random_like,
    require_eval_mode,
    require_teacher_and_student,
    save_model,
)
from kd_helpers.pretrained import NO_CODE, explained, quiet_transformers, require_encoder
from kd_helpers.provenance import made_by
from kd_helpers.resolve import Setup
from kd_helpers.runtime import autocast, evaluating, seed_everything
from kd_helpers.teacher import TeacherLogits, attach

MASKED_SHARE = 0.15  # of the tokens, as in BERT
TEMPERATURE = 2.0
ADAPTATION_STEPS = 600
LEARNING_RATE = 5e-4
BATCH_SIZE = 32
HELD_OUT_SEED = 0  # masks the same tokens of the held-out texts for every model


class Weights(NamedTuple):
    """The weights of the three losses; the defaults are those of the authors' published command."""

    soft: float = 5.0
    language: float = 2.0
    cosine: float = 1.0


WEIGHTS = Weights()


class LanguageLoss(NamedTuple):
    """The weighted sum and its parts, which are not weighted: scalars in float32, or `[steps]`."""

    total: torch.Tensor
    soft: torch.Tensor
    language: torch.Tensor
    cosine: torch.Tensor


class LanguageOutput(NamedTuple):
    """What a masked language model computes: `logits` `[N, V]` at the masked tokens, and last `states` `[B, L, H]`."""

    logits: torch.Tensor
    states: torch.Tensor


# --- texts with masked tokens ---


def language_batches(
    tokenized: datasets.Dataset, tokenizer: Tokenizer, batch_size: int = BATCH_SIZE, *, seed: int
) -> DataLoader:
    """Batches of texts of similar length with 15% of their tokens masked, others in every epoch (dynamic masking).

    Args:
        tokenized: what `data.tokenize` returns; labels are not used.
        tokenizer: must have a mask token.
        batch_size: B.
        seed: of the order of the texts and of the masking, whatever else is drawn meanwhile.

    Returns:
        A loader of `input_ids`, `attention_mask` (and `token_type_ids`) and `labels`, all `[B, L]`. The label of a
        masked token is its own id; it is −100 elsewhere.

    Raises:
        ValueError: the tokenizer has no mask token.
    """
    if tokenizer.mask_token is None:
        raise ValueError("this tokenizer has no mask token, so nothing can be masked; use that of a BERT.")
    texts = tokenized.select_columns([name for name in tokenized.column_names if name in tokenizer.model_input_names])
    masking = DataCollatorForLanguageModeling(
        tokenizer, mlm_probability=MASKED_SHARE, pad_to_multiple_of=PAD_TO_MULTIPLE_OF, seed=seed
    )
    masking.create_rng()  # now, so that a checkpoint can hold its state
    return DataLoader(
        texts,
        batch_sampler=BucketBatchSampler(tokenized["length"][:], batch_size, seed=seed),
        collate_fn=masking,
        generator=torch.Generator(),  # or each pass would draw from the generator that dropout draws from
    )


# --- the loss ---


def language_forward(model: BertForMaskedLM, batch: Batch, precision: torch.dtype | None = None) -> LanguageOutput:
    """Run a masked language model on a batch, with gradients where they are on.

    Scores over a whole vocabulary are expensive, so they are computed at the masked tokens alone.

    Args:
        model: a BERT with a language head.
        batch: of `language_batches`.
        precision: dtype of the matrix products; None computes in the precision of the code around it.
    """
    as_asked = contextlib.nullcontext() if precision is None else autocast(model.device, precision)
    with as_asked:
        states = model.base_model(**model_inputs(model.base_model, batch)).last_hidden_state
        return LanguageOutput(model.cls(states[batch["labels"].to(states.device) != IGNORE_INDEX]), states)


def triple_loss(
    student: LanguageOutput,
    teacher: LanguageOutput | None,
    batch: Batch,
    *,
    temperature: float = TEMPERATURE,
    weights: Weights = WEIGHTS,
) -> LanguageLoss:
    """The three losses of DistilBERT and their weighted sum (1910.01108, section 2).

    Soft and language loss are means over the masked tokens, the cosine loss over all tokens. A loss of weight 0 is not
    computed and reported as 0.

    Args:
        student: its output.
        teacher: its output; None where neither soft nor cosine loss has a weight.
        batch: `labels` and `attention_mask`, `[B, L]`.
        temperature: T of the soft loss.
        weights: of the three.

    Raises:
        ValueError: a weight is negative or all are 0, or the teacher is missing.
    """
    if min(weights) < 0 or max(weights) == 0:
        raise ValueError(f"the weights are {tuple(weights)}; give three numbers of at least 0, one of them above 0.")
    if teacher is None and (weights.soft or weights.cosine):
        raise ValueError("soft and cosine loss need the teacher's output; give it, or set these two weights to 0.")
    device = student.states.device
    labels, mask = batch["labels"].to(device), batch["attention_mask"].to(device)
    masked = labels[labels != IGNORE_INDEX]
    soft = language = cosine = student.states.new_zeros((), dtype=torch.float32)
    if weights.soft:
        soft = vocabulary_soft_loss(student.logits, teacher.logits, torch.ones_like(masked), temperature)
    if weights.language:
        language = masked_language_loss(student.logits, masked)
    if weights.cosine:
        cosine = cosine_loss(student.states, teacher.states, mask)
    total = weights.soft * soft + weights.language * language + weights.cosine * cosine
    return LanguageLoss(total, soft, language, cosine)


# --- training and measuring ---


def train_language_model(
    model: BertForMaskedLM,
    batches: DataLoader | Sequence[Batch],
    *,
    steps: int,
    teacher: BertForMaskedLM | None = None,
    temperature: float = TEMPERATURE,
    weights: Weights = WEIGHTS,
    learning_rate: float = LEARNING_RATE,
    precision: torch.dtype = torch.float32,
    checkpoints: Path | None = None,
    description: str = "Distilling the language model",
) -> LanguageLoss:
    """Train on texts with masked tokens, with a teacher or (language loss alone) without.

    Args:
        model: learns, in place. Frozen parameters stay as they are.
        batches: of `language_batches`, repeated as often as it takes; or at least `steps` of them.
        steps: optimiser steps.
        teacher: frozen. It runs on every batch: which tokens are masked changes from epoch to epoch, so its output
            cannot be cached by text.
        temperature: T of the soft loss.
        weights: of the three losses.
        learning_rate: its peak, after a tenth of the steps.
        precision: of the matrix products; losses are always float32.
        checkpoints: see `loop.fit`.
        description: of the progress bar.

    Returns:
        The losses of every step, float32 tensors `[steps]`.

    Raises:
        ValueError: the teacher is in train mode or shares weights with the student, there are fewer batches than
            steps, or see `triple_loss`.
        DivergedError: a loss or a gradient is not finite.
    """
    require_whole("steps", steps, minimum=1)
    require_teacher_and_student(teacher, model)
    if teacher is not None:
        require_eval_mode(teacher)

    def loss_of(batch: Batch) -> LanguageLoss:
        needed = teacher is not None and (weights.soft or weights.cosine)
        with torch.no_grad():
            shown = language_forward(teacher, batch) if needed else None
        return triple_loss(language_forward(model, batch), shown, batch, temperature=temperature, weights=weights)

    progress = fit(
        model,
        batches,
        loss_of,
        steps=steps,
        **recipe(DistillConfig(learning_rate=learning_rate), steps),
        precision=precision,
        checkpoints=checkpoints,
        description=description,
    )
    model.eval()
    return LanguageLoss(*(progress.curve(name) for name in LanguageLoss._fields))


def held_out_batches(texts: datasets.Dataset, tokenizer: Tokenizer, max_length: int) -> list[Batch]:
    """Held-out texts with the same tokens masked for every model."""
    return list(language_batches(tokenize(texts, tokenizer, max_length), tokenizer, 64, seed=HELD_OUT_SEED))


def language_loss(
    model: BertForMaskedLM, batches: Iterable[Batch], precision: torch.dtype = torch.float32
) -> dict[str, float]:
    """How well a model predicts masked tokens, without dropout.

    Returns:
        `loss`, the mean negative log-likelihood of a masked token in nats; `perplexity`, its exponential; `accuracy`,
        the share of masked tokens that the model predicts.
    """
    summed, right, count = 0.0, 0, 0
    with evaluating(model), torch.inference_mode():
        for batch in batches:
            logits = language_forward(model, batch, precision).logits
            masked = batch["labels"][batch["labels"] != IGNORE_INDEX].to(logits.device)
            summed += masked_language_loss(logits, masked).item() * len(masked)
            right += int((logits.argmax(dim=-1) == masked).sum())
            count += len(masked)
    if count == 0:
        raise ValueError("no token is masked in these texts, so nothing can be predicted; give more texts.")
    loss = torch.tensor(summed / count)
    return {"loss": loss.item(), "perplexity": loss.exp().item(), "accuracy": right / count}


def likely_words(
    model: BertForMaskedLM, tokenizer: Tokenizer, text: str, *, temperature: float = 1.0, count: int = 5
) -> list[tuple[str, float]]:
    """What the model predicts in the place of `[MASK]`: the likeliest word pieces and their probabilities.

    Raises:
        ValueError: the text does not hold the mask token exactly once.
    """
    inputs = tokenizer(text, return_tensors="pt")
    masked = inputs["input_ids"] == tokenizer.mask_token_id
    if masked.sum() != 1:
        raise ValueError(f"the text masks {int(masked.sum())} words; write {tokenizer.mask_token} once.")
    batch = {**inputs, "labels": torch.where(masked, inputs["input_ids"], IGNORE_INDEX)}
    with torch.inference_mode():
        shares = soft_targets(language_forward(model, batch).logits[0], temperature)
    best = shares.topk(count)
    return list(zip(tokenizer.convert_ids_to_tokens(best.indices.tolist()), best.values.tolist(), strict=True))


# --- the models ---


def language_teacher(setup: Setup, *, steps: int = ADAPTATION_STEPS, head_only: bool = False) -> BertForMaskedLM:
    """The pre-trained teacher as a frozen masked language model.

    A checkpoint with a language head (bert-base has one) is taken as it is. One without a head (the packaged model
    was trained to embed sentences) gets a new one, which shares the embedding table, and is adapted to the texts that
    the course's classifier is fine-tuned on, without their labels. That is done once and found again in `artifacts/`.

    Args:
        setup: teacher, texts, `max_length`, device and precision; nothing of the student matters.
        steps: of the adaptation.
        head_only: adapt the new head and leave the encoder and the table as they are.

    Raises:
        ValueError: the teacher is no BERT.
    """
    config, data, tokenizer = setup.config, setup.data, setup.tokenizers.teacher
    model, has_head = load_language_model(config.teacher_source)
    if has_head:
        return freeze(model).to(setup.device)
    provenance = {
        **made_by("kd_helpers.methods.distilbert"),
        "checkpoint": checkpoint_version(config.teacher_source),
        "texts": dataset_digest(data.teacher_train),
        "max_length": config.max_length,
        "steps": steps,
        "head_only": head_only,
        "recipe": [BATCH_SIZE, LEARNING_RATE, MASKED_SHARE],
        "machine": setup.machine,
    }
    key = artifacts.fingerprint(provenance)
    folder, checkpoints = artifacts.artifacts_dir() / "language_teachers" / key, checkpoints_dir(key)

    def adapt(target: Path) -> None:
        model.to(setup.device)
        if head_only:
            model.base_model.requires_grad_(False)
        batches = language_batches(tokenize(data.teacher_train, tokenizer, config.max_length), tokenizer, seed=0)
        # What a caller draws next must not depend on whether the teacher was found or made.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            train_language_model(
                model,
                batches,
                steps=steps,
                weights=Weights(soft=0, language=1, cosine=0),
                precision=setup.precision,
                checkpoints=checkpoints,
                description="Adapting the language teacher",
            )
        save_model(target, model, tokenizer)
        artifacts.save_json(target / artifacts.PROVENANCE, provenance)

    artifacts.get_or_build(folder, adapt)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return freeze(load_language_model(str(folder))[0]).to(setup.device)


def load_language_model(name: str) -> tuple[BertForMaskedLM, bool]:
    """A BERT with a masked-language head, and whether the checkpoint has that head; if not, its weights are random.

    Raises:
        ValueError: the checkpoint is no BERT, or lacks weights of its encoder.
        FileNotFoundError: there is no such model, or it has no safetensors.
        ConnectionError: the model is on the hub, which cannot be reached.
    """
    if (kind := load_config(name).model_type) != "bert":
        raise ValueError(f"a language teacher must be a BERT, {name!r} is a {kind}; name another teacher_checkpoint.")
    path = checkpoint_path(name)
    with quiet_transformers(), torch.random.fork_rng(), explained(name, path):
        torch.manual_seed(0)
        model, report = BertForMaskedLM.from_pretrained(
            path,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are reported, and looked at here
            output_loading_info=True,
            **NO_CODE,
        )
    require_encoder(name, model, report)
    copy_out_of_file(model)
    return model, not any(key.startswith("cls.predictions.transform") for key in report["missing_keys"])


def language_student(
    teacher: BertForMaskedLM, layers: Sequence[int] | None = None, *, random_start: bool = False, seed: int = 0
) -> BertForMaskedLM:
    """A masked language model made of the teacher's embeddings, some of its layers and its head.

    Args:
        teacher: a BERT.
        layers: which of its layers, 0 the lowest; None takes every second one (`hidden_losses.every_second_layer`).
        random_start: random weights of that shape instead of the teacher's.
        seed: of the random weights.

    Raises:
        ValueError: a layer that the teacher does not have.
    """
    depth = teacher.config.num_hidden_layers
    layers = every_second_layer(depth) if layers is None else list(layers)
    if not layers or min(layers) < 0 or max(layers) >= depth:
        raise ValueError(f"layers are {tuple(layers)}; the teacher has layers 0 to {depth - 1}, name at least one.")
    student = copy.deepcopy(teacher)
    student.config.num_hidden_layers = len(layers)
    taken = teacher.base_model.encoder.layer
    student.base_model.encoder.layer = nn.ModuleList(copy.deepcopy(taken[layer]) for layer in layers)
    student.requires_grad_(True)
    return random_like(student, seed=seed).to(teacher.device) if random_start else student


def as_classifier(
    language_model: BertForMaskedLM, config: DistillConfig, label_names: Sequence[str], *, random_start: bool = False
) -> PreTrainedModel:
    """A classifier with the language model's embeddings and layers, and a fresh head drawn from `config.seed`.

    The pooler below the head is the pre-trained teacher's, which no language model trains; with `random_start` it is
    random as well.
    """
    depth = language_model.config.num_hidden_layers
    classifier = copy_layers(load_teacher(config, label_names), range(depth), seed=config.seed)
    if random_start:
        classifier = random_like(classifier, seed=config.seed)
    source, target = language_model.base_model, classifier.base_model
    target.embeddings.load_state_dict(source.embeddings.state_dict())
    target.encoder.load_state_dict(source.encoder.state_dict())
    return classifier.to(language_model.device)


def fine_tune(
    classifier: PreTrainedModel,
    setup: Setup,
    texts: datasets.Dataset,
    teacher_logits: TeacherLogits | None = None,
) -> PreTrainedModel:
    """Train a classifier, in place, as the configuration says; by distillation where there are `teacher_logits`."""
    config, tokenizer = setup.config, setup.tokenizers.teacher
    texts = tokenize(texts, tokenizer, config.max_length)
    texts = texts if teacher_logits is None else attach(texts, teacher_logits)
    batches = training_batches(texts, tokenizer, config.batch_size, seed=config.seed)
    seed_everything(config.seed)
    train_classifier(classifier, batches, config=config, precision=setup.precision, description="Fine-tuning")
    return classifier.eval()
