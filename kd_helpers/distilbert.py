"""Chapter 11: a student distilled before there are labels.

DistilBERT (Sanh et al. 2019, arXiv 1910.01108): a student made of every second layer of a masked language model learns
from it on texts without labels, by three losses together,

    total = w_soft · T² · KL(p_T ‖ q_S) + w_language · CE(q_S, hidden tokens) + w_cosine · (1 − cos(h_S, h_T)),

and is fine-tuned for a task afterwards. Shapes: B texts, L tokens of each, N hidden tokens in the batch, V the
vocabulary, H the width.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoConfig, BertForMaskedLM, DataCollatorForLanguageModeling, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from kd_helpers import __version__, artifacts, hub
from kd_helpers.config import DistillConfig, require_whole, seed_everything
from kd_helpers.data import (
    PAD_TO_MULTIPLE_OF,
    BucketBatchSampler,
    endless,
    evaluation_batches,
    load_splits,
    tokenize,
    training_batches,
)
from kd_helpers.features import cosine_loss, every_second_layer, masked_language_loss, vocabulary_soft_loss
from kd_helpers.losses import IGNORE_INDEX, soft_targets
from kd_helpers.models import (
    NO_CODE,
    checkpoint_path,
    checkpoint_version,
    copy_layers,
    copy_out_of_file,
    freeze,
    load_teacher,
    load_tokenizer,
    model_inputs,
    quiet_transformers,
    random_like,
    require_eval_mode,
    require_teacher_and_student,
    save_model,
)
from kd_helpers.optim import make_optimizer, make_scheduler
from kd_helpers.studies import run_study
from kd_helpers.teacher_logits import TeacherLogits, attach, autocast
from kd_helpers.training import dataset_digest, evaluate, machine, require_finite, teacher_answers, train

Batch = dict[str, torch.Tensor]

HIDDEN_SHARE = 0.15  # of the tokens is hidden: BERT's own choice
TEMPERATURE = 2.0
ADAPTATION_STEPS = 600
LEARNING_RATE = 5e-4
BATCH_SIZE = 32
HELD_OUT_SEED = 0  # hides the same tokens of the held-out texts for every model


class Weights(NamedTuple):
    """Of the three losses, as in the authors' published command."""

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


class Answers(NamedTuple):
    """What a masked language model says of a batch: `logits` `[N, V]` at the hidden tokens, `states` `[B, L, H]`."""

    logits: torch.Tensor
    states: torch.Tensor


TEACHER_STATES = "teacher_states"  # what `answered` adds to a batch


# --- texts with hidden tokens ---


def language_batches(
    tokenized: datasets.Dataset, tokenizer: Tokenizer, batch_size: int = BATCH_SIZE, *, seed: int
) -> DataLoader[Any]:
    """Batches of texts of similar length with 15% of their tokens hidden, others in every epoch (dynamic masking).

    Args:
        tokenized: what `data.tokenize` returns; labels are not used.
        tokenizer: has a token for what is hidden.
        batch_size: B.
        seed: of the order of the texts and of what is hidden, whatever else is drawn meanwhile.

    Returns:
        A loader of `input_ids`, `attention_mask` (and `token_type_ids`) and `labels`, all `[B, L]`: a hidden token's
        own id, −100 elsewhere.

    Raises:
        ValueError: the tokenizer has no token for what is hidden.
    """
    if tokenizer.mask_token is None:
        raise ValueError("this tokenizer has no mask token, so nothing can be hidden; take that of a BERT.")
    texts = tokenized.select_columns([name for name in tokenized.column_names if name in tokenizer.model_input_names])
    return DataLoader(
        texts,
        batch_sampler=BucketBatchSampler(tokenized["length"][:], batch_size, seed=seed),
        collate_fn=DataCollatorForLanguageModeling(
            tokenizer, mlm_probability=HIDDEN_SHARE, pad_to_multiple_of=PAD_TO_MULTIPLE_OF, seed=seed
        ),
        generator=torch.Generator(),  # or each pass would draw from the one that dropout draws from
    )


# --- the loss ---


def ask_language_model(model: BertForMaskedLM, batch: Batch, precision: torch.dtype = torch.float32) -> Answers:
    """The model's answers to a batch, with gradients where they are on.

    The scores of a whole vocabulary are dear, so they are computed for the hidden tokens alone.
    """
    with autocast(model.device, precision):
        return _guess(model, batch, model.base_model(**model_inputs(model, batch)).last_hidden_state)


