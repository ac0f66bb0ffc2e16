"""The study of chapter 11: DistilBERT's ablation in small, beside rivals that make as many steps."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from kd_helpers.config import DistillConfig
from kd_helpers.data import corpus_digest, evaluation_batches, read_corpus, tokenize
from kd_helpers.experiments.study import Arm, Study, run_study
from kd_helpers.methods import distilbert
from kd_helpers.methods.distilbert import WEIGHTS, Weights
from kd_helpers.metrics import evaluate
from kd_helpers.models import Batch, checkpoint_version
from kd_helpers.resolve import Setup, resolve
from kd_helpers.runtime import seed_everything
from kd_helpers.teacher import load_teacher_logits


@dataclasses.dataclass(frozen=True)
class Route:
    """One way to the fine-tuned student.

    Attributes:
        weights: of the three losses; None: the language model is not distilled.
        random_start: the student starts from random weights.
        task_only: the steps of the distillation are steps for the task instead.
        adapted: the student is made of the language teacher's layers; False: of the packaged model's, as in chapter 02.
        again: the student is also fine-tuned by a second distillation, from the fine-tuned classifier.
    """

    weights: Weights | None = WEIGHTS
    random_start: bool = False
    task_only: bool = False
    adapted: bool = True
    again: bool = False


ALL_LOSSES, NOT_DISTILLED = "all three losses", "no language distillation"
TASK_ONLY, COURSE_STUDENT = "all steps for the task", "chapter 02's student, all steps for the task"
_ROUTES = {
    ALL_LOSSES: Route(again=True),
    "without the soft loss": Route(Weights(soft=0)),
    "without the cosine loss": Route(Weights(cosine=0)),
    "without the language loss": Route(Weights(language=0)),
    "random start": Route(random_start=True),
    NOT_DISTILLED: Route(weights=None, again=True),
    TASK_ONLY: Route(weights=None, task_only=True, again=True),
    COURSE_STUDENT: Route(weights=None, task_only=True, adapted=False, again=True),
}
ARMS = {name: Arm(name, route) for name, route in _ROUTES.items()}
CONFIG = DistillConfig(
    train_size=500,
    transfer_size=23_500,
    max_steps=100,  # decides over epochs
    epochs=3,
    learning_rate=1e-4,
    warmup_ratio=0.1,
    alpha=0.0,
    precision="bfloat16",
)
STEPS = 200
SEEDS = (0, 1, 2, 3)
SECOND_DISTILLATION = {"alpha": 0.9, "temperature": 2.0}
SENTENCES = ("the flight was [MASK] again", "i [MASK] this phone", "what a [MASK] day")


def distilbert_study(
    config: DistillConfig = CONFIG, *, steps: int = STEPS, adaptation_steps: int = distilbert.ADAPTATION_STEPS
) -> Study:
    """Distil the language model (or don't), then fine-tune it with few labels.

    Runs have `language_loss` and `language_accuracy` of the student on validation before fine-tuning, and `accuracy`
    and `nll` on test after it. Routes with `again` also have `again_…`, after a second distillation on the same texts,
    and where all steps are for the task `transfer_…`, after one on the texts without labels as well.
    """
    whole = resolve(config)

    @functools.lru_cache(maxsize=1)  # a study runs all arms of a seed one after the other
    def batches_of_a_seed(seed: int) -> list[Batch]:
        tokenizer = whole.tokenizers.teacher
        texts = tokenize(whole.data.student_train, tokenizer, config.max_length)
        batches = distilbert.language_batches(texts, tokenizer, seed=seed)
        teacher = distilbert.language_teacher(whole, steps=adaptation_steps)
        return distilbert.with_teacher_states(batches, teacher, steps, whole.precision)

    def run(route: Route, seed: int, _folder: Path) -> dict[str, float]:
        setup = dataclasses.replace(whole, config=config.replace(seed=seed))
        teacher = distilbert.language_teacher(setup, steps=adaptation_steps)
        source = teacher
        if not route.adapted:
            source = distilbert.load_language_model(config.teacher_source)[0].to(setup.device)
        student = distilbert.language_student(source, random_start=route.random_start, seed=seed)
        if route.weights is not None:
            batches = batches_of_a_seed(seed)
            seed_everything(seed)
            distilbert.train_language_model(
                student, batches, steps=steps, teacher=teacher, weights=route.weights, precision=setup.precision
            )
        held_out = distilbert.held_out_batches(setup.data.validation, setup.tokenizers.teacher, config.max_length)
        predicted = distilbert.language_loss(student, held_out, setup.precision)
        measures = {"language_loss": predicted["loss"], "language_accuracy": predicted["accuracy"]}
        for prefix, tuned in _fine_tunings(route, setup, steps).items():
            measures |= _fine_tuned_measures(student, route, *tuned, prefix)
        return measures

    choices = {
        "config": config.replace(seed=0).to_dict(),  # each run has a seed of its own
        "steps": steps,
        "adaptation_steps": adaptation_steps,
        "second_distillation": SECOND_DISTILLATION,
        "temperature": distilbert.TEMPERATURE,
        "learning_rate": distilbert.LEARNING_RATE,
        "batch_size": distilbert.BATCH_SIZE,
        "masked_share": distilbert.MASKED_SHARE,
        "machine": whole.machine,
        "checkpoint": checkpoint_version(config.teacher_source),
        "texts": corpus_digest(read_corpus(config)),
    }
    return Study("distilbert", "kd_helpers.experiments.distilbert", ARMS, SEEDS, choices, run)


def _fine_tunings(route: Route, setup: Setup, steps: int) -> dict[str, tuple[Setup, str]]:
    """How a route's student is fine-tuned, and on which split, by the prefix of the measures."""
    config = setup.config
    task = config.replace(max_steps=config.max_steps + (steps if route.task_only else 0))
    distilled = task.replace(**SECOND_DISTILLATION)
    tunings = {"": (task, "train")}
    if route.again:
        tunings["again_"] = (distilled, "train")
    if route.task_only:
        tunings["transfer_"] = (distilled, "student_train")
    return {prefix: (dataclasses.replace(setup, config=own), split) for prefix, (own, split) in tunings.items()}


def _fine_tuned_measures(student: Any, route: Route, setup: Setup, split: str, prefix: str) -> dict[str, float]:
    config, data, tokenizer = setup.config, setup.data, setup.tokenizers.teacher
    teacher_logits = load_teacher_logits(setup, split) if config.alpha else None
    classifier = distilbert.as_classifier(student, config, data.label_names, random_start=route.random_start)
    distilbert.fine_tune(classifier, setup, getattr(data, split), teacher_logits)
    test = evaluation_batches(tokenize(data.test, tokenizer, config.max_length), tokenizer)
    measured = evaluate(classifier, test, setup.precision)
    return {f"{prefix}{metric}": measured[metric] for metric in ("accuracy", "nll")}


def study() -> dict[str, Any]:
    """The paper's ablation in small.

    Beside what `run_study` returns: `teachers`, how well the language teacher predicts on validation with and without
    adaptation, and `words`, what it would put into some sentences at T = 1 and at the temperature of the study.
    """
    setup = resolve(CONFIG)
    tokenizer = setup.tokenizers.teacher
    held_out = distilbert.held_out_batches(setup.data.validation, tokenizer, CONFIG.max_length)
    teachers = {
        "not adapted": distilbert.load_language_model(CONFIG.teacher_source)[0].to(setup.device),
        "head only": distilbert.language_teacher(setup, head_only=True),
        "all weights": distilbert.language_teacher(setup),
    }
    measured = {name: distilbert.language_loss(model, held_out, setup.precision) for name, model in teachers.items()}
    words = {
        sentence: {
            f"{temperature:g}": distilbert.likely_words(
                teachers["all weights"], tokenizer, sentence, temperature=temperature
            )
            for temperature in (1.0, distilbert.TEMPERATURE)
        }
        for sentence in SENTENCES
    }
    return run_study(distilbert_study()) | {"teachers": measured, "words": words}
