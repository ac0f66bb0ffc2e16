"""The study of chapter 10: every experiment runs, and each control differs from its rival in one thing."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from kd_helpers import artifacts
from kd_helpers.experiments import dark_knowledge
from kd_helpers.experiments.study import run_arm
from kd_helpers.methods import digits


@pytest.fixture
def small(own_artifacts, monkeypatch) -> None:
    """Two seeds of tiny nets that are trained for a step or two."""
    changes = {
        "teacher_units": 8,
        "teachers": 2,
        "temperatures": [1.0, 8.0],
        "steps": {"teacher": 2, "800": 1, "30": 2},
    }
    monkeypatch.setattr(dark_knowledge, "CHOICES", dark_knowledge.CHOICES | changes)
    monkeypatch.setattr(dark_knowledge, "ARMS", dark_knowledge._arms())
    monkeypatch.setattr(dark_knowledge, "SEEDS", (0, 1))


def test_study_runs_every_experiment(small):
    study = dark_knowledge.study()
    assert json.loads(json.dumps(study))["runs"] == study["runs"]
    runs = {run["arm"]: run for run in study["runs"] if run["seed"] == 1}
    assert len(study["runs"]) == 2 * len(runs)
    assert runs.keys() == dark_knowledge.ARMS.keys() == study["arms"].keys()
    assert {"teacher", "ensemble", "student of the ensemble", "30 units: labels", "800 units: T = 8"} <= set(runs)
    for name in ("no 3: labels", "no 3: soft targets", "only 7 and 8: labels", "only 7 and 8: soft targets"):
        assert runs[name]["unseen_after"] + runs[name]["others_after"] + runs[name]["errors_after"] == 599
    assert all(0 <= runs[name]["train"] <= 1 for name in runs if name.startswith("few"))
    assert study["choices"]["steps"]["30"] == 2


@pytest.mark.parametrize(
    ("name", "rival", "differs"),
    [
        ("no 3: labels", "no 3: soft targets", {"temperature"}),
        ("no 3: soft targets, T = 1", "no 3: soft targets", {"temperature"}),
        ("only 7 and 8: labels", "only 7 and 8: soft targets", {"temperature"}),
        ("few: labels", "few: soft targets", {"temperature"}),
        ("few: labels", "few: labels, stopped early", {"stop_early"}),
        ("student of the ensemble", "800 units: T = 8", {"teachers"}),
        ("30 units: labels", "800 units: labels", {"units"}),
    ],
)
def test_rivals_differ_in_one_thing(name, rival, differs):
    one, other = (dataclasses.asdict(dark_knowledge.ARMS[arm].recipe) for arm in (name, rival))
    assert {field for field in one if one[field] != other[field]} == differs


def test_arms_train_what_their_recipe_says(small, monkeypatch):
    """Which digits a student sees, what it is shown for them, and for how long."""
    happened, splits = {}, digits.load_digits()

    def train_student(seen, logits, *, temperature, units, steps, seed, stop_on):
        happened[arm] = (seen, logits, temperature, units, steps, seed, stop_on)
        return digits.digit_net(8, 4, seed=0)

    monkeypatch.setattr(dark_knowledge, "train_student", train_student)
    study = dark_knowledge.dark_knowledge_study()
    for arm in ("no 3: soft targets", "few: labels, stopped early", "student of the ensemble", "30 units: T = 8"):
        run_arm(study, arm, 1)
    seen, logits, temperature, units, steps, seed, stop_on = happened["no 3: soft targets"]
    assert sorted(set(seen.labels.tolist())) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert len(seen.labels) == len(logits) == int((splits.train.labels != 3).sum())
    assert (temperature, units, steps, seed, stop_on) == (8.0, 800, 1, 1, None)
    seen, logits, temperature, units, steps, seed, stop_on = happened["few: labels, stopped early"]
    assert (len(seen.labels), logits, temperature, units, steps) == (45, None, 1.0, 800, 1)
    assert torch.equal(stop_on.pictures, splits.validation.pictures)
    assert happened["30 units: T = 8"][3:6] == (30, 2, 1)
    one, several = (happened[arm][1] for arm in ("30 units: T = 8", "student of the ensemble"))
    assert one.shape == several.shape == (899, 10)
    assert not torch.allclose(one, several)


def test_what_a_run_is_stored_under(small, own_artifacts):
    study = dark_knowledge.dark_knowledge_study()
    made = run_arm(study, "few: labels", 1)
    provenance = artifacts.load_json(own_artifacts / made["folder"] / artifacts.PROVENANCE)
    assert provenance["arm"]["recipe"]["share"] == 0.05
    assert provenance["choices"] == json.loads(json.dumps(dark_knowledge.CHOICES))
    for name in ("digits", "learning_rate", "dropout", "max_norm", "jitter", "teacher_units", "steps", "few"):
        assert name in provenance["choices"]
