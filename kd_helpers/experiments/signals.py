"""What a student learns from: labels, or the soft targets of one teacher or another.

Two arms whose signals differ in one thing show what that thing brings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import datasets
import torch
import torch.nn.functional as F

from kd_helpers.config import DistillConfig
from kd_helpers.resolve import Setup
from kd_helpers.teacher import TeacherLogits, load_teacher_logits

BASELINE = "baseline"  # the name of the arm that learns from labels alone
# Of fine-tuning a teacher on the student's 2,500 tweets. With as many steps as the tuned teacher makes (8 epochs) it
# overfits: on validation its NLL is then 1.06, after 3 epochs 0.60.
OWN_EPOCHS = 3
CERTAIN = 1000.0  # a logit beside which the others' probabilities are 0 in float32


@dataclasses.dataclass(frozen=True)
class Signal:
    """What an arm's student learns from.

    Attributes:
        teacher: whose soft targets: "none"; "uniform" (the same probability for every class); "untuned" (a random
            head); "own" (a teacher that was fine-tuned on the student's own labels alone); "tuned"; or "hard" (of the
            tuned teacher only the most probable class, with probability 1).
        temperature: T of the soft loss.
        alpha: weight of the soft loss.
        labels: how many labelled texts, as a multiple of `config.train_size`.
        transfer: whether the texts of `config.transfer_size` are added without labels.
    """

    teacher: str = "none"
    temperature: float = 1.0
    alpha: float = 0.0
    labels: int = 1
    transfer: bool = False

    def configure(self, config: DistillConfig) -> DistillConfig:
        """The configuration of this arm, given the one that all arms share."""
        config = config.replace(
            temperature=self.temperature,
            alpha=self.alpha,
            train_size=config.train_size * self.labels,
            transfer_size=config.transfer_size if self.transfer else 0,
            teacher_epochs=0 if self.teacher == "untuned" else config.teacher_epochs,
        )
        if self.teacher != "own":
            return config
        return config.replace(teacher_train_size=config.train_size, teacher_epochs=OWN_EPOCHS)


def signal_logits(signal: Signal, setup: Setup) -> TeacherLogits | None:
    """The teacher logits for an arm's training texts; None for an arm without a teacher."""
    if signal.teacher == "none":
        return None
    if signal.teacher == "uniform":
        return uniform_logits([setup.data.student_train], setup.data.label_names)
    logits = load_teacher_logits(setup, "student_train")
    return hard_logits(logits) if signal.teacher == "hard" else logits


def uniform_logits(texts: Sequence[datasets.Dataset], label_names: Sequence[str]) -> TeacherLogits:
    """The logits of a teacher that gives every class the same probability."""
    ids = torch.tensor([number for part in texts for number in part["id"][:]])
    return TeacherLogits(ids, torch.zeros(len(ids), len(label_names)))


def hard_logits(teacher_logits: TeacherLogits) -> TeacherLogits:
    """Logits that give all probability to the teacher's most probable class (at temperature 1)."""
    logits = teacher_logits.logits
    one_hot = F.one_hot(logits.argmax(dim=-1), logits.shape[-1])
    return TeacherLogits(teacher_logits.ids, CERTAIN * one_hot.to(logits.dtype))
