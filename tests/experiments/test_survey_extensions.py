"""The three experiments at the edge of chapter 15's map."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from support.models import tiny_bert

from kd_helpers.config import DistillConfig
from kd_helpers.experiments import survey_extensions, survey_tweets
from kd_helpers.experiments.survey_extensions import (
    CALIBRATION_ARMS,
    SUBLIMINAL_ARMS,
    WEAK_ARMS,
    Start,
    Sureness,
    calibration_study,
    noise,
    subliminal_study,
    two_headed_net,
    weak_teacher,
    weak_to_strong_study,
)
from kd_helpers.experiments.survey_tweets import Ground
from kd_helpers.models import freeze
from kd_helpers.resolve import resolve

CONFIG = DistillConfig(max_steps=3, learning_rate=1e-3, batch_size=8, precision="float32", device="cpu")


# Subliminal learning


@pytest.fixture
def trained_in_turn(monkeypatch) -> list:
    """What is handed to `learn`, the teacher first, without training."""
    happened = []
    monkeypatch.setattr(
        survey_extensions, "learn", lambda modules, loss_of, *_, **__: happened.append((modules[0], loss_of))
    )
    return happened


def test_a_student_starts_from_its_teachers_weights_or_from_others(trained_in_turn):
    for weights in ("the teacher's", "others"):
        subliminal_study().run(Start(weights, 3), 0, None)
    first = [dict(net.named_parameters())["0.weight"] for net, _ in trained_in_turn]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[2], first[3])


@pytest.mark.parametrize(("outputs", "meaningless"), [(3, True), (0, False)])
def test_only_the_chosen_outputs_are_learned(trained_in_turn, outputs, meaningless):
    subliminal_study().run(Start("others", outputs), 0, None)
    (teacher, teacher_loss), (student, student_loss) = trained_in_turn
    teacher_loss(torch.arange(5)).total.backward()
    assert teacher[-1].bias.grad[:10].any()
    assert not teacher[-1].bias.grad[10:].any(), "nothing trains the teacher's other outputs"
    teacher.zero_grad()
    student_loss(torch.arange(5)).total.backward()
    assert bool(student[-1].bias.grad[:10].any()) == (not meaningless)
    assert bool(student[-1].bias.grad[10:].any()) == meaningless
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in teacher.parameters())


def test_noise_is_uniform():
    drawn = noise(200, 64, torch.Generator().manual_seed(0))
    assert drawn.min() >= -1
    assert drawn.max() <= 1
    assert drawn.mean().abs() < 0.02
    assert drawn.std().item() == pytest.approx(1 / 3**0.5, abs=0.01)


def test_a_student_with_the_teachers_start_learns_digits_from_noise(monkeypatch):
    monkeypatch.setattr(survey_extensions, "SUBLIMINAL_STEPS", 300)
    same, other = (subliminal_study().run(SUBLIMINAL_ARMS[arm].recipe, 0, None) for arm in ("same_100", "other_100"))
    assert same["teacher"] == other["teacher"] > 0.9
    assert same["accuracy"] > 0.3 > other["accuracy"]
    assert two_headed_net(3, seed=0)[-1].out_features == 13


# Weak to strong


@pytest.fixture
def ground(monkeypatch, tokenized, splits) -> Ground:
    monkeypatch.setattr(survey_extensions, "half_student", lambda config, _names: tiny_bert(layers=2, seed=config.seed))
    data = dataclasses.replace(splits, train=splits.train.select(range(60)))
    few = tokenized.select(range(12))
    return Ground(resolve(CONFIG, data), freeze(tiny_bert(layers=4)), [], few, few, few)


def test_a_weak_teacher_counts_words(splits):
    weak = weak_teacher(splits.train)
    right = np.mean(weak.predict(splits.train["text"][:]) == np.array(splits.train["label"][:]))
    assert right > 0.6
    assert weak.predict_log_proba(["some text"]).shape == (1, 3)


@pytest.mark.parametrize("arm", WEAK_ARMS)
def test_what_a_student_of_a_weak_teacher_learns(ground, monkeypatch, arm):
    happened = []

    def learn(_modules, texts, loss_of, _setup, config):
        happened.append((texts, loss_of, config))

    monkeypatch.setattr(survey_tweets, "learn", learn)
    study = weak_to_strong_study(ground)
    found = study.run(WEAK_ARMS[arm].recipe, 0, None)
    assert found.keys() == {"accuracy", "nll", "ece"}
    if arm == "weak":
        assert not happened
        return
    ((texts, _, config),) = happened
    data = ground.setup.data
    assert not set(texts["id"][:]) & set(data.train["id"][:]), "texts that the weak teacher has not learned"
    assert len(texts) == study.choices["texts"] <= len(data.train)
    truth = dict(zip(data.teacher_train["id"][:], data.teacher_train["label"][:], strict=True))
    labels = np.array([truth[text_id] for text_id in texts["id"][:]])
    words = dict(zip(data.teacher_train["id"][:], data.teacher_train["text"][:], strict=True))
    said = weak_teacher(data.train).predict([words[text_id] for text_id in texts["id"][:]])
    assert texts["label"][:] == list(said if arm == "weak_labels" else labels)
    assert (config.temperature, config.alpha) == (1.0, 1.0)


# Calibration


def test_a_teachers_logits_are_multiplied(monkeypatch):
    learned = []
    whole = survey_extensions.taught

    def taught(given, loss):
        learned.append(given.seen.logits)
        return whole(given._replace(training=dataclasses.replace(given.training, steps=2)), loss)

    monkeypatch.setattr(survey_extensions, "taught", taught)
    study = calibration_study()
    found = {times: study.run(Sureness(times), 0, None) for times in (0.0, 0.5, 2.0)}
    torch.testing.assert_close(learned[2], 4 * learned[1])
    assert "teacher_ece" not in found[0.0], "labels have no teacher"
    assert found[0.5]["teacher_ece"] != found[2.0]["teacher_ece"]
    assert [arm.recipe.times for arm in CALIBRATION_ARMS.values()] == [0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0]
