"""The studies of chapter 13: how small a language model can be, and whether a teacher helps it.

`sizes_study` trains models of several widths and depths on the same stories. `language_models_study` trains one small
model in several ways that differ only in what it learns from.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from kd_helpers import artifacts
from kd_helpers.experiments.study import Arm, Study, run_study
from kd_helpers.experiments.watch import Curve
from kd_helpers.methods.language_models import (
    CausalShape,
    LossOf,
    Text,
    cached_texts,
    cached_top_logits,
    causal_batches,
    cross_entropy_loss,
    distillation_loss_of,
    held_out_batches,
    held_out_nats,
    make_causal_model,
    nats_of_texts,
    on_policy_loss_of,
    train_causal_model,
    write_texts,
)
from kd_helpers.methods.stories import floor_nats, mean_scores, story_splits, story_tokenizer
from kd_helpers.models import count_parameters, freeze
from kd_helpers.provenance import made_by

MODULE = "kd_helpers.experiments.language_models"
BASELINE = "baseline"
SEEDS = (0, 1, 2, 3, 4)
BATCH_SIZE = 8  # at equal cost, many small steps teach these small models more than few large ones
QUARTERS = 4  # of a text, for what changes along it


# --- texts ---


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Which texts are learned and how many.

    Attributes:
        stories: see `methods.stories.read_stories`; "" are stories that a program makes.
        teacher_texts: that the teacher is trained on.
        student_texts: the first of them, all that the student has.
        held_out: texts that are measured on, and as many others that choices are made with (validation).
        vocabulary: tokens of the tokenizer.
        positions: tokens of a text that are kept.
    """

    stories: str = ""
    teacher_texts: int = 16_384
    student_texts: int = 512
    held_out: int = 256
    vocabulary: int = 512
    positions: int = 160


class Texts(NamedTuple):
    """A corpus as tokens.

    Attributes:
        tokenizer: trained on these texts.
        teacher: token ids of each text that the teacher learns.
        student: those that the student has.
        validation: those that choices are made with.
        held_out: those that are measured on in the end.
        floors: nats a token that no model can go below on `validation` and on `held_out`; empty where nobody knows.
    """

    tokenizer: PreTrainedTokenizerFast
    teacher: list[Text]
    student: list[Text]
    validation: list[Text]
    held_out: list[Text]
    floors: dict[str, float]


def load_texts(corpus: Corpus) -> Texts:
    """The texts of a corpus, tokenized; a text is cut off after `positions` tokens."""
    splits = story_splits(train=corpus.teacher_texts, held_out=2 * corpus.held_out, stories=corpus.stories)
    train, measured = splits.train["text"][:], splits.held_out["text"][:]
    held_out = {"validation": measured[corpus.held_out :], "held_out": measured[: corpus.held_out]}
    made = not corpus.stories
    tokenizer = story_tokenizer(None if made else train, vocabulary=corpus.vocabulary)

    def encode(texts: list[str]) -> list[Text]:
        return [ids[: corpus.positions] for ids in tokenizer(texts)["input_ids"]]

    teacher = encode(train)
    floors = {name: floor_nats(some, tokenizer) for name, some in held_out.items()} if made else {}
    encoded = {name: encode(some) for name, some in held_out.items()}
    return Texts(tokenizer, teacher, teacher[: corpus.student_texts], **encoded, floors=floors)


def texts_digest(texts: Texts) -> str:
    """A digest of all texts as tokens, for results that depend on them."""
    return artifacts.fingerprint({"of": [texts.teacher, texts.validation, texts.held_out]})


# --- what is measured ---


def write_own(model: PreTrainedModel, texts: Texts, corpus: Corpus, *, count: int, seed: int) -> list[list[int]]:
    """Texts that a model writes when it is given nothing but the token that begins a text."""
    begin, end = texts.tokenizer.bos_token_id, texts.tokenizer.eos_token_id
    return write_texts(model, [[begin]] * count, new_tokens=corpus.positions - 1, seed=seed, end_id=end)


