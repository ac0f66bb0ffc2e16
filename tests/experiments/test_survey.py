"""The study of chapter 15: every method runs, comparisons are fair, and choices are made on validation."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kd_helpers.experiments import survey
from kd_helpers.experiments.survey import (
    ARMS,
    EXTRAS,
    METHODS,
    OLD,
    Method,
    Profiles,
    Training,
    few_of_each_class,
    lesson,
    measured,
    new_classes,
    new_student,
    splits,
    survey_study,
)
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


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_runs_and_its_student_answers(arm):
    recipe = dataclasses.replace(ARMS[arm].recipe, settings=ARMS[arm].recipe.settings[:1])
    found = survey_study(ARMS, SHORT).run(recipe, 0, None)
    assert 0 <= found["accuracy"] <= 1
    assert found["setting"] == recipe.settings[0]
    assert found["tried"] == [found["validation"]]


def test_every_method_and_every_added_loss_has_an_arm():
    assert {arm.recipe.name for arm in ARMS.values()} == METHODS.keys() | EXTRAS.keys()
    assert all(len(arm.recipe.settings) == 4 for arm in ARMS.values()), "as many tries for each"


@pytest.mark.parametrize("arm", ["labels", "response_relations", "born_again", "generated_pictures"])
def test_the_same_seed_gives_the_same_student_whatever_ran_before(arm):
    recipe = dataclasses.replace(ARMS[arm].recipe, settings=ARMS[arm].recipe.settings[:1])
    study = survey_study(ARMS, SHORT)
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
    found = survey_study(ARMS, SHORT).run(Method("answers", (1.0, 2.0, 3.0, 4.0)), 0, None)
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
    longer = given._replace(steps=40)
    before = survey.old_student(longer)
    digits = given.digits.where(given.digits.labels >= OLD)

    def moved(weight: float) -> float:
        with torch.no_grad():
            logits = [net(digits.pictures).logits[:, :OLD].softmax(dim=1) for net in (before, after[weight])]
        return (logits[0] - logits[1]).abs().mean().item()

    after = {weight: new_classes(longer, 3e-3, weight=weight) for weight in (0.0, 10.0)}
    assert moved(10.0) < 0.7 * moved(0.0)