def _guess(model: BertForMaskedLM, batch: Batch, states: torch.Tensor) -> Answers:
    return Answers(model.cls(states[batch["labels"].to(states.device) != IGNORE_INDEX]), states)


def answered(
    batches: DataLoader[Any], teacher: BertForMaskedLM, steps: int, precision: torch.dtype = torch.float32
) -> list[Batch]:
    """The first `steps` batches with the teacher's last states, for several students that meet the same batches.

    The states take H numbers a token, the logits would take V: the head is asked anew instead.
    """
    asked = []
    for batch in tqdm(
        itertools.islice(endless(batches), steps), total=steps, desc="Asking the teacher", unit="step", leave=False
    ):
        with torch.no_grad():
            asked.append({**batch, TEACHER_STATES: ask_language_model(teacher, batch, precision).states.cpu()})
    return asked


def triple_loss(
    student: Answers,
    teacher: Answers | None,
    batch: Batch,
    *,
    temperature: float = TEMPERATURE,
    weights: Weights = WEIGHTS,
) -> LanguageLoss:
    """The three losses of DistilBERT and their weighted sum (1910.01108, section 2).

    Soft and language loss are means over the hidden tokens, the cosine loss over all tokens. A loss of weight 0 is not
    computed and reported as 0.

    Args:
        student: its answers.
        teacher: its answers; None where neither soft nor cosine loss has a weight.
        batch: `labels` and `attention_mask`, `[B, L]`.
        temperature: T of the soft loss.
        weights: of the three.

    Raises:
        ValueError: a weight is negative or all are 0, or the teacher is missing.
    """
    if min(weights) < 0 or max(weights) == 0:
        raise ValueError(f"the weights are {tuple(weights)}; give three numbers of at least 0, one of them above 0.")
    if teacher is None and (weights.soft or weights.cosine):
        raise ValueError("soft and cosine loss need a teacher's answers; give them, or set these two weights to 0.")
    device = student.states.device
    labels, mask = batch["labels"].to(device), batch["attention_mask"].to(device)
    hidden = labels[labels != IGNORE_INDEX]
    soft = language = cosine = student.states.new_zeros((), dtype=torch.float32)
    if weights.soft:
        soft = vocabulary_soft_loss(student.logits, teacher.logits, torch.ones_like(hidden), temperature)
    if weights.language:
        language = masked_language_loss(student.logits, hidden)
    if weights.cosine:
        cosine = cosine_loss(student.states, teacher.states, mask)
    total = weights.soft * soft + weights.language * language + weights.cosine * cosine
    return LanguageLoss(total, soft, language, cosine)


# --- training and measuring ---


