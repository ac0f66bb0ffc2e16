"""The study of chapter 11: what its arms leave out, how rates are chosen, and all of it in small."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from transformers import BertConfig, BertModel

from kd_helpers import artifacts
from kd_helpers.config import DistillConfig
from kd_helpers.data import corpus_digest, read_corpus
from kd_helpers.experiments import distilbert
from kd_helpers.experiments.distilbert import (
    ARMS,
    FEW,
    LANGUAGE_PILOT_SEEDS,
    LANGUAGE_RATES,
    LONGER,
    SEEDS,
    TASK_PILOT_SEEDS,
    TASK_RATES,
    TASKS,
    Rates,
    choose_rates,
    distilbert_study,
    prepare,
    train_language,
    train_task,
)
from kd_helpers.experiments.study import run_arm
from kd_helpers.methods import distilbert as method
from kd_helpers.methods.distilbert import Weights
from kd_helpers.models import weights_digest
from kd_helpers.resolve import resolve

SHAPE = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 4}
SHORT = {
    name: task._replace(labels=min(task.labels, 24), steps=2 if task.steps == distilbert.TASK_STEPS else 4)
    for name, task in TASKS.items()
}
RATES = dict.fromkeys(ARMS, Rates(5e-4, dict.fromkeys(TASKS, 1e-4)))


@pytest.fixture(scope="module")
def headless(tmp_path_factory, tokenizer) -> str:
    """A pre-trained BERT without a language head, as the packaged one."""
    folder = tmp_path_factory.mktemp("headless")
    torch.manual_seed(0)
    BertModel(BertConfig(**SHAPE)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def config(headless, small_data, splits, monkeypatch) -> DistillConfig:
    """Of a teacher that is not fine-tuned, on few texts; tasks of a few steps."""
    data = dataclasses.replace(small_data, transfer=splits.transfer)
    monkeypatch.setattr(distilbert, "resolve", lambda config: resolve(config, data))
    monkeypatch.setattr(distilbert, "TASKS", SHORT)
    return DistillConfig(
        teacher_checkpoint=headless, teacher_epochs=0, max_length=24, precision="float32", device="cpu"
    )


@pytest.fixture
def ground(own_artifacts, config):
    return prepare(config, adaptation_steps=2)


# The arms


def test_each_arm_of_the_ablation_leaves_out_one_thing():
    whole = ARMS["triple"].recipe
    assert whole.weights == Weights(5, 2, 1)
    for part in ("soft", "cosine", "language"):
        assert ARMS[f"no_{part}"].recipe.weights == Weights()._replace(**{part: 0})
    for name in ("language", "language_longer", "random_language"):
        assert ARMS[name].recipe.weights == Weights(soft=0, language=1, cosine=0), "no teacher"
    assert ARMS["none"].recipe.weights is ARMS["random_none"].recipe.weights is None
    assert [name for name, arm in ARMS.items() if arm.recipe.random_start] == [
        name for name in ARMS if name.startswith("random")
    ]
    assert {name: arm.recipe.times for name, arm in ARMS.items() if arm.recipe.times != 1} == {
        "language_longer": LONGER
    }


def test_every_task_is_that_of_a_student_and_pilot_seeds_are_no_others():
    assert all(FEW in arm.recipe.tasks for arm in ARMS.values())
    assert {task for arm in ARMS.values() for task in arm.recipe.tasks} == TASKS.keys()
    assert len({arm.recipe for arm in ARMS.values()}) == len(ARMS)
    assert not {*LANGUAGE_PILOT_SEEDS, *TASK_PILOT_SEEDS} & {*SEEDS}


# What a student learns from


def test_labels_are_drawn_by_the_seed_and_shared_by_the_arms(ground, monkeypatch):
    seen = []
    monkeypatch.setattr(
        method, "fine_tune", lambda classifier, setup, texts, logits: seen.append((setup, texts, logits))
    )
    student = method.language_student(ground.teacher)
    for name, seed in (("labels_50", 0), ("labels_50", 1), ("transfer_500", 0), ("teacher_500", 0)):
        train_task(student, ARMS["none"].recipe, SHORT[name], ground, 1e-3, seed=seed)
    (few, texts, none), (_, others, _), (more, both, logits), (_, same, _) = seen
    assert len(texts) == 24
    assert texts["id"][:] != others["id"][:]
    assert texts["id"][:] == same["id"][:] == both["id"][:24]
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

    def language(_model, _ground, texts):
        assert texts["id"][:] == held_out
        return {"loss": abs(rate_of["language"] - 5e-4), "accuracy": 0.0}

    def task(_model, _ground, texts):
        assert texts["id"][:] == held_out
        return {"accuracy": 1 - abs(rate_of["task"] - 3e-4), "nll": 0.0}

    rate_of, seeds, tuned = {}, set(), []

    def train(_route, _ground, rate, *, seed, steps):
        rate_of["language"] = rate
        seeds.add(seed)

    monkeypatch.setattr(distilbert, "train_language", train)

    def fine_tune(_student, _route, task, _ground, rate, *, seed):
        # A task with all steps has another best rate than the others.
        rate_of["task"] = rate * (3 if task.steps == SHORT["all_labels_500"].steps else 1)
        seeds.add(seed)
        tuned.append(task)

    monkeypatch.setattr(distilbert, "train_task", fine_tune)
    monkeypatch.setattr(distilbert, "measure_language", language)
    monkeypatch.setattr(distilbert, "measure_task", task)
    arms = {name: ARMS[name] for name in ("triple", "none")}
    found, tries = choose_rates(ground, arms, steps=2)
    few_steps, all_steps = dict.fromkeys(distilbert.CURVE, 3e-4), dict.fromkeys(distilbert.ALL_STEPS, 1e-4)
    assert found == {
        "triple": Rates(5e-4, few_steps | dict.fromkeys(distilbert.DISTILLED, 3e-4) | {"all_transfer_500": 1e-4}),
        "none": Rates(LANGUAGE_RATES[0], few_steps | all_steps),
    }
    assert seeds == {*LANGUAGE_PILOT_SEEDS, *TASK_PILOT_SEEDS}
    assert len(tuned) == len(TASK_PILOT_SEEDS) * len(TASK_RATES) * (7 + 7)
    assert tries["nats"].keys() == {f"triple {rate:g}" for rate in LANGUAGE_RATES}
    assert min(tries["nats"], key=tries["nats"].get) == "triple 0.0005"
    assert tries["accuracy"].keys() == {*arms}
    assert len(tries["accuracy"]["none"]) == 7 * len(TASK_RATES)


# What a run is stored under


def test_everything_that_decides_a_run_is_in_its_provenance(ground, config):
    study = dataclasses.replace(distilbert_study(ground, RATES, steps=7), run=lambda *_: {})
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
    assert choices["tasks"][FEW] == {"labels": 24, "distilled": False, "transfer": False, "steps": 2}
    assert choices["learning_rates"]["triple"] == {"language": 5e-4, "tasks": dict.fromkeys(TASKS, 1e-4)}
    assert choices["texts"] == corpus_digest(read_corpus(config))
    assert choices["teacher_logits"] == ground.logits.digest()
    assert "float32" in choices["machine"]
    rates = RATES | {"none": Rates(1, dict.fromkeys(TASKS, 1))}
    other = dataclasses.replace(distilbert_study(ground, rates, steps=7), run=study.run)
    assert run_arm(other, "no_soft", 2)["folder"] != made["folder"]


# In small


def test_arms_run_and_repeat_themselves_and_are_measured(ground, tmp_path):
    study = distilbert_study(ground, RATES, steps=2)
    names = ("triple", "language", "none", "random_none")
    measures = {name: run_arm(study, name, 0) for name in names}
    about = {"arm", "seed", "folder", "seconds"}
    for name, found in measures.items():
        tasks = {f"{task}_{what}" for task in ARMS[name].recipe.tasks for what in ("accuracy", "nll", "seconds")}
        assert found.keys() - about == {"nats", "language_accuracy"} | tasks, name
        assert all(math.isfinite(found[measure]) for measure in found.keys() - about), name
    again = study.run(ARMS["triple"].recipe, 0, tmp_path)
    results = [key for key in again if not key.endswith("seconds")]
    assert [again[key] for key in results] == [measures["triple"][key] for key in results]
    assert len({found["nats"] for found in measures.values()}) == len(names)
    assert len({found[f"{FEW}_nll"] for found in measures.values()}) == len(names)


def test_the_study_keeps_its_arms_and_its_teachers(own_artifacts, config, monkeypatch):
    monkeypatch.setattr(distilbert, "CONFIG", config)
    monkeypatch.setattr(distilbert, "ADAPTATION_STEPS", 2)
    monkeypatch.setattr(distilbert, "choose_rates", lambda ground, arms: (RATES, {"nats": {"triple 0.0005": 4.0}}))
    adapt = method.language_teacher
    monkeypatch.setattr(method, "language_teacher", lambda setup, **options: adapt(setup, **{"steps": 2, **options}))
    whole = distilbert_study

    def quick(ground, rates):
        return dataclasses.replace(whole(ground, rates), run=lambda route, seed, _: {"nats": len(route.tasks) + seed})

    monkeypatch.setattr(distilbert, "distilbert_study", quick)
    study = json.loads(json.dumps(distilbert.study()))
    assert [(run["arm"], run["seed"]) for run in study["runs"]] == [(arm, seed) for seed in SEEDS for arm in ARMS]
    assert study["tries"] == {"nats": {"triple 0.0005": 4.0}}
    assert list(study["teachers"]) == ["not adapted", "head only", "600 steps", "all texts, 3,000 steps"]
    assert study["teachers"]["not adapted"]["loss"] > 9, "a fresh head"
