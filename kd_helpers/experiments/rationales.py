"""The studies of chapter 14: do a teacher's rationales help a student, and what about them does?

Every arm trains a small encoder-decoder for the same number of steps, unless it is there to show what more steps do.
The encoder-decoder is pre-trained on texts without labels, as the T5 of the paper is. Arms with the same seed start
from the same weights and learn the same questions in the same order. Each seed has its own weights and questions.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kd_helpers import artifacts
from kd_helpers.experiments.study import Arm, Study, run_study
from kd_helpers.experiments.watch import Curve
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
    with_blanks,
    write_targets,
)
from kd_helpers.methods.reasoning_tasks import explained_tweets, first_examples, held_out_tweets, unlabelled_tweets
from kd_helpers.models import count_parameters, freeze
from kd_helpers.pretrained import tokenizer_digest
from kd_helpers.provenance import made_by

MODULE = "kd_helpers.experiments.rationales"
# With 400 questions a student may or may not find out how the materials work, so that task needs more seeds.
SEEDS = {"knowledge": tuple(range(10)), "arithmetic": tuple(range(5)), "tweets": tuple(range(5))}
# Of the examples that the teacher learns, of those that are measured on, and of the texts without labels.
TEACHER_SEED, HELD_OUT_SEED, UNLABELLED_SEED = 100, 101, 102
LEARNING_RATE = 3e-3  # of a model of width 64; a wider one needs a lower rate
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

    examples: int = 400
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
        pretraining_steps: before them, on texts without labels; of the teacher, too.
        unlabelled: texts without labels.
        teacher_width: of the teacher.
        teacher_examples: that it learns, with their true rationales.
        teacher_steps: of the finished teacher; `TEACHERS` says when the others are taken.
        validation: questions that the best step is chosen with.
        test: questions that are measured on in the end.
        vocabulary: tokens of the tokenizer.
    """

    steps: int = 1000
    every: int = 125
    pretraining_steps: int = 3000
    unlabelled: int = 16_000
    teacher_width: int = 96
    teacher_examples: int = 300
    teacher_steps: int = 1000
    validation: int = 500
    test: int = 2000
    vocabulary: int = 512


# After which share of its training a teacher explains.
TEACHERS = {"early teacher": 0.15, "middle teacher": 0.2, "teacher": 1.0}


# --- questions ---


class Ground(NamedTuple):
    """Questions that students learn and are measured on.

    Attributes:
        tokenizer: trained on them.
        unlabelled: texts to pre-train on.
        learned: the examples of a lesson with a seed.
        validation: examples that the best step is chosen with.
        test: examples that are measured on in the end.
        data: a digest of what is not made by this package's code.
    """

    tokenizer: PreTrainedTokenizerBase
    unlabelled: list[str]
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
    unlabelled = [example.question for example in first_examples(task, training.unlabelled, seed=UNLABELLED_SEED)]

    @functools.cache
    def explained(teacher: str, seed: int) -> dict[str, Example]:
        """What a teacher says of all questions of a seed."""
        questions = [example.question for example in first_examples(task, MOST_EXAMPLES, seed=seed)]
        model = rationale_teachers(known, ground, training)[teacher]
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

    validation, test = held_out[: training.validation], held_out[training.validation :]
    ground = Ground(tokenizer, unlabelled, learned, validation, test)
    return ground


def tweets_ground(training: Training) -> Ground:
    """Packaged tweets, explained by SmolLM2-135M; each seed learns its own draw of them, in its own order."""
    explained = explained_tweets()
    texts = [text for example in explained for text in (example.question, example.label, example.rationale)]

    def learned(lesson: Lesson, seed: int) -> list[Example]:
        return as_asked(random.Random(seed).sample(explained, lesson.examples), lesson.rationales)

    tokenizer = question_tokenizer(texts, vocabulary=training.vocabulary)
    unlabelled = unlabelled_tweets(training.unlabelled, after=len(explained))
    held_out = held_out_tweets(training.validation, training.test)
    data = artifacts.fingerprint({"of": [unlabelled, explained, *held_out]})
    return Ground(tokenizer, unlabelled, learned, *held_out, data=data)


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


