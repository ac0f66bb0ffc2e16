"""Chapter 14: distilling step by step. A teacher's explanations become a second task for the student.

Hsieh et al., "Distilling Step-by-Step!" (2023, arXiv 2305.02301), let a large language model explain why a label is
right: it writes a *rationale*. A small encoder-decoder then learns two tasks from each example. Asked with the prefix
`[label]` it writes the label, asked with `[rationale]` it writes the rationale, and the loss is
`L = L_label + λ · L_rationale`. When the student is used, it is asked for the label alone, so the rationales cost
nothing then.

The other way to learn from a rationale is to write it first and the label after it, as a large model does that thinks
aloud (chain of thought). That is one task with longer targets, see `explained_first`, and it costs the time to write
them at every question.

Shapes: B examples, S tokens of a source (prefix and question), L tokens of a target, V tokens in the vocabulary.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from kd_helpers import artifacts, own_data
from kd_helpers.checkpoints import Progress, build_parts
from kd_helpers.config import DistillConfig, require_whole
from kd_helpers.data import BucketBatchSampler, LengthSortedBatchSampler, text_id
from kd_helpers.loop import fit, recipe
from kd_helpers.losses import IGNORE_INDEX, token_hard_loss
from kd_helpers.methods.stories import story_tokenizer
from kd_helpers.models import (
    Batch,
    checkpoint_path,
    load_config,
    load_tokenizer,
    model_digest,
    model_inputs,
    require_eval_mode,
)
from kd_helpers.pretrained import NO_CODE, explained, quiet_transformers, some, tokenizer_digest
from kd_helpers.provenance import made_by
from kd_helpers.runtime import autocast, evaluating

LABEL, RATIONALE = "[label]", "[rationale]"  # the prefixes of the two tasks
ANSWER = "so the answer is"  # between a rationale and the label that follows from it
BLANK = "_"  # stands for a word in pre-training
BATCH_SIZE = 16
LEARNING_RATE = 3e-3
WARMUP = 0.05  # share of the steps in which the learning rate rises
MAX_LENGTH = 512  # tokens of a source or a target
SHARD = 512  # questions; a teacher that is interrupted while it explains loses at most these


class Example(NamedTuple):
    """A question with its answer.

    Attributes:
        question: the text that the model reads.
        label: the answer, a word or a few.
        rationale: why; "" where nobody has said so.
    """

    question: str
    label: str
    rationale: str = ""


# --- the model ---


def question_tokenizer(texts: Iterable[str], *, vocabulary: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on these texts that ends a text with `<end>`, as T5's does with `</s>`.

    The prefixes of the tasks and the blank are a token each, beside those of the vocabulary.
    """
    tokenizer = story_tokenizer(texts, vocabulary=vocabulary)
    tokenizer.add_tokens([LABEL, RATIONALE, BLANK])
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {tokenizer.eos_token}", special_tokens=[end]
    )
    return tokenizer


def make_seq2seq(
    tokenizer: PreTrainedTokenizerBase,
    *,
    width: int = 64,
    encoder_layers: int = 2,
    decoder_layers: int = 1,
    seed: int,
) -> T5ForConditionalGeneration:
    """A small T5 (Raffel et al. 2020, arXiv 1910.10683) with random weights and without dropout.

    Args:
        tokenizer: whose vocabulary the model reads and writes.
        width: numbers in a hidden state, a multiple of 16, since each head of the attention has 16 of them.
        encoder_layers: that read the question.
        decoder_layers: that write the answer.
        seed: draws the weights.

    Raises:
        TypeError: a size is no whole number.
        ValueError: a size is below 1, or `width` is no multiple of 16.
    """
    for name, value in {"width": width, "encoder_layers": encoder_layers, "decoder_layers": decoder_layers}.items():
        require_whole(name, value, minimum=1)
    if width % 16:
        raise ValueError(f"width is {width}; give a multiple of 16, since each head has 16 numbers.")
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=16,
        d_ff=4 * width,
        num_layers=encoder_layers,
        num_decoder_layers=decoder_layers,
        num_heads=width // 16,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return T5ForConditionalGeneration(config)


