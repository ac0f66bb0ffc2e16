"""The study of chapter 12: TinyBERT's stages and losses against logits alone, at several lengths.

Two arms that are compared draw from the same texts, and start from the same weights. Learning rates are chosen once, on
validation, with a seed that the study does not use.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from transformers import PreTrainedModel

from kd_helpers.config import DistillConfig
from kd_helpers.data import corpus_digest, evaluation_batches, read_corpus, tokenize, training_batches
from kd_helpers.experiments.study import Arm, Study, run_study, study_table
from kd_helpers.loop import train_classifier
from kd_helpers.methods.augmentation import CANDIDATES, PROBABILITY, augmented_texts
from kd_helpers.methods.distilbert import language_teacher
from kd_helpers.methods.tinybert import STUDENTS, Projections, distill_layers
from kd_helpers.metrics import classification_metrics, fidelity, predict
from kd_helpers.models import checkpoint_version, freeze, load_teacher
from kd_helpers.resolve import Setup, resolve
from kd_helpers.runtime import seed_everything
from kd_helpers.teacher import TeacherLogits, attach, cached_logits, fine_tuned_teacher

MODULE = "kd_helpers.experiments.tinybert"
CONFIG = DistillConfig(transfer_size=21_631, epochs=3, warmup_ratio=0.1, alpha=1.0, temperature=2.0)
SEEDS, PART_SEEDS = (0, 1, 2, 3, 4), (0, 1, 2)
PILOT_SEED = 100
LENGTHS = (600, 1200, 2400)
COPIES = 4  # of each labelled text; the paper makes 20
# The attention loss is by far the largest of the three, and under a clipped gradient it would decide nearly alone.
WEIGHTS = {"embedding": 1.0, "attention": 0.1, "hidden": 1.0}
STAGES = ("general", "layers", "prediction")


@dataclasses.dataclass(frozen=True)
class Stages:
    """What an arm does with its steps.

    Attributes:
        length: its steps in all.
        student: a key of `methods.tinybert.STUDENTS`.
        texts: that every stage reads: the labelled "train" alone, or with those that are "augmented", or with the
            "real" ones of the transfer set.
        general: share of the steps for the layers of the pre-trained teacher.
        layers: share for the layers of the fine-tuned teacher.
        prediction: share for the fine-tuned teacher's logits (or for labels).
        without: a layer loss that is left out.
        alpha: weight of the soft loss in the prediction stage; 0 is the baseline.
    """

    length: int = 1200
    student: str = "narrow"
    texts: str = "augmented"
    general: int = 1
    layers: int = 1
    prediction: int = 2
    without: str = ""
    alpha: float = 1.0

    def steps(self) -> dict[str, int]:
        """The steps of each stage, `length` in all: what an arm leaves out goes to its other stages."""
        shares = {"general": self.general, "layers": self.layers, "prediction": self.prediction}
        steps = {stage: self.length * share // sum(shares.values()) for stage, share in shares.items()}
        steps["prediction"] += self.length - sum(steps.values())
        return steps

    def weights(self) -> dict[str, float]:
        """Of the layer losses."""
        return {part: weight for part, weight in WEIGHTS.items() if part != self.without}


def logits_only(**values: Any) -> Stages:
    """All steps for the teacher's logits, as in the rest of the course."""
    return Stages(general=0, layers=0, **values)


# Whether layers help, by texts and length.
ARMS: dict[str, Arm] = {
    f"{name}_{texts}_{length}": Arm(f"{title}, {texts} texts, {length:,} steps", recipe(length=length, texts=texts))
    for length in LENGTHS
    for texts in ("augmented", "real")
    for name, title, recipe in (("logits", "Logits only", logits_only), ("tinybert", "TinyBERT", Stages))
}
# What each part is worth: one thing differs from `WHOLE`.
WHOLE = "tinybert_augmented_1200"
PARTS: dict[str, Arm] = {
    WHOLE: ARMS[WHOLE],
    "logits_augmented_1200": ARMS["logits_augmented_1200"],
    "no_general": Arm("− general distillation", Stages(general=0)),
    "no_layers": Arm("− the task's layers", Stages(layers=0)),
    "no_embedding": Arm("− embedding loss", Stages(without="embedding")),
    "no_attention": Arm("− attention loss", Stages(without="attention")),
    "no_hidden": Arm("− hidden loss", Stages(without="hidden")),
    "no_augmentation": Arm("− augmentation", Stages(texts="train")),
    "logits_train": Arm("Logits only, labelled texts", logits_only(texts="train")),
    "labels": Arm("Labels only", logits_only(texts="train", alpha=0.0)),
    "half_logits": Arm("Half: logits only", logits_only(student="half")),
    "half_tinybert": Arm("Half: TinyBERT", Stages(student="half")),
}


