from __future__ import annotations

import dataclasses
import json
from functools import partial

import numpy as np
import pytest
import torch
from conftest import tiny_bert
from sklearn.metrics import log_loss
from torch.testing import assert_close
from tqdm.auto import tqdm
from transformers import pipeline

from kd_helpers.config import DistillConfig
from kd_helpers.data import evaluation_batches, training_batches
from kd_helpers.losses import soft_targets
from kd_helpers.models import freeze, load_saved
from kd_helpers.optim import make_optimizer, make_scheduler
from kd_helpers.teacher_logits import TeacherLogits, attach, cached_logits
from kd_helpers.training import (
    classification_metrics,
    distill,
    distill_epoch,
    evaluate,
    expected_calibration_error,
    fine_tuned_teacher,
    predict,
    reliability,
)

pytestmark = pytest.mark.filterwarnings("ignore:the teacher names the class of")  # it is not tuned

SHORT = DistillConfig(
    train_size=64,
    max_steps=3,
    teacher_epochs=0,
    alpha=0.5,
    batch_size=16,
    max_length=24,
    device="cpu",
    precision="float32",
)


def one_epoch(student, batches, **options):
    optimizer = make_optimizer(student, learning_rate=1e-3, weight_decay=0.01)
    scheduler = make_scheduler(optimizer, steps=len(list(batches)))
    return distill_epoch(student, batches, optimizer, scheduler, **options)


def test_cached_and_online_teacher_give_the_same_losses_and_weights(own_artifacts, tokenized, tokenizer):
    teacher = freeze(tiny_bert(seed=1))
    answers = cached_logits(teacher, tokenized, tokenizer, precision=torch.float32)
    students = [tiny_bert(dropout=0.0), tiny_bert(dropout=0.0)]
    online = one_epoch(
        students[0],
        training_batches(tokenized, tokenizer, 16, seed=0),
        temperature=2.0,
        alpha=0.7,
        teacher=teacher,
    )
    cached = one_epoch(
        students[1],
        training_batches(attach(tokenized, answers), tokenizer, 16, seed=0),
        temperature=2.0,
        alpha=0.7,
    )
    assert_close(online, cached, rtol=1e-6, atol=1e-6)
    for one, other in zip(students[0].parameters(), students[1].parameters(), strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_epoch_trains_the_student_and_leaves_the_teacher(tokenized, tokenizer):
    teacher, student = freeze(tiny_bert(seed=1)), tiny_bert(seed=2)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    start = student.classifier.weight.detach().clone()
    losses = one_epoch(
        student, training_batches(tokenized, tokenizer, 16, seed=0), temperature=2.0, alpha=0.5, teacher=teacher
    )
    assert student.training
    assert not teacher.training
    assert not torch.equal(student.classifier.weight, start)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert len(losses.total) == 8
    assert_close(losses.total, 0.5 * losses.soft + 0.5 * losses.hard)
    assert losses.mean()["total"] == pytest.approx(losses.total.mean().item())


def test_a_student_alone_learns_its_teacher(tokenized, tokenizer):
    teacher, student = freeze(tiny_bert(seed=1)), tiny_bert(seed=2, dropout=0.0)
    with torch.no_grad():
        teacher.classifier.weight.mul_(20)
    batches = training_batches(tokenized, tokenizer, 16, seed=0)
    optimizer = make_optimizer(student, learning_rate=3e-3, weight_decay=0.0)
    scheduler = make_scheduler(optimizer, steps=10_000)
    means = [
        distill_epoch(student, batches, optimizer, scheduler, temperature=2.0, alpha=1.0, teacher=teacher).mean()[
            "soft"
        ]
        for _ in range(5)
    ]
    assert means[-1] < 0.5 * means[0]


def test_gradient_is_clipped(tokenized, tokenizer):
    student = tiny_bert()
    seen = []

    class Recorder(torch.optim.SGD):
        def step(self, closure=None):
            norms = [p.grad.norm() for group in self.param_groups for p in group["params"] if p.grad is not None]
            seen.append(torch.stack(norms).norm().item())
            return super().step(closure)

    optimizer = Recorder(student.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    batches = training_batches(tokenized, tokenizer, 16, seed=0)
    distill_epoch(student, batches, optimizer, scheduler, temperature=1.0, alpha=0.0, max_grad_norm=0.01)
    assert max(seen) <= 0.01 * 1.001


def test_mistakes_are_named(tokenized, tokenizer):
    student, teacher = tiny_bert(), tiny_bert(seed=1)
    batches = training_batches(tokenized, tokenizer, 16, seed=0)
    with pytest.raises(ValueError, match="same model"):
        one_epoch(student, batches, temperature=2.0, alpha=0.5, teacher=student)
    with pytest.raises(ValueError, match="train mode"):
        one_epoch(student, batches, temperature=2.0, alpha=0.5, teacher=teacher.train())
    with pytest.raises(ValueError, match="no teacher logits"):
        one_epoch(student, batches, temperature=2.0, alpha=0.5)
    with pytest.raises(
        ValueError, match="the teacher's classes are negative, neutral, positive, class 3, the student's"
    ):
        one_epoch(student, batches, temperature=2.0, alpha=0.5, teacher=freeze(tiny_bert(classes=4)))
    with pytest.raises(ValueError, match="no batches"):
        one_epoch(student, [], temperature=2.0, alpha=0.5)


def test_predictions_are_sorted_by_id_and_the_mode_is_kept(tokenized, tokenizer):
    model = tiny_bert().train()
    one = predict(model, evaluation_batches(tokenized, tokenizer, 16))
    other = predict(model, training_batches(tokenized, tokenizer, 8, seed=4))
    assert model.training
    assert torch.equal(one.ids, other.ids)
    assert bool((one.ids.diff() > 0).all())
    assert_close(one.logits, other.logits, rtol=1e-4, atol=1e-5)


def test_metrics_by_hand():
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 4.0]])
    labels = torch.tensor([0, 0, 1, 2])
    metrics = classification_metrics(logits, labels)
    assert metrics["accuracy"] == 0.75
    assert metrics["macro_recall"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert metrics["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert metrics["nll"] == pytest.approx(log_loss(labels, soft_targets(logits, 1.0).double()), rel=1e-5)


def test_calibration_error_by_hand():
    """Two texts at confidence 0.9, one right: gap 0.4. Two at 0.6, both right: gap 0.4."""
    logits = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]]).log()
    labels = torch.tensor([0, 1, 0, 0])
    assert expected_calibration_error(logits, labels, bins=10) == pytest.approx(0.4, abs=1e-6)
    curve = reliability(logits, labels, bins=10)
    assert curve["share"].sum() == pytest.approx(1.0)
    assert np.isnan(curve["accuracy"][0])