def rate(width: int) -> float:
    """The peak of the learning rate for a model of this width."""
    return LEARNING_RATE * 64 / width


def pretrained(ground: Ground, training: Training, *, width: int, seed: int) -> PreTrainedModel:
    """An encoder-decoder that has learned to fill the blanks in texts without labels; found again, or trained."""
    key = artifacts.fingerprint(
        {
            **made_by(MODULE),
            "texts": artifacts.fingerprint({"of": ground.unlabelled}),
            "tokenizer": tokenizer_digest(ground.tokenizer),
            "steps": training.pretraining_steps,
            "width": width,
            "seed": seed,
        }
    )
    folder = artifacts.artifacts_dir() / "pretrained_students" / key
    model = make_seq2seq(ground.tokenizer, width=width, seed=seed)

    def train(target: Path) -> None:
        batches = task_batches(with_blanks(ground.unlabelled, seed=seed), ground.tokenizer, seed=seed)
        steps, learning_rate = training.pretraining_steps, rate(width)
        train_seq2seq(model, batches, steps=steps, learning_rate=learning_rate, description="Pre-training")
        safetensors.torch.save_model(model, target / "model.safetensors")

    artifacts.get_or_build(folder, train)
    safetensors.torch.load_model(model, folder / "model.safetensors")
    return model


def rationale_teachers(known: Sequence[Example], ground: Ground, training: Training) -> dict[str, PreTrainedModel]:
    """The teachers of a task, frozen: one model, taken at several moments of its training; found again, or trained.

    Args:
        known: examples that the teacher learns, with their rationales.
        ground: of the task.
        training: how the teacher is trained.
    """
    key = artifacts.fingerprint(
        {
            **made_by(MODULE),
            "known": artifacts.fingerprint({"of": known}),
            "texts": artifacts.fingerprint({"of": ground.unlabelled}),
            "training": dataclasses.asdict(training),
        }
    )
    folder = artifacts.artifacts_dir() / "rationale_teachers" / key
    moments = {round(share * training.teacher_steps): name for name, share in TEACHERS.items()}

    def train(target: Path) -> None:
        model = pretrained(ground, training, width=training.teacher_width, seed=TEACHER_SEED)

        def keep(step: int) -> None:
            if step in moments:
                safetensors.torch.save_model(model, target / f"{moments[step]}.safetensors")

        train_seq2seq(
            model,
            task_batches([explained_first(example) for example in known], ground.tokenizer, seed=TEACHER_SEED),
            steps=training.teacher_steps,
            learning_rate=rate(training.teacher_width),
            after_step=keep,
            description="Training the teacher",
        )

    artifacts.get_or_build(folder, train)
    teachers = {}
    for name in TEACHERS:
        teachers[name] = make_seq2seq(ground.tokenizer, width=training.teacher_width, seed=TEACHER_SEED)
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
    steps = round(lesson.times * training.steps)
    every = round(lesson.times * training.every)  # as often in every arm, so that none can choose among more steps

    def answered_rightly() -> dict[str, float]:
        if lesson.first:
            written = written_answers(model, ground, ground.validation, first=True)
            return {"validation": accuracy(labels_of(written, first=True), ground.validation)}
        return {"validation": measure(model, batches).accuracy}

    curve = Curve(model, answered_rightly, steps=steps, every=every, better=operator.gt)
    targets = [explained_first(example) for example in examples] if lesson.first else examples
    train_seq2seq(
        model,
        task_batches(targets, ground.tokenizer, seed=seed),
        steps=steps,
        rationale_weight=float(bool(lesson.rationales) and not lesson.first),
        learning_rate=rate(lesson.width),
        after_step=curve.look,
        description=None,
    )
    model.load_state_dict(curve.weights)
    return curve.history


