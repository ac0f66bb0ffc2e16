"""Which settings? Temperature, alpha, learning rate and number of steps, on four sets of texts.

One setting at a time is changed, from the same centre, with the same labels for teacher and student. Everything is
measured on texts that serve as validation: of the course's tweets those of its validation split, of the other sets all
held-out texts. What helps on one set of texts and hurts on the next can't be a default.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import torch

from kd_helpers.config import DistillConfig
from kd_helpers.data import DataSplits, dataset_digest
from kd_helpers.experiments.judgement import Estimate, crossed
from kd_helpers.experiments.signals import BASELINE, Signal
from kd_helpers.experiments.study import Arm, Study, run_study, stored_study
from kd_helpers.experiments.text_sets import SETS, TWEETS, all_texts
from kd_helpers.experiments.verdict_runs import (
    DISTILLED,
    TRANSFER,
    Ground,
    Training,
    in_order,
    labels_of,
    prepare,
    train_student,
    with_enough_epochs,
)
from kd_helpers.losses import IGNORE_INDEX
from kd_helpers.metrics import classification_metrics, fidelity
from kd_helpers.models import checkpoint_version
from kd_helpers.resolve import resolve
from kd_helpers.runtime import machine

TEXTS = (TWEETS, *SETS)
SEEDS = (0, 1)
CONFIG = DistillConfig(max_length=24)  # short texts, so that many runs can be made
LABELS, WITHOUT_LABELS, HELD_OUT = 1000, 3000, 2000  # texts of each set, at most


@dataclasses.dataclass(frozen=True)
class Setting:
    """What one arm does.

    Attributes:
        texts: the name of their set.
        kind: `BASELINE`, `DISTILLED` (the same labelled texts) or `TRANSFER` (also texts without labels).
        temperature, alpha: of the soft loss.
        learning_rate: peak of the student's.
        steps: of the student.
    """

    texts: str
    kind: str
    temperature: float = 2.0
    alpha: float = 0.9
    learning_rate: float = 3e-4
    steps: int = 500

    def training(self) -> Training:
        """What the student learns from."""
        signals = {
            BASELINE: Signal(),
            DISTILLED: Signal("tuned", self.temperature, self.alpha),
            TRANSFER: Signal("tuned", self.temperature, self.alpha, transfer=True),
        }
        return Training(signals[self.kind], learning_rate=self.learning_rate)


CENTRE = "centre"
OF_ALL = {
    CENTRE: {},
    "250 steps": {"steps": 250},
    "1,000 steps": {"steps": 1000},
    "rate 1e-4": {"learning_rate": 1e-4},
    "rate 6e-4": {"learning_rate": 6e-4},
}
OF_DISTILLED = {
    "T 1": {"temperature": 1.0},
    "T 4": {"temperature": 4.0},
    "alpha 0.5": {"alpha": 0.5},
    "alpha 1": {"alpha": 1.0},
}
CHANGES = {BASELINE: OF_ALL, DISTILLED: OF_ALL | OF_DISTILLED, TRANSFER: OF_ALL | OF_DISTILLED}


def arm_name(texts: str, kind: str, change: str) -> str:
    """The name of an arm."""
    return f"{texts}, {kind}, {change}"


ARMS: dict[str, Arm] = {
    arm_name(texts, kind, change): Arm(change, Setting(texts, kind, **values))
    for texts in TEXTS
    for kind, changes in CHANGES.items()
    for change, values in changes.items()
}


def split(whole: DataSplits) -> DataSplits:
    """The texts of one set: labelled ones for teacher and student, others without labels, and held-out ones.

    Of a pool that is too small for both, at most two thirds are labelled texts. All held-out texts serve as validation,
    since nothing is tested here at the end.
    """
    pool, test = whole.train, whole.test
    held_out = datasets.concatenate_datasets([whole.validation, test.select(range(1, len(test)))])
    labelled = LABELS if len(pool) > 2 * LABELS else len(pool) * 2 // 3
    train = pool.select(range(min(LABELS, labelled)))
    others = pool.select(range(len(train), min(len(train) + WITHOUT_LABELS, len(pool))))
    return dataclasses.replace(
        whole,
        train=train,
        teacher_train=train,
        transfer=others.remove_columns("label").add_column("label", [IGNORE_INDEX] * len(others)),
        validation=held_out.select(range(min(HELD_OUT, len(held_out)))),
        test=test.select([0]),  # is not read
    )


@functools.cache
def data_of(texts: str) -> DataSplits:
    """The splits of one set of texts."""
    return split(all_texts(texts))


@functools.cache
def ground_of(texts: str) -> Ground:
    """What all runs on one set of texts share: the teacher, fine-tuned as for a verdict, and its logits."""
    data = data_of(texts)
    return prepare(resolve(with_enough_epochs(CONFIG, data), data))


def run(setting: Setting, seed: int, folder: Path) -> dict[str, Any]:
    """One student.

    Returns:
        `accuracy`, `macro_recall`, `nll` and `fidelity` on validation, `loss` (see `verdict_runs.validation_loss`),
        the `teacher_accuracy` there, and `right`: for each text in order of the ids 1 if the student is right, else 0,
        packed to a hexadecimal number.
    """
    ground = ground_of(setting.texts)
    _, watch = train_student(ground, setting.steps, setting.training(), seed)
    validation = ground.setup.data.validation
    labels = torch.tensor(labels_of(validation))
    logits, of_teacher = watch.logits["last"], ground.teacher.lookup(torch.tensor(in_order(validation, "id")))
    measures = watch.history[-1]
    return {
        **{name: measures[name] for name in ("accuracy", "macro_recall", "nll", "loss")},
        "fidelity": fidelity(logits, of_teacher)["fidelity"],
        "teacher_accuracy": classification_metrics(of_teacher, labels)["accuracy"],
        "right": packed((logits.argmax(dim=-1) == labels).numpy()),
    }


def packed(right: np.ndarray) -> str:
    """Truth values `[N]` as a hexadecimal number, after their number."""
    return f"{len(right)}:{np.packbits(right).tobytes().hex()}"


def unpacked(text: str) -> np.ndarray:
    """The truth values `[N]` of `packed`."""
    count, _, number = text.partition(":")
    return np.unpackbits(np.frombuffer(bytes.fromhex(number), dtype=np.uint8), count=int(count)).astype(bool)


def settings_study() -> Study:
    """The study that comes with the package."""
    sets = {texts: data_of(texts) for texts in TEXTS}
    return Study(
        name="settings",
        module="kd_helpers.experiments.settings",
        arms=ARMS,
        seeds=SEEDS,
        choices={
            "config": CONFIG.to_dict(),
            "machine": str(machine(CONFIG)),
            "checkpoint": checkpoint_version(CONFIG.teacher_source),
            "texts": {
                name: [dataset_digest(part) for part in (data.train, data.transfer, data.validation)]
                for name, data in sets.items()
            },
            "sizes": {
                name: [len(data.label_names), len(data.train), len(data.transfer), len(data.validation)]
                for name, data in sets.items()
            },
        },
        run=run,
    )


def study() -> dict[str, Any]:
    """Make it (see `study.run_study`)."""
    return run_study(settings_study())


def stored_settings() -> dict[str, Any]:
    """The study that comes with the package, made by `make study`."""
    return stored_study("settings")


# ---- What came out


def right_answers(result: Mapping[str, Any], texts: str, kind: str, change: str) -> np.ndarray:
    """Where the students of an arm are right: `[S, N]`, a row for each seed and a column for each text."""
    arm = arm_name(texts, kind, change)
    return np.stack([unpacked(entry["right"]) for entry in result["runs"] if entry["arm"] == arm])


def gain(result: Mapping[str, Any], texts: str, kind: str, change: str, against: tuple[str, str]) -> Estimate:
    """The accuracy of one arm minus that of another `(kind, change)` on the same texts, with its 95% interval."""
    first, second = right_answers(result, texts, kind, change), right_answers(result, texts, *against)
    return crossed(first.astype(float) - second.astype(float))


def changes_table(result: Mapping[str, Any], kind: str) -> pd.DataFrame:
    """What each change brings against the centre.

    Returns:
        A row for each change; for each set of texts, and for their `mean`, columns `gain`, `low` and `high` (95%). The
        mean's interval holds for these sets of texts; it does not say what others would show.
    """
    rows = {}
    for change in CHANGES[kind]:
        if change == CENTRE:
            continue
        found = {texts: gain(result, texts, kind, change, (kind, CENTRE)) for texts in TEXTS}
        rows[change] = {
            (texts, name): getattr(estimate, name)
            for texts, estimate in found.items()
            for name in ("gain", "low", "high")
        }
        mean = float(np.mean([estimate.gain for estimate in found.values()]))
        half = math.hypot(*((estimate.high - estimate.low) / 2 for estimate in found.values())) / len(found)
        rows[change] |= {("mean", "gain"): mean, ("mean", "low"): mean - half, ("mean", "high"): mean + half}
    return pd.DataFrame.from_dict(rows, orient="index")
