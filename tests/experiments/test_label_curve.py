"""Chapter 11's accuracy by the number of labels: what is tried, what is kept, and what a run is stored under."""

from __future__ import annotations

import dataclasses

import pytest

from kd_helpers.experiments import distilbert, label_curve
from kd_helpers.experiments.label_curve import ARMS, RATES, chosen_language_rates, curve_study
from kd_helpers.experiments.study import run_arm
from kd_helpers.methods import distilbert as method
from kd_helpers.models import weights_digest

LANGUAGE_RATES = {"triple": 5e-4, "language": 2e-4, "none": 0.0, "packaged": 0.0}


@pytest.fixture
def ground(own_artifacts, language_config):
    return distilbert.prepare(language_config, adaptation_steps=2)


def test_the_arms_are_those_of_the_other_study_with_these_tasks_alone():
    assert ARMS.keys() == distilbert.ARMS.keys()
    for name, arm in ARMS.items():
        assert arm.recipe == dataclasses.replace(distilbert.ARMS[name].recipe, tasks=())
    assert len({arm.recipe for arm in ARMS.values()}) == len(ARMS)
    assert [task.labels for task in distilbert.CURVE.values()] == list(RATES)
    assert chosen_language_rates() == LANGUAGE_RATES


def test_each_student_keeps_the_rate_that_is_best_on_validation_and_is_measured_on_test(ground, monkeypatch, tmp_path):
    trained, validation, test = [], ground.setup.data.validation["id"][:], ground.setup.data.test["id"][:]
    best = {("triple", 50): 1e-4, ("triple", 500): 1e-3, ("none", 50): 1e-5, ("none", 500): 3e-4}
    monkeypatch.setattr(label_curve, "RATES", {count: RATES[count] for count in (50, 500)})
    name_of = {arm.recipe: name for name, arm in ARMS.items()}

    def language(route, _ground, rate, *, seed, steps):
        trained.append((name_of[route], rate, seed, steps))
        return name_of[route]

    def task(student, route, task, _ground, rate, *, seed):
        assert (student, seed, task.transfer, task.steps) == (name_of[route], 3, False, distilbert.TASK_STEPS)
        return (student, task.labels, rate)

    def measure(classifier, _ground, texts):
        name, labels, rate = classifier
        right = best[name, labels]
        if texts["id"][:] == validation:
            return {"accuracy": 0.9 if rate == right else 0.5, "nll": 0.0}
        assert texts["id"][:] == test
        assert rate == right, "test is for the chosen student alone"
        return {"accuracy": 0.7, "nll": rate}

    monkeypatch.setattr(distilbert, "train_language", language)
    monkeypatch.setattr(distilbert, "train_task", task)
    monkeypatch.setattr(distilbert, "measure_task", measure)
    study = curve_study(ground, LANGUAGE_RATES, steps=7)
    for name in ("triple", "none"):
        found = study.run(ARMS[name].recipe, 3, tmp_path)
        assert found == {
            key: value
            for labels in (50, 500)
            for key, value in {
                f"labels_{labels}_rate": best[name, labels],
                f"labels_{labels}_tried": {rate: 0.9 if rate == best[name, labels] else 0.5 for rate in RATES[labels]},
                f"labels_{labels}_accuracy": 0.7,
                f"labels_{labels}_nll": best[name, labels],
            }.items()
        }
    assert trained == [("triple", 5e-4, 3, 7), ("none", 0.0, 3, 7)], "one student for all numbers of labels"


def test_everything_that_decides_a_run_is_in_its_provenance(ground):
    def folder(study):
        return run_arm(dataclasses.replace(study, run=lambda *_: {}), "none", 2)["folder"]

    study = curve_study(ground, LANGUAGE_RATES, steps=7)
    assert study.choices["tasks"]["50"] == {
        "labels": 50,
        "transfer": False,
        "steps": distilbert.TASK_STEPS,
        "rates": RATES[50],
    }
    assert study.choices["steps"] == 7
    others = (
        curve_study(ground, LANGUAGE_RATES, steps=8),
        curve_study(ground, LANGUAGE_RATES | {"language": 1e-3}, steps=7),
    )
    assert len({folder(study), *map(folder, others)}) == 3


def test_the_whole_of_it_in_small(ground, monkeypatch, tmp_path):
    monkeypatch.setattr(label_curve, "RATES", {8: (1e-3, 1e-2)})
    monkeypatch.setattr(distilbert, "TASK_STEPS", 2)
    study = curve_study(ground, LANGUAGE_RATES, steps=2)
    route = ARMS["none"].recipe
    found = study.run(route, 0, tmp_path)
    assert found["labels_8_rate"] in found["labels_8_tried"]
    start = method.language_student(ground.teacher, seed=0)
    classifier = distilbert.train_task(start, route, distilbert.Task(8), ground, found["labels_8_rate"], seed=0)
    measured = distilbert.measure_task(classifier, ground, ground.setup.data.test)
    assert measured == {what: found[f"labels_8_{what}"] for what in ("accuracy", "nll")}
    assert weights_digest(start) == weights_digest(method.language_student(ground.teacher, seed=0))
