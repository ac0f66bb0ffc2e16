"""The study of chapter 11: what distilling a language model brings, with and without its teacher.

Every student makes as many steps on texts without labels, unless it is there to show what more of them do, and is
then fine-tuned for a task with few labels or many. Each learning rate is chosen once, on validation, with seeds that
the study does not use.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from transformers import BertForMaskedLM, PreTrainedModel

from kd_helpers.config import DistillConfig
from kd_helpers.data import corpus_digest, evaluation_batches, read_corpus, tokenize
from kd_helpers.experiments.study import Arm, Study, run_study, study_table
from kd_helpers.methods import distilbert
from kd_helpers.methods.distilbert import WEIGHTS, Weights
from kd_helpers.metrics import evaluate
from kd_helpers.models import checkpoint_version, model_digest
from kd_helpers.resolve import Setup, resolve
from kd_helpers.runtime import seed_everything
from kd_helpers.teacher import TeacherLogits, load_teacher_logits

MODULE = "kd_helpers.experiments.distilbert"
CONFIG = DistillConfig(train_size=2500, transfer_size=21_631, warmup_ratio=0.1, temperature=2.0, alpha=0.9)
SEEDS = (0, 1, 2, 3, 4)
# Of the tries. Nats hardly depend on the seed; accuracy after a task does, so it is the mean over three.
LANGUAGE_PILOT_SEEDS, TASK_PILOT_SEEDS = (100,), (100, 101, 102)
STEPS, TASK_STEPS = 400, 200  # on texts without labels, and for the task
LONGER = 1.5  # times the steps: what a step with the teacher costs of one without it, about
ADAPTATION_STEPS = 3000  # of the packaged teacher, on all texts of the pool
LANGUAGE_RATES = (2e-4, 5e-4, 1e-3, 2e-3)
TASK_RATES = (5e-5, 1e-4, 3e-4, 1e-3)


class Task(NamedTuple):
    """How a student is fine-tuned.

    Attributes:
        labels: labelled texts, drawn by the seed.
        distilled: whether it also learns the soft targets of the tuned teacher.
        transfer: whether it also learns those of the texts without labels.
        steps: of the optimiser.
    """

    labels: int
    distilled: bool = False
    transfer: bool = False
    steps: int = TASK_STEPS


FEW = "labels_500"  # the task that every student learns
CURVE = {f"labels_{count}": Task(count) for count in (50, 100, 500, 2500)}
DISTILLED = {"teacher_500": Task(500, distilled=True), "transfer_500": Task(500, distilled=True, transfer=True)}
# With the steps on texts without labels spent on the task instead.
ALL_STEPS = {
    "all_labels_500": Task(500, steps=STEPS + TASK_STEPS),
    "all_teacher_500": Task(500, distilled=True, steps=STEPS + TASK_STEPS),
    "all_transfer_500": Task(500, distilled=True, transfer=True, steps=STEPS + TASK_STEPS),
}
TASKS = CURVE | DISTILLED | ALL_STEPS


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


_RANDOM = (*CURVE, "all_labels_500")
_ALONE = Weights(soft=0, language=1, cosine=0)
ARMS: dict[str, Arm] = {
    "triple": Arm("All three losses", Route(tasks=(*CURVE, *DISTILLED, "all_transfer_500"))),
    "language": Arm("Language loss alone", Route(_ALONE, tasks=(*CURVE,))),
    "language_longer": Arm("Language loss alone, 1.5 × the steps", Route(_ALONE, times=LONGER)),
    "no_soft": Arm("Without the soft loss", Route(Weights(soft=0))),
    "no_cosine": Arm("Without the cosine loss", Route(Weights(cosine=0))),
    "no_language": Arm("Without the language loss", Route(Weights(language=0))),
    "packaged_language": Arm("The checkpoint's layers, language loss alone", Route(_ALONE, adapted=False)),
    "none": Arm("The teacher's layers as they are", Route(None, tasks=(*CURVE, *ALL_STEPS))),
    "packaged": Arm("The checkpoint's layers as they are", Route(None, adapted=False, tasks=(FEW, *ALL_STEPS))),
    "random_triple": Arm("Random start, all three losses", Route(random_start=True, tasks=(*CURVE,))),
    "random_language": Arm("Random start, language loss alone", Route(_ALONE, random_start=True)),
    "random_none": Arm("Random start, nothing before the task", Route(None, random_start=True, tasks=_RANDOM)),
}


class Rates(NamedTuple):
    """Peak learning rates: on texts without labels, and for each task of a route."""

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
        seed=seed,
        max_steps=task.steps,
        learning_rate=rate,
        alpha=setup.config.alpha if task.distilled else 0.0,
    )
    own = dataclasses.replace(setup, config=config, data=data)
    classifier = distilbert.as_classifier(student, config, data.label_names, random_start=route.random_start)
    return distilbert.fine_tune(classifier, own, data.student_train, ground.logits if task.distilled else None)


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


@dataclasses.dataclass(frozen=True)
class Try:
    """A route with a learning rate for texts without labels; where there are `tasks`, theirs are tried."""

    route: Route
    rate: float
    tasks: tuple[str, ...] = ()


def tries_study(ground: Ground, tries: Mapping[str, Try], seeds: tuple[int, ...], *, steps: int = STEPS) -> Study:
    """Runs have `nats` on validation; where rates for tasks are tried, the accuracy there as `TASK RATE`."""

    def run(tried: Try, seed: int, _folder: Path) -> dict[str, float]:
        student = train_language(tried.route, ground, tried.rate, seed=seed, steps=steps)
        validation = ground.setup.data.validation
        if not tried.tasks:
            return {"nats": measure_language(student, ground, validation)["loss"]}
        found = {}
        for name, rate in itertools.product(tried.tasks, TASK_RATES):
            classifier = train_task(student, tried.route, TASKS[name], ground, rate, seed=seed)
            found[f"{name} {rate:g}"] = measure_task(classifier, ground, validation)["accuracy"]
        return found

    arms = {name: Arm(name, tried) for name, tried in tries.items()}
    return Study("distilbert_rates", MODULE, arms, seeds, choices(ground, steps), run)


def choose_rates(
    ground: Ground, arms: Mapping[str, Arm], *, steps: int = STEPS
) -> tuple[dict[str, Rates], dict[str, Any]]:
    """Of every arm the rates that are best on validation: by the language loss, then by the accuracy of each task.

    Returns:
        The rates by arm; and what they were chosen by, means over the pilot seeds: `nats` by arm and rate, and
        `accuracy` by arm, then by task and rate.
    """
    routes = {name: arm.recipe for name, arm in arms.items()}
    tried = {
        f"{name} {rate:g}": Try(route, rate)
        for name, route in routes.items()
        if route.weights is not None
        for rate in LANGUAGE_RATES
    }
    nats = study_table(run_study(tries_study(ground, tried, LANGUAGE_PILOT_SEEDS, steps=steps)), "nats").mean()
    language = {
        name: LANGUAGE_RATES[0]
        if route.weights is None
        else min(LANGUAGE_RATES, key=lambda rate, name=name: nats[f"{name} {rate:g}"])
        for name, route in routes.items()
    }
    tried = {name: Try(route, language[name], route.tasks) for name, route in routes.items()}
    runs = run_study(tries_study(ground, tried, TASK_PILOT_SEEDS, steps=steps))["runs"]
    accuracy = {
        name: {
            f"{task} {rate:g}": float(np.mean([run[f"{task} {rate:g}"] for run in runs if run["arm"] == name]))
            for task, rate in itertools.product(route.tasks, TASK_RATES)
        }
        for name, route in routes.items()
    }

    def best(arm: str, task: str) -> float:
        return max(TASK_RATES, key=lambda rate: accuracy[arm][f"{task} {rate:g}"])

    rates = {
        name: Rates(language[name], {task: best(name, task) for task in route.tasks}) for name, route in routes.items()
    }
    return rates, {"nats": nats.to_dict(), "accuracy": accuracy}


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
    ground: Ground, rates: Mapping[str, Rates], arms: Mapping[str, Arm] = ARMS, *, steps: int = STEPS
) -> Study:
    """Train on texts without labels (or don't), then for each task of the route.

    Runs have `nats` and `language_accuracy` on test, of masked tokens; for each task of the route `TASK_accuracy` and
    `TASK_nll` on test; and `seconds` and `TASK_seconds`, the processor time of the training on texts without labels and
    for the task, summed over threads. What else the machine does hardly changes it.
    """
    rates_of = {arms[name].recipe: found for name, found in rates.items()}

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
    return Study("distilbert", MODULE, arms, SEEDS, choices(ground, steps) | {"learning_rates": learning_rates}, run)


def study() -> dict[str, Any]:
    """Every arm with every seed.

    Beside what `run_study` returns: `tries`, what the learning rates were chosen by (see `choose_rates`), and
    `teachers`, how well the language teacher predicts on test with and without adaptation.
    """
    ground = prepare(CONFIG, adaptation_steps=ADAPTATION_STEPS)
    setup = ground.setup
    teachers = {
        "not adapted": ground.checkpoint,
        "head only": distilbert.language_teacher(setup, head_only=True),
        "600 steps": distilbert.language_teacher(setup),
        "all texts, 3,000 steps": ground.teacher,
    }
    rates, tries = choose_rates(ground, ARMS)
    result = run_study(distilbert_study(ground, rates))
    measured = {name: measure_language(model, ground, setup.data.test) for name, model in teachers.items()}
    return result | {"tries": tries, "teachers": measured}
