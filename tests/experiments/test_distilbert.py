"""The study of chapter 11: what its arms leave out, how rates are chosen, and all of it in small."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from kd_helpers import artifacts
from kd_helpers.config import DistillConfig
from kd_helpers.data import corpus_digest, read_corpus
from kd_helpers.experiments import distilbert
from kd_helpers.experiments.distilbert import (
    ARMS,
    COPIED_RATES,
    FEW,
    LONGER,
    PART_SEEDS,
    PARTS,
    PILOT_SEED,
    RANDOM_RATES,
    RATES_OF,
    SEEDS,
    TASK_RATES,
    TASKS,
    Rates,
    chosen_rates,
    distilbert_study,
    prepare,
    train_language,
    train_task,
    tries_study,
)
from kd_helpers.experiments.study import run_arm, run_study
from kd_helpers.methods import distilbert as method
from kd_helpers.methods.distilbert import Weights
from kd_helpers.models import weights_digest

SHORT = {
    name: task._replace(labels=min(task.labels, 24), steps=2 if task.steps == distilbert.TASK_STEPS else 4)
    for name, task in TASKS.items()
}
RATES = dict.fromkeys(ARMS | PARTS, Rates(5e-4, dict.fromkeys(TASKS, 1e-4)))


@pytest.fixture
def config(language_config, monkeypatch) -> DistillConfig:
    """With tasks of a few steps."""
    monkeypatch.setattr(distilbert, "TASKS", SHORT)
    return language_config


@pytest.fixture
def ground(own_artifacts, config):
    return prepare(config, adaptation_steps=2)


# The arms


def test_each_part_leaves_out_one_thing():
    whole = ARMS["triple"].recipe
    assert whole.weights == Weights(5, 2, 1)
    assert {name: PARTS[name] for name in PARTS.keys() & ARMS} == {name: ARMS[name] for name in ("triple", "language")}
    for part in ("soft", "cosine", "language"):
        assert PARTS[f"no_{part}"].recipe.weights == Weights()._replace(**{part: 0})
    for name in ("language", "language_longer", "random_language"):
        assert PARTS[name].recipe.weights == Weights(soft=0, language=1, cosine=0), "no teacher"
    assert ARMS["none"].recipe.weights is PARTS["random_none"].recipe.weights is None
    assert [name for name, arm in PARTS.items() if arm.recipe.random_start] == [
        name for name in PARTS if name.startswith("random")
    ]
    assert {name: arm.recipe.times for name, arm in PARTS.items() if arm.recipe.times != 1} == {
        "language_longer": LONGER
    }


def test_every_task_is_that_of_a_student_and_the_pilot_seed_is_no_other():
    both = ARMS | PARTS
    assert all(FEW in arm.recipe.tasks for arm in both.values())
    assert {task for arm in both.values() for task in arm.recipe.tasks} == TASKS.keys()
    assert len({arm.recipe for arm in both.values()}) == len(both)
    assert PILOT_SEED not in {*SEEDS, *PART_SEEDS}
    assert set(PART_SEEDS) < set(SEEDS), "so that parts find the runs of the arms"


# What a student learns from


def test_labels_are_drawn_by_the_seed_and_shared_by_the_arms(ground, monkeypatch):
    seen = []
    monkeypatch.setattr(
        method, "fine_tune", lambda classifier, setup, texts, logits: seen.append((setup, texts, logits))
    )
    student = method.language_student(ground.teacher)
    for name, seed in (("labels_50", 0), ("labels_50", 1), ("transfer_500", 0)):
        train_task(student, ARMS["none"].recipe, SHORT[name], ground, 1e-3, seed=seed)
    (few, texts, none), (_, others, _), (more, both, logits) = seen
    assert len(texts) == 24
    assert texts["id"][:] != others["id"][:]
    assert texts["id"][:] == both["id"][:24]
    assert len(both) == 24 + len(ground.setup.data.transfer)
    assert none is None
    assert logits is ground.logits
    assert (few.config.alpha, more.config.alpha) == (0.0, 0.9)
    assert (few.config.seed, few.config.learning_rate, few.config.max_steps) == (0, 1e-3, 2)


def test_the_teacher_is_adapted_to_all_texts_but_the_held_out_ones(own_artifacts, config, monkeypatch):
    asked = []
    adapt = method.language_teacher
    monkeypatch.setattr(
        method, "language_teacher", lambda setup, **options: asked.append(setup) or adapt(setup, **options)
    )
    found = prepare(config, adaptation_steps=2)
    (setup,) = asked
    assert setup.data.teacher_train["id"][:] == found.setup.data.student_train["id"][:]
    held_out = {*found.setup.data.validation["id"][:], *found.setup.data.test["id"][:]}
    assert not held_out & set(setup.data.teacher_train["id"][:])


def test_without_language_training_a_student_is_its_start(ground):
    plain = method.language_student(ground.teacher, seed=3)
    found = train_language(ARMS["none"].recipe, ground, 1e-3, seed=3, steps=2)
    assert weights_digest(found) == weights_digest(plain)
    trained = train_language(ARMS["language"].recipe, ground, 1e-3, seed=3, steps=2)
    assert weights_digest(trained) != weights_digest(plain)
    packaged = train_language(ARMS["packaged"].recipe, ground, 1e-3, seed=3, steps=2)
    assert weights_digest(packaged) == weights_digest(method.language_student(ground.checkpoint, seed=3))
    assert weights_digest(packaged) != weights_digest(plain)


# Learning rates


def test_rates_are_chosen_on_validation_one_after_the_other(ground, monkeypatch):
    held_out = ground.setup.data.validation["id"][:]
    trained, tuned = [], []

    def train(route, _ground, rate, *, seed, steps):
        trained.append((route, rate, seed, steps))
        return rate

    def fine_tune(language_rate, _route, task, _ground, rate, *, seed):
        assert seed == PILOT_SEED
        tuned.append(language_rate)
        # A task with all steps has another best rate than the others.
        return rate * (3 if task.steps == SHORT["all_labels_500"].steps else 1)

    def language(language_rate, _ground, texts):
        assert texts["id"][:] == held_out
        return {"loss": abs(language_rate - 1e-3), "accuracy": 0.0}

    def task(task_rate, _ground, texts):
        assert texts["id"][:] == held_out
        return {"accuracy": 1 - abs(task_rate - 3e-4), "nll": 0.0}

    monkeypatch.setattr(distilbert, "train_language", train)
    monkeypatch.setattr(distilbert, "train_task", fine_tune)
    monkeypatch.setattr(distilbert, "measure_language", language)
    monkeypatch.setattr(distilbert, "measure_task", task)
    arms = {name: (ARMS | PARTS)[name] for name in ("triple", "none", "random_none", "random_language", "no_soft")}
    tries = run_study(tries_study(ground, arms, steps=2))
    few = dict.fromkeys((*distilbert.CURVE, "transfer_500"), 0.0003)
    found = chosen_rates(tries)
    assert found == {
        "triple": Rates(1e-3, few | {"all_transfer_500": 1e-4}),
        "none": Rates(0.0, dict.fromkeys(distilbert.CURVE, 3e-4) | dict.fromkeys(distilbert.ALL_STEPS, 1e-4)),
        "random_none": Rates(0.0, {FEW: 3e-4}),
        "random_language": Rates(1e-3, {FEW: 3e-4}),
        **{name: found["triple"] for name, other in RATES_OF.items() if other == "triple"},
    }
    assert trained == [
        *((ARMS["triple"].recipe, rate, PILOT_SEED, 2) for rate in COPIED_RATES),
        (ARMS["none"].recipe, 0.0, PILOT_SEED, 2),
        (PARTS["random_none"].recipe, 0.0, PILOT_SEED, 2),
        *((PARTS["random_language"].recipe, rate, PILOT_SEED, 2) for rate in RANDOM_RATES),
    ]
    best = [1e-3] * 6 + [0.0] * (6 + 1) + [1e-3]  # a rate for each task of each arm
    assert tuned == [rate for rate in best for _ in TASK_RATES], "the student with the best nats"


# What a run is stored under


def test_everything_that_decides_a_run_is_in_its_provenance(ground, config):
    study = dataclasses.replace(distilbert_study(ground, RATES, PARTS, steps=7), run=lambda *_: {})
    made = run_arm(study, "no_soft", 2)
    stored = artifacts.load_json(artifacts.artifacts_dir() / made["folder"] / artifacts.PROVENANCE)
    assert stored["study"] == "distilbert"
    assert stored["arm"] == {
        "title": "Without the soft loss",
        "recipe": {"weights": [0, 2.0, 1.0], "random_start": False, "adapted": True, "times": 1.0, "tasks": [FEW]},
    }
    assert stored["seed"] == 2
    choices = stored["choices"]
    assert choices["config"] == config.to_dict()
    assert choices["steps"] == 7
    assert choices["tasks"][FEW] == {"labels": 24, "transfer": False, "steps": 2}
    assert choices["learning_rates"]["triple"] == {"language": 5e-4, "tasks": dict.fromkeys(TASKS, 1e-4)}
    assert choices["texts"] == corpus_digest(read_corpus(config))
    assert choices["teacher_logits"] == ground.logits.digest()
    assert "float32" in choices["machine"]
    rates = RATES | {"none": Rates(1, dict.fromkeys(TASKS, 1))}
    other = dataclasses.replace(distilbert_study(ground, rates, PARTS, steps=7), run=study.run)
    assert run_arm(other, "no_soft", 2)["folder"] != made["folder"]


# In small


def test_arms_run_and_repeat_themselves_and_are_measured(ground, tmp_path):
    study = distilbert_study(ground, RATES, ARMS | PARTS, steps=2)
    names = ("triple", "language", "none", "random_none")
    measures = {name: run_arm(study, name, 0) for name in names}
    about = {"arm", "seed", "folder", "seconds"}
    for name, found in measures.items():
        tasks = {
            f"{task}_{what}" for task in (ARMS | PARTS)[name].recipe.tasks for what in ("accuracy", "nll", "seconds")
        }
        assert found.keys() - about == {"nats", "language_accuracy"} | tasks, name
        assert all(math.isfinite(found[measure]) for measure in found.keys() - about), name
    again = study.run(ARMS["triple"].recipe, 0, tmp_path)
    results = [key for key in again if not key.endswith("seconds")]
    assert [again[key] for key in results] == [measures["triple"][key] for key in results]
    assert len({found["nats"] for found in measures.values()}) == len(names)
    assert len({found[f"{FEW}_nll"] for found in measures.values()}) == len(names)


def test_the_study_keeps_its_arms_its_parts_and_its_teachers(own_artifacts, config, monkeypatch):
    monkeypatch.setattr(distilbert, "CONFIG", config)
    monkeypatch.setattr(distilbert, "ADAPTATION_STEPS", 2)
    tries = {"runs": [{"arm": "triple", "seed": PILOT_SEED, "nats": {"0.0005": 4.0}, "accuracy": {}}]}
    monkeypatch.setattr(distilbert, "tries_study", lambda ground: tries)
    monkeypatch.setattr(distilbert, "chosen_rates", lambda tries: RATES)
    monkeypatch.setattr(distilbert, "run_study", lambda study: study if study is tries else run_study(study))
    adapt = method.language_teacher
    monkeypatch.setattr(method, "language_teacher", lambda setup, **options: adapt(setup, **{"steps": 2, **options}))
    whole = distilbert_study

    def run(route, seed, _folder):
        return {"nats": len(route.tasks) + seed}

    def quick(*arguments, **options):
        return dataclasses.replace(whole(*arguments, **options), run=run)

    monkeypatch.setattr(distilbert, "distilbert_study", quick)
    study = json.loads(json.dumps(distilbert.study()))
    assert [(run["arm"], run["seed"]) for run in study["runs"]] == [(arm, seed) for seed in SEEDS for arm in ARMS]
    parts = study["parts"]["runs"]
    assert [(run["arm"], run["seed"]) for run in parts] == [(arm, seed) for seed in PART_SEEDS for arm in PARTS]
    folders = {run["folder"] for run in (*study["runs"], *parts)}
    assert len(folders) == len(study["runs"]) + len(parts) - 2 * len(PART_SEEDS), "shared runs are run once"
    assert study["tries"] == {"triple": {"nats": {"0.0005": 4.0}, "accuracy": {}}}
    assert list(study["teachers"]) == ["not adapted", "head only", "600 steps", "all texts"]
    assert study["teachers"]["not adapted"]["loss"] > 9, "a fresh head"