class Seq2Seq(NamedTuple):
    """An encoder-decoder and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_seq2seq(name: str) -> Seq2Seq:
    """A pre-trained encoder-decoder in float32, with its tokenizer.

    Args:
        name: of a checkpoint on the Hugging Face hub, such as `google/flan-t5-small`, or a folder.

    Raises:
        ValueError: the checkpoint is of another kind, lacks weights, or its tokenizer knows more tokens than it does.
        FileNotFoundError: there is no such model, or it has no safetensors.
        ConnectionError: the model is on the hub and it can't be reached.
    """
    config, path = load_config(name), checkpoint_path(name)
    if not config.is_encoder_decoder:
        raise ValueError(
            f"{name!r} is of the kind {config.model_type}, which is no encoder-decoder; take one such as "
            "google/flan-t5-small."
        )
    with quiet_transformers(), explained(name, path):
        model, report = AutoModelForSeq2SeqLM.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **NO_CODE
        )
    if lacking := sorted(report["missing_keys"]):
        raise ValueError(f"{name!r} lacks weights ({some(lacking)}); take a checkpoint that is whole.")
    tokenizer = load_tokenizer(name)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {name!r} knows {len(tokenizer):,} tokens, the model {model.config.vocab_size:,}; use "
            "the tokenizer that the model was made for."
        )
    return Seq2Seq(model, tokenizer)


# --- batches ---


def task_batches(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = BATCH_SIZE,
    *,
    seed: int,
    max_length: int = MAX_LENGTH,
) -> DataLoader:
    """Batches to train on, each with both tasks of the same examples, in another order in every epoch.

    Args:
        examples: an example without a rationale is learned as a label only.
        tokenizer: of the model.
        batch_size: B.
        seed: of the order.
        max_length: tokens of a source or a target; the rest is cut off.

    Returns:
        A loader of batches with the keys `label` and `rationale`. Each holds the `input_ids` and `attention_mask`
        `[B, S]` of the sources and the `labels` `[B, L]` of the targets, −100 where a target has ended. `rationale` is
        None where no example of the batch has one.

    Raises:
        ValueError: there are no examples, or one has no label.
    """
    rows, lengths = _encoded(examples, tokenizer, max_length)
    return _loader(rows, BucketBatchSampler(lengths, batch_size, seed=seed), tokenizer)


def measured_batches(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 250,
    *,
    max_length: int = MAX_LENGTH,
) -> DataLoader:
    """Batches to measure on, from the shortest example to the longest; otherwise as `task_batches`."""
    rows, lengths = _encoded(examples, tokenizer, max_length)
    return _loader(rows, LengthSortedBatchSampler(lengths, batch_size), tokenizer)


class _Row(NamedTuple):
    """The token ids of one example's two tasks."""

    label: tuple[list[int], list[int]]
    rationale: tuple[list[int], list[int]] | None


def _encoded(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[_Row], list[int]]:
    """The rows of some examples, and how many tokens each has."""
    if len(examples) == 0:
        raise ValueError("there are no examples; give at least one.")
    if unlabelled := sum(1 for example in examples if not example.label):
        raise ValueError(f"{unlabelled:,} of {len(examples):,} examples have no label; leave them out.")

    def ids(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]

    sources = {task: ids([f"{task} {example.question}" for example in examples]) for task in (LABEL, RATIONALE)}
    labels = ids([example.label for example in examples])
    rationales = ids([example.rationale for example in examples])
    rows = [
        _Row((sources[LABEL][i], labels[i]), (sources[RATIONALE][i], rationales[i]) if example.rationale else None)
        for i, example in enumerate(examples)
    ]
    return rows, [sum(map(len, row.label)) + sum(map(len, row.rationale or ())) for row in rows]


def _loader(rows: list[_Row], sampler: Any, tokenizer: PreTrainedTokenizerBase) -> DataLoader:
    pad_id = tokenizer.pad_token_id

    def collate(some: list[_Row]) -> dict[str, Batch | None]:
        explained = [row.rationale for row in some if row.rationale is not None]
        return {
            "label": _padded([row.label for row in some], pad_id),
            "rationale": _padded(explained, pad_id) if explained else None,
        }

    return DataLoader(
        rows,
        batch_sampler=sampler,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or each pass would draw from the one that everything else draws from
    )