def measure_writing(written: Sequence[Text], texts: Texts) -> dict[str, float]:
    """The parser's scores of written stories (see `methods.stories.StoryScore`); none for other texts."""
    if not texts.floors:
        return {}
    return mean_scores(texts.tokenizer.batch_decode(written, skip_special_tokens=True))


def measure_held_out(model: PreTrainedModel, texts: Texts) -> dict[str, float]:
    """`nats` a token of the held-out texts; of made stories also the `excess`, how far above the floor that is."""
    nats = held_out_nats(model, held_out_batches(texts.held_out))
    return {"nats": nats, "excess": nats - texts.floors["held_out"]} if texts.floors else {"nats": nats}


def trained(
    model: PreTrainedModel,
    batches: Any,
    loss_of: LossOf,
    texts: Texts,
    *,
    steps: int,
    learning_rate: float,
    every: int,
    measure: Callable[[], dict[str, float]] = dict,
    keep_best: bool = True,
) -> list[dict[str, float]]:
    """Train a model and measure it after every so many steps.

    Args:
        keep_best: leave the model as it was when validation was best; otherwise as it is in the end.

    Returns:
        For each measurement `step`, `seconds` (of training alone), `validation` (nats a token) and what `measure` says.
    """
    validation = held_out_batches(texts.validation)
    curve = Curve(
        model,
        lambda: {"validation": held_out_nats(model, validation), **measure()},
        steps=steps,
        every=every,
        better=operator.lt,
    )
    train_causal_model(
        model, batches, loss_of, steps=steps, learning_rate=learning_rate, after_step=curve.look, description=None
    )
    if keep_best:
        model.load_state_dict(curve.weights)
    return curve.history


def best_step(history: Sequence[dict[str, float]]) -> int:
    """After how many steps validation was best."""
    return int(min(history, key=lambda entry: entry["validation"])["step"])


# --- how small can a model be? ---


