from __future__ import annotations

import datetime
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_bert
from scipy import stats

from kd_helpers.experiments import statistics
from kd_helpers import metrics
from kd_helpers.experiments import comparison
from kd_helpers.experiments.comparison import ARMS, BASELINE, FULL, FULL_SEEDS, METRICS
from kd_helpers.config import DistillConfig
from kd_helpers.data import LABEL_NAMES, evaluation_batches, load_splits
from kd_helpers.models import load_student
from kd_helpers.models import weights_digest
from kd_helpers.metrics import classification_metrics

stored = pytest.fixture(scope="module")(comparison.stored_comparison)


def made_up(differences=(0.01, 0.02, 0.03)):
    """A comparison of two arms whose accuracies differ by the given amounts."""
    runs = []
    for seed, difference in enumerate(differences):
        for arm, value in ((BASELINE, 0.7 + 0.1 * seed), ("tuned_teacher", 0.7 + 0.1 * seed + difference)):
            run = dict.fromkeys(METRICS, value) | {
                "arm": arm,
                "seed": seed,
                "seconds": 1.0,
                "predicted": " ".join("0" * 10),
            }
            runs.append(run)
    return {"arms": {BASELINE: {}, "tuned_teacher": {}}, "runs": runs, "labels": " ".join("0" * 5 + "1" * 5)}


def test_paired_difference_leaves_out_what_the_arms_share():
    row = comparison.paired_differences(made_up()).loc[ARMS["tuned_teacher"].title]
    expected = stats.ttest_1samp([0.01, 0.02, 0.03], 0).confidence_interval()
    assert row.difference == pytest.approx(0.02)
    assert (row.low, row.high) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_difference_over_texts_needs_different_answers():
    compared = made_up()
    for run in compared["runs"]:
        run["predicted"] = " ".join("0000011111" if run["arm"] == "tuned_teacher" else "0000000000")
    row = comparison.paired_over_texts(compared).loc[ARMS["tuned_teacher"].title]
    expected = stats.ttest_1samp([0.0] * 5 + [1.0] * 5, 0).confidence_interval()
    assert row.difference == pytest.approx(0.5)
    assert (row.low, row.high) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_one_value_has_no_interval():
    mean, low, high = statistics.mean_interval([0.5])
    assert mean == 0.5
    assert np.isnan(low)
    assert np.isnan(high)


def test_fidelity_by_hand():
    student = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    same = metrics.fidelity(student, student)
    assert same == {"fidelity": 1.0, "kl": pytest.approx(0.0, abs=1e-7)}
    other = metrics.fidelity(student, torch.tensor([[1.0, 0.0], [3.0, 0.0], [1.0, 0.0]]))
    assert other["fidelity"] == pytest.approx(2 / 3)
    assert other["kl"] > 0


def test_arms_of_one_seed_differ_in_nothing_but_the_signal():
    shared = {"seed", "max_steps", "batch_size", "learning_rate", "warmup_ratio", "weight_decay", "student_init"}
    configs = [arm.configure(FULL) for arm in ARMS.values()]
    for name in shared:
        assert len({getattr(config, name) for config in configs}) == 1, name
    starts = {weights_digest(load_student(config, LABEL_NAMES)) for config in configs}
    assert len(starts) == 1
    assert ARMS["tuned_teacher"].configure(FULL).train_size == ARMS[BASELINE].configure(FULL).train_size
    assert ARMS["transfer_set"].configure(FULL).transfer_size == 21_949
    assert ARMS["more_labels"].configure(FULL).train_size == 4 * FULL.train_size
    assert ARMS["untuned_teacher"].configure(FULL).teacher_epochs == 0


def test_a_uniform_teacher_knows_nothing(small_data):
    answers = comparison.arm_answers(ARMS["label_smoothing"], FULL, small_data)
    assert torch.equal(answers.logits, torch.zeros(64, 3))
    assert comparison.arm_answers(ARMS[BASELINE], FULL, small_data) is None


def test_predict_and_evaluate_is_the_same_for_any_model(tokenized, tokenizer):
    labelled = tokenized.select(range(96))
    result = metrics.predict_and_evaluate(tiny_bert(), "tiny", evaluation_batches(labelled, tokenizer))
    assert result["model"] == "tiny"
    assert result["texts"] == 96
    assert result["seconds"] > 0
    assert result["ms_per_text"] == pytest.approx(1000 * result["seconds"] / 96)


def test_latency_counts_every_batch_but_the_warm_up(tokenized, tokenizer):
    class Sleeper(torch.nn.Module):
        calls = 0

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids):
            self.calls += 1
            time.sleep(0.05 if self.calls == 4 else 0.001)  # the last of two batches, after two to warm up
            return SimpleNamespace(logits=self.weight)

    model = Sleeper().train()
    times = metrics.latency(model, evaluation_batches(tokenized.select(range(2)), tokenizer, 1))
    assert model.calls == 4
    assert times["p95"] > 45
    assert 1 < times["p50"] < times["p95"]
    assert not model.training


# The stored comparison: complete, made by today's configuration, and consistent in itself.


def test_stored_comparison_fits_the_configuration(stored):
    assert DistillConfig(**stored["config"]) == FULL, "the configuration changed: run `make results` again"
    assert stored["seeds"] == list(FULL_SEEDS)
    assert {name: comparison.Arm(**arm) for name, arm in stored["arms"].items()} == ARMS


def test_stored_comparison_was_measured(stored):
    datetime.date.fromisoformat(stored["made_with"]["date"])
    assert len({run["predicted"] for run in stored["runs"]}) == len(stored["runs"])
    assert {cost["model"] for cost in stored["costs"]} == {"teacher", "student"}


def test_stored_comparison_is_complete(stored):
    assert {(run["arm"], run["seed"]) for run in stored["runs"]} == {(arm, seed) for arm in ARMS for seed in FULL_SEEDS}
    assert len(stored["runs"]) == len(ARMS) * len(FULL_SEEDS)
    assert {run["steps"] for run in stored["runs"]} == {FULL.max_steps}
    assert {"kd_helpers", "python", "torch", "transformers", "date"} <= set(stored["made_with"])


def test_stored_numbers_follow_from_the_stored_answers(stored):
    data = load_splits(DistillConfig())
    order = np.argsort(data.test["id"][:])
    labels = np.array(data.test["label"][:])[order]
    assert " ".join(map(str, labels)) == stored["labels"]
    for run in stored["runs"]:
        predicted = np.array([int(number) for number in run["predicted"].split()])
        logits = torch.nn.functional.one_hot(torch.tensor(predicted), 3).float()
        again = classification_metrics(logits, torch.tensor(labels))
        for metric in ("accuracy", "macro_recall", "macro_f1"):
            assert run[metric] == pytest.approx(again[metric]), (run["arm"], run["seed"], metric)
        assert np.trace(run["confusion"]) == (predicted == labels).sum()


def test_table_names_every_arm(stored):
    table = comparison.format_table(stored)
    for arm in ARMS.values():
        assert arm.title in table
    assert "Tuned teacher itself" in table
