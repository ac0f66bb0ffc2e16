"""The students of a verdict (see `verdict`): what each arm learns from, and one run of one arm.

All arms of a seed start from the same weights and make the same number of steps; those with the same texts see them in
the same order.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import safetensors.torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from kd_helpers import artifacts
from kd_helpers.config import DistillConfig
from kd_helpers.data import DataSplits, dataset_digest, evaluation_batches, tokenize, training_batches
from kd_helpers.experiments.signals import BASELINE, Signal, uniform_logits
from kd_helpers.experiments.study import Arm, Study
from kd_helpers.experiments.watch import Watch
from kd_helpers.loop import classifier_loss, fit, recipe
from kd_helpers.losses import soft_targets
from kd_helpers.metrics import Predictions, predict
from kd_helpers.models import checkpoint_version, load_student, save_model
from kd_helpers.resolve import Setup
from kd_helpers.runtime import seed_everything
from kd_helpers.teacher import TeacherLogits, attach, cached_logits, fine_tuned_teacher

MODULE = "kd_helpers.experiments.verdict_runs"
UNIFORM, DISTILLED, TRANSFER, MORE = "uniform_teacher", "tuned_teacher", "transfer_set", "more_labels"

MOMENTS = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)  # of the baseline, at whose best on validation it can be stopped
TEACHER_STEPS = 600  # of fine-tuning at least: a few hundred texts make few steps an epoch
MOST_SEEDS = 8  # of an arm
EFFECT = 0.01  # the difference that matters, unless somebody says otherwise: one point


@dataclasses.dataclass(frozen=True)
class Training:
    """What one arm does.

    Attributes:
        signal: what the student learns from.
        texts: the split of labelled texts that it reads: "train" or "teacher_train".
        share: of the transfer set that it reads, if its signal has one.
        learning_rate: peak of the student's.
        moments: shares of its steps at which it is measured on validation. With more than one, the weights of the best
            are kept as well as the last.
    """

    signal: Signal
    texts: str = "train"
    share: float = 1.0
    learning_rate: float = DistillConfig.learning_rate
    moments: tuple[float, ...] = (1.0,)


@dataclasses.dataclass(frozen=True)
class Ground:
    """What all runs share.

    Attributes:
        setup: configuration and data.
        model: the fine-tuned teacher.
        teacher: its logits for the texts that students read, and for validation.
        splits: "train", "teacher_train", "transfer" (if it has texts), "validation" and "test", tokenized for the
            student. Of test, `train_arm` makes a file that `open_test` alone reads.
        measure: of `judgement.MEASURES`, by which models are compared and the best moment of a run is chosen.
        effect: the difference in it that matters, as a share.
        keep_student: whether a run with seed 0 keeps its student.
    """

    setup: Setup
    model: PreTrainedModel
    teacher: TeacherLogits
    splits: Mapping[str, datasets.Dataset]
    measure: str = "accuracy"
    effect: float = EFFECT
    keep_student: bool = True


def arms_of(config: DistillConfig, data: DataSplits) -> dict[str, Arm]:
    """The arms that a verdict compares: with the configuration's temperature and alpha, and what the data allows.

    One teacher gives every class the same probability. Its student has the distilled one's loss without any knowledge:
    what it gains is regularisation, which is to be had without a teacher.
    """
    distilled = Signal("tuned", config.temperature, config.alpha)
    arms = {
        BASELINE: Arm("Labels only", Training(Signal(), moments=MOMENTS)),
        UNIFORM: Arm("A teacher that knows nothing", Training(dataclasses.replace(distilled, teacher="uniform"))),
        DISTILLED: Arm("Distilled, same labels", Training(distilled)),
    }
    if len(data.transfer):
        with_transfer = dataclasses.replace(distilled, transfer=True)
        arms[TRANSFER] = Arm("Distilled, with texts without labels", Training(with_transfer))
    if config.teacher_epochs and len(data.teacher_train) > len(data.train):
        of_teacher = Training(Signal(), texts="teacher_train", moments=MOMENTS)
        arms[MORE] = Arm("Labels only, all that the teacher saw", of_teacher)
    return arms


def with_enough_epochs(config: DistillConfig, data: DataSplits) -> DistillConfig:
    """The configuration with so many epochs of fine-tuning that the teacher makes `TEACHER_STEPS` steps at least."""
    if config.teacher_epochs == 0:
        return config
    per_epoch = steps_an_epoch(len(data.teacher_train))
    return config.replace(teacher_epochs=max(config.teacher_epochs, math.ceil(TEACHER_STEPS / per_epoch)))


def steps_an_epoch(texts: int) -> int:
    """Of fine-tuning a teacher, whose batches are of the default size."""
    return math.ceil(texts / DistillConfig.batch_size)


def prepare(setup: Setup) -> Ground:
    """Fine-tune the teacher and let it read all texts but those of test; what was made before is found again."""
    data, config, tokenizers = setup.data, setup.config, setup.tokenizers
    teacher = fine_tuned_teacher(setup)
    read = [data.train, data.transfer, data.validation]
    together = datasets.concatenate_datasets([part for part in read if len(part)])
    logits = cached_logits(
        teacher,
        tokenize(together, tokenizers.teacher, config.max_length),
        tokenizers.teacher,
        precision=setup.precision,
    )
    splits = {
        name: tokenize(getattr(data, name), tokenizers.student, config.max_length)
        for name in ("train", "teacher_train", "transfer", "validation", "test")
        if len(getattr(data, name))
    }
    return Ground(setup, teacher, logits, splits)


def train_arm(ground: Ground, steps: int, training: Training, seed: int, folder: Path) -> dict[str, Any]:
    """Train one student and keep what it predicts.

    Args:
        ground: what all runs share.
        steps: of the optimiser.
        training: what the arm does.
        seed: of head, dropout and order.
        folder: gets `validation.safetensors` and `test.safetensors`: logits `[N, C]` in order of the ids, after the
            `last` step and, if the arm has several moments, at the `best` of them (see `Watch`). With seed 0 it also
            gets a distilled student.

    Returns:
        `history` (measures and `loss` on validation at each moment, see `validation_loss`) and `seconds`.
    """
    started = time.perf_counter()
    student, watch = train_student(ground, steps, training, seed)
    tokenizer, precision = ground.setup.tokenizers.student, ground.setup.precision
    if seed == 0 and training.signal.teacher == "tuned" and ground.keep_student:
        save_model(folder / "student", student, tokenizer)
    test = evaluation_batches(ground.splits["test"], tokenizer)
    on_test = {"last": predict(student, test, precision).logits}
    if watch.weights:
        student.load_state_dict(watch.weights)
        on_test["best"] = predict(student, test, precision).logits
    for split, logits in (("validation", watch.logits), ("test", on_test)):
        safetensors.torch.save_file(logits, folder / f"{split}.safetensors")
    return {"history": watch.history, "seconds": time.perf_counter() - started}


def try_arm(ground: Ground, steps: int, training: Training, seed: int, folder: Path) -> dict[str, Any]:
    """The same for a setting that is only tried: no text of test is read, and no student kept."""
    started = time.perf_counter()
    _, watch = train_student(ground, steps, training, seed)
    safetensors.torch.save_file(watch.logits, folder / "validation.safetensors")
    return {"history": watch.history, "seconds": time.perf_counter() - started}


def runs_study(
    ground: Ground, arms: Mapping[str, Arm], steps: int, run: Callable[..., dict[str, Any]] = train_arm
) -> Study:
    """The study whose runs make so many steps each.

    Args:
        ground: what all runs share.
        arms: by name; each recipe is a `Training`.
        steps: of every run.
        run: what a run does and keeps: `train_arm` or `try_arm`.
    """
    config, data = ground.setup.config, ground.setup.data
    # Each arm and run has its own:
    own = {"temperature": 1.0, "alpha": 0.0, "learning_rate": DistillConfig.learning_rate}
    shared = config.replace(seed=0, max_steps=steps, **own)
    return Study(
        name="verdict",
        module=MODULE,
        arms=arms,
        seeds=range(MOST_SEEDS),
        choices={
            "config": shared.to_dict(),
            "machine": ground.setup.machine,
            "student": checkpoint_version(config.student_source or config.teacher_source),
            "teacher": ground.teacher.digest(),
            "labels": data.label_names,
            "texts": [dataset_digest(part) for part in (data.train, data.transfer, data.teacher_train)],
            "held_out": [dataset_digest(part) for part in (data.validation, data.test)],
            "run": run.__name__,
            "measure": ground.measure,
        },
        run=functools.partial(run, ground, steps),
    )


def train_student(ground: Ground, steps: int, training: Training, seed: int) -> tuple[PreTrainedModel, Watch]:
    """Train one student, and say what it was like on validation at the moments of its arm.

    Args: see `train_arm`.
    """
    setup, signal, splits = ground.setup, training.signal, ground.splits
    tokenizer = setup.tokenizers.student
    config = setup.config.replace(seed=seed, max_steps=steps, learning_rate=training.learning_rate)
    texts = splits[training.texts]
    if signal.transfer:
        transfer = splits["transfer"]
        transfer = transfer.select(range(max(1, round(training.share * len(transfer)))))
        texts = datasets.concatenate_datasets([texts, transfer])
    teacher_logits = None
    if signal.teacher == "tuned":
        teacher_logits = ground.teacher
    elif signal.teacher == "uniform":
        teacher_logits = uniform_logits([texts, splits["validation"]], setup.data.label_names)
    if teacher_logits is not None:
        texts = attach(texts, teacher_logits)
    validation = evaluation_batches(splits["validation"], tokenizer)
    seed_everything(seed)
    student = load_student(config, setup.data.label_names, tokenizer).to(setup.device)
    watch = Watch(
        student,
        functools.partial(predict, student, validation, setup.precision),
        functools.partial(validation_loss, signal, teacher_logits),
        moments=[max(1, round(share * steps)) for share in training.moments],
        measure=ground.measure,
    )
    fit(
        student,
        training_batches(texts, tokenizer, config.batch_size, seed=seed),
        classifier_loss(student, temperature=signal.temperature, alpha=signal.alpha),
        steps=steps,
        **recipe(config, steps),
        precision=setup.precision,
        lean=config.lean,
        after_step=watch.look,
        description="Training",
    )
    return student, watch


def validation_loss(signal: Signal, teacher_logits: TeacherLogits | None, found: Predictions) -> float:
    """The loss that an arm is trained with, on validation, with cross-entropy in place of KL.

    The two differ by the entropy of the soft targets, which no student changes. Beside it, a change of a loss that is
    all but zero does not look large.
    """
    hard = F.cross_entropy(found.logits, found.labels)
    if teacher_logits is None:
        return hard.item()
    targets = soft_targets(teacher_logits.lookup(found.ids), signal.temperature)
    soft = signal.temperature**2 * F.cross_entropy(found.logits / signal.temperature, targets)
    return (signal.alpha * soft + (1 - signal.alpha) * hard).item()


# ---- What was predicted


def run_logits(run: Mapping[str, Any], moment: str, split: str) -> np.ndarray:
    """What the student of a run predicts for a split: logits `[N, C]` in order of the ids.

    Args:
        run: of `study.run_arm`.
        moment: "last" or "best".
        split: "validation" or "test".
    """
    file = artifacts.artifacts_dir() / run["folder"] / f"{split}.safetensors"
    return safetensors.torch.load(file.read_bytes())[moment].numpy()


def in_order(split: datasets.Dataset, column: str) -> list[Any]:
    """A column in order of the ids, as predictions are."""
    values = split[column][:]
    return [values[index] for index in np.argsort(split["id"][:])]


def labels_of(split: datasets.Dataset) -> np.ndarray:
    """The numbers of the classes of all texts, `[N]`, in the same order."""
    return np.array(in_order(split, "label"))
