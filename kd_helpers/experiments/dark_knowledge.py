"""The study of chapter 10: Hinton's experiments on digits, with controls and several seeds."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kd_helpers.experiments.study import Arm, Study, run_study
from kd_helpers.methods.digits import (
    CLASSES,
    DROPOUT,
    JITTER,
    LEARNING_RATE,
    MAX_NORM,
    DigitSplits,
    ensemble_logits,
    few_positions,
    load_digits,
    logits_of,
    train_student,
    train_teacher,
    unseen_measures,
)
from kd_helpers.metrics import classification_metrics

SEEDS = (0, 1, 2, 3, 4)
# What the stored study is made of. Students of 30 units get more steps: they are cheap, and learn slowly.
CHOICES: dict[str, Any] = {
    "digits": "sklearn",
    "learning_rate": LEARNING_RATE,
    "dropout": DROPOUT,
    "max_norm": MAX_NORM,
    "jitter": JITTER,
    "teacher_units": 1200,
    "teachers": 10,
    "temperature": 8.0,
    "temperatures": [1.0, 2.0, 3.0, 4.0, 8.0, 12.0, 20.0, 40.0],
    "steps": {"teacher": 400, "800": 400, "30": 1500},
    "few": 0.05,
}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What one arm trains, and on what.

    Attributes:
        units: of each hidden layer of the student; None measures the teachers and trains no student.
        temperature: T of the soft targets; None trains on labels.
        teachers: the probabilities of so many teachers are averaged.
        seen: the digits of the transfer set; empty means all.
        moved: the classes whose biases are shifted together afterwards.
        share: of the training digits that the student sees.
        stop_early: keep the weights with which most validation digits were right.
    """

    units: int | None = 800
    temperature: float | None = None
    teachers: int = 1
    seen: tuple[int, ...] = ()
    moved: tuple[int, ...] = ()
    share: float = 1.0
    stop_early: bool = False


def _arms() -> dict[str, Arm]:
    hot, many, few = CHOICES["temperature"], CHOICES["teachers"], CHOICES["few"]
    no_three = {"seen": tuple(digit for digit in range(CLASSES) if digit != 3), "moved": (3,)}
    two_only = {"seen": (7, 8), "moved": (7, 8)}
    experiments = {
        "teacher": Experiment(units=None),
        "ensemble": Experiment(units=None, teachers=many),
        "student of the ensemble": Experiment(temperature=hot, teachers=many),
        "no 3: labels": Experiment(**no_three),
        "no 3: soft targets, T = 1": Experiment(temperature=1.0, **no_three),
        "no 3: soft targets": Experiment(temperature=hot, **no_three),
        "only 7 and 8: labels": Experiment(**two_only),
        "only 7 and 8: soft targets": Experiment(temperature=hot, **two_only),
        "few: labels": Experiment(share=few),
        "few: labels, stopped early": Experiment(share=few, stop_early=True),
        "few: soft targets": Experiment(temperature=hot, share=few),
    }
    for units in (30, 800):
        for at in (None, *CHOICES["temperatures"]):
            name = f"{units} units: " + ("labels" if at is None else f"T = {at:g}")
            experiments[name] = Experiment(units=units, temperature=at)
    return {name: Arm(name, experiment) for name, experiment in experiments.items()}


ARMS = _arms()


def dark_knowledge_study() -> Study:
    """Every experiment of the chapter. The seed draws the teachers, the student and the batches.

    Arms of students on all digits, and the teachers, have `accuracy` and `nll` on test and `validation`, the accuracy
    there. The arms with few digits also have `train`, the accuracy on those. For those without some digits see
    `digits.unseen_measures`.
    """
    splits = load_digits(CHOICES["digits"])

    @functools.cache
    def teacher_logits(seed: int, member: int = 0) -> list[torch.Tensor]:
        """Of one teacher, on training, validation and test digits."""
        units, steps = CHOICES["teacher_units"], CHOICES["steps"]["teacher"]
        net = train_teacher(splits.train, units=units, steps=steps, seed=seed + 1000 * member)
        return [logits_of(net, part.pictures) for part in splits]

    def averaged(seed: int, teachers: int, temperature: float) -> list[torch.Tensor]:
        members = [teacher_logits(seed, member) for member in range(teachers)]
        return [ensemble_logits(torch.stack(logits), temperature) for logits in zip(*members, strict=True)]

    def run(experiment: Experiment, seed: int, _folder: Path) -> dict[str, float]:
        at = experiment.temperature or 1.0
        logits = teacher_logits(seed) if experiment.teachers == 1 else averaged(seed, experiment.teachers, at)
        if experiment.units is None:
            return _measures(logits[1:], splits)
        kept = _kept(experiment, splits, seed)
        net = train_student(
            splits.train.where(kept),
            None if experiment.temperature is None else logits[0][kept],
            temperature=at,
            units=experiment.units,
            steps=CHOICES["steps"][str(experiment.units)],
            seed=seed,
            stop_on=splits.validation if experiment.stop_early else None,
        )
        if experiment.seen:
            return unseen_measures(net, splits, experiment.seen, experiment.moved)
        measures = _measures([logits_of(net, part.pictures) for part in splits[1:]], splits)
        if experiment.share < 1:
            seen = splits.train.where(kept)
            measures["train"] = classification_metrics(logits_of(net, seen.pictures), seen.labels)["accuracy"]
        return measures

    return Study("dark_knowledge", "kd_helpers.experiments.dark_knowledge", ARMS, SEEDS, CHOICES, run)


def _kept(experiment: Experiment, splits: DigitSplits, seed: int) -> torch.Tensor:
    """Which of the training digits the student sees: a mask, or positions."""
    labels = splits.train.labels
    if experiment.seen:
        return torch.isin(labels, torch.tensor(experiment.seen))
    if experiment.share < 1:
        return few_positions(len(labels), experiment.share, seed=seed)
    return torch.ones_like(labels, dtype=torch.bool)


def _measures(logits: Sequence[torch.Tensor], splits: DigitSplits) -> dict[str, float]:
    """Of logits on validation and on test."""
    validation, test = (classification_metrics(z, part.labels) for z, part in zip(logits, splits[1:], strict=True))
    return {"accuracy": test["accuracy"], "nll": test["nll"], "validation": validation["accuracy"]}


def study() -> dict[str, Any]:
    """The study that comes with the package (see `dark_knowledge_study`)."""
    return run_study(dark_knowledge_study())