def rationales_study(
    name: str,
    ground: Ground,
    arms: Mapping[str, Arm],
    training: Training = Training(),
    *,
    seeds: Sequence[int],
) -> Study:
    """Train small encoder-decoders in several ways.

    Runs have `parameters`, `history` (see `trained`), `seconds` of training, and of the student with the best
    validation: `step`, `accuracy` on the test questions, `seconds_per_question` and `tokens_per_question` that it takes
    to answer them, and `rationale_accuracy`, the share of the test questions' true rationales that it writes exactly
    (of arms that learn them as a second task, where the true ones are known).
    """

    def run(lesson: Lesson, seed: int, _folder: Path) -> dict[str, Any]:
        student = pretrained(ground, training, width=lesson.width, seed=seed)
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


def _arms(counts: Sequence[int], middle: int) -> dict[str, Arm]:
    """The arms that both made tasks have: curves over these numbers of examples, and controls at the middle one."""
    fewer, most = tuple(count for count in counts if count >= middle), counts[-1:]
    both = {"labels": "teacher", "rationales": "teacher"}
    return {
        **_sizes("labels", "Labels", counts),
        **_sizes("rationales", "Labels and the teacher's rationales", counts, rationales="teacher"),
        **_sizes("longer", "Labels, twice the steps", fewer, times=EQUAL_COMPUTE),
        **_sizes("first", "The teacher's rationale, then the label", fewer, rationales="teacher", first=True),
        **_sizes("teacher_labels", "The teacher's labels", most, labels="teacher"),
        **_sizes("teacher_rationales", "The teacher's labels and rationales", most, **both),
        **_sizes("true", "Labels and true rationales", (middle,), rationales="true"),
        **_sizes("shuffled", "Labels and rationales of other examples", (middle,), rationales="shuffled"),
        **_sizes("random", "Labels and random facts", (middle,), rationales="random"),
    }


def _more_arms(middle: int) -> dict[str, Arm]:
    """More controls, teachers of less quality, and students of other widths."""
    ways = (("labels", "Labels", ""), ("rationales", "Labels and rationales", "teacher"))
    return {
        **_sizes("false", "Labels and false facts", (middle,), rationales="false"),
        **_sizes("noise", "Labels and noise", (middle,), rationales="noise"),
        **_sizes("early", "Labels and an early teacher's rationales", (middle,), rationales="early teacher"),
        **_sizes("middle", "Labels and a later teacher's rationales", (middle,), rationales="middle teacher"),
        **{
            f"{name}_{width}_wide": Arm(f"{title}, width {width}", Lesson(middle, rationales=rationales, width=width))
            for width in (32, 48)
            for name, title, rationales in ways
        },
    }


ARMS = {
    "knowledge": _arms((200, 400, 800, 3200), 400) | _more_arms(400),
    "arithmetic": _arms((200, 800, 3200), 800),
}
TRAINING = {
    "knowledge": Training(),
    "arithmetic": Training(steps=3000, every=375, teacher_examples=500, teacher_steps=2000),
}
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
    for name, teacher in rationale_teachers(known, ground, training).items():
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


def study_of(task: str) -> dict[str, Any]:
    """The study of a made task, with what is measured of its teachers: `teachers` (see `measured_teachers`)."""
    training = TRAINING[task]
    made = rationales_study(task, made_ground(task, training), ARMS[task], training, seeds=SEEDS[task])
    return run_study(made) | {"teachers": measured_teachers(task, training)}


def study() -> dict[str, Any]:
    """The studies of both made tasks, and of the tweets.

    Returns:
        What `study_of` returns for "knowledge", with `arithmetic`, the same for that task, and `tweets`.
    """
    ground, seeds = tweets_ground(TWEETS_TRAINING), SEEDS["tweets"]
    tweets = rationales_study("explained_tweets", ground, TWEET_ARMS, TWEETS_TRAINING, seeds=seeds)
    return study_of("knowledge") | {"arithmetic": study_of("arithmetic"), "tweets": run_study(tweets)}