class Rates(NamedTuple):
    """Peak learning rates of a student: in the two stages of layers, and in the last stage for logits or for labels."""

    layers: float = 0.0
    prediction: float = 0.0
    labels: float = 0.0


# What is tried on validation: each student's rates for logits alone, for labels alone if an arm learns them, and then
# for the layers before the logits.
TRIED = {
    "narrow": {
        "prediction": (5e-4, 1e-3, 2e-3, 4e-3),
        "labels": (2.5e-4, 5e-4, 1e-3, 2e-3),
        "layers": (1e-3, 2e-3, 4e-3, 8e-3),
    },
    "half": {"prediction": (5e-5, 1e-4, 2e-4, 4e-4), "layers": (5e-5, 1e-4, 2e-4, 4e-4)},
}


class Material(NamedTuple):
    """What all arms share: both teachers and the texts.

    Attributes:
        setup: configuration and data.
        pretrained: the teacher before fine-tuning.
        tuned: the teacher after it.
        texts: tokenized, with the tuned teacher's logits, by the names that `Stages.texts` has.
        test_logits: of the tuned teacher on the test texts.
    """

    setup: Setup
    pretrained: PreTrainedModel
    tuned: PreTrainedModel
    texts: Mapping[str, datasets.Dataset]
    test_logits: TeacherLogits


def prepare_material(setup: Setup, *, copies: int) -> Material:
    """Load, fine-tune and augment, and run the teacher, once for all arms; what was made before is found again."""
    config, data, tokenizer = setup.config, setup.data, setup.tokenizers.teacher
    tuned = fine_tuned_teacher(setup)
    chosen = {"max_length": config.max_length, "precision": setup.precision}
    augmented = augmented_texts(data, language_teacher(setup), tokenizer, copies=copies, **chosen)
    texts = {
        "train": data.train,
        "augmented": datasets.concatenate_datasets([data.train, augmented]),
        "real": data.student_train,
    }

    def with_teacher_logits(part: datasets.Dataset) -> datasets.Dataset:
        tokenized = tokenize(part, tokenizer, config.max_length)
        return attach(tokenized, cached_logits(tuned, tokenized, tokenizer, precision=setup.precision))

    test = tokenize(data.test, tokenizer, config.max_length)
    return Material(
        setup=setup,
        pretrained=freeze(load_teacher(config, data.label_names)).to(setup.device),
        tuned=tuned,
        texts={name: with_teacher_logits(part) for name, part in texts.items()},
        test_logits=cached_logits(tuned, test, tokenizer, precision=setup.precision),
    )


def train_in_stages(stages: Stages, material: Material, rates: Rates, *, seed: int) -> PreTrainedModel:
    """One arm with one seed: its student."""
    setup = material.setup
    config, tokenizer = setup.config.replace(seed=seed), setup.tokenizers.teacher
    planned, texts = stages.steps(), material.texts[stages.texts]
    # Each stage has an order of its own, or it would begin with the batches of the stage before.
    orders = {stage: seed + 1000 * number for number, stage in enumerate(STAGES)}
    seed_everything(seed)
    student = STUDENTS[stages.student](config, setup.data.label_names).to(setup.device)
    projections = Projections(student.config.hidden_size, material.tuned.config.hidden_size).to(setup.device)
    for stage, teacher in (("general", material.pretrained), ("layers", material.tuned)):
        if planned[stage]:
            own = dataclasses.replace(setup, config=config.replace(learning_rate=rates.layers, seed=orders[stage]))
            distill_layers(student, teacher, projections, texts, own, steps=planned[stage], weights=stages.weights())
    rate = rates.prediction if stages.alpha else rates.labels
    config = config.replace(learning_rate=rate, alpha=stages.alpha, max_steps=planned["prediction"])
    batches = training_batches(texts, tokenizer, config.batch_size, seed=orders["prediction"])
    train_classifier(student, batches, config=config, precision=setup.precision, description="Distilling logits")
    return student.eval()


