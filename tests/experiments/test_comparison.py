"""The comparison of chapter 06: its arms, its differences by seed and by text, and the one that is stored."""

from __future__ import annotations

import dataclasses
import datetime
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from support.models import tiny_bert
from support.runs import tiny_config
from transformers import PretrainedConfig, PreTrainedModel

from kd_helpers import artifacts, metrics
from kd_helpers.config import DistillConfig
from kd_helpers.data import LABEL_NAMES, corpus_digest, evaluation_batches, load_splits, read_corpus
from kd_helpers.experiments import comparison, statistics
from kd_helpers.experiments.comparison import (
    ARMS,
    COMPARISON,
    COMPARISON_SEEDS,
    METRICS,
    comparison_study,
)
from kd_helpers.experiments.signals import BASELINE, signal_logits
from kd_helpers.experiments.study import gains, run_arm
from kd_helpers.losses import IGNORE_INDEX
from kd_helpers.metrics import classification_metrics
from kd_helpers.models import load_student, weights_digest
from kd_helpers.resolve import resolve
from kd_helpers.runs import load_run

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
    arms = {name: ARMS[name].to_dict() for name in (BASELINE, "tuned_teacher")}
    return {"arms": arms, "runs": runs, "labels": " ".join("0" * 5 + "1" * 5)}


