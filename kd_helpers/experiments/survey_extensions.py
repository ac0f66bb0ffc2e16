"""Three experiments at the edge of chapter 15's map.

- Subliminal learning (Cloud et al. 2025, arXiv 2507.14805, the experiment with MNIST): a student sees nothing but
  noise, and learns nothing but outputs that were never trained. Does it learn the digits?
- Weak to strong (Burns et al. 2023, arXiv 2312.09390): a pre-trained student learns from a teacher that is worse than
  the student could be; on tweets.
- Calibration (Kim et al. 2025, arXiv 2508.20224): what a student learns from a teacher that is too sure, or too unsure.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import datasets
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from torch import nn

from kd_helpers.data import tokenize
from kd_helpers.experiments import survey_tweets
from kd_helpers.experiments.study import Arm, Study
from kd_helpers.experiments.survey_digits import (
    BATCH_SIZE,
    LEARNING_RATE,
    SEEDS,
    Training,
    label_loss,
    learn,
    lesson,
    response_loss,
    splits,
    taught,
)
from kd_helpers.loop import Loss
from kd_helpers.losses import hard_loss, soft_loss
from kd_helpers.methods.digits import CLASSES
from kd_helpers.methods.tinybert import half_student
from kd_helpers.metrics import classification_metrics
from kd_helpers.models import model_inputs
from kd_helpers.runtime import seed_everything
from kd_helpers.teacher import TeacherLogits

MODULE = "kd_helpers.experiments.survey_extensions"
TRAINING = Training()
UNITS, SUBLIMINAL_STEPS, SUBLIMINAL_RATE = 256, 1000, 1e-3


def scores(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Accuracy, NLL and expected calibration error."""
    found = classification_metrics(logits, labels)
    return {name: found[name] for name in ("accuracy", "nll", "ece")}