def _padded(pairs: Sequence[tuple[list[int], list[int]]], pad_id: int) -> Batch:
    """Sources and targets as tensors, shorter ones filled up on the right."""
    sources, targets = zip(*pairs, strict=True)
    return {
        "input_ids": _filled(sources, pad_id),
        "attention_mask": _filled([[1] * len(source) for source in sources], 0),
        "labels": _filled(targets, IGNORE_INDEX),
    }


def _filled(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    length = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])


def with_blanks(texts: Sequence[str], *, seed: int, share: float = 0.3) -> list[Example]:
    """Examples to pre-train a model with: a text with blanks is the question, the whole text the answer.

    This is token masking as BART has it (Lewis et al. 2019, arXiv 1910.13461), a word at a time. It teaches a model of
    random weights to read the texts and to write their words, and needs neither labels nor rationales.

    Args:
        texts: without labels.
        seed: decides which words are left out.
        share: of the words that are left out.
    """
    rng = random.Random(seed)
    return [Example(" ".join(BLANK if rng.random() < share else word for word in text.split()), text) for text in texts]


# --- the loss ---


class StepByStepLoss(NamedTuple):
    """The loss of a batch, float32 scalars: what is trained, and its two parts in nats a token."""

    total: torch.Tensor
    label: torch.Tensor
    rationale: torch.Tensor


def step_by_step_loss(student: PreTrainedModel, *, rationale_weight: float = 1.0) -> Callable[[Any], StepByStepLoss]:
    """`L_label + λ · L_rationale` (arXiv 2305.02301, section 3.2), a loss for `loop.fit`.

    Each part is the cross-entropy of the target's tokens, a mean over the tokens of the batch. The authors' code weighs
    the two with α and 1 − α instead. That is α times the loss here with λ = (1 − α) / α.

    Args:
        student: an encoder-decoder.
        rationale_weight: λ; 0 learns the labels alone, and the rationales are not read.

    Raises:
        ValueError: λ is below 0 or not finite.
    """
    if not 0 <= rationale_weight < float("inf"):
        raise ValueError(f"rationale_weight is {rationale_weight}; give a number of at least 0.")

    def loss_of(batch: dict[str, Batch | None]) -> StepByStepLoss:
        label = target_loss(student, batch["label"])
        if rationale_weight == 0 or batch["rationale"] is None:
            return StepByStepLoss(label, label, torch.zeros_like(label))
        rationale = target_loss(student, batch["rationale"])
        return StepByStepLoss(label + rationale_weight * rationale, label, rationale)

    return loss_of


def target_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """The cross-entropy of a batch's targets given its sources: a float32 scalar, nats a token."""
    return token_hard_loss(target_logits(model, batch), batch["labels"].to(model.device, non_blocking=True))


