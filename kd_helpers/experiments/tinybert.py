"""The study of chapter 12: TinyBERT's stages, losses and augmentation, each arm with as many steps."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from transformers import PreTrainedModel

from kd_helpers.config import DistillConfig
from kd_helpers.data import corpus_digest, evaluation_batches, read_corpus, tokenize, training_batches
from kd_helpers.experiments.study import Arm, Study, run_study
from kd_helpers.loop import train_classifier
from kd_helpers.methods.augmentation import CANDIDATES, PROBABILITY, augmented_texts, candidate_words
from kd_helpers.methods.distilbert import language_teacher
from kd_helpers.methods.tinybert import PARTS, STUDENTS, Memory, distill_layers
from kd_helpers.metrics import classification_metrics, fidelity, predict
from kd_helpers.models import checkpoint_version, freeze, load_teacher
from kd_helpers.resolve import Setup, resolve
from kd_helpers.runtime import seed_everything
from kd_helpers.teacher import TeacherLogits, attach, cached_logits, fine_tuned_teacher


@dataclasses.dataclass(frozen=True)
class Stages:
    """What an arm does with its steps.

    Attributes:
        student: a key of `methods.tinybert.STUDENTS`.
        general: its share of the steps for the layers of the pre-trained teacher, on real texts of no task.
        layers: share for the layers of the fine-tuned teacher, on the task's texts.
        prediction: share for the fine-tuned teacher's logits on the task's texts (or for labels).
        texts: the task's: "train" alone, or with those that are "augmented", or with as many real ones ("transfer").
        parts: which layer losses are trained.
        alpha: weight of the soft loss in the prediction stage; 0 is the baseline.
        times: 0.5 gives the arm half of the others' steps.
    """

    student: str = "narrow"
    general: int = 1
    layers: int = 1
    prediction: int = 2
    texts: str = "augmented"
    parts: tuple[str, ...] = PARTS
    alpha: float = 1.0
    times: float = 1.0

    def steps(self, total: int) -> dict[str, int]:
        """The steps of each stage, `total · times` in all: what an arm leaves out goes to its other stages."""
        total = round(total * self.times)
        shares = {"general": self.general, "layers": self.layers, "prediction": self.prediction}
        steps = {stage: total * share // sum(shares.values()) for stage, share in shares.items()}
        steps["prediction"] += total - sum(steps.values())
        return steps


_LOGITS_ONLY = {"general": 0, "layers": 0}
ARMS: dict[str, Arm] = {
    "baseline": Arm("Labels only", Stages(texts="train", alpha=0.0, **_LOGITS_ONLY)),
    "plain": Arm("Logits only", Stages(texts="train", **_LOGITS_ONLY)),
    "plain_augmented": Arm("Logits only, augmented", Stages(**_LOGITS_ONLY)),
    "plain_transfer": Arm("Logits only, transfer set", Stages(texts="transfer", **_LOGITS_ONLY)),
    "tinybert": Arm("TinyBERT", Stages()),
    "no_general": Arm("− general distillation", Stages(general=0)),
    "no_layers": Arm("− task's layers", Stages(layers=0)),
    "no_augmentation": Arm("− augmentation", Stages(texts="train")),
    "transfer": Arm("transfer set for augmentation", Stages(texts="transfer")),
    "no_embedding": Arm("− embedding loss", Stages(parts=("attention", "hidden"))),
    "no_attention": Arm("− attention loss", Stages(parts=("embedding", "hidden"))),
    "no_hidden": Arm("− hidden loss", Stages(parts=("embedding", "attention"))),
    # With half of the steps, the arm gets as many of them as TinyBERT's last stage, whose other stages come on top.
    "plain_short": Arm("Logits only, augmented, half the steps", Stages(times=0.5, **_LOGITS_ONLY)),
    "tinybert_short": Arm("TinyBERT, half the steps", Stages(times=0.5)),
    "half_baseline": Arm("Half: labels only", Stages(student="half", texts="train", alpha=0.0, **_LOGITS_ONLY)),
    "half_plain": Arm("Half: logits only, augmented", Stages(student="half", **_LOGITS_ONLY)),
    "half_tinybert": Arm("Half: TinyBERT", Stages(student="half")),
}

# The narrow student's: the lowest NLL on validation, after 300 steps, of 5e-4, 1e-3 and 2e-3 for logits alone, then of
# 1e-3 and 2e-3 for the layers before them, with a seed that the study does not use. The half student's is the course's.
LEARNING_RATES = {"narrow": {"layers": 0.002, "prediction": 0.001}, "half": {"layers": 1e-4, "prediction": 1e-4}}
CONFIG = DistillConfig(transfer_size=21_631, epochs=3, warmup_ratio=0.1, alpha=1.0, precision="bfloat16")
SEEDS = (0, 1, 2)
STEPS = 600
COPIES = 4  # of each labelled text
SENTENCES = ("the flight was great", "i love this phone", "my bag is lost again and nobody helps")


class Material(NamedTuple):
    """What all arms share: both teachers and the texts of each stage.

    Attributes:
        setup: configuration and data.
        pretrained: the teacher before fine-tuning.
        tuned: the teacher after it.
        general: the real texts, tokenized; the task's texts are among them.
        task: tokenized texts with the tuned teacher's logits, by the names that `Stages.texts` has.
        test_logits: of the tuned teacher on the test texts.
    """

    setup: Setup
    pretrained: PreTrainedModel
    tuned: PreTrainedModel
    general: datasets.Dataset
    task: dict[str, datasets.Dataset]
    test_logits: TeacherLogits


def prepare_material(setup: Setup, *, copies: int) -> Material:
    """Load, fine-tune and augment, and run the teacher, once for all arms; what was made before is found again."""
    config, data, tokenizer = setup.config, setup.data, setup.tokenizers.teacher
    tuned = fine_tuned_teacher(setup)
    chosen = {"max_length": config.max_length, "precision": setup.precision}
    augmented = augmented_texts(data, language_teacher(setup), tokenizer, copies=copies, **chosen)
    real = data.transfer.select(range(min(len(augmented), len(data.transfer))))
    more = {"train": [], "augmented": [augmented], "transfer": [real]}

    def with_teacher_logits(texts: datasets.Dataset) -> datasets.Dataset:
        tokenized = tokenize(texts, tokenizer, config.max_length)
        return attach(tokenized, cached_logits(tuned, tokenized, tokenizer, precision=setup.precision))

    test = tokenize(data.test, tokenizer, config.max_length)
    return Material(
        setup=setup,
        pretrained=freeze(load_teacher(config, data.label_names)).to(setup.device),
        tuned=tuned,
        general=tokenize(data.student_train, tokenizer, config.max_length),
        task={
            name: with_teacher_logits(datasets.concatenate_datasets([data.train, *added]))
            for name, added in more.items()
        },
        test_logits=cached_logits(tuned, test, tokenizer, precision=setup.precision),
    )


def train_in_stages(
    stages: Stages, material: Material, *, seed: int, steps: int, memory: Memory | None = None
) -> PreTrainedModel:
    """One arm with one seed: its student, trained for `stages.steps(steps)` (`memory`: see `distill_layers`)."""
    setup = material.setup
    config, tokenizer = setup.config.replace(seed=seed), setup.tokenizers.teacher
    rates, planned = LEARNING_RATES[stages.student], stages.steps(steps)
    seed_everything(seed)
    student = STUDENTS[stages.student](config, setup.data.label_names).to(setup.device)
    for stage, teacher, texts in (
        ("general", material.pretrained, material.general),
        ("layers", material.tuned, material.task[stages.texts]),
    ):
        if planned[stage]:
            own = dataclasses.replace(setup, config=config.replace(learning_rate=rates["layers"]))
            distill_layers(student, teacher, texts, own, steps=planned[stage], parts=stages.parts, memory=memory)
    own = config.replace(learning_rate=rates["prediction"], alpha=stages.alpha, max_steps=planned["prediction"])
    batches = training_batches(material.task[stages.texts], tokenizer, own.batch_size, seed=seed)
    train_classifier(student, batches, config=own, precision=setup.precision, description="Distilling logits")
    return student.eval()


def measure_on_test(model: PreTrainedModel, material: Material) -> dict[str, float]:
    """The course's measures on test, and how well the model matches the tuned teacher."""
    setup = material.setup
    test = tokenize(setup.data.test, setup.tokenizers.teacher, setup.config.max_length)
    predictions = predict(model, evaluation_batches(test, setup.tokenizers.teacher), setup.precision)
    return {
        **classification_metrics(predictions.logits, predictions.labels),
        **fidelity(predictions.logits, material.test_logits.lookup(predictions.ids)),
    }


