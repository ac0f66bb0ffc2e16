"""Chapter 05: training and measuring.

`distill_epoch` and `evaluate` are the two functions everything else repeats; `fine_tuned_teacher` and
`distill` are the two runs made of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import filelock
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, f1_score, recall_score
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kd_helpers import __version__, artifacts
from kd_helpers.config import PRESETS, DistillConfig, pick_device, pick_precision, seed_everything
from kd_helpers.data import DataSplits, evaluation_batches, load_splits, tokenize, training_batches
from kd_helpers.lean import lean_training
from kd_helpers.losses import DistillationLoss, distillation_loss
from kd_helpers.models import (
    checkpoint_version,
    freeze,
    load_saved,
    load_student,
    load_teacher,
    load_tokenizer,
    load_tokenizers,
    model_inputs,
    save_model,
)
from kd_helpers.optim import make_optimizer, make_scheduler
from kd_helpers.teacher_logits import TeacherLogits, ask, attach, autocast, cached_logits

Batch = dict[str, torch.Tensor]


class EpochLosses(NamedTuple):
    """The losses of every step, each a float32 tensor `[steps]` on the CPU."""

    total: torch.Tensor
    soft: torch.Tensor
    hard: torch.Tensor

    def mean(self) -> dict[str, float]:
        """The mean of each over the steps."""
        return {name: values.mean().item() for name, values in self._asdict().items()}


def distill_epoch(
    student: nn.Module,
    batches: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
    *,
    temperature: float,
    alpha: float,
    teacher: nn.Module | None = None,
    precision: torch.dtype = torch.float32,
    max_grad_norm: float = 1.0,
) -> EpochLosses:
    """Train the student on every batch once.

    Args:
        student: the model that learns, in place.
        batches: `input_ids`, `attention_mask`, `labels` and, when there is no `teacher`, `teacher_logits`.
        optimizer: of the student's parameters.
        scheduler: moves the learning rate after each step.
        temperature: T of the soft loss.
        alpha: weight of the soft loss.
        teacher: a frozen model to ask for every batch (online); None reads the answers that the batches
            carry (cached). With alpha 0 neither is needed.
        precision: dtype of the matrix products; the losses are float32 always.
        max_grad_norm: the gradient is scaled down to this norm when it is longer.

    Raises:
        ValueError: teacher and student are one model, the teacher is in train mode, or the shapes differ.
    """
    if teacher is student:
        raise ValueError("teacher and student are the same model, so there is nothing to learn; load two.")
    device = next(student.parameters()).device
    student.train()
    steps: list[DistillationLoss] = []
    for batch in batches:
        teacher_logits = batch.get("teacher_logits") if teacher is None else ask(teacher, batch, precision)
        with autocast(device, precision):
            student_logits = student(**model_inputs(student, batch)).logits
        loss = distillation_loss(
            student_logits,
            None if teacher_logits is None else teacher_logits.to(device, non_blocking=True),
            batch["labels"].to(device, non_blocking=True),
            temperature=temperature,
            alpha=alpha,
        )
        optimizer.zero_grad()
        loss.total.backward()
        nn.utils.clip_grad_norm_(student.parameters(), max_grad_norm)
        optimizer.step()
        scheduler.step()
        # Kept as tensors: .item() here would make a GPU wait at every step.
        steps.append(DistillationLoss(*(part.detach() for part in loss)))
    if not steps:
        raise ValueError("there are no batches to train on; give at least one.")
    return EpochLosses(*(torch.stack(parts).cpu() for parts in zip(*steps, strict=True)))


class Predictions(NamedTuple):
    """What a model says of N texts: `ids` int64 `[N]`, `logits` float32 `[N, C]`, `labels` int64 `[N]`."""

    ids: torch.Tensor
    logits: torch.Tensor
    labels: torch.Tensor


def predict(model: nn.Module, batches: Iterable[Batch], precision: torch.dtype = torch.float32) -> Predictions:
    """The model's logits for every text, dropout off, sorted by id. The model's mode is put back after."""
    device = next(model.parameters()).device
    was_training = model.training
    ids, logits, labels = [], [], []
    try:
        model.eval()
        with torch.inference_mode(), autocast(device, precision):
            for batch in batches:
                logits.append(model(**model_inputs(model, batch)).logits.float().cpu())
                ids.append(batch["id"])
                labels.append(batch["labels"])
    finally:
        model.train(was_training)
    order = torch.argsort(torch.cat(ids))
    return Predictions(torch.cat(ids)[order], torch.cat(logits)[order], torch.cat(labels)[order])


def evaluate(model: nn.Module, batches: Iterable[Batch], precision: torch.dtype = torch.float32) -> dict[str, float]:
    """Accuracy, macro recall, macro F1, NLL and ECE of a model on labelled batches."""
    predictions = predict(model, batches, precision)
    return classification_metrics(predictions.logits, predictions.labels)


def classification_metrics(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """The course's five measures.

    Args:
        logits: `[N, C]`.
        labels: `[N]`, every one given.

    Returns:
        `accuracy`, `macro_recall` (TweetEval's measure for sentiment) and `macro_f1` in [0, 1], the latter two means
        over the classes that occur among the labels; `nll`, the mean negative log-likelihood of the label in nats;
        `ece`, the expected calibration error in [0, 1].
    """
    predicted = logits.argmax(dim=-1)
    macro = {"average": "macro", "labels": labels.unique(), "zero_division": 0}
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_recall": float(recall_score(labels, predicted, **macro)),
        "macro_f1": float(f1_score(labels, predicted, **macro)),
        "nll": F.cross_entropy(logits.float(), labels).item(),
        "ece": expected_calibration_error(logits, labels),
    }


def reliability(logits: torch.Tensor, labels: torch.Tensor, bins: int = 15) -> dict[str, np.ndarray]:
    """Confidence against accuracy in bins of equal width (Guo et al. 2017, arXiv 1706.04599).

    Returns:
        `share` of the texts, mean `confidence` and `accuracy` of each bin, each `[bins]`; an empty bin
        has share 0 and NaN for the other two.
    """
    confidence, predicted = F.softmax(logits.float(), dim=-1).max(dim=-1)
    correct = (predicted == labels).float()
    index = (confidence * bins).long().clamp(max=bins - 1)
    count = torch.bincount(index, minlength=bins)
    return {
        "share": (count / len(labels)).numpy(),
        "confidence": (torch.bincount(index, confidence, bins) / count).numpy(),
        "accuracy": (torch.bincount(index, correct, bins) / count).numpy(),
    }


def expected_calibration_error(logits: torch.Tensor, labels: torch.Tensor, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over the bins, weighted by their share (1706.04599)."""
    curve = reliability(logits, labels, bins)
    return float(np.nansum(curve["share"] * np.abs(curve["confidence"] - curve["accuracy"])))


class Machine(NamedTuple):
    """Where and how a run computes."""

    device: torch.device
    precision: torch.dtype


def machine(config: DistillConfig) -> Machine:
    """The device and the precision that a configuration asks for."""
    device = pick_device(config.device)
    return Machine(device, pick_precision(config.precision, device))


def train(
    model: PreTrainedModel,
    batches: DataLoader[Any],
    validation: DataLoader[Any] | None,
    *,
    config: DistillConfig,
    precision: torch.dtype,
    description: str,
) -> list[dict[str, Any]]:
    """Repeat `distill_epoch` and `evaluate` until the configured steps are made; no `validation`, no `evaluate`.

    Returns:
        One entry an epoch: epoch, steps, the losses of each step and the metrics on validation.
    """
    steps = config.max_steps or config.epochs * len(batches)
    history: list[dict[str, Any]] = []
    done = 0
    with (
        lean_training(model, batches.dataset["input_ids"][:]),
        tqdm(total=steps, desc=description, unit="step", leave=False) as bar,
    ):
        optimizer = make_optimizer(model, learning_rate=config.learning_rate, weight_decay=config.weight_decay)
        scheduler = make_scheduler(optimizer, steps=steps, warmup_ratio=config.warmup_ratio)
        for epoch in range(math.ceil(steps / len(batches))):
            batches.batch_sampler.set_epoch(epoch)
            losses = distill_epoch(
                model,
                _counted(itertools.islice(batches, steps - done), bar),
                optimizer,
                scheduler,
                temperature=config.temperature,
                alpha=config.alpha,
                precision=precision,
                max_grad_norm=config.max_grad_norm,
            )
            done += len(losses.total)
            metrics = {}
            if validation is not None:
                metrics = evaluate(model, validation, precision)
                bar.set_postfix(validation=f"{metrics['accuracy']:.1%}")
            history.append(
                {
                    "epoch": epoch + 1,
                    "step": done,
                    "losses": {name: values.tolist() for name, values in losses._asdict().items()},
                    "validation": metrics,
                }
            )
    return history


def _counted(batches: Iterable[Batch], bar: tqdm) -> Iterable[Batch]:
    for batch in batches:
        yield batch
        bar.update()


def fine_tuned_teacher(config: DistillConfig, data: DataSplits, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The teacher, fine-tuned on its labelled texts and frozen.

    It is fine-tuned once and found again in `artifacts/` by every later notebook and run: nothing of the
    student, the temperature, alpha or `config.seed` changes it. With `teacher_epochs=0` it is the checkpoint's own.
    """
    device, precision = machine(config)
    if config.teacher_epochs == 0:
        return freeze(load_teacher(config, data.label_names)).to(device)
    recipe = DistillConfig(
        preset=config.preset,
        teacher_checkpoint=config.teacher_checkpoint,
        alpha=0.0,
        epochs=config.teacher_epochs,
        learning_rate=config.teacher_learning_rate,
        max_length=config.max_length,
        warmup_ratio=0.1,
        teacher_train_size=config.teacher_train_size,
        precision=str(precision).removeprefix("torch."),
        device=device.type,
    )
    made_of = {
        "package": __version__,
        "recipe": recipe.to_dict(),
        "checkpoint": checkpoint_version(config.teacher_source),
        "labels": data.label_names,
        "texts": dataset_digest(data.teacher_train),
    }
    folder = artifacts.artifacts_dir() / "teachers" / artifacts.fingerprint(made_of)

    def fine_tune(target: Path) -> None:
        teacher = load_teacher(recipe, data.label_names).to(device)
        validation = evaluation_batches(tokenize(data.validation, tokenizer, recipe.max_length), tokenizer)
        texts = tokenize(data.teacher_train, tokenizer, recipe.max_length)
        batches = training_batches(texts, tokenizer, recipe.batch_size, seed=recipe.seed)
        # What a caller draws next must not depend on whether the teacher was found or made.
        with torch.random.fork_rng():
            torch.manual_seed(recipe.seed)
            history = train(
                teacher, batches, validation, config=recipe, precision=precision, description="Fine-tuning the teacher"
            )
        save_model(target, teacher, tokenizer)
        artifacts.save_json(target / "history.json", history)
        artifacts.save_json(target / "made_of.json", made_of)

    artifacts.get_or_build(folder, fine_tune)
    return freeze(load_saved(folder)).to(device)


def teacher_answers(config: DistillConfig, data: DataSplits, split: str) -> TeacherLogits:
    """The logits of the configured teacher for one split of the data, asked for once and kept."""
    tokenizer = load_tokenizer(config.teacher_source)
    teacher = fine_tuned_teacher(config, data, tokenizer)
    tokenized = tokenize(getattr(data, split), tokenizer, config.max_length)
    return cached_logits(teacher, tokenized, tokenizer, precision=machine(config).precision)


def dataset_digest(dataset: datasets.Dataset) -> str:
    """A digest of ids, texts and labels."""
    return artifacts.fingerprint({column: dataset[column][:] for column in ("id", "text", "label")})


@dataclasses.dataclass(frozen=True)
class DistillResult:
    """A finished run.

    Attributes:
        config: what was asked for.
        student: the trained student, in eval mode.
        tokenizer: its tokenizer.
        history: one entry an epoch (see `train`).
        metrics: `validation` and `test` (see `classification_metrics`), `steps`, `labelled` and `unlabelled` texts
            that were trained on, `seconds`.
        predictions: the student's logits on the test split.
        folder: where all of it was saved.
    """

    config: DistillConfig
    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    history: list[dict[str, Any]]
    metrics: dict[str, Any]
    predictions: Predictions
    folder: Path


def distill(
    config: DistillConfig,
    *,
    data: DataSplits | None = None,
    answers: TeacherLogits | None = None,
    output_dir: str | Path | None = None,
) -> DistillResult:
    """Distil a student as `config` says: the whole course in one call.

    Args:
        config: every choice.
        data: the splits, if they are loaded already.
        answers: the teacher's logits for `data.student_train`, in place of those of the preset's
            fine-tuned teacher. An arm of the comparison is a run with other answers.
        output_dir: where to save; None saves under `artifacts/runs`.

    Returns:
        The student with its history and metrics, saved.
    """
    device, precision = machine(config)
    tokenizer = load_tokenizers(config).student
    data = data or load_splits(config)
    tokenized = tokenize(data.student_train, tokenizer, config.max_length)
    if answers is None and config.alpha > 0:
        answers = teacher_answers(config, data, "student_train")
    if answers is not None:
        tokenized = attach(tokenized, answers)

    seed_everything(config.seed)
    start = time.perf_counter()
    student = load_student(config, data.label_names).to(device)
    batches = training_batches(tokenized, tokenizer, config.batch_size, seed=config.seed)
    held_out = {
        split: evaluation_batches(tokenize(getattr(data, split), tokenizer, config.max_length), tokenizer)
        for split in ("validation", "test")
    }
    history = train(
        student, batches, held_out["validation"], config=config, precision=precision, description="Distilling"
    )
    predictions = predict(student, held_out["test"], precision)
    metrics: dict[str, Any] = {
        "validation": history[-1]["validation"],
        "test": classification_metrics(predictions.logits, predictions.labels),
        "steps": history[-1]["step"],
        "labelled": len(data.train),
        "unlabelled": len(data.transfer),
        "seconds": time.perf_counter() - start,
    }
    made_of = {
        "package": __version__,
        "config": config.to_dict(),
        "machine": str(machine(config)),
        "checkpoint": config.student_source and checkpoint_version(config.student_source),
        "labels": data.label_names,
        "texts": [dataset_digest(part) for part in (data.student_train, data.validation, data.test)],
        "answers": None if answers is None else answers.digest(),
    }
    folder = Path(output_dir or artifacts.artifacts_dir() / "runs" / artifacts.fingerprint(made_of))
    result = DistillResult(config, student.eval(), tokenizer, history, metrics, predictions, folder)
    save_run(result)
    return result


def save_run(result: DistillResult) -> None:
    """Save a run in its folder: `student/` (weights, tokenizer, model card), then three JSON files.

    `metrics.json` goes first and comes last: where it stands, the run is whole.
    """

    def save_student(target: Path) -> None:
        save_model(target, result.student, result.tokenizer)
        (target / "README.md").write_text(model_card(result), encoding="utf-8")

    result.folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(result.folder / ".lock"):
        (result.folder / "metrics.json").unlink(missing_ok=True)
        artifacts.write_folder(result.folder / "student", save_student)
        artifacts.save_json(result.folder / "config.json", result.config.to_dict())
        artifacts.save_json(result.folder / "history.json", result.history)
        artifacts.save_json(result.folder / "metrics.json", result.metrics)


def model_card(result: DistillResult) -> str:
    """The student's README in the hub's format: how it was made and what it scores."""
    config, test = result.config, result.metrics["test"]
    measured = "\n".join(f"| {name} | {value:.4f} |" for name, value in test.items())
    names = ", ".join(result.student.config.id2label.values())
    signal = "on labels alone"
    if config.alpha > 0:
        signal = (
            f"with knowledge distillation at temperature {config.temperature:g} and alpha {config.alpha:g} "
            "(the weight of the teacher's soft targets)"
        )
    return f"""---
library_name: transformers
pipeline_tag: text-classification
tags: [knowledge-distillation]
---
# A small classifier: {names}

Trained {signal}, on {result.metrics["labelled"]:,} labelled and {result.metrics["unlabelled"]:,} unlabelled texts of
{Path(config.data).name or PRESETS[config.preset].data} for {result.metrics["steps"]:,} steps, seed {config.seed}.
Preset {config.preset}, teacher {Path(config.teacher_checkpoint).name or config.teacher_source}.

| test split | |
|---|---|
{measured}

```python
from transformers import pipeline

pipeline("text-classification", "path/to/this/folder")("a text to classify")
```
"""