def target_logits(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """What the model predicts for each token of the targets from the source and the tokens before it, `[B, L, V]`."""
    read = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"].to(model.device, non_blocking=True))
    return model(**model_inputs(model, batch), decoder_input_ids=read, use_cache=False).logits


# --- training ---


def train_seq2seq(
    model: PreTrainedModel,
    batches: DataLoader,
    *,
    steps: int,
    rationale_weight: float = 1.0,
    learning_rate: float = LEARNING_RATE,
    precision: torch.dtype = torch.float32,
    after_step: Callable[[int], None] | None = None,
    checkpoints: Path | None = None,
    checkpoint_steps: int = 0,
    description: str | None = "Training the student",
) -> Progress:
    """`loop.fit` with the loss, the optimiser and the schedule of this chapter.

    Args:
        model: learns, in place; it is in eval mode afterwards.
        batches: of `task_batches`, repeated as often as it takes.
        steps: optimiser steps.
        rationale_weight: λ, see `step_by_step_loss`.
        learning_rate: its peak.
        precision: of the matrix products; losses are always float32.
        after_step: see `loop.fit`, as are the others.
        checkpoints: a folder for checkpoints.
        checkpoint_steps: steps between two of them, beside those after each epoch.
        description: of the progress bar; None shows none.

    Returns:
        See `loop.fit`; the losses are `total`, `label` and `rationale`.
    """
    progress = fit(
        model,
        batches,
        step_by_step_loss(model, rationale_weight=rationale_weight),
        steps=steps,
        **recipe(DistillConfig(learning_rate=learning_rate, warmup_ratio=WARMUP), steps),
        precision=precision,
        after_step=after_step,
        checkpoints=checkpoints,
        checkpoint_steps=checkpoint_steps,
        description=description,
    )
    model.eval()
    return progress


# --- measuring and writing ---


class Scores(NamedTuple):
    """How well a model knows the targets of one task.

    Attributes:
        accuracy: share of the targets that it writes exactly.
        nats: negative log-likelihood of a target's token, mean over all tokens.
    """

    accuracy: float
    nats: float


def measure(
    model: PreTrainedModel, batches: Iterable[Any], task: str = "label", precision: torch.dtype = torch.float32
) -> Scores:
    """Score a model on the targets of one task, without writing them.

    A model that writes the likeliest token each time (greedy) writes exactly the target if, and only if, each token of
    the target is the likeliest one after those before it. So one forward pass tells what it would write.

    Args:
        model: its mode is the same afterwards.
        batches: of `measured_batches`.
        task: "label" or "rationale".
        precision: dtype of the matrix products.

    Raises:
        ValueError: no example has a target for this task.
    """
    right, nats, examples, tokens = 0, 0.0, 0, 0
    with evaluating(model), torch.no_grad(), autocast(model.device, precision):
        for batch in batches:
            if batch[task] is None:
                continue
            labels = batch[task]["labels"].to(model.device)
            logits, counts = target_logits(model, batch[task]), labels != IGNORE_INDEX
            right += int(((logits.argmax(dim=-1) == labels) | ~counts).all(dim=1).sum())
            nats += token_hard_loss(logits, labels).item() * int(counts.sum())
            examples, tokens = examples + len(labels), tokens + int(counts.sum())
    if not examples:
        raise ValueError(f"no example has a {task}, so there is nothing to measure; give some that have.")
    return Scores(right / examples, nats / tokens)


def write_targets(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    *,
    task: str = LABEL,
    new_tokens: int = 64,
    batch_size: int = 64,
    max_length: int = MAX_LENGTH,
) -> list[str]:
    """Let a model answer questions, or explain them: the likeliest token each time.

    Args:
        model: its mode is the same afterwards.
        tokenizer: of the model.
        questions: without a prefix.
        task: `LABEL` or `RATIONALE`.
        new_tokens: of an answer, at most.
        batch_size: questions that are answered together, those of similar length.
        max_length: tokens of a question; the rest is cut off.

    Returns:
        An answer to each question, in their order.
    """
    sources = [f"{task} {question}" for question in questions]
    in_order = sorted(range(len(sources)), key=lambda row: len(sources[row]))
    written = [""] * len(sources)
    with evaluating(model), torch.no_grad():
        for start in range(0, len(in_order), batch_size):
            rows = in_order[start : start + batch_size]
            encoded = tokenizer(
                [sources[row] for row in rows],
                padding=True,
                truncation=True,
                max_length=max_length,
                return_tensors="pt",
            )
            tokens = model.generate(
                **model_inputs(model, encoded), max_new_tokens=new_tokens, do_sample=False, num_beams=1
            )
            for row, text in zip(rows, tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True):
                written[row] = text.strip()
    return written


# --- the rationale first ---


def explained_first(example: Example) -> Example:
    """The same question with one target: the rationale, then the label (chain of thought).

    Raises:
        ValueError: the example has no rationale.
    """
    if not example.rationale:
        raise ValueError(f"the question {own_data.short(example.question)} has no rationale to begin with.")
    return Example(example.question, f"{example.rationale} {ANSWER} {example.label}")


def split_answer(written: str) -> tuple[str, str]:
    """Rationale and label of a text that a model wrote as `explained_first` has them; the label is "" if it has none"""
    rationale, _, label = written.rpartition(f" {ANSWER} ")
    return (rationale.strip(), label.strip()) if rationale else (written.strip(), "")


def cached_explanations(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    *,
    new_tokens: int = 64,
    root: Path | None = None,
) -> list[Example]:
    """Let a teacher explain and answer questions; found again in the cache, or written and kept there.

    They are stored under a fingerprint of the teacher, the tokenizer, the questions, what was asked for and the code.
    An interrupted pass goes on after the last `SHARD` questions that were finished.

    Args:
        teacher: frozen; it has learned targets of `explained_first`.
        tokenizer: of the teacher.
        questions: without a prefix.
        new_tokens: of an explanation and its label, at most.
        root: the artifacts folder that holds the cache; `artifacts_dir()` when left out.

    Returns:
        The questions, each with the teacher's label and rationale. Where the teacher came to no answer the label is "".

    Raises:
        ValueError: the teacher is in train mode.
    """
    require_eval_mode(teacher)
    key = artifacts.fingerprint(
        {
            **made_by("kd_helpers.methods.rationales"),
            "teacher": model_digest(teacher),
            "tokenizer": tokenizer_digest(tokenizer),
            "questions": list(questions),
            "new_tokens": new_tokens,
        }
    )
    root = artifacts.artifacts_dir() if root is None else root
    folder, shards = root / "teacher_rationales" / key, root / "checkpoints" / key

    def write_some(_number: int, some: Sequence[str], _bar: tqdm, target: Path) -> None:
        artifacts.save_json(target / "written.json", write_targets(teacher, tokenizer, some, new_tokens=new_tokens))

    def write(target: Path) -> None:
        made = build_parts(
            shards, questions, write_some, size=SHARD, description="The teacher explains", unit="question"
        )
        written = [text for part in made for text in artifacts.load_json(part / "written.json")]
        artifacts.save_json(target / "written.json", written)

    artifacts.get_or_build(folder, write)
    shutil.rmtree(shards, ignore_errors=True)
    answers = map(split_answer, artifacts.load_json(folder / "written.json"))
    return [
        Example(question, label, rationale) for question, (rationale, label) in zip(questions, answers, strict=True)
    ]


# --- examples from elsewhere ---


def read_examples(
    source: str, *, text_column: str = "text", label_column: str = "label", rationale_column: str = "rationale"
) -> list[Example]:
    """Questions with labels and rationales from a file, for instance rationales that a large model wrote.

    Args:
        source: path of a CSV, TSV, JSON, JSON Lines or Parquet file.
        text_column: where the questions stand.
        label_column: where their labels stand.
        rationale_column: where the rationales stand; a row may have none.

    Returns:
        One example for each question. Copies of a question are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file can't be read, a column is missing, a row has no question or no label, or copies of a
            question have different labels.
    """
    try:
        frame = own_data.read_file(source, text_column=text_column, label_column=label_column)
    except ValueError as error:
        raise ValueError(str(error).replace(f", or {own_data.WITHOUT_LABELS}", "")) from error
    try:
        reasons = own_data.read_file(source, text_column=rationale_column, label_column="", label_needed=False)
    except ValueError as error:
        raise ValueError(str(error).replace("text_column", "rationale_column")) from error
    own_data.unify_numbers({"train": frame})
    examples: dict[str, Example] = {}
    rows = zip(frame["text"], frame["label"], reasons["text"], frame["place"], strict=True)
    for question, label, rationale, place in rows:
        if not question or label is None:
            raise ValueError(f"{place}: there is no {'label' if question else 'text'}; give one, or remove the row.")
        key = own_data.spelled(question).casefold()
        before = examples.setdefault(key, Example(question, label, rationale))
        if before.label != label:
            raise ValueError(
                f"{place}: the text {own_data.short(question)} has the label {label!r}, a copy of it {before.label!r}; "
                "keep the right one."
            )
    return list(examples.values())


def split_examples(examples: Sequence[Example], *, held_out: int) -> tuple[list[Example], list[Example]]:
    """Cut off some examples to measure with, always the same ones, whatever order the file has.

    Args:
        examples: all different.
        held_out: how many to measure with.

    Returns:
        The examples to learn from, and the others.

    Raises:
        ValueError: there would be none to learn from, or none to measure with.
    """
    require_whole("held_out", held_out, minimum=1)
    if held_out >= len(examples):
        raise ValueError(f"held_out is {held_out}, there are {len(examples)} examples; give fewer than that.")
    in_order = sorted(examples, key=lambda example: text_id(own_data.spelled(example.question).casefold()))
    return in_order[held_out:], in_order[:held_out]
