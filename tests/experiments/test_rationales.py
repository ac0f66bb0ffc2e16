"""The studies of chapter 14: what an arm learns, that it is trained as it says, and what is measured."""

from __future__ import annotations

import dataclasses

import pytest

from kd_helpers.experiments import rationales
from kd_helpers.experiments.rationales import (
    ARMS,
    SEEDS,
    TEACHERS,
    TWEET_ARMS,
    Arm,
    Ground,
    Lesson,
    Training,
    accuracy,
    labels_of,
    made_ground,
    measured_teachers,
    pretrained,
    rationale_teachers,
    rationales_study,
    trained,
    tweets_ground,
    written_answers,
)
from kd_helpers.experiments.study import run_arm, run_study
from kd_helpers.methods.rationales import Example, Scores, make_seq2seq, measure, measured_batches
from kd_helpers.methods.reasoning_tasks import explained_tweets, first_examples
from kd_helpers.models import weights_digest

SMALL = Training(
    steps=8,
    every=4,
    pretraining_steps=4,
    unlabelled=40,
    teacher_width=16,
    teacher_examples=40,
    teacher_steps=20,
    validation=30,
    test=40,
    vocabulary=400,
)
COUNT = 48


@pytest.fixture
def small(own_artifacts, monkeypatch) -> Ground:
    monkeypatch.setattr(rationales, "MOST_EXAMPLES", COUNT)
    return made_ground("knowledge", SMALL)


def arms_of(*lessons: Lesson) -> dict[str, Arm]:
    return {f"arm {number}": Arm(f"Arm {number}", lesson) for number, lesson in enumerate(lessons)}


# --- what is learned ---


def test_each_seed_has_its_own_questions_and_all_arms_of_a_seed_the_same(small):
    def questions(lesson: Lesson, seed: int) -> list[str]:
        return [example.question for example in small.learned(lesson, seed)]

    plain = questions(Lesson(20), 0)
    assert plain == [example.question for example in first_examples("knowledge", 20, seed=0)]
    assert questions(Lesson(20), 1) != plain
    assert questions(Lesson(10), 0) == plain[:10]
    for kind in ("true", "shuffled", "false", "random", "noise", *TEACHERS):
        assert questions(Lesson(20, rationales=kind), 0) == plain
    held_out = {example.question for example in (*small.validation, *small.test)}
    assert len(held_out) == SMALL.validation + SMALL.test
    assert not held_out & set(plain)


def test_the_rationales_are_those_that_an_arm_names(small):
    true = first_examples("knowledge", 20, seed=0)
    given = {
        kind: [example.rationale for example in small.learned(Lesson(20, rationales=kind), 0)]
        for kind in ("", "true", "shuffled", "false", "random", "noise")
    }
    right = [example.rationale for example in true]
    assert given[""] == [""] * 20
    assert given["true"] == right
    assert given["shuffled"] == [*right[1:], right[0]]
    for kind in ("false", "random"):
        assert given[kind] == [e.rationale for e in first_examples("knowledge", 20, seed=0, facts=kind)]
    words = set(" ".join(right).split())
    for noise, rationale in zip(given["noise"], right, strict=True):
        assert len(noise.split()) == len(rationale.split())
        assert set(noise.split()) <= words
    assert given["noise"] != right


def test_a_teacher_gives_rationales_and_if_asked_labels(small, monkeypatch):
    asked = []

    def explanations(teacher, tokenizer, questions, *, new_tokens):
        asked.append((weights_digest(teacher), list(questions)))
        # No answer to every third question.
        return [Example(q, "" if row % 3 == 2 else f"label {row}", f"because {row}") for row, q in enumerate(questions)]

    monkeypatch.setattr(rationales, "cached_explanations", explanations)
    true = first_examples("knowledge", 9, seed=1)
    only_rationales = small.learned(Lesson(9, rationales="early teacher"), 1)
    assert [example.label for example in only_rationales] == [example.label for example in true]
    assert [example.rationale for example in only_rationales] == [f"because {row}" for row in range(9)]
    both = small.learned(Lesson(9, labels="teacher", rationales="teacher"), 1)
    assert [example.label for example in both] == [f"label {row}" for row in range(9) if row % 3 != 2]
    assert [example.rationale for example in both] == [f"because {row}" for row in range(9) if row % 3 != 2]
    labels = small.learned(Lesson(9, labels="teacher"), 1)
    assert [example.label for example in labels] == [example.label for example in both]
    assert not any(example.rationale for example in labels)
    assert len({digest for digest, _ in asked}) == 2, "two teachers"
    every = [example.question for example in first_examples("knowledge", COUNT, seed=1)]
    assert all(questions == every for _, questions in asked), "all questions of the seed, whatever the arm takes"


