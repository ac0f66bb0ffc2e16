"""The study of chapter 11: what distilling a language model brings, with and without its teacher.

Every student makes as many steps on texts without labels, unless it is there to show what more of them do, and is
then fine-tuned for a task with few labels or many. Learning rates are chosen once, on validation, with a seed that the
study does not use.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from transformers import BertForMaskedLM, PreTrainedModel

from kd_helpers.config import DistillConfig
from kd_helpers.data import corpus_digest, evaluation_batches, read_corpus, tokenize
from kd_helpers.experiments.study import Arm, Study, run_study
from kd_helpers.methods import distilbert
from kd_helpers.methods.distilbert import WEIGHTS, Weights
from kd_helpers.metrics import evaluate
from kd_helpers.models import checkpoint_version, model_digest
from kd_helpers.resolve import Setup, resolve
from kd_helpers.runtime import seed_everything
from kd_helpers.teacher import TeacherLogits, load_teacher_logits

MODULE = "kd_helpers.experiments.distilbert"
# The precision is fixed, so that machines with and without bfloat16 can share the runs.
CONFIG = DistillConfig(
    train_size=2500, transfer_size=21_631, warmup_ratio=0.1, temperature=2.0, alpha=0.9, precision="float32"
)
SEEDS, PART_SEEDS = (0, 1, 2, 3, 4), (0, 1, 2)
PILOT_SEED = 100
STEPS, TASK_STEPS = 200, 100  # on texts without labels, and for the task
LONGER = 1.6  # times the steps: what a step with the teacher costs of one without it, about
ADAPTATION_STEPS = 2000  # of the packaged teacher, on all texts of the pool
# Tried on texts without labels, for copied layers and for random ones, which need a higher rate; and for a task.
COPIED_RATES, RANDOM_RATES = (2e-4, 5e-4, 1e-3), (5e-4, 1e-3, 2e-3)
TASK_RATES = (3e-5, 1e-4, 3e-4, 1e-3)


class Task(NamedTuple):
    """How a student is fine-tuned.

    Attributes:
        labels: labelled texts, drawn by the seed.
        transfer: whether it learns the soft targets of the tuned teacher as well, for these texts and for all those
            without labels.
        steps: of the optimiser.
    """

    labels: int
    transfer: bool = False
    steps: int = TASK_STEPS


FEW = "labels_500"  # the task that every student learns
CURVE = {f"labels_{count}": Task(count) for count in (50, 100, 500, 2500)}
# With the steps on texts without labels spent on the task instead.
ALL_STEPS = {
    "all_labels_500": Task(500, steps=STEPS + TASK_STEPS),
    "all_transfer_500": Task(500, transfer=True, steps=STEPS + TASK_STEPS),
}
TASKS = CURVE | {"transfer_500": Task(500, transfer=True)} | ALL_STEPS


@dataclasses.dataclass(frozen=True)
class Route:
    """One way to a student that knows the language.

    Attributes:
        weights: of the three losses; None: it does not learn from texts without labels. Without soft and cosine loss
            there is no teacher.
        random_start: it starts from random weights, not from its teacher's layers.
        adapted: its layers are those of the language teacher, not those of the checkpoint that this was adapted from.
        times: its steps, as a multiple of those of the others.
        tasks: names of `TASKS`.
    """

    weights: Weights | None = WEIGHTS
    random_start: bool = False
    adapted: bool = True
    times: float = 1.0
    tasks: tuple[str, ...] = (FEW,)


_ALONE = Weights(soft=0, language=1, cosine=0)
# What a student learns about the task, by what it has learned about the language.
ARMS: dict[str, Arm] = {
    "triple": Arm("All three losses", Route(tasks=(*CURVE, "transfer_500", "all_transfer_500"))),
    "language": Arm("Language loss alone", Route(_ALONE, tasks=(*CURVE,))),
    "none": Arm("The teacher's layers as they are", Route(None, tasks=(*CURVE, *ALL_STEPS))),
    "packaged": Arm("The checkpoint's layers as they are", Route(None, adapted=False, tasks=(FEW, *ALL_STEPS))),
}
# What each part is worth for the language: one thing differs from `triple`, or from `language`.
PARTS: dict[str, Arm] = {
    "triple": ARMS["triple"],
    "language": ARMS["language"],
    "language_longer": Arm("Language loss alone, 1.6 × the steps", Route(_ALONE, times=LONGER)),
    "no_soft": Arm("Without the soft loss", Route(Weights(soft=0))),
    "no_cosine": Arm("Without the cosine loss", Route(Weights(cosine=0))),
    "no_language": Arm("Without the language loss", Route(Weights(language=0))),
    "random_triple": Arm("Random start, all three losses", Route(random_start=True)),
    "random_language": Arm("Random start, language loss alone", Route(_ALONE, random_start=True)),
    "random_none": Arm("Random start, nothing before the task", Route(None, random_start=True)),
}
# Arms that take the rates of another.
RATES_OF = {"language_longer": "language", "no_soft": "triple", "no_cosine": "triple", "no_language": "triple"}


class Rates(NamedTuple):
    """Peak learning rates: on texts without labels (0 where none are learned), and for each task of a route."""

    language: float
    tasks: Mapping[str, float]


class Ground(NamedTuple):
    """What all runs share.

    Attributes:
        setup: configuration and data.
        teacher: the language teacher.
        checkpoint: what it was adapted from.
        logits: of the tuned teacher.
    """

    setup: Setup
    teacher: BertForMaskedLM
    checkpoint: BertForMaskedLM
    logits: TeacherLogits


def prepare(config: DistillConfig, *, adaptation_steps: int) -> Ground:
    """The texts, and the teacher as a language model, adapted to all of them but the held-out ones."""
    setup = resolve(config)
    everything = dataclasses.replace(setup.data, teacher_train=setup.data.student_train)
    teacher = distilbert.language_teacher(dataclasses.replace(setup, data=everything), steps=adaptation_steps)
    checkpoint = distilbert.load_language_model(config.teacher_source)[0].to(setup.device)
    return Ground(setup, teacher, checkpoint, load_teacher_logits(setup, "student_train"))


def train_language(route: Route, ground: Ground, rate: float, *, seed: int, steps: int) -> BertForMaskedLM:
    """A student of a route before its task."""
    setup = ground.setup
    source = ground.teacher if route.adapted else ground.checkpoint
    student = distilbert.language_student(source, random_start=route.random_start, seed=seed)
    if route.weights is None:
        return student.eval()
    texts = tokenize(setup.data.student_train, setup.tokenizers.teacher, setup.config.max_length)
    seed_everything(seed)
    distilbert.train_language_model(
        student,
        distilbert.language_batches(texts, setup.tokenizers.teacher, seed=seed),
        steps=round(route.times * steps),
        teacher=ground.teacher,
        weights=route.weights,
        learning_rate=rate,
        precision=setup.precision,
    )
    return student


def train_task(
    student: BertForMaskedLM, route: Route, task: Task, ground: Ground, rate: float, *, seed: int
) -> PreTrainedModel:
    """A copy of the student, fine-tuned for a task."""
    setup = ground.setup
    drawn = np.random.default_rng(seed).permutation(len(setup.data.train))[: task.labels]
    data = dataclasses.replace(
        setup.data,
        train=setup.data.train.select(np.sort(drawn)),
        transfer=setup.data.transfer if task.transfer else setup.data.transfer.select([]),
    )
    config = setup.config.replace(
        seed=seed, max_steps=task.steps, learning_rate=rate, alpha=setup.config.alpha if task.transfer else 0.0
    )
    own = dataclasses.replace(setup, config=config, data=data)
    classifier = distilbert.as_classifier(student, config, data.label_names, random_start=route.random_start)
    return distilbert.fine_tune(classifier, own, data.student_train, ground.logits if task.transfer else None)


def measure_task(classifier: PreTrainedModel, ground: Ground, texts: datasets.Dataset) -> dict[str, float]:
    """Accuracy and NLL of a fine-tuned student."""
    setup = ground.setup
    tokenized = tokenize(texts, setup.tokenizers.teacher, setup.config.max_length)
    measured = evaluate(classifier, evaluation_batches(tokenized, setup.tokenizers.teacher), setup.precision)
    return {name: measured[name] for name in ("accuracy", "nll")}


def measure_language(model: BertForMaskedLM, ground: Ground, texts: datasets.Dataset) -> dict[str, float]:
    """How well a model predicts masked tokens (see `methods.distilbert.language_loss`)."""
    setup = ground.setup
    batches = distilbert.held_out_batches(texts, setup.tokenizers.teacher, setup.config.max_length)
    return distilbert.language_loss(model, batches, setup.precision)


# --- learning rates ---


def tries_study(ground: Ground, arms: Mapping[str, Arm] = ARMS | PARTS, *, steps: int = STEPS) -> Study:
    """Runs have, on validation, `nats` by rate and `accuracy` by task and rate, of the student with the best nats."""

    def run(route: Route, seed: int, _folder: Path) -> dict[str, Any]:
        validation = ground.setup.data.validation
        students, nats = {}, {}
        rates = RANDOM_RATES if route.random_start else COPIED_RATES
        for rate in rates if route.weights else (0.0,):
            students[rate] = train_language(route, ground, rate, seed=seed, steps=steps)
            nats[rate] = measure_language(students[rate], ground, validation)["loss"]
        student = students[min(nats, key=nats.__getitem__)]
        accuracy: dict[str, dict[float, float]] = {name: {} for name in route.tasks}
        for name in route.tasks:
            for rate in TASK_RATES:
                classifier = train_task(student, route, TASKS[name], ground, rate, seed=seed)
                accuracy[name][rate] = measure_task(classifier, ground, validation)["accuracy"]
        return {"nats": nats, "accuracy": accuracy}

    tried = {name: arm for name, arm in arms.items() if name not in RATES_OF}
    return Study("distilbert_rates", MODULE, tried, (PILOT_SEED,), choices(ground, steps), run)


def chosen_rates(tries: Mapping[str, Any]) -> dict[str, Rates]:
    """By arm the rates that were best in `tries_study`: for the language, then for each task."""
    found = {}
    for run in tries["runs"]:
        # JSON names a rate by a text.
        tasks = {name: float(max(rates, key=rates.get)) for name, rates in run["accuracy"].items()}
        found[run["arm"]] = Rates(float(min(run["nats"], key=run["nats"].get)), tasks)
    return found | {name: found[other] for name, other in RATES_OF.items() if other in found}


# --- the study ---


def choices(ground: Ground, steps: int) -> dict[str, Any]:
    """What the results depend on, beside arm and seed."""
    config = ground.setup.config
    return {
        "config": config.replace(seed=0).to_dict(),  # each run has a seed of its own
        "steps": steps,
        "adaptation_steps": ADAPTATION_STEPS,
        "teacher": model_digest(ground.teacher),
        "teacher_logits": ground.logits.digest(),
        "tasks": {name: task._asdict() for name, task in TASKS.items()},
        "temperature": distilbert.TEMPERATURE,
        "batch_size": distilbert.BATCH_SIZE,
        "masked_share": distilbert.MASKED_SHARE,
        "machine": ground.setup.machine,
        "checkpoint": checkpoint_version(config.teacher_source),
        "texts": corpus_digest(read_corpus(config)),
    }


def distilbert_study(
    ground: Ground,
    rates: Mapping[str, Rates],
    arms: Mapping[str, Arm] = ARMS,
    *,
    seeds: Sequence[int] = SEEDS,
    steps: int = STEPS,
) -> Study:
    """Train on texts without labels (or don't), then for each task of the route.

    Runs have `nats` and `language_accuracy` on test, of masked tokens; for each task of the route `TASK_accuracy` and
    `TASK_nll` on test; and `seconds` and `TASK_seconds`, the processor time of the training on texts without labels and
    for the task, summed over threads. What else the machine does hardly changes it.
    """
    rates_of = {(ARMS | PARTS)[name].recipe: found for name, found in rates.items()}

    def run(route: Route, seed: int, _folder: Path) -> dict[str, float]:
        started = time.process_time()
        student = train_language(route, ground, rates_of[route].language, seed=seed, steps=steps)
        seconds = time.process_time() - started
        test = ground.setup.data.test
        predicted = measure_language(student, ground, test)
        measures = {"seconds": seconds, "nats": predicted["loss"], "language_accuracy": predicted["accuracy"]}
        for name in route.tasks:
            started = time.process_time()
            classifier = train_task(student, route, TASKS[name], ground, rates_of[route].tasks[name], seed=seed)
            measures[f"{name}_seconds"] = time.process_time() - started
            measures |= {f"{name}_{what}": value for what, value in measure_task(classifier, ground, test).items()}
        return measures

    learning_rates = {name: found._asdict() for name, found in rates.items()}
    return Study("distilbert", MODULE, arms, seeds, choices(ground, steps) | {"learning_rates": learning_rates}, run)


def study() -> dict[str, Any]:
    """The arms of `ARMS` with every seed; as `parts`, those of `PARTS` with three of them.

    There are also `tries`, by arm what its learning rates were chosen by (see `tries_study`), and `teachers`, how well
    the language teacher predicts on test with and without adaptation.
    """
    ground = prepare(CONFIG, adaptation_steps=ADAPTATION_STEPS)
    setup = ground.setup
    tries = run_study(tries_study(ground))
    rates = chosen_rates(tries)
    result = run_study(distilbert_study(ground, rates))
    parts = run_study(distilbert_study(ground, rates, PARTS, seeds=PART_SEEDS))
    teachers = {
        "not adapted": ground.checkpoint,
        "head only": distilbert.language_teacher(setup, head_only=True),
        "600 steps": distilbert.language_teacher(setup),
        "all texts": ground.teacher,
    }
    measured = {name: measure_language(model, ground, setup.data.test) for name, model in teachers.items()}
    tried = {run["arm"]: {name: run[name] for name in ("nats", "accuracy")} for run in tries["runs"]}
    return result | {"parts": parts, "tries": tried, "teachers": measured}