def tinybert_study(material: Material, *, steps: int = STEPS, copies: int = COPIES) -> Study:
    """Every arm with every seed.

    The arms of a seed share what was computed inside the teachers, up to 10 GB of main memory.
    """
    config = material.setup.config

    @functools.lru_cache(maxsize=1)  # another seed means other batches
    def memory_of(_seed: int) -> Memory:
        return {}

    def run(stages: Stages, seed: int, _folder: Path) -> dict[str, float]:
        student = train_in_stages(stages, material, seed=seed, steps=steps, memory=memory_of(seed))
        return measure_on_test(student, material)

    choices = {
        "config": config.replace(seed=0).to_dict(),  # each run has a seed of its own
        "steps": steps,
        "copies": copies,
        "replacement": {"probability": PROBABILITY, "candidates": CANDIDATES},
        "learning_rates": LEARNING_RATES,
        "texts": {name: len(texts) for name, texts in material.task.items()} | {"general": len(material.general)},
        "machine": material.setup.machine,
        "checkpoint": checkpoint_version(config.teacher_source),
        "corpus": corpus_digest(read_corpus(config)),
    }
    return Study("tinybert", "kd_helpers.experiments.tinybert", ARMS, SEEDS, choices, run)


def study() -> dict[str, Any]:
    """Every arm with every seed.

    Beside what `run_study` returns: `teacher`, the tuned teacher's own measures, and `candidates`, what augmentation
    would put in the place of each word of some sentences, as `[start, end, words]`.
    """
    setup = resolve(CONFIG)
    material = prepare_material(setup, copies=COPIES)
    result = run_study(tinybert_study(material))
    options = {"max_length": CONFIG.max_length, "precision": setup.precision}
    found = candidate_words(SENTENCES, language_teacher(setup), setup.tokenizers.teacher, **options)
    candidates = {
        text: [[*span, words] for span, words in by_word.items()]
        for text, by_word in zip(SENTENCES, found, strict=True)
    }
    return result | {"teacher": measure_on_test(material.tuned, material), "candidates": candidates}