def train_language_model(
    model: BertForMaskedLM,
    batches: DataLoader[Any] | Sequence[Batch],
    *,
    steps: int,
    teacher: BertForMaskedLM | None = None,
    temperature: float = TEMPERATURE,
    weights: Weights = WEIGHTS,
    learning_rate: float = LEARNING_RATE,
    precision: torch.dtype = torch.float32,
    description: str = "Distilling the language model",
) -> LanguageLoss:
    """Train on texts with hidden tokens, with a teacher or (language loss alone) without.

    Args:
        model: learns, in place. Frozen parameters stay as they are.
        batches: of `language_batches`, repeated as often as it takes; or so many of `answered`.
        steps: optimiser steps.
        teacher: frozen. It is asked for every batch that does not carry its states: what is hidden changes from epoch
            to epoch, so answers can't be kept by text.
        temperature: T of the soft loss.
        weights: of the three losses.
        learning_rate: its peak, after a tenth of the steps.
        precision: of the matrix products; losses are float32 always.
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
    if not isinstance(batches, DataLoader) and len(batches) < steps:
        raise ValueError(f"{steps} steps need as many batches, there are {len(batches)}; give more, or a loader.")
    stream = itertools.islice(endless(batches) if isinstance(batches, DataLoader) else batches, steps)
    optimizer = make_optimizer(model, learning_rate=learning_rate, weight_decay=0.01)
    scheduler = make_scheduler(optimizer, steps=steps, warmup_ratio=0.1)
    model.train()
    history = []
    for batch in tqdm(stream, total=steps, desc=description, unit="step", leave=False):
        answers = None
        if teacher is not None and (weights.soft or weights.cosine):
            answers = _teacher_answers(teacher, batch, precision)
        own = ask_language_model(model, batch, precision)
        loss = triple_loss(own, answers, batch, temperature=temperature, weights=weights)
        optimizer.zero_grad()
        loss.total.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        require_finite(len(history) + 1, loss.total.detach() + norm, loss._asdict())
        optimizer.step()
        scheduler.step()
        history.append([part.detach() for part in loss])
    optimizer.zero_grad()  # gradients take as much memory as the model
    model.eval()
    return LanguageLoss(*(torch.stack(parts).cpu() for parts in zip(*history, strict=True)))


@torch.no_grad()
def _teacher_answers(teacher: BertForMaskedLM, batch: Batch, precision: torch.dtype) -> Answers:
    if TEACHER_STATES not in batch:
        return ask_language_model(teacher, batch, precision)
    with autocast(teacher.device, precision):
        return _guess(teacher, batch, batch[TEACHER_STATES].to(teacher.device))


def held_out_batches(texts: datasets.Dataset, tokenizer: Tokenizer, max_length: int) -> list[Batch]:
    """Held-out texts with the same tokens hidden whoever is asked."""
    return list(language_batches(tokenize(texts, tokenizer, max_length), tokenizer, 64, seed=HELD_OUT_SEED))


def language_loss(
    model: BertForMaskedLM, batches: Iterable[Batch], precision: torch.dtype = torch.float32
) -> dict[str, float]:
    """How well a model guesses hidden tokens, dropout off.

    Returns:
        `loss`, the mean negative log-likelihood of a hidden token in nats; `perplexity`, its exponential; `accuracy`,
        the share of hidden tokens that the model names.
    """
    was_training = model.training
    model.eval()
    summed, right, count = 0.0, 0, 0
    with torch.inference_mode():
        for batch in batches:
            logits = ask_language_model(model, batch, precision).logits
            hidden = batch["labels"][batch["labels"] != IGNORE_INDEX].to(logits.device)
            summed += masked_language_loss(logits, hidden).item() * len(hidden)
            right += int((logits.argmax(dim=-1) == hidden).sum())
            count += len(hidden)
    model.train(was_training)
    if count == 0:
        raise ValueError("no token is hidden in these texts, so nothing can be guessed; give more texts.")
    loss = torch.tensor(summed / count)
    return {"loss": loss.item(), "perplexity": loss.exp().item(), "accuracy": right / count}


def likely_words(
    model: BertForMaskedLM, tokenizer: Tokenizer, text: str, *, temperature: float = 1.0, count: int = 5
) -> list[tuple[str, float]]:
    """What the model would put in the place of `[MASK]`: the likeliest pieces of words and their probabilities.

    Raises:
        ValueError: the text does not hold the mask token once.
    """
    inputs = tokenizer(text, return_tensors="pt")
    hidden = inputs["input_ids"] == tokenizer.mask_token_id
    if hidden.sum() != 1:
        raise ValueError(f"the text hides {int(hidden.sum())} words; write {tokenizer.mask_token} once.")
    batch = {**inputs, "labels": torch.where(hidden, inputs["input_ids"], IGNORE_INDEX)}
    with torch.inference_mode():
        shares = soft_targets(ask_language_model(model, batch).logits[0], temperature)
    best = shares.topk(count)
    return list(zip(tokenizer.convert_ids_to_tokens(best.indices.tolist()), best.values.tolist(), strict=True))


# --- the models ---


def language_teacher(
    config: DistillConfig, *, steps: int = ADAPTATION_STEPS, head_only: bool = False
) -> BertForMaskedLM:
    """The pre-trained teacher as a frozen masked language model.

    A checkpoint that brings a language head (bert-base does) is taken as it is. One that has none (the packaged model
    was trained to embed sentences) gets one, which shares the embedding table, and is adapted to the texts that the
    course's classifier is fine-tuned on, without their labels. That is done once and found again in `artifacts/`.

    Args:
        config: names teacher and texts; `max_length`, `precision` and `device` count, nothing of the student does.
        steps: of the adaptation.
        head_only: adapt the new head and leave the encoder and the table as they are.

    Raises:
        ValueError: the teacher is no BERT.
    """
    device, precision = machine(config)
    model, has_head = load_language_model(config.teacher_source)
    if has_head:
        return freeze(model).to(device)
    data, tokenizer = load_splits(config), load_tokenizer(config.teacher_source)
    made_of = {
        "package": __version__,
        "checkpoint": checkpoint_version(config.teacher_source),
        "texts": dataset_digest(data.teacher_train),
        "max_length": config.max_length,
        "steps": steps,
        "head_only": head_only,
        "recipe": [BATCH_SIZE, LEARNING_RATE, HIDDEN_SHARE],
        "machine": str(machine(config)),
    }
    folder = artifacts.artifacts_dir() / "language_teachers" / artifacts.fingerprint(made_of)

    def adapt(target: Path) -> None:
        model.to(device)
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
                precision=precision,
                description="Adapting the language teacher",
            )
        save_model(target, model, tokenizer)
        artifacts.save_json(target / artifacts.MADE_OF, made_of)

    artifacts.get_or_build(folder, adapt)
    return freeze(load_language_model(str(folder))[0]).to(device)


def load_language_model(name: str) -> tuple[BertForMaskedLM, bool]:
    """A BERT with a masked-language head, and whether the checkpoint brought that head; a fresh one is drawn else.

    Raises:
        ValueError: the checkpoint is no BERT.
        FileNotFoundError: there is no such model, or it has no safetensors.
        ConnectionError: the model is on the hub and it can't be reached.
    """
    path = checkpoint_path(name)
    with hub.found(name, "model"):
        kind = AutoConfig.from_pretrained(path, **NO_CODE).model_type
    if kind != "bert":
        raise ValueError(f"a language teacher must be a BERT, {name!r} is a {kind}; name another teacher_checkpoint.")
    with quiet_transformers(), torch.random.fork_rng(), hub.found(name, "model"):
        torch.manual_seed(0)
        model, report = BertForMaskedLM.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **NO_CODE
        )
    copy_out_of_file(model)
    return model, not any(key.startswith("cls.predictions.transform") for key in report["missing_keys"])


def language_student(
    teacher: BertForMaskedLM, layers: Sequence[int] | None = None, *, random_start: bool = False, seed: int = 0
) -> BertForMaskedLM:
    """A masked language model made of the teacher's embeddings, some of its layers and its head.

    Args:
        teacher: a BERT.
        layers: which of its layers, 0 the lowest; None takes every second one (`features.every_second_layer`).
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
    student.base_model.encoder.layer = nn.ModuleList(student.base_model.encoder.layer[layer] for layer in layers)
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
    config: DistillConfig,
    texts: datasets.Dataset,
    tokenizer: Tokenizer,
    answers: TeacherLogits | None = None,
) -> PreTrainedModel:
    """Train a classifier on texts as `config` says, in place; with a teacher's `answers` by distillation."""
    texts = tokenize(texts, tokenizer, config.max_length)
    texts = texts if answers is None else attach(texts, answers)
    batches = training_batches(texts, tokenizer, config.batch_size, seed=config.seed)
    seed_everything(config.seed)
    train(classifier, batches, None, config=config, precision=machine(config).precision, description="Fine-tuning")
    return classifier.eval()