def test_the_teachers_are_one_model_at_several_moments(small, monkeypatch):
    known = first_examples("knowledge", SMALL.teacher_examples, seed=100)
    teachers = rationale_teachers(known, small, SMALL)
    assert list(teachers) == list(TEACHERS)
    assert len({weights_digest(teacher) for teacher in teachers.values()}) == len(TEACHERS)
    assert not any(p.requires_grad for teacher in teachers.values() for p in teacher.parameters())
    monkeypatch.setattr(rationales, "train_seq2seq", lambda *_, **__: pytest.fail("it was trained again"))
    again = rationale_teachers(known, small, SMALL)
    assert {n: weights_digest(t) for n, t in again.items()} == {n: weights_digest(t) for n, t in teachers.items()}


def test_students_are_pre_trained_on_texts_without_labels(small, monkeypatch):
    model = pretrained(small, SMALL, width=16, seed=0)
    fresh = make_seq2seq(small.tokenizer, width=16, seed=0)
    assert weights_digest(model) != weights_digest(fresh)
    monkeypatch.setattr(rationales, "train_seq2seq", lambda *_, **__: pytest.fail("it was trained again"))
    assert weights_digest(pretrained(small, SMALL, width=16, seed=0)) == weights_digest(model)
    held_out = {example.question for example in (*small.validation, *small.test)}
    assert len(set(small.unlabelled)) == SMALL.unlabelled
    assert not held_out & set(small.unlabelled)


@pytest.mark.parametrize(
    "changed", [{"width": 32}, {"seed": 1}, {"training": dataclasses.replace(SMALL, pretraining_steps=3)}]
)
def test_another_pre_training_is_another_student(small, changed):
    asked = {"training": SMALL, "width": 16, "seed": 0}
    assert weights_digest(pretrained(small, **asked)) != weights_digest(pretrained(small, **asked | changed))


def test_tweets_are_drawn_anew_for_each_seed():
    ground = tweets_ground(SMALL)
    tweets = {example.question: example for example in explained_tweets()}
    one, other = (ground.learned(Lesson(100, rationales="teacher"), seed) for seed in (0, 1))
    assert one != other
    assert all(tweets[example.question] == example for example in one)
    assert [example.question for example in ground.learned(Lesson(100), 0)] == [example.question for example in one]
    held_out = {example.question for example in (*ground.validation, *ground.test)}
    assert len(held_out) == SMALL.validation + SMALL.test
    assert not held_out & set(tweets)
    assert not (held_out | set(tweets)) & set(ground.unlabelled)
    assert ground.data


# --- training and measuring ---


def test_what_a_student_has_written_is_read():
    assert labels_of(["first", "x so the answer is both"], first=False) == ["first", "x so the answer is both"]
    assert labels_of(["a is b. so the answer is both", "both"], first=True) == ["both", ""]
    examples = [Example("?", "first"), Example("??", "both")]
    assert accuracy(["first", ""], examples) == 0.5


def test_a_student_is_left_as_it_was_at_its_best(small, monkeypatch):
    student = make_seq2seq(small.tokenizer, width=16, seed=0)
    digests, scores = [], iter([0.2, 0.7, 0.7, 0.1])

    def scored(model, batches):
        digests.append(weights_digest(model))
        return Scores(next(scores), 0.0)

    monkeypatch.setattr(rationales, "measure", scored)
    training = dataclasses.replace(SMALL, steps=8, every=2)
    history = trained(student, small.learned(Lesson(20), 0), Lesson(20), small, training, seed=0)
    assert [entry["step"] for entry in history] == [2, 4, 6, 8]
    assert [entry["validation"] for entry in history] == [0.2, 0.7, 0.7, 0.1]
    assert weights_digest(student) == digests[1], "the first of the best"
    assert len(set(digests)) == 4