@dataclasses.dataclass(frozen=True)
class Size:
    """A model's size.

    Attributes:
        width: numbers in a hidden state.
        depth: layers.
        learning_rate: its peak; a wider model needs a lower one.
    """

    width: int
    depth: int
    learning_rate: float

    def shape(self, corpus: Corpus) -> CausalShape:
        """As `make_causal_model` takes it: 16 numbers of a hidden state belong to each head of the attention."""
        return CausalShape(corpus.vocabulary, self.width, self.depth, self.width // 16)


RATES = {32: 1e-2, 64: 1e-2, 128: 5e-3}
SIZES = {
    f"{width} × {depth}": Arm(f"width {width}, depth {depth}", Size(width, depth, rate))
    for width, rate in RATES.items()
    for depth in (1, 2, 4)
}
SIZE_STEPS = 4096
SIZE_EVERY = 512


def sizes_study(
    corpus: Corpus = Corpus(), *, steps: int = SIZE_STEPS, every: int = SIZE_EVERY, written: int = 128
) -> Study:
    """Train every size on the teacher's texts, and measure it on the way.

    Runs have `parameters`, `history` (see `trained`), with the parser's scores of stories that the model writes at each
    step, and of the model with the best validation `step`, `nats`, `excess` and the scores.
    """
    texts = load_texts(corpus)

    def run(size: Size, seed: int, _folder: Path) -> dict[str, Any]:
        model = make_causal_model(size.shape(corpus), seed=seed)

        def scores() -> dict[str, float]:
            return measure_writing(write_own(model, texts, corpus, count=written, seed=seed), texts)

        history = trained(
            model,
            causal_batches(texts.teacher, BATCH_SIZE, seed=seed),
            cross_entropy_loss(model),
            texts,
            steps=steps,
            learning_rate=size.learning_rate,
            every=every,
            measure=scores,
        )
        measured = {**measure_held_out(model, texts), **scores()}
        return {"parameters": count_parameters(model), "history": history, "step": best_step(history), **measured}

    choices = {
        "corpus": dataclasses.asdict(corpus),
        "texts": texts_digest(texts),
        "steps": steps,
        "every": every,
        "written": written,
        "batch_size": BATCH_SIZE,
    }
    return Study("story_sizes", MODULE, SIZES, SEEDS, choices, run)


# --- does a teacher help? ---


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What an arm's student learns from.

    Attributes:
        texts: "student", the few that it has; "written", as many that the teacher wrote; "many written", as many as the
            teacher has learned; or "teacher", those that the teacher has learned.
        alpha: weight of the soft loss; 0 needs no teacher.
        beta: its divergence, 0 forward KL, 1 reverse KL.
        ending: what changes in the last quarter of the steps: nothing, "reverse" (reverse KL on the same texts) or
            "on policy" (reverse KL on texts that the student writes).
        times: its steps, as a multiple of those of the others.
    """

    texts: str = "student"
    alpha: float = 0.0
    beta: float = 0.0
    ending: str = ""
    times: int = 1


ENDING = 0.25  # share of the steps


ARMS = {
    BASELINE: Arm("Baseline: the texts alone", Lesson()),
    "half_forward": Arm("½ texts + ½ forward KL", Lesson(alpha=0.5)),
    "forward": Arm("Forward KL", Lesson(alpha=1.0)),
    "jsd": Arm("JSD(½)", Lesson(alpha=1.0, beta=0.5)),
    "reverse": Arm("Reverse KL", Lesson(alpha=1.0, beta=1.0)),
    "forward_reverse": Arm("Forward KL, then reverse KL", Lesson(alpha=1.0, ending="reverse")),
    "on_policy": Arm("Forward KL, then reverse KL on own texts", Lesson(alpha=1.0, ending="on policy")),
    "sequence": Arm("Texts the teacher wrote", Lesson("written")),
    "sequence_forward": Arm("Texts the teacher wrote, forward KL", Lesson("written", alpha=1.0)),
    "sequence_many": Arm("Many texts the teacher wrote", Lesson("many written")),
    "more_texts": Arm("All the teacher's texts", Lesson("teacher")),
    "more_texts_longer": Arm("All the teacher's texts, twice the steps", Lesson("teacher", times=2)),
    "more_texts_forward": Arm("All the teacher's texts, forward KL", Lesson("teacher", alpha=1.0)),
}
TEACHER = Size(width=128, depth=4, learning_rate=5e-3)
STUDENT = Size(width=64, depth=2, learning_rate=1e-2)
TOP = 32  # logits of the teacher that are cached for each token


@dataclasses.dataclass(frozen=True)
class Training:
    """How long teacher and student are trained, and what of the student is measured.

    Attributes:
        batch_size: texts of a batch.
        teacher_steps: optimiser steps of the teacher.
        steps: of the student.
        every: steps between two measurements on held-out texts.
        prompt_tokens: that begin a text of an on-policy batch.
        written: texts that a student writes in the end.
    """

    batch_size: int = BATCH_SIZE
    teacher_steps: int = 4096
    steps: int = 2048
    every: int = 256
    prompt_tokens: int = 1
    written: int = 256


REAL_ARMS = (BASELINE, "forward", "sequence", "more_texts")
# By its name, what makes a study of texts that no program makes (see `language_models_study`).
REAL_TEXTS: dict[str, dict[str, Any]] = {
    "tweets": {
        "name": "tweets",
        "corpus": Corpus(
            "tweets", teacher_texts=24_000, student_texts=1500, held_out=512, vocabulary=1024, positions=64
        ),
        "training": Training(batch_size=32, teacher_steps=2048, steps=1024, every=128),
        "arms": REAL_ARMS,
    },
    "written": {
        "name": "written",
        "corpus": Corpus(
            "written", teacher_texts=4096, student_texts=256, held_out=256, vocabulary=1024, positions=256
        ),
        "training": Training(steps=1024, every=128),
        "arms": REAL_ARMS,
    },
}


def language_teacher(texts: Texts, corpus: Corpus, *, steps: int, batch_size: int = BATCH_SIZE) -> PreTrainedModel:
    """The teacher of a corpus, frozen: found again, or trained (seed 0) and kept."""
    key = artifacts.fingerprint(
        {
            **made_by(MODULE),
            "corpus": dataclasses.asdict(corpus),
            "texts": artifacts.fingerprint({"texts": texts.teacher}),
            "size": dataclasses.asdict(TEACHER),
            "steps": steps,
            "batch_size": batch_size,
        }
    )
    folder = artifacts.artifacts_dir() / "story_teachers" / key
    model = make_causal_model(TEACHER.shape(corpus), seed=0)

    def train(target: Path) -> None:
        batches = causal_batches(texts.teacher, batch_size, seed=0)
        checkpoints = artifacts.artifacts_dir() / "checkpoints" / key
        train_causal_model(
            model,
            batches,
            steps=steps,
            learning_rate=TEACHER.learning_rate,
            checkpoints=checkpoints,
            description="Training the teacher",
        )
        safetensors.torch.save_model(model, target / "model.safetensors")

    artifacts.get_or_build(folder, train)
    safetensors.torch.load_model(model, folder / "model.safetensors")
    return freeze(model)


def in_turn(first: LossOf, then: LossOf, *, at: int) -> LossOf:
    """One loss until step `at`, another from there on."""
    return lambda batch: (first if int(batch["step"]) < at else then)(batch)


def language_models_study(
    corpus: Corpus = Corpus(),
    training: Training = Training(),
    *,
    arms: Sequence[str] = tuple(ARMS),
    seeds: Sequence[int] = SEEDS,
    name: str = "language_models",
) -> Study:
    """Train one small model in several ways. Arms with the same seed start from the same weights.

    Runs have `history` (see `trained`), `seconds` of training, and of the student with the best validation (after an
    ending, of the last one): `step`, `nats` (a token of the held-out texts), `excess` (of made stories), and of the
    texts that it writes: `teacher_nats`, how improbable a token of them is for the teacher; `own_nats`, the same for
    the student, which is its entropy; `teacher_nats_by_quarter` of a text; for made stories the parser's scores (see
    `methods.stories.StoryScore`); and `samples`, the first of them.
    """
    texts = load_texts(corpus)

    @functools.cache
    def teacher() -> PreTrainedModel:
        return language_teacher(texts, corpus, steps=training.teacher_steps, batch_size=training.batch_size)

    def learned(lesson: Lesson) -> list[Text]:
        given = {"student": texts.student, "teacher": texts.teacher}
        if lesson.texts in given:
            return given[lesson.texts]
        count = len({"written": texts.student, "many written": texts.teacher}[lesson.texts])
        begin, end = texts.tokenizer.bos_token_id, texts.tokenizer.eos_token_id
        return cached_texts(teacher(), [[begin]] * count, new_tokens=corpus.positions - 1, seed=0, end_id=end)

    def loss_of(student: PreTrainedModel, lesson: Lesson, learned: list[Text], seed: int) -> LossOf:
        if lesson.alpha == 0:
            return cross_entropy_loss(student)
        signal = cached_top_logits(teacher(), learned, k=TOP) if lesson.beta == 0 else teacher()
        offline = distillation_loss_of(student, signal, alpha=lesson.alpha, beta=lesson.beta)
        if not lesson.ending:
            return offline
        reverse = distillation_loss_of(student, teacher(), alpha=1.0, beta=1.0)
        on_policy = on_policy_loss_of(
            student,
            teacher(),
            reverse,
            share=1.0,
            prompt_tokens=training.prompt_tokens,
            new_tokens=corpus.positions - training.prompt_tokens,
            seed=seed,
            end_id=texts.tokenizer.eos_token_id,
        )
        then = {"reverse": reverse, "on policy": on_policy}[lesson.ending]
        return in_turn(offline, then, at=round((1 - ENDING) * training.steps * lesson.times))

    def run(lesson: Lesson, seed: int, _folder: Path) -> dict[str, Any]:
        student = make_causal_model(STUDENT.shape(corpus), seed=seed)
        given = learned(lesson)
        history = trained(
            student,
            causal_batches(given, training.batch_size, seed=seed),
            loss_of(student, lesson, given, seed),
            texts,
            steps=training.steps * lesson.times,
            learning_rate=STUDENT.learning_rate,
            every=training.every,
            # What an ending is for is not likelihood, so likelihood must not undo it.
            keep_best=not lesson.ending,
        )
        own = write_own(student, texts, corpus, count=training.written, seed=seed)
        return {
            "history": history,
            "seconds": history[-1]["seconds"],
            "step": history[-1]["step"] if lesson.ending else best_step(history),
            **measure_held_out(student, texts),
            **measure_own(student, teacher(), own, texts),
        }

    choices = {
        "corpus": dataclasses.asdict(corpus),
        "texts": texts_digest(texts),
        "training": dataclasses.asdict(training),
        "teacher": dataclasses.asdict(TEACHER),
        "student": dataclasses.asdict(STUDENT),
        "top": TOP,
        "ending": ENDING,
    }
    return Study(name, MODULE, {arm: ARMS[arm] for arm in arms}, seeds, choices, run)


def measure_own(
    model: PreTrainedModel, teacher: PreTrainedModel, written: Sequence[Text], texts: Texts, samples: int = 3
) -> dict[str, Any]:
    """What `language_models_study` says of texts that a model has written."""
    by_teacher, by_model = nats_of_texts(teacher, written), nats_of_texts(model, written)
    return {
        "teacher_nats": _mean(by_teacher),
        "own_nats": _mean(by_model),
        "teacher_nats_by_quarter": _mean_by_quarter(by_teacher),
        **measure_writing(written, texts),
        "samples": texts.tokenizer.batch_decode(written[:samples], skip_special_tokens=True),
    }


def _mean(of_texts: Sequence[Sequence[float]]) -> float:
    """The mean over all tokens of all texts."""
    return sum(map(sum, of_texts)) / sum(map(len, of_texts))


def _mean_by_quarter(of_texts: Sequence[Sequence[float]]) -> list[float]:
    """The same for the tokens of the first quarter of each text, of the second, and so on."""
    quarters: list[list[float]] = [[] for _ in range(QUARTERS)]
    for values in of_texts:
        for place, value in enumerate(values):
            quarters[QUARTERS * place // len(values)].append(value)
    return [sum(values) / len(values) for values in quarters]


def study_of(corpus: Corpus, training: Training = Training(), **options: Any) -> dict[str, Any]:
    """A study of a corpus, with what is measured of its teacher: `teacher`, and `floors` (see `Texts`)."""
    study = language_models_study(corpus, training, **options)
    texts = load_texts(corpus)
    teacher = language_teacher(texts, corpus, steps=training.teacher_steps, batch_size=training.batch_size)
    own = write_own(teacher, texts, corpus, count=training.written, seed=0)
    measures = {
        "parameters": count_parameters(teacher),
        "student_parameters": count_parameters(make_causal_model(STUDENT.shape(corpus), seed=0)),
        **measure_held_out(teacher, texts),
        **measure_own(teacher, teacher, own, texts),
    }
    return run_study(study) | {"teacher": measures, "floors": texts.floors}


def study() -> dict[str, Any]:
    """The studies on made stories, on tweets and on stories that a language model has written, and that of the sizes.

    Returns:
        What `study_of` returns for made stories, with `tweets` and `written`, the same for those, and `sizes`.
    """
    return study_of(Corpus()) | {
        **{name: study_of(**choices) for name, choices in REAL_TEXTS.items()},
        "sizes": run_study(sizes_study()),
    }