# --- the study ---


class Arm(NamedTuple):
    """One way to the student.

    Attributes:
        weights: of the three losses; None: the language model is not distilled.
        random_start: the student starts from random weights.
        task_only: the steps of the distillation are steps for the task instead.
        adapted: the student is cut from the language teacher; False: from the packaged model, as in chapter 02.
    """

    weights: Weights | None = WEIGHTS
    random_start: bool = False
    task_only: bool = False
    adapted: bool = True


FULL, SHORT = "all three losses", "no language distillation"
PLAIN, COURSE = "all steps for the task", "chapter 02's student, all steps for the task"
ARMS = {
    FULL: Arm(),
    "without the soft loss": Arm(Weights(soft=0)),
    "without the cosine loss": Arm(Weights(cosine=0)),
    "without the language loss": Arm(Weights(language=0)),
    "random start": Arm(random_start=True),
    SHORT: Arm(weights=None),
    PLAIN: Arm(weights=None, task_only=True),
    COURSE: Arm(weights=None, task_only=True, adapted=False),
}
STUDY = DistillConfig(
    train_size=500,
    transfer_size=23_500,
    max_steps=100,
    learning_rate=1e-4,
    warmup_ratio=0.1,
    alpha=0.0,
    precision="bfloat16",  # "auto" may choose otherwise on a busy machine
)
STUDY_STEPS = 200
SEEDS = (0, 1, 2, 3)
AGAIN = {"alpha": 0.9, "temperature": 2.0}  # of distillation from the fine-tuned classifier
AGAIN_ARMS = (FULL, SHORT, PLAIN, COURSE)
SENTENCES = ("the flight was [MASK] again", "i [MASK] this phone", "what a [MASK] day")