def test_longer_arms_make_more_steps_but_are_measured_as_often(small):
    student = make_seq2seq(small.tokenizer, width=16, seed=0)
    lesson = Lesson(20, times=2.0)
    history = trained(student, small.learned(lesson, 0), lesson, small, SMALL, seed=0)
    assert [entry["step"] for entry in history] == [8, 16]


def test_a_run_of_every_kind_of_arm(small):
    arms = arms_of(
        Lesson(COUNT),
        Lesson(COUNT, rationales="true"),
        Lesson(COUNT, rationales="teacher", first=True),
        Lesson(COUNT, rationales="teacher", width=32),
    )
    study = rationales_study("small", small, arms, SMALL, seeds=(0,))
    found = {run["arm"]: run for run in run_study(study)["runs"]}
    for run in found.values():
        assert 0 <= run["accuracy"] <= 1
        assert run["tokens_per_question"] >= 1
        assert run["seconds_per_question"] > 0
        assert [entry["step"] for entry in run["history"]] == [4, 8]
    assert {arm for arm, run in found.items() if "rationale_accuracy" in run} == {"arm 1", "arm 3"}
    assert found["arm 3"]["parameters"] < found["arm 0"]["parameters"]
    again = rationales_study("small", small, arms, SMALL, seeds=(0,)).run(Lesson(COUNT), 0, None)
    assert again["accuracy"] == found["arm 0"]["accuracy"]
    other = dataclasses.replace(SMALL, steps=4)
    folder = run_arm(rationales_study("small", small, arms, other, seeds=(0,)), "arm 0", 0)["folder"]
    assert folder != found["arm 0"]["folder"]


def test_what_is_measured_is_what_the_student_writes(small):
    student = make_seq2seq(small.tokenizer, width=32, seed=0)
    training = dataclasses.replace(SMALL, steps=120, every=60)
    lesson = Lesson(COUNT)
    trained(student, small.learned(lesson, 0), lesson, small, training, seed=0)
    written = labels_of(written_answers(student, small, small.test, first=False), first=False)
    assert accuracy(written, small.test) == measure(student, measured_batches(small.test, small.tokenizer)).accuracy
    assert accuracy(written, small.test) > 0


def test_teachers_are_measured_on_test_and_on_what_students_are_given(small):
    found = measured_teachers("knowledge", SMALL)
    assert list(found) == list(TEACHERS)
    for measures in found.values():
        assert set(measures) == {"parameters", "accuracy", "given_accuracy", "given_rationales"}
        assert all(0 <= measures[name] <= 1 for name in set(measures) - {"parameters"})


# --- the arms ---


def test_the_arms_differ_in_what_they_say_alone():
    for arms in (*ARMS.values(), TWEET_ARMS):
        recipes = [arm.recipe for arm in arms.values()]
        assert len(set(recipes)) == len(recipes), "no arm is run twice"
        assert all(recipe.examples <= rationales.MOST_EXAMPLES for recipe in recipes)
    assert all(set(TEACHERS) >= {arm.recipe.rationales} for arm in ARMS["arithmetic"].values() if arm.recipe.first)
    assert all(len(seeds) >= 5 for seeds in SEEDS.values())
    base = Lesson()
    changed = {
        name: {field for field, value in dataclasses.asdict(arm.recipe).items() if value != getattr(base, field)}
        for name, arm in ARMS["knowledge"].items()
    }
    assert changed["labels_400"] == set()
    for name in ("true_400", "shuffled_400", "random_400", "false_400", "noise_400", "early_400", "rationales_400"):
        assert changed[name] == {"rationales"}
    assert changed["longer_400"] == {"times"}
    assert changed["first_400"] == {"rationales", "first"}
    assert changed["rationales_32_wide"] == {"rationales", "width"}
