"""The study of chapter 15: every method runs, comparisons are fair, and choices are made on validation."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kd_helpers.experiments import survey_digits
from kd_helpers.experiments.survey_digits import (
    ARMS,
    EXTRAS,
    METHODS,
    OLD,
    Method,
    Profiles,
    Training,
    digits_study,
    few_of_each_class,
    lesson,
    measured,
    new_classes,
    new_student,
    splits,
)
from kd_helpers.loop import Loss
from kd_helpers.methods.digit_cnns import Seen

SHORT = Training(steps=3, teacher_steps=3, pictures=4)


@pytest.fixture(scope="module")
def given():
    return lesson(SHORT, seed=0)


def test_a_lesson_has_a_few_pictures_of_each_class_and_what_the_teacher_sees(given):
    assert given.digits.labels.bincount().tolist() == [4] * 10
    seen = given.teacher(given.digits.pictures)
    torch.testing.assert_close(given.seen.logits, seen.logits)
    torch.testing.assert_close(given.seen.maps[1], seen.maps[1])
    assert not given.seen.logits.requires_grad
    assert not given.teacher.training
    other = lesson(SHORT, seed=1)
    assert not torch.equal(other.digits.pictures, given.digits.pictures)
    assert torch.equal(lesson(SHORT, seed=0).digits.pictures, given.digits.pictures)


def test_few_of_each_class_are_different_pictures_of_it():
    labels = torch.tensor([0, 1] * 20)
    chosen = few_of_each_class(labels, 5, seed=3)
    assert len(set(chosen.tolist())) == 10
    assert labels[chosen].tolist() == [0] * 5 + [1] * 5


def test_a_class_with_too_few_pictures_is_refused():
    with pytest.raises(ValueError, match="30 pictures of each class were asked for, one has 20"):
        few_of_each_class(torch.tensor([0, 1] * 20), 30, seed=0)


def test_three_teachers_share_no_picture(monkeypatch):
    learned = []
    monkeypatch.setattr(
        survey_digits, "taught_by_labels", lambda _channels, digits, **_: learned.append(digits.pictures)
    )
    survey_digits.teachers_of_thirds.__wrapped__(1)
    assert [len(pictures) for pictures in learned] == [300, 300, 299]
    pool = splits().train.pictures
    assert sorted(torch.cat(learned).tolist()) == sorted(pool.tolist())


def test_generated_pictures_have_the_mean_and_the_spread_of_digits():
    pixels = splits().train.pictures
    assert pixels.mean().item() == pytest.approx(survey_digits.INK, abs=2e-3)
    assert pixels.std().item() == pytest.approx(survey_digits.SPREAD, abs=2e-3)
    made = survey_digits.picture_generator(8)(torch.randn(50, survey_digits.NOISE))
    assert made.shape == (50, 64)
    assert made.mean().item() == pytest.approx(survey_digits.INK, abs=1e-3)
    assert made.std().item() == pytest.approx(survey_digits.SPREAD, abs=1e-3)


def test_modules_are_trained_at_rates_of_their_own():
    one, other = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    before = other.weight.clone()

    def loss_of(_batch):
        return Loss((one(torch.ones(1, 2)) + other(torch.ones(1, 2))).square().sum())

    survey_digits.learn([one, other], loss_of, 50, steps=3, seed=0, learning_rates=[0.1, 0.0])
    assert torch.equal(other.weight, before)
    assert not one.weight.requires_grad or not torch.equal(one.weight, before)


def test_a_student_with_exits_is_handed_on_without_them(given):
    student = METHODS["own_teacher"](given, 0.5)
    assert isinstance(student, type(new_student(given)))
    logits, features = survey_digits.WithExits(student).exits(student(given.digits.pictures))
    assert [tuple(own.shape) for own in logits] == [(40, 10)] * 3
    assert [tuple(own.shape) for own in features] == [(40, 24)] * 3


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_runs_and_its_student_answers(arm):
    recipe = dataclasses.replace(ARMS[arm].recipe, settings=ARMS[arm].recipe.settings[:1])
    found = digits_study(ARMS, SHORT).run(recipe, 0, None)
    assert 0 <= found["accuracy"] <= 1
    assert found["setting"] == recipe.settings[0]
    assert found["tried"] == [found["validation"]]


def test_every_method_and_every_added_loss_has_an_arm():
    assert {arm.recipe.name for arm in ARMS.values()} == METHODS.keys() | EXTRAS.keys()
    assert all(len(arm.recipe.settings) == 3 for arm in ARMS.values()), "as many tries for each"


@pytest.mark.parametrize("arm", ["labels", "response_relations", "born_again", "generated_pictures"])
def test_the_same_seed_gives_the_same_student_whatever_ran_before(arm):
    recipe = dataclasses.replace(ARMS[arm].recipe, settings=ARMS[arm].recipe.settings[:1])
    study = digits_study(ARMS, SHORT)
    first = study.run(recipe, 1, None)
    torch.rand(7)
    assert study.run(recipe, 1, None) == first


def test_students_of_a_seed_start_from_the_same_weights(given):
    """With a rate of 0 nothing is learned, so what is left is where training starts."""
    first = new_student(given)
    for name in ("labels", "coarse_labels", "profile_labels"):
        student = METHODS[name](given, 0.0)
        weights = [parameter for parameter in student.parameters() if parameter.shape == (6, 1, 3, 3)]
        torch.testing.assert_close(weights[0], first.convolutions[0].weight)


def test_the_setting_is_chosen_on_validation_and_measured_on_test(monkeypatch):
    """Setting 2 is best on validation, setting 3 would be best on test."""
    right = {1.0: (0.2, 0.5), 2.0: (0.9, 0.4), 3.0: (0.3, 1.0), 4.0: (0.9, 0.0)}

    class Answers(torch.nn.Module):
        def __init__(self, setting: float) -> None:
            super().__init__()
            self.shares = dict(
                zip((len(splits().validation.labels), len(splits().test.labels)), right[setting], strict=True)
            )

        def forward(self, pictures: torch.Tensor) -> Seen:
            digits = splits().validation if len(pictures) == len(splits().validation.labels) else splits().test
            count = round(self.shares[len(pictures)] * len(pictures))
            answers = torch.where(torch.arange(len(pictures)) < count, digits.labels, (digits.labels + 1) % 10)
            return Seen([], pictures, torch.nn.functional.one_hot(answers, 10).float())

    monkeypatch.setitem(METHODS, "answers", lambda _lesson, setting: Answers(setting))
    found = digits_study(ARMS, SHORT).run(Method("answers", (1.0, 2.0, 3.0, 4.0)), 0, None)
    assert found["setting"] == 2.0, "of two that are as good, the first"
    assert found["accuracy"] == pytest.approx(0.4, abs=0.01)
    assert found["validation"] == pytest.approx(0.9, abs=0.01)
    assert found["tried"] == pytest.approx([0.2, 0.9, 0.3, 0.9], abs=0.01)


def test_profiles_show_only_rows_and_columns():
    one, other = torch.zeros(2, 2), torch.zeros(2, 2)
    one[0, 0] = one[1, 1] = other[0, 1] = other[1, 0] = 1.0
    shown = Profiles()(torch.stack([one.flatten(), other.flatten()]))
    torch.testing.assert_close(shown[0], shown[1])
    torch.testing.assert_close(shown[0], torch.full((4,), 0.5))
    assert Profiles()(torch.zeros(1, 4)).tolist() == [[0.0] * 4]


def test_old_and_new_digits_are_measured_among_their_own(given):
    class Knows(torch.nn.Module):
        def forward(self, pictures: torch.Tensor) -> Seen:
            logits = torch.nn.functional.one_hot(splits().test.labels, 10).float()
            logits[:, :OLD] *= -1  # the old digits are all wrong, the new ones right
            return Seen([], pictures, logits)

    found = measured(Knows(), splits().test, "new_classes")
    assert found["new_accuracy"] == 1.0
    assert found["old_accuracy"] == 0.0
    assert found["accuracy"] == 0.5


def test_old_logits_move_less_where_they_are_weighed(given):
    longer = given._replace(training=dataclasses.replace(SHORT, steps=40))
    before = survey_digits.old_student(longer)
    digits = given.digits.where(given.digits.labels >= OLD)

    def moved(weight: float) -> float:
        with torch.no_grad():
            logits = [net(digits.pictures).logits[:, :OLD].softmax(dim=1) for net in (before, after[weight])]
        return (logits[0] - logits[1]).abs().mean().item()

    after = {weight: new_classes(longer, 3e-3, weight=weight) for weight in (0.0, 10.0)}
    assert moved(10.0) < 0.7 * moved(0.0)