# --- subliminal learning ---


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a student begins, and what it learns.

    Attributes:
        weights: "the teacher's" first weights, or "others".
        outputs: how many it learns that nothing has trained the teacher to use; 0 for the outputs of the digits.
    """

    weights: str
    outputs: int


SUBLIMINAL_ARMS: dict[str, Arm] = {
    **{
        f"{start}_{outputs}": Arm(f"{title}, {outputs} outputs", Start(weights, outputs))
        for start, title, weights in (
            ("same", "The teacher's first weights", "the teacher's"),
            ("other", "Other first weights", "others"),
        )
        for outputs in (3, 10, 32, 100)
    },
    "other_digits": Arm("Other first weights, the outputs of the digits", Start("others", 0)),
}


def two_headed_net(others: int, *, seed: int) -> nn.Sequential:
    """Two hidden layers, ten outputs for the digits and some others; the seed draws the weights."""
    pixels = splits().train.pictures.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(pixels, UNITS),
            nn.ReLU(),
            nn.Linear(UNITS, UNITS),
            nn.ReLU(),
            nn.Linear(UNITS, CLASSES + others),
        )


def noise(pictures: int, pixels: int, draw: torch.Generator) -> torch.Tensor:
    """Pictures `[N, pixels]` of uniform noise between −1 and 1."""
    return 2 * torch.rand(pictures, pixels, generator=draw) - 1


def subliminal_study() -> Study:
    """Students that see noise alone; runs have their `accuracy` on test, and that of their `teacher`."""

    def run(start: Start, seed: int, _folder: Path) -> dict[str, Any]:
        digits = splits().train
        teacher = two_headed_net(start.outputs, seed=seed)
        student = two_headed_net(start.outputs, seed=seed if start.weights == "the teacher's" else seed + 1000)
        draw = torch.Generator().manual_seed(seed)
        shown = slice(CLASSES, None) if start.outputs else slice(CLASSES)

        def teacher_loss(batch: torch.Tensor) -> Loss:
            return Loss(hard_loss(teacher(digits.pictures[batch])[:, :CLASSES], digits.labels[batch]))

        def student_loss(_batch: torch.Tensor) -> Loss:
            pictures = noise(BATCH_SIZE, digits.pictures.shape[1], draw)
            return Loss(soft_loss(student(pictures)[:, shown], teacher(pictures)[:, shown].detach(), 1.0))

        how = {"steps": SUBLIMINAL_STEPS, "seed": seed, "learning_rates": [SUBLIMINAL_RATE]}
        learn([teacher], teacher_loss, len(digits.labels), **how)
        learn([student], student_loss, BATCH_SIZE, **how)
        test = splits().test
        with torch.no_grad():
            return {
                name: scores(net(test.pictures)[:, :CLASSES], test.labels)["accuracy"]
                for name, net in (("accuracy", student), ("teacher", teacher))
            }

    choices = {"steps": SUBLIMINAL_STEPS, "learning_rate": SUBLIMINAL_RATE, "units": UNITS}
    return Study("survey_subliminal", MODULE, SUBLIMINAL_ARMS, SEEDS, choices, run)


# --- weak to strong ---


@dataclasses.dataclass(frozen=True)
class Pupil:
    """What a model learns from.

    Attributes:
        targets: "weak labels" or "weak probabilities" of the texts that the weak teacher has not learned, their
            true "labels", or "none", which is the weak teacher itself.
    """

    targets: str


WEAK_ARMS: dict[str, Arm] = {
    "weak": Arm("The weak teacher", Pupil("none")),
    "weak_labels": Arm("Its labels", Pupil("weak labels")),
    "weak_probabilities": Arm("Its probabilities", Pupil("weak probabilities")),
    "ceiling": Arm("True labels", Pupil("labels")),
}
WEAK_SEEDS = survey_tweets.SEEDS


def weak_teacher(train: datasets.Dataset) -> Pipeline:
    """Logistic regression on how often words occur (TF-IDF)."""
    return make_pipeline(TfidfVectorizer(min_df=2), LogisticRegression(max_iter=1000)).fit(
        train["text"][:], train["label"][:]
    )


def weak_to_strong_study(ground: survey_tweets.Ground) -> Study:
    """The student of the tweets, taught by counts of words; runs have `scores` on test."""
    setup = ground.setup
    data, tokenizer = setup.data, setup.tokenizers.teacher
    learned = set(data.train["id"][:])
    others = data.teacher_train.filter(lambda text_id: text_id not in learned, input_columns="id")
    others = others.select(range(len(data.train)))

    @functools.cache
    def answers() -> tuple[torch.Tensor, torch.Tensor]:
        """The weak teacher's log-probabilities of the other texts and of the test texts."""
        weak = weak_teacher(data.train)
        return tuple(
            torch.from_numpy(weak.predict_log_proba(texts["text"][:])).float() for texts in (others, data.test)
        )

    def run(pupil: Pupil, seed: int, _folder: Path) -> dict[str, Any]:
        on_others, on_test = answers()
        if pupil.targets == "none":
            return scores(on_test, torch.tensor(data.test["label"][:]))
        texts = tokenize(others, tokenizer, setup.config.max_length)
        taught_by: list[TeacherLogits] = []
        if pupil.targets == "weak labels":
            texts = texts.remove_columns("label").add_column("label", on_others.argmax(dim=1).tolist())
        if pupil.targets == "weak probabilities":
            taught_by = [TeacherLogits(torch.tensor(texts["id"][:]), on_others)]
        config = setup.config.replace(temperature=1.0, alpha=1.0, seed=seed)
        task = survey_tweets.task_loss(taught_by, config)
        seed_everything(seed)
        student = half_student(config, data.label_names)
        survey_tweets.learn(
            [student], texts, lambda batch: task(student(**model_inputs(student, batch)).logits, batch), setup, config
        )
        found = survey_tweets.answers(student, ground, ground.test)
        return scores(found.logits, found.labels)

    choices = survey_tweets.choices(ground) | {"texts": len(others)}
    return Study("survey_weak_to_strong", MODULE, WEAK_ARMS, WEAK_SEEDS, choices, run)


# --- a teacher that is too sure, or too unsure ---


@dataclasses.dataclass(frozen=True)
class Sureness:
    """How sure the teacher is made: its logits are multiplied by this; 0 leaves the labels alone as a teacher."""

    times: float


CALIBRATION_ARMS: dict[str, Arm] = {
    "labels": Arm("Labels", Sureness(0.0)),
    **{f"times {times:g}": Arm(f"Logits × {times:g}", Sureness(times)) for times in (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)},
}


def calibration_study() -> Study:
    """Students of a teacher whose logits were multiplied.

    Runs have `scores` on test and, where there is a teacher, `teacher_ece`, its expected calibration error there.
    """

    def run(sureness: Sureness, seed: int, _folder: Path) -> dict[str, Any]:
        given, test = lesson(TRAINING, seed), splits().test
        seen = given.seen._replace(logits=sureness.times * given.seen.logits)
        loss = response_loss(1.0) if sureness.times else label_loss
        student = taught(given._replace(seen=seen), loss)
        with torch.no_grad():
            found = scores(student(test.pictures).logits, test.labels)
            teacher = scores(sureness.times * given.teacher(test.pictures).logits, test.labels)
        return found | ({"teacher_ece": teacher["ece"]} if sureness.times else {})

    choices = {**dataclasses.asdict(TRAINING), "learning_rate": LEARNING_RATE}
    return Study("survey_calibration", MODULE, CALIBRATION_ARMS, SEEDS, choices, run)