@functools.lru_cache(maxsize=1)  # a study runs all arms of a seed one after the other
def _batches_of_a_seed(config: DistillConfig, steps: int, adaptation_steps: int) -> list[Batch]:
    data, tokenizer = load_splits(config), load_tokenizer(config.teacher_source)
    batches = language_batches(tokenize(data.student_train, tokenizer, config.max_length), tokenizer, seed=config.seed)
    teacher = language_teacher(config, steps=adaptation_steps)
    return answered(batches, teacher, steps, machine(config).precision)


def run_arm(
    name: str,
    seed: int,
    *,
    config: DistillConfig = STUDY,
    steps: int = STUDY_STEPS,
    adaptation_steps: int = ADAPTATION_STEPS,
) -> dict[str, float]:
    """Distil the language model (or don't), then fine-tune it with few labels; some arms also by a second distillation.

    Returns:
        `language_loss` and `language_accuracy` of the student on validation before fine-tuning; on test after it
        `accuracy` and `nll`. For `AGAIN_ARMS` also `again_…`, with a classifier's answers to the same texts, and where
        all steps are for the task `transfer_…`, with its answers to those without labels, too.
    """
    arm, own = ARMS[name], config.replace(seed=seed)
    data, tokenizer = load_splits(own), load_tokenizer(own.teacher_source)
    precision = machine(own).precision
    teacher = language_teacher(own, steps=adaptation_steps)
    whole = teacher if arm.adapted else load_language_model(own.teacher_source)[0].to(teacher.device)
    student = language_student(whole, random_start=arm.random_start, seed=seed)
    if arm.weights is not None:
        batches = _batches_of_a_seed(own, steps, adaptation_steps)
        seed_everything(seed)
        train_language_model(student, batches, steps=steps, teacher=teacher, weights=arm.weights, precision=precision)
    guessed = language_loss(student, held_out_batches(data.validation, tokenizer, own.max_length), precision)
    measures = {"language_loss": guessed["loss"], "language_accuracy": guessed["accuracy"]}
    test = evaluation_batches(tokenize(data.test, tokenizer, own.max_length), tokenizer)
    for_task = own.replace(max_steps=own.max_steps + (steps if arm.task_only else 0))
    by_distillation = for_task.replace(**AGAIN)
    tunings = {"": (for_task, "train")}
    if name in AGAIN_ARMS:
        tunings["again_"] = (by_distillation, "train")
    if arm.task_only:
        tunings["transfer_"] = (by_distillation, "student_train")
    for prefix, (tuning, split) in tunings.items():
        answers = teacher_answers(tuning, data, split) if tuning.alpha else None
        classifier = as_classifier(student, tuning, data.label_names, random_start=arm.random_start)
        fine_tune(classifier, tuning, getattr(data, split), tokenizer, answers)
        measured = evaluate(classifier, test, precision)
        measures |= {f"{prefix}{metric}": measured[metric] for metric in ("accuracy", "nll")}
    return measures


def study() -> dict[str, Any]:
    """The paper's ablation in small.

    Beside what `run_study` returns: `teachers`, how well the language teacher guesses on validation with and without
    adaptation, and `words`, what it would put into some sentences at T = 1 and at the temperature of the study.
    """
    choices = {"config": STUDY.to_dict(), "steps": STUDY_STEPS, "adaptation_steps": ADAPTATION_STEPS, "again": AGAIN}
    arms = {name: functools.partial(run_arm, name) for name in ARMS}
    data, tokenizer = load_splits(STUDY), load_tokenizer(STUDY.teacher_source)
    held_out = held_out_batches(data.validation, tokenizer, STUDY.max_length)
    precision = machine(STUDY).precision
    teachers = {
        "not adapted": load_language_model(STUDY.teacher_source)[0].to(machine(STUDY).device),
        "head only": language_teacher(STUDY, head_only=True),
        "all weights": language_teacher(STUDY),
    }
    measured = {name: language_loss(model, held_out, precision) for name, model in teachers.items()}
    words = {
        sentence: {
            f"{temperature:g}": likely_words(teachers["all weights"], tokenizer, sentence, temperature=temperature)
            for temperature in (1.0, TEMPERATURE)
        }
        for sentence in SENTENCES
    }
    return run_study("distilbert", arms, SEEDS, choices=choices) | {"teachers": measured, "words": words}
