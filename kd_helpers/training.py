"""Chapter 05: training and measuring.

`distill_epoch` and `evaluate` are the two functions everything else repeats; `fine_tuned_teacher` and
`distill` are the two runs made of them. Either goes on where it was cut off, and is found again when it is done.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from accelerate.utils.memory import should_reduce_batch_size
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, recall_score
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kd_helpers import __version__, artifacts
from kd_helpers.checkpoints import Progress, checkpoints_dir, last_checkpoint, load_checkpoint, save_checkpoint
from kd_helpers.config import (
    PRESETS,
    DistillConfig,
    pick_device,
    pick_precision,
    require_whole,
    seed_everything,
)
from kd_helpers.data import (
    DataSplits,
    evaluation_batches,
    load_splits,
    require_disjoint,
    tokenize,
    training_batches,
)
from kd_helpers.lean import lean_training
from kd_helpers.losses import IGNORE_INDEX, distillation_loss
from kd_helpers.models import (
    checkpoint_version,
    freeze,
    load_saved,
    load_student,
    load_teacher,
    load_tokenizer,
    load_tokenizers,
    model_inputs,
    require_teacher_and_student,
    save_model,
    warn_if_swapped,
)
from kd_helpers.optim import make_optimizer, make_scheduler
from kd_helpers.teacher_logits import TeacherLogits, ask, attach, autocast, cached_logits

Batch = dict[str, torch.Tensor]


class EpochLosses(NamedTuple):
    """The losses of every step, and the norm of its gradient before clipping: float32 tensors `[steps]` on the CPU."""

    total: torch.Tensor
    soft: torch.Tensor
    hard: torch.Tensor
    gradient_norm: torch.Tensor

    def mean(self) -> dict[str, float]:
        """The mean of each over the steps."""
        return {name: values.mean().item() for name, values in self._asdict().items()}


class DivergedError(FloatingPointError):
    """Training met a loss or a gradient that is not a finite number; the step it belongs to was not made.

    Args:
        step: which step, counted from 1.
        parts: total, soft and hard loss and the norm of the gradient, by name.
        checkpoint: the last good one.
    """

    def __init__(self, step: int, parts: dict[str, float], checkpoint: Path | None = None) -> None:
        self.step, self.parts, self.checkpoint = step, parts, checkpoint
        values = ", ".join(f"{name} {value:g}" for name, value in parts.items())
        kept = "" if checkpoint is None else f"; the last good checkpoint is {checkpoint}"
        super().__init__(
            f"training diverged at step {step} ({values}): lower the learning rate, or train in float32{kept}."
        )


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
        ValueError: teacher and student share weights, are swapped, or name their classes differently; the teacher is
            in train mode, or the shapes differ.
        DivergedError: a loss or a gradient is not finite. The student keeps the weights of the step before.
    """
    require_teacher_and_student(teacher, student)
    device = next(student.parameters()).device
    student.train()
    steps: list[tuple[torch.Tensor, ...]] = []
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
        norm = nn.utils.clip_grad_norm_(student.parameters(), max_grad_norm)
        # A GPU has to be waited for here, once a step. Without, a single bad step would spoil every weight unseen.
        require_finite(len(steps) + 1, loss.total + norm, {**loss._asdict(), "gradient norm": norm})
        optimizer.step()
        scheduler.step()
        steps.append((*(part.detach() for part in loss), norm))
    if not steps:
        raise ValueError("there are no batches to train on; give at least one.")
    return EpochLosses(*(torch.stack(parts).cpu() for parts in zip(*steps, strict=True)))


