"""The study of chapter 08, in small, and what is computed from the stored one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from kd_helpers.data import load_splits
from kd_helpers.experiments import deployment
from kd_helpers.experiments.deployment import (
    ARMS,
    CONFIG,
    WAYS,
    accuracy_change,
    cascade_measures,
    deployment_study,
    prepare,
    resplit_agreements,
    right,
    train,
)
from kd_helpers.experiments.study import run_arm, stored_study
from kd_helpers.metrics import Predictions
from kd_helpers.models import weights_digest
from kd_helpers.resolve import resolve
from kd_helpers.teacher import TeacherLogits

SMALL = CONFIG.replace(
    max_steps=2, transfer_size=0, train_size=32, teacher_train_size=32, teacher_epochs=1, precision="float32"
)
HELD_OUT = 200


@pytest.fixture(scope="module")
def few_texts(tmp_path_factory) -> Iterator[None]:
    """The held-out splits in small: the whole ones take minutes, in bfloat16 above all where it is emulated.

    What is made of them takes a minute and is shared.
    """
    data = load_splits(SMALL)
    short = {split: getattr(data, split).select(range(HELD_OUT)) for split in ("validation", "test")}
    few = functools.partial(resolve, data=dataclasses.replace(data, **short))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KD_ARTIFACTS", str(tmp_path_factory.mktemp("artifacts")))
        patch.setattr(deployment, "resolve", few)
        yield


def test_the_arms_train_three_different_students(few_texts):
    ground = prepare(SMALL)
    digests = [weights_digest(train(ground, arm.recipe, 0)) for arm in ARMS.values()]
    assert len(set(digests)) == 3
    assert digests[0] == weights_digest(train(ground, ARMS["student"].recipe, 0))
    logits = [ground.teacher_logits(kind, "validation").logits for kind in ("float32", "int8")]
    assert 0 < float((logits[0] - logits[1]).abs().max()) < 1


def test_a_run_has_every_measure_in_every_way(few_texts, monkeypatch):
    monkeypatch.setattr(deployment, "RESPLITS", 3)
    run = run_arm(deployment_study(SMALL, seeds=(0,)), "aware", 0)
    for way in WAYS:
        for name in ("accuracy", "nll", "ece", "fidelity", "kl", "agreement"):
            assert 0 <= run[f"{way}_{name}"] < 3
        predicted = np.array(run[f"{way}_predicted"].split())
        assert set(predicted) <= {"0", "1", "2"}
        assert len(predicted) == HELD_OUT
    assert run["float32_fidelity"] == 1
    assert run["int8_fidelity"] > 0.8
    assert run["batched_fidelity"] > 0.8
    assert run["cascade_agreement"] >= 0.95
    assert 0 <= run["cascade_asked"] <= 1


def random_predictions(count: int, seed: int, teacher: torch.Tensor | None = None) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    noise = 2 * torch.randn(count, 3, generator=generator)
    logits = noise if teacher is None else teacher + 0.5 * noise
    return Predictions(torch.arange(count), logits, logits.argmax(dim=-1))


def test_a_cascade_is_measured_against_its_teacher():
    teacher = {split: random_predictions(1500, seed) for seed, split in enumerate(("validation", "test"))}
    student = {split: random_predictions(1500, 7, found.logits) for split, found in teacher.items()}
    stored = {split: TeacherLogits(found.ids, found.logits) for split, found in teacher.items()}
    measures = cascade_measures(student, stored, seed=0)
    assert measures["cascade_agreement"] >= 0.96
    assert 0.1 < measures["cascade_asked"] < 0.9
    assert measures["cascade_kept"] >= 0.95
    perfect = cascade_measures(teacher, stored, seed=0)
    assert perfect.pop("cascade_asked") < 0.01  # those below the lowest confidence that was seen
    assert perfect == {"cascade_agreement": 1, "cascade_accuracy": 1, "cascade_kept": 1}
    assert len(resplit_agreements(teacher["test"].logits, teacher["test"].logits, 500, 0)) == deployment.RESPLITS


def test_changes_of_accuracy_are_paired_over_texts():
    runs = [
        {"arm": "student", "seed": 0, "float32_predicted": "0 1 1 0", "int8_predicted": "0 1 0 0"},
        {"arm": "student", "seed": 1, "float32_predicted": "0 1 1 1", "int8_predicted": "0 1 1 0"},
    ]
    result = {"labels": "0 1 1 0", "runs": runs, "teachers": {"teacher": {"int8_predicted": "0 1 1 1"}}}
    assert right(result, "student", "float32").tolist() == [1, 1, 1, 0.5]
    assert right(result, "teacher", "int8").tolist() == [1, 1, 1, 0]
    mean, low, high = accuracy_change(result, ("student", "int8"), ("student", "float32"))
    assert mean == 0
    assert low == pytest.approx(-high)
    assert high == pytest.approx(3.182446 * np.std([0, 0, -0.5, 0.5], ddof=1) / 2, rel=1e-5)


def test_the_stored_predictions_give_the_stored_accuracy():
    result = stored_study("deployment")
    for arm in ARMS:
        for way in WAYS:
            found = [run[f"{way}_accuracy"] for run in result["runs"] if run["arm"] == arm]
            assert right(result, arm, way).mean() == pytest.approx(np.mean(found))
    assert right(result, "teacher", "int8").mean() == pytest.approx(result["teachers"]["teacher"]["int8_accuracy"])
    assert {run["cascade_kept"] >= 0 for run in result["runs"]} == {True}