def test_evaluate_measures_what_predict_says(tokenized, tokenizer):
    labelled = tokenized.select(range(96))
    batches = evaluation_batches(labelled, tokenizer)
    model = tiny_bert()
    predictions = predict(model, batches)
    assert evaluate(model, batches) == classification_metrics(predictions.logits, predictions.labels)


def test_same_seed_same_weights_other_seed_other_weights(own_artifacts, small_data):
    runs = [distill(SHORT.replace(seed=seed), data=small_data, resume=False) for seed in (0, 0, 1)]
    weights = [run.student.classifier.weight for run in runs]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert runs[0].metrics["test"] == runs[1].metrics["test"]
    assert runs[0].history == runs[1].history


def test_a_saved_run_is_whole_and_reloads_to_identical_logits(own_artifacts, small_data, tmp_path):
    keep = tmp_path / "out" / "notes.txt"
    keep.parent.mkdir()
    keep.write_text("mine")
    run = distill(SHORT, data=small_data, output_dir=tmp_path / "out")
    assert keep.read_text() == "mine"
    assert json.loads((run.folder / "config.json").read_text()) == SHORT.to_dict()
    assert json.loads((run.folder / "metrics.json").read_text())["steps"] == 3
    assert len(json.loads((run.folder / "history.json").read_text())) == 1
    names = {path.name for path in (run.folder / "student").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "README.md", "config.json"} <= names
    assert not [path for path in run.folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]

    ids = torch.tensor([[101, 2054, 102]])
    assert torch.equal(load_saved(run.folder / "student")(ids).logits, run.student(ids).logits)
    answer = pipeline("text-classification", str(run.folder / "student"))("what a day")[0]
    assert answer["label"] in ("negative", "neutral", "positive")
    card = (run.folder / "student" / "README.md").read_text()
    assert f"{run.metrics['test']['accuracy']:.4f}" in card


def test_runs_with_other_answers_have_folders_of_their_own(own_artifacts, small_data):
    ids = torch.tensor(small_data.student_train["id"][:])
    uniform = TeacherLogits(ids, torch.zeros(len(ids), 3))
    folders = {distill(SHORT, data=small_data, answers=answers).folder for answers in (None, uniform)}
    assert len(folders) == 2


def test_a_run_that_dies_while_saving_has_no_metrics(own_artifacts, small_data, monkeypatch):
    run = distill(SHORT, data=small_data)

    def die(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("kd_helpers.training.save_model", die)
    with pytest.raises(OSError, match="no space"):
        distill(SHORT, data=small_data, resume=False)
    assert not (run.folder / "metrics.json").exists()
    assert load_saved(run.folder / "student").config.num_labels == 3


def test_making_the_teacher_does_not_move_the_random_state(own_artifacts, small_data, tokenizer):
    config = SHORT.replace(teacher_epochs=1)
    data = dataclasses.replace(small_data, teacher_train=small_data.train)
    draws = []
    for _ in range(2):  # made the first time, found the second
        torch.manual_seed(3)
        fine_tuned_teacher(config, data, tokenizer)
        draws.append(torch.rand(1))
    assert torch.equal(*draws)
    assert len(list((own_artifacts / "teachers").glob("[0-9a-f]*"))) == 1


def test_steps_are_counted_without_a_progress_bar(own_artifacts, small_data, monkeypatch):
    monkeypatch.setattr("kd_helpers.training.tqdm", partial(tqdm, disable=True))
    run = distill(SHORT.replace(max_steps=5, alpha=0.0), data=small_data)
    assert [entry["step"] for entry in run.history] == [4, 5]


def test_max_steps_stops_in_the_middle_of_an_epoch(own_artifacts, small_data):
    run = distill(SHORT.replace(max_steps=5, alpha=0.0), data=small_data)
    assert [entry["step"] for entry in run.history] == [4, 5]
    assert run.metrics["steps"] == 5