def require_finite(step: int, decisive: torch.Tensor, parts: dict[str, torch.Tensor]) -> None:
    """Stop a training step whose `decisive` value, a scalar, is not finite; `parts` are named in the error.

    Raises:
        DivergedError: it is not finite.
    """
    if not torch.isfinite(decisive.detach()):
        raise DivergedError(step, {name: value.item() for name, value in parts.items()})


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
    if not ids:
        raise ValueError("there are no batches to predict; give at least one.")
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
    if bool((labels == IGNORE_INDEX).any()):
        raise ValueError("some texts have no label, so they can't be scored; leave them out.")
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
    checkpoints: Path | None = None,
    checkpoint_steps: int = 0,
) -> Progress:
    """Repeat `distill_epoch` and `evaluate` until the configured steps are made; no `validation`, no `evaluate`.

    Args:
        model: the model that learns, in place.
        batches: of `training_batches`.
        validation: batches to evaluate on after each epoch.
        config: temperature, alpha, and all that optimiser and scheduler need.
        precision: of the matrix products.
        description: of the progress bar.
        checkpoints: a folder for checkpoints, written after each epoch. Training goes on from the newest in it.
        checkpoint_steps: write one after every so many steps, too.

    Returns:
        The progress at the end. Its history has an entry an epoch: `epoch`, `step` (so many were made by then),
        `losses` of each step with the norm of its gradient, and the measures on `validation`.

    Raises:
        DivergedError: a loss or a gradient is not finite; the last good checkpoint is named.
        MemoryError: a step needs more memory than there is; a batch size to try is named.
    """
    per_epoch = len(batches)
    steps = config.max_steps or config.epochs * per_epoch
    with lean_training(model, batches.dataset["input_ids"][:]):
        optimizer = make_optimizer(model, learning_rate=config.learning_rate, weight_decay=config.weight_decay)
        scheduler = make_scheduler(optimizer, steps=steps, warmup_ratio=config.warmup_ratio)
        progress = Progress() if checkpoints is None else load_checkpoint(checkpoints, model, optimizer, scheduler)
        started = time.perf_counter() - progress.seconds

        def keep() -> None:
            progress.seconds = time.perf_counter() - started
            if checkpoints is not None:
                save_checkpoint(checkpoints, model, optimizer, scheduler, progress)

        with tqdm(total=steps, initial=progress.step, desc=description, unit="step", leave=False) as bar:
            for epoch in range(progress.step // per_epoch, math.ceil(steps / per_epoch)):
                batches.batch_sampler.set_epoch(epoch, start=progress.step - epoch * per_epoch)
                rest = iter(batches)
                end = min(steps, (epoch + 1) * per_epoch)
                while progress.step < end:
                    pause = min(end, _next_multiple(progress.step, checkpoint_steps) if checkpoint_steps else end)
                    with _failures_explained(progress, config, checkpoints):
                        losses = distill_epoch(
                            model,
                            _counted(itertools.islice(rest, pause - progress.step), bar),
                            optimizer,
                            scheduler,
                            temperature=config.temperature,
                            alpha=config.alpha,
                            precision=precision,
                            max_grad_norm=config.max_grad_norm,
                        )
                    progress.add({name: values.tolist() for name, values in losses._asdict().items()})
                    if progress.step < end:
                        keep()
                metrics = {}
                if validation is not None:
                    metrics = evaluate(model, validation, precision)
                    bar.set_postfix(validation=f"{metrics['accuracy']:.1%}")
                progress.finish_epoch(metrics)
                keep()
    return progress


def _next_multiple(step: int, of: int) -> int:
    return (step // of + 1) * of


@contextmanager
def _failures_explained(progress: Progress, config: DistillConfig, checkpoints: Path | None) -> Iterator[None]:
    """Say of a step that failed which one of the whole run it is, and what to do."""
    try:
        yield
    except DivergedError as error:
        last = None if checkpoints is None else last_checkpoint(checkpoints)
        raise DivergedError(progress.step + error.step, error.parts, last) from None
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
            raise
        smaller = config.batch_size // 2
        remedy = f"try batch_size={smaller}" if smaller else f"try a max_length below {config.max_length}"
        raise MemoryError(
            f"a step with batch_size={config.batch_size} needs more memory than there is; {remedy}."
        ) from error


def _counted(batches: Iterable[Batch], bar: tqdm) -> Iterable[Batch]:
    for batch in batches:
        yield batch
        bar.update()


def fine_tuned_teacher(
    config: DistillConfig, data: DataSplits, tokenizer: PreTrainedTokenizerBase, *, checkpoint_steps: int = 0
) -> PreTrainedModel:
    """The teacher, fine-tuned on its labelled texts and frozen.

    It is fine-tuned once and found again in `artifacts/` by every later notebook and run: nothing of the
    student, the temperature, alpha or `config.seed` changes it. With `teacher_epochs=0` it is the checkpoint's own.
    Cut off, it goes on from its last checkpoint: after each epoch, and every `checkpoint_steps` steps if that is not 0.
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
    key = artifacts.fingerprint(made_of)
    folder, checkpoints = artifacts.artifacts_dir() / "teachers" / key, checkpoints_dir(key)

    def fine_tune(target: Path) -> None:
        teacher = load_teacher(recipe, data.label_names).to(device)
        validation = evaluation_batches(tokenize(data.validation, tokenizer, recipe.max_length), tokenizer)
        texts = tokenize(data.teacher_train, tokenizer, recipe.max_length)
        batches = training_batches(texts, tokenizer, recipe.batch_size, seed=recipe.seed)
        # What a caller draws next must not depend on whether the teacher was found or made.
        with torch.random.fork_rng():
            torch.manual_seed(recipe.seed)
            progress = train(
                teacher,
                batches,
                validation,
                config=recipe,
                precision=precision,
                description="Fine-tuning the teacher",
                checkpoints=checkpoints,
                checkpoint_steps=checkpoint_steps,
            )
        save_model(target, teacher, tokenizer)
        artifacts.save_json(target / "history.json", progress.history)
        artifacts.save_json(target / artifacts.MADE_OF, made_of)

    artifacts.get_or_build(folder, fine_tune)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return freeze(load_saved(folder)).to(device)


def teacher_answers(config: DistillConfig, data: DataSplits, split: str, *, checkpoint_steps: int = 0) -> TeacherLogits:
    """The logits of the configured teacher for one split of the data, asked for once and kept."""
    tokenizer = load_tokenizer(config.teacher_source)
    teacher = fine_tuned_teacher(config, data, tokenizer, checkpoint_steps=checkpoint_steps)
    tokenized = tokenize(getattr(data, split), tokenizer, config.max_length)
    return cached_logits(teacher, tokenized, tokenizer, precision=machine(config).precision)


def warn_of_guessing(answers: TeacherLogits, labelled: datasets.Dataset) -> None:
    """Warn when the teacher is not better than someone who always names the commonest class.

    Such a teacher was never trained for these classes, or has them in another order. Tested on the texts that have a
    label, one-sided, at a level of 1%.
    """
    labels = torch.tensor(labelled["label"][:])
    right = int((answers.lookup(torch.tensor(labelled["id"][:])).argmax(dim=-1) == labels).sum())
    commonest = int(torch.bincount(labels).max())
    if stats.binomtest(right, len(labels), commonest / len(labels), alternative="greater").pvalue > 0.01:
        warnings.warn(
            f"the teacher names the class of {right:,} of {len(labels):,} labelled texts, always naming the commonest "
            f"would get {commonest:,} right: it guesses, so its student learns noise; fine-tune it (teacher_epochs), "
            "or check the order of its classes.",
            stacklevel=2,
        )


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
    resume: bool = True,
    checkpoint_steps: int = 0,
) -> DistillResult:
    """Distil a student as `config` says: the whole course in one call.

    Args:
        config: every choice.
        data: the splits, if they are loaded already.
        answers: the teacher's logits for `data.student_train`, in place of those of the preset's
            fine-tuned teacher. An arm of the comparison is a run with other answers.
        output_dir: where to save; None saves under `artifacts/runs`.
        resume: go on from the run's last checkpoint, or find it again if it is finished; False begins anew.
        checkpoint_steps: write a checkpoint after every so many steps, not only after each epoch.

    Returns:
        The student with its history and metrics, saved.

    Raises:
        ValueError: `data` or `answers` make no sense, or `output_dir` holds a finished run of something else.
        DivergedError, MemoryError: see `train`.
    """
    require_whole("checkpoint_steps", checkpoint_steps, minimum=0)
    device, precision = machine(config)
    tokenizer = load_tokenizers(config).student
    data = data or load_splits(config)
    require_disjoint(data)
    tokenized = tokenize(data.student_train, tokenizer, config.max_length)
    if answers is None and config.alpha > 0:
        warn_if_swapped(config)
        answers = teacher_answers(config, data, "student_train", checkpoint_steps=checkpoint_steps)
        warn_of_guessing(answers, data.train)
    if answers is not None:
        answers.require_classes(data.label_names)
        tokenized = attach(tokenized, answers)
    made_of = {
        "package": __version__,
        "config": config.to_dict(),
        "machine": str(machine(config)),
        "checkpoint": config.student_source and checkpoint_version(config.student_source),
        "labels": data.label_names,
        "texts": [dataset_digest(part) for part in (data.student_train, data.validation, data.test)],
        "answers": None if answers is None else answers.digest(),
    }
    key = artifacts.fingerprint(made_of)
    checkpoints = checkpoints_dir(key)
    folder = Path(output_dir or artifacts.artifacts_dir() / "runs" / key)
    with artifacts.locked(checkpoints):
        found = find_run(folder, made_of)
        if not resume:
            shutil.rmtree(checkpoints, ignore_errors=True)
        elif found is not None:
            shutil.rmtree(checkpoints, ignore_errors=True)  # of a process that died before it could
            return dataclasses.replace(found, student=found.student.to(device))

        seed_everything(config.seed)
        student = load_student(config, data.label_names).to(device)
        batches = training_batches(tokenized, tokenizer, config.batch_size, seed=config.seed)
        held_out = {
            split: evaluation_batches(tokenize(getattr(data, split), tokenizer, config.max_length), tokenizer)
            for split in ("validation", "test")
        }
        progress = train(
            student,
            batches,
            held_out["validation"],
            config=config,
            precision=precision,
            description="Distilling",
            checkpoints=checkpoints,
            checkpoint_steps=checkpoint_steps,
        )
        predictions = predict(student, held_out["test"], precision)
        metrics: dict[str, Any] = {
            "validation": progress.history[-1]["validation"],
            "test": classification_metrics(predictions.logits, predictions.labels),
            "steps": progress.step,
            "labelled": len(data.train),
            "unlabelled": len(data.transfer),
            "seconds": progress.seconds,
        }
        result = DistillResult(config, student.eval(), tokenizer, progress.history, metrics, predictions, folder)
        save_run(result, made_of)
        shutil.rmtree(checkpoints, ignore_errors=True)
    return result


RUN_FILES = ("config.json", "history.json", "metrics.json", artifacts.MADE_OF, "predictions.safetensors")


def save_run(result: DistillResult, made_of: dict[str, Any]) -> None:
    """Save a run in its folder: `student/` (weights, tokenizer, model card), its predictions, and JSON files.

    `metrics.json` goes first and comes back late: where it stands, the run is whole. The seal, `manifest.json`, comes
    last and tells a change in any of them. Other files in the folder are left alone.

    Args:
        result: of the run.
        made_of: all that determined it.

    Raises:
        OSError: the folder can't be written; one sentence says why.
    """

    def save_student(target: Path) -> None:
        save_model(target, result.student, result.tokenizer)
        (target / "README.md").write_text(model_card(result), encoding="utf-8")

    folder, student = result.folder, result.folder / "student"
    with artifacts.locked(folder / "run"):
        for name in (artifacts.MANIFEST, "metrics.json"):
            (folder / name).unlink(missing_ok=True)
        artifacts.write_folder(student, save_student)
        predictions = safetensors.torch.save(result.predictions._asdict())
        artifacts.write_bytes(folder / "predictions.safetensors", predictions)
        artifacts.save_json(folder / "config.json", result.config.to_dict())
        artifacts.save_json(folder / "history.json", result.history)
        artifacts.save_json(folder / artifacts.MADE_OF, made_of)
        artifacts.save_json(folder / "metrics.json", result.metrics)
        weights = [f"student/{path.name}" for path in student.iterdir() if path.name != artifacts.MANIFEST]
        artifacts.seal(folder, [*RUN_FILES, *sorted(weights)])


def find_run(folder: Path, made_of: dict[str, Any]) -> DistillResult | None:
    """The finished run in a folder; None where there is none, or a damaged one, which is reported.

    Raises:
        ValueError: the folder holds a finished run that was made of something else.
    """
    if not (folder / artifacts.MANIFEST).exists():
        return None
    try:
        result = load_run(folder)
    except ValueError as error:
        warnings.warn(str(error).replace("delete it and run again", "it is made again"), stacklevel=3)
        return None
    other = artifacts.load_json(folder / artifacts.MADE_OF)
    if artifacts.fingerprint(other) != artifacts.fingerprint(made_of):
        old, new = result.config.to_dict(), made_of["config"]
        what = ", ".join(artifacts.differences(old, new)) or "other texts, answers, machine or package version"
        raise ValueError(f"{folder} holds a finished run with {what}; choose another output_dir, or delete it.")
    return result


def load_run(folder: str | Path) -> DistillResult:
    """A run that `distill` saved, its student on the CPU.

    Raises:
        FileNotFoundError: the folder holds no finished run.
        ValueError: one of its files was changed or is missing; it is named.
    """
    folder = Path(folder)
    if not (folder / artifacts.MANIFEST).exists():
        raise FileNotFoundError(f"{folder} holds no finished run; give the folder of one.")
    if wrong := artifacts.damaged(folder):
        raise ValueError(f"the run in {folder} is damaged ({', '.join(wrong)}); delete it and run again.")
    config, history, metrics = (
        artifacts.load_json(folder / name) for name in ("config.json", "history.json", "metrics.json")
    )
    return DistillResult(
        config=DistillConfig(**config),
        student=load_saved(folder / "student"),
        tokenizer=load_tokenizer(str(folder / "student")),
        history=history,
        metrics=metrics,
        predictions=Predictions(**safetensors.torch.load((folder / "predictions.safetensors").read_bytes())),
        folder=folder,
    )


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