def test_paired_difference_leaves_out_what_the_arms_share():
    row = gains(made_up(), "accuracy", over=BASELINE).loc["tuned_teacher"]
    expected = stats.ttest_1samp([0.01, 0.02, 0.03], 0).confidence_interval()
    assert row.gain == pytest.approx(0.02)
    assert (row.low, row.high) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_difference_over_texts_needs_different_predictions():
    compared = made_up()
    for run in compared["runs"]:
        run["predicted"] = " ".join("0000011111" if run["arm"] == "tuned_teacher" else "0000000000")
    row = comparison.gains_over_texts(compared).loc["tuned_teacher"]
    expected = stats.ttest_1samp([0.0] * 5 + [1.0] * 5, 0).confidence_interval()
    assert row.gain == pytest.approx(0.5)
    assert (row.low, row.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    over = comparison.gains_over_texts(compared, over="tuned_teacher")
    assert over.loc[BASELINE, "gain"] == pytest.approx(-0.5)


def test_the_summary_has_a_row_for_each_title():
    table = comparison.summary(made_up())
    assert list(table.index) == ["Baseline: labels only", "Tuned teacher"]
    assert table.loc["Tuned teacher", "accuracy"] == pytest.approx(0.82)
    expected = stats.t.ppf(0.975, 2) * stats.sem([0.71, 0.82, 0.93])
    assert table.loc["Tuned teacher", "accuracy ±"] == pytest.approx(expected)


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


# The arms


def test_arms_of_one_seed_differ_in_nothing_but_the_signal():
    shared = {
        "seed",
        "max_steps",
        "batch_size",
        "learning_rate",
        "warmup_ratio",
        "weight_decay",
        "student_init",
        "lean",
    }
    configs = {name: arm.recipe.configure(COMPARISON) for name, arm in ARMS.items()}
    for name in shared | {"lean", "precision", "max_length"}:
        assert len({getattr(config, name) for config in configs.values()}) == 1, name
    starts = {weights_digest(load_student(config, LABEL_NAMES)) for config in configs.values()}
    assert len(starts) == 1
    assert configs["tuned_teacher"].train_size == configs[BASELINE].train_size
    assert configs["transfer_set"].transfer_size == 21_631
    assert configs["more_labels"].train_size == 4 * COMPARISON.train_size
    assert configs["untuned_teacher"].teacher_epochs == 0
    assert configs["own_labels"].teacher_train_size == COMPARISON.train_size
    soft, hard = (dataclasses.asdict(ARMS[name].recipe) for name in ("tuned_teacher", "hard_labels"))
    assert {name for name in soft if soft[name] != hard[name]} == {"teacher"}


def test_redrawn_labels_are_others_and_the_texts_stay_the_same():
    whole = DistillConfig(train_size=2500, transfer_size=21_631)
    before = load_splits(whole)
    after = [comparison.redrawn(before, seed) for seed in (0, 1)]
    ids = [set(data.train["id"][:]) for data in (before, *after)]
    assert len({frozenset(found) for found in ids}) == 3
    true = dict(zip(before.teacher_train["id"][:], before.teacher_train["label"][:], strict=True))
    for data in after:
        assert len(data.train) == 2500
        assert [true[text] for text in data.train["id"][:]] == data.train["label"][:]
        assert sorted(data.student_train["id"][:]) == sorted(before.student_train["id"][:])
        assert set(data.transfer["label"][:]) == {IGNORE_INDEX}
    assert comparison.redrawn(before, 0).train["id"][:] == after[0].train["id"][:]
    new = comparison.with_new_texts(before, 14_131)
    assert not set(new.transfer["id"][:]) & set(before.teacher_train["id"][:])
    assert len(new.transfer) == 14_131
    assert new.transfer["id"][:5000] == comparison.with_new_texts(before, 5000).transfer["id"][:]
    with pytest.raises(ValueError, match="14,132 new texts were asked for, the transfer set has 14,131; ask for fewer"):
        comparison.with_new_texts(before, 14_132)
    few = comparison.redrawn(load_splits(whole.replace(transfer_size=0)), 0)
    assert few.train["id"][:] == after[0].train["id"][:]
    assert len(few.transfer) == 0


def test_a_uniform_teacher_knows_nothing(small_data):
    setup = resolve(COMPARISON.replace(precision="float32"), small_data)
    teacher_logits = signal_logits(ARMS["label_smoothing"].recipe, setup)
    assert torch.equal(teacher_logits.logits, torch.zeros(64, 3))
    assert torch.equal(teacher_logits.ids, torch.tensor(small_data.train["id"][:]))
    assert signal_logits(ARMS[BASELINE].recipe, setup) is None


# Runs


@pytest.fixture
def config(own_artifacts, tmp_path, tokenizer, small_data, monkeypatch) -> DistillConfig:
    data = dataclasses.replace(small_data, teacher_train=small_data.teacher_train.select(range(64)))
    monkeypatch.setattr(comparison, "resolve", lambda config: resolve(config, data))
    return tiny_config(tmp_path, tokenizer, epochs=1)


def test_a_run_measures_and_keeps_its_student(own_artifacts, config):
    study = comparison_study(config, arms=["baseline", "label_smoothing", "tuned_teacher"], seeds=[0, 1])
    runs = {name: run_arm(study, name, 1) for name in study.arms}
    for name, run in runs.items():
        assert run["steps"] == 4
        assert {*METRICS, "kl", "confusion", "reliability", "seconds", "history"} <= run.keys()
        assert np.sum(run["confusion"]) == len(run["predicted"].split()) == 40
        assert run["history"][-1]["step"] == 4
        kept = load_run(own_artifacts / run["folder"])
        assert kept.config == ARMS[name].recipe.configure(config.replace(seed=1))
        assert kept.metrics["test"]["nll"] == run["nll"]
        assert kept.predictions.logits.argmax(dim=-1).tolist() == [int(number) for number in run["predicted"].split()]
    assert len({run["nll"] for run in runs.values()}) == 3
    assert run_arm(study, "baseline", 1) == runs["baseline"]


def test_the_best_epoch_is_that_of_the_baseline_and_chosen_on_validation(own_artifacts, config):
    config = config.replace(max_steps=12, learning_rate=3e-2)
    study = comparison_study(config, arms=["baseline", "best_epoch"], seeds=[0])
    last, best = (run_arm(study, name, 0) for name in study.arms)
    assert best["history"] == last["history"]
    by_step = {epoch["step"]: epoch["accuracy"] for epoch in last["history"]}
    assert len(by_step) == 3
    assert by_step[best["steps"]] == max(by_step.values())
    assert best["steps"] == min(step for step, accuracy in by_step.items() if accuracy == max(by_step.values()))
    if best["steps"] == 12:
        assert best["predicted"] == last["predicted"]
    student = load_run(own_artifacts / last["folder"])
    assert (best["nll"] == student.metrics["test"]["nll"]) == (best["steps"] == 12)
    assert best["last_nll"] == last["nll"]
    assert best["last_accuracy"] == last["accuracy"]


def provenance_of(config: DistillConfig, arm: str, seed: int) -> dict:
    """That of a run that trains nothing."""
    study = dataclasses.replace(comparison_study(config), run=lambda *_: {})
    return artifacts.load_json(artifacts.artifacts_dir() / run_arm(study, arm, seed)["folder"] / artifacts.PROVENANCE)


def test_everything_that_decides_a_run_is_in_its_provenance(config):
    found = provenance_of(config, "label_smoothing", 3)
    assert found["arm"] == {
        "title": "Label smoothing 0.2",
        "recipe": {
            **{"teacher": "uniform", "temperature": 1.0, "alpha": 0.2, "labels": 1, "transfer": False},
            **{"best_epoch": False, "redrawn": False, "new_texts": 0},
        },
    }
    assert found["seed"] == 3
    choices = found["choices"]
    assert choices["config"] == config.to_dict()
    assert choices["texts"] == corpus_digest(read_corpus(config))
    assert "float32" in choices["machine"]
    assert len(set(choices["checkpoints"])) == 2
    assert provenance_of(config.replace(seed=7), "label_smoothing", 3) == found, "each run has a seed of its own"
    assert provenance_of(config.replace(weight_decay=0.1), "label_smoothing", 3) != found


def test_a_changed_file_of_either_model_is_another_run(config, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "read_corpus", lambda config: "the course's tweets")  # they take a second
    monkeypatch.setattr(comparison, "corpus_digest", lambda corpus: "their digest")
    found = [provenance_of(config, BASELINE, 0)]
    for model in ("teacher", "student"):
        path = tmp_path / model / "config.json"
        path.write_text(path.read_text() + " ")
        found.append(provenance_of(config, BASELINE, 0))
    assert len({artifacts.fingerprint(one) for one in found}) == 3


# Measures


def test_predict_and_evaluate_is_the_same_for_any_model(tokenized, tokenizer):
    labelled = tokenized.select(range(96))
    result = metrics.predict_and_evaluate(tiny_bert(), "tiny", evaluation_batches(labelled, tokenizer))
    assert result["model"] == "tiny"
    assert result["texts"] == 96
    assert result["seconds"] > 0
    assert result["ms_per_text"] == pytest.approx(1000 * result["seconds"] / 96)


def test_latency_counts_every_batch_but_the_warm_up(tokenized, tokenizer):
    class Sleeper(PreTrainedModel):
        calls = 0

        def __init__(self):
            super().__init__(PretrainedConfig())
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
    choices = stored["choices"]
    assert DistillConfig(**choices["config"]) == COMPARISON, "the configuration changed: run `make results` again"
    assert stored["seeds"] == list(COMPARISON_SEEDS)
    assert stored["arms"] == {name: arm.to_dict() for name, arm in ARMS.items()}


def test_stored_comparison_was_measured(stored):
    datetime.date.fromisoformat(stored["made_with"]["date"])
    runs = [run for run in stored["runs"] if run["arm"] != "best_epoch"]  # the best epoch may be the baseline's last
    assert len({run["predicted"] for run in runs}) == len(runs)
    assert {cost["model"] for cost in stored["costs"]} == {"teacher", "student"}


def test_stored_comparison_is_complete(stored):
    assert {(run["arm"], run["seed"]) for run in stored["runs"]} == {
        (arm, seed) for arm in ARMS for seed in COMPARISON_SEEDS
    }
    assert len(stored["runs"]) == len(ARMS) * len(COMPARISON_SEEDS)
    assert {run["steps"] for run in stored["runs"] if run["arm"] != "best_epoch"} == {COMPARISON.max_steps}
    assert {"kd_helpers", "python", "torch", "transformers", "date"} <= set(stored["made_with"])


def test_stored_numbers_follow_from_the_stored_predictions(stored):
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