def measure(model: PreTrainedModel, material: Material, split: str) -> dict[str, float]:
    """The course's measures on a split of the data, and on test how well the model matches the tuned teacher."""
    setup = material.setup
    texts = tokenize(getattr(setup.data, split), setup.tokenizers.teacher, setup.config.max_length)
    predictions = predict(model, evaluation_batches(texts, setup.tokenizers.teacher), setup.precision)
    measures = classification_metrics(predictions.logits, predictions.labels)
    if split == "test":
        measures |= fidelity(predictions.logits, material.test_logits.lookup(predictions.ids))
    return measures


# --- learning rates ---


@dataclasses.dataclass(frozen=True)
class Try:
    """An arm with learning rates that are tried."""

    stages: Stages
    rates: Rates


def tries_study(material: Material, arms: Mapping[str, Arm], *, copies: int = COPIES) -> Study:
    """Arms with rates that are tried; runs have the measures on validation."""

    def run(tried: Try, seed: int, _folder: Path) -> dict[str, float]:
        student = train_in_stages(tried.stages, material, tried.rates, seed=seed)
        return measure(student, material, "validation")

    return Study("tinybert_rates", MODULE, arms, (PILOT_SEED,), choices(material, copies), run)


def choose_rates(material: Material, student: str, *, copies: int = COPIES, length: int = 1200) -> Rates:
    """The rates of a student that are most accurate on validation; those for layers after those for logits.

    Accuracy is what the arms are compared by. NLL would choose for labels alone a rate at which little is learned.
    """
    stages_of = {
        "prediction": logits_only(student=student, length=length),
        "labels": logits_only(student=student, length=length, texts="train", alpha=0.0),
        "layers": Stages(student=student, length=length),
    }
    found = Rates()
    for stage, rates in TRIED[student].items():
        tries = {f"{stage} {rate:g}": Try(stages_of[stage], found._replace(**{stage: rate})) for rate in rates}
        arms = {name: Arm(name, tried) for name, tried in tries.items()}
        accuracy = study_table(run_study(tries_study(material, arms, copies=copies)), "accuracy").loc[PILOT_SEED]
        found = tries[accuracy.idxmax()].rates
    return found


# --- the study ---


def choices(material: Material, copies: int) -> dict[str, Any]:
    """What the results depend on, beside arm and seed."""
    config = material.setup.config
    return {
        "config": config.replace(seed=0).to_dict(),  # each run has a seed of its own
        "copies": copies,
        "replacement": {"probability": PROBABILITY, "candidates": CANDIDATES},
        "weights": WEIGHTS,
        "texts": {name: len(texts) for name, texts in material.texts.items()},
        "machine": material.setup.machine,
        "checkpoint": checkpoint_version(config.teacher_source),
        "corpus": corpus_digest(read_corpus(config)),
    }


def tinybert_study(
    material: Material,
    rates_of: Callable[[str], Rates],
    arms: Mapping[str, Arm] = ARMS,
    *,
    seeds: tuple[int, ...] = SEEDS,
    copies: int = COPIES,
) -> Study:
    """Every arm with every seed; runs have `seconds` of training, and what `measure` returns on test.

    Args:
        material: what all arms share.
        rates_of: the learning rates of a kind of student.
        arms: by name.
        seeds: of the runs.
        copies: of each labelled text, augmented.
    """

    def run(stages: Stages, seed: int, _folder: Path) -> dict[str, float]:
        started = time.perf_counter()
        student = train_in_stages(stages, material, rates_of(stages.student), seed=seed)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, **measure(student, material, "test")}

    students = sorted({arm.recipe.student for arm in PARTS.values()})
    rates = {student: rates_of(student)._asdict() for student in students}
    return Study("tinybert", MODULE, arms, seeds, choices(material, copies) | {"learning_rates": rates}, run)


def study() -> dict[str, Any]:
    """The arms of `ARMS` with every seed; as `parts`, those of `PARTS` with three of them.

    Beside what `run_study` returns: `teacher`, the tuned teacher's own measures.
    """
    setup = resolve(CONFIG)
    material = prepare_material(setup, copies=COPIES)
    rates_of = functools.cache(functools.partial(choose_rates, material))
    result = run_study(tinybert_study(material, rates_of))
    parts = run_study(tinybert_study(material, rates_of, PARTS, seeds=PART_SEEDS))
    return result | {"parts": parts, "teacher": measure(material.tuned, material, "test")}
