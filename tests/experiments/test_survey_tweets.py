"""The second ground of chapter 15's study: what every arm learns from, and that comparisons are fair."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from support.models import tiny_bert

from kd_helpers.config import DistillConfig
from kd_helpers.data import evaluation_batches
from kd_helpers.experiments import survey_tweets
from kd_helpers.experiments.survey_tweets import (
    ARMS,
    TEACHERS,
    Ground,
    Method,
    further_loss,
    look,
    task_loss,
    teachers_of,
    teachers_of_thirds,
    trained,
    tweets_study,
)
from kd_helpers.losses import distillation_loss, hard_loss
from kd_helpers.methods.hidden_losses import attention_loss
from kd_helpers.methods.relations import angle_loss, distance_loss
from kd_helpers.models import freeze, weights_digest
from kd_helpers.resolve import resolve
from kd_helpers.teacher import TeacherLogits

CONFIG = DistillConfig(max_steps=3, learning_rate=1e-3, batch_size=8, precision="float32", device="cpu")


@pytest.fixture
def ground(own_artifacts, monkeypatch, tokenized, splits) -> Ground:
    """Tiny teachers of four layers, students of two."""
    monkeypatch.setattr(survey_tweets, "half_student", lambda config, _names: tiny_bert(layers=2, seed=config.seed))
    teacher, *thirds = (freeze(tiny_bert(layers=4, seed=seed)) for seed in (11, 12, 13, 14))
    labelled, few = (tokenized.select(range(count)) for count in (96, 12))
    return Ground(resolve(CONFIG, splits), teacher, thirds, labelled, few, few)


@pytest.fixture
def batch(ground):
    return next(iter(evaluation_batches(ground.train, ground.setup.tokenizers.teacher, batch_size=6)))


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_runs_and_its_student_is_measured(ground, arm):
    found = tweets_study(ground).run(ARMS[arm].recipe, 0, None)
    assert found.keys() == {"accuracy", "nll", "validation"}
    assert 0 <= found["accuracy"] <= 1


def test_no_two_arms_are_one():
    assert len({arm.recipe for arm in ARMS.values()}) == len({arm.title for arm in ARMS.values()}) == len(ARMS)
    assert {arm.recipe.teacher for arm in ARMS.values()} == set(TEACHERS)


@pytest.mark.parametrize("arm", ["labels", "response_hints", "mutual"])
def test_the_same_seed_gives_the_same_student_whatever_ran_before(ground, arm):
    first = weights_digest(trained(ARMS[arm].recipe, ground, seed=1))
    torch.rand(5)
    assert weights_digest(trained(ARMS[arm].recipe, ground, seed=1)) == first
    assert weights_digest(trained(ARMS[arm].recipe, ground, seed=2)) != first


def test_arms_start_alike_and_see_the_same_batches(ground, monkeypatch):
    happened = {}
    for arm in ("labels", "response", "relations", "mutual"):

        def learn(modules, texts, _loss_of, _setup, config, arm=arm):
            happened[arm] = (weights_digest(modules[0]), texts["id"][:], config.seed)

        monkeypatch.setattr(survey_tweets, "learn", learn)
        trained(ARMS[arm].recipe, ground, seed=4)
    assert len(set(map(repr, happened.values()))) == 1


def test_the_loss_of_a_task(ground, batch):
    logits = torch.randn(6, 3)
    assert torch.equal(task_loss([], CONFIG)(logits, batch), hard_loss(logits, batch["labels"]))
    teachers = teachers_of(Method("tuned"), ground, seed=0)
    expected = distillation_loss(
        logits, teachers[0].lookup(batch["id"]), batch["labels"], temperature=2.0, alpha=CONFIG.alpha
    )
    torch.testing.assert_close(task_loss(teachers, CONFIG)(logits, batch), expected.total)


def test_a_surer_teacher_counts_for_more(batch):
    """Of a teacher that knows the labels and one that has them all wrong, weights leave the first alone."""
    right = 20.0 * torch.nn.functional.one_hot(batch["labels"], 3)
    teachers = [TeacherLogits(batch["id"], right), TeacherLogits(batch["id"], right.roll(1, dims=1))]
    logits = torch.randn(6, 3)
    found = task_loss(teachers, CONFIG, by_confidence=True)(logits, batch)
    torch.testing.assert_close(found, task_loss(teachers[:1], CONFIG)(logits, batch), rtol=1e-3, atol=1e-3)
    assert not torch.isclose(found, task_loss(teachers, CONFIG)(logits, batch), rtol=1e-2)


def test_the_teachers_of_an_arm(ground, monkeypatch):
    asked = []
    monkeypatch.setattr(survey_tweets, "cached_logits", lambda model, *_, **__: asked.append(model) or model)
    for teacher, models in (
        ("none", []),
        ("tuned", [ground.teacher]),
        ("third", ground.thirds[:1]),
        ("thirds", ground.thirds),
        ("by confidence", ground.thirds),
    ):
        assert teachers_of(Method(teacher), ground, seed=0) == models
    assert len(asked) == 8


def test_a_student_is_born_again_from_one_with_other_first_weights(ground, monkeypatch):
    made = []

    def labels_only(method, _ground, *, seed):
        made.append((method, seed))
        return tiny_bert(seed=seed)

    monkeypatch.setattr(survey_tweets, "trained", labels_only)
    (logits,) = teachers_of(Method("itself"), ground, seed=3)
    assert made == [(Method(), 1003)]
    assert set(logits.ids.tolist()) == set(ground.train["id"][:])


def test_three_teachers_share_no_text(ground, monkeypatch, splits):
    learned = []
    monkeypatch.setattr(
        survey_tweets, "fine_tuned_teacher", lambda setup: learned.append(setup.data.teacher_train["id"][:])
    )
    teachers_of_thirds(ground.setup)
    assert len(learned) == 3
    assert sorted(itertools.chain(*learned)) == sorted(splits.teacher_train["id"][:])


def test_a_model_shows_what_it_computes(ground, batch):
    seen = look(ground.teacher, batch)
    logits = ground.teacher(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
    torch.testing.assert_close(seen.logits, logits)
    assert len(seen.states) == len(seen.scores) == 4
    assert seen.states[0].shape == (6, ground.teacher.config.hidden_size)


def test_further_losses_compare_the_layers_that_belong_together(ground, batch):
    student = tiny_bert(layers=2, seed=0).eval()
    own, teacher = look(student, batch), look(ground.teacher, batch)
    regressor, mask = torch.nn.Linear(32, 32), batch["attention_mask"]
    given = (own, teacher, mask, [1, 3], regressor)
    expected = (regressor(own.states[1]) - teacher.states[3]).square().mean()
    torch.testing.assert_close(further_loss("hints", *given), expected)
    expected = attention_loss(own.scores[0], teacher.scores[1], mask)
    expected = expected + attention_loss(own.scores[1], teacher.scores[3], mask)
    torch.testing.assert_close(further_loss("attention", *given), expected)
    ends = own.states[-1], teacher.states[-1]
    torch.testing.assert_close(further_loss("relations", *given), distance_loss(*ends) + 2 * angle_loss(*ends))


def test_a_coarse_student_has_few_values(ground):
    student = trained(dataclasses.replace(Method(), bits=2), ground, seed=0)
    assert len(student.bert.encoder.layer[0].attention.self.query.weight.unique()) <= 4
