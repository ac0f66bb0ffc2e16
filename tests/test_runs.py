from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import warnings
from functools import partial

import datasets
import pytest
import torch
from tqdm.auto import tqdm
from transformers import pipeline

from kd_helpers.config import DistillConfig
from kd_helpers.models import load_saved
from kd_helpers.resolve import resolve
from kd_helpers.runs import distill
from kd_helpers.teacher import TeacherLogits, fine_tuned_teacher, load_teacher_logits, warn_if_teacher_at_chance

pytestmark = pytest.mark.filterwarnings("ignore:the teacher is not shown")  # it is not tuned

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


def test_same_seed_same_weights_other_seed_other_weights(own_artifacts, small_data):
    runs = [distill(SHORT.replace(seed=seed), data=small_data, resume=False) for seed in (0, 0, 1)]
    weights = [run.student.classifier.weight for run in runs]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert runs[0].metrics["test"] == runs[1].metrics["test"]
    assert runs[0].history == runs[1].history


def test_training_texts_need_no_labels(own_artifacts, small_data):
    """As in a file without labels, with others for the held-out splits: the teacher provides all targets."""
    hidden = small_data.train.remove_columns("label").add_column("label", [-100] * len(small_data.train))
    bare = dataclasses.replace(
        small_data, train=small_data.train.select([]), teacher_train=small_data.train.select([]), transfer=hidden
    )
    config = SHORT.replace(alpha=1.0)
    run = distill(config, data=bare)
    assert run.metrics["steps"] == 3
    assert 0 < run.metrics["test"]["accuracy"] < 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_teacher_at_chance(load_teacher_logits(resolve(config, bare), "student_train"), bare.train)


def test_a_teacher_is_at_chance_unless_it_is_shown_not_to_be():
    ids, labels = torch.arange(20), [0, 1] * 10
    texts = datasets.Dataset.from_dict({"id": ids.tolist(), "label": labels})
    for right, warned in ((15, True), (16, False)):
        given = [label if number < right else 1 - label for number, label in enumerate(labels)]
        logits = TeacherLogits(ids, 5.0 * torch.nn.functional.one_hot(torch.tensor(given), 2))
        expected = pytest.warns(UserWarning, match=r"not shown to be above chance level: it is right for 15 of 20")
        with expected if warned else contextlib.nullcontext():
            warn_if_teacher_at_chance(logits, texts)


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


def test_a_run_deletes_no_model_that_stands_where_its_student_goes(own_artifacts, small_data, tmp_path):
    run = distill(SHORT, data=small_data, output_dir=tmp_path / "first")
    models = tmp_path / "models"
    shutil.copytree(run.folder / "student", models / "student")
    weights = (models / "student" / "model.safetensors").read_bytes()
    started = SHORT.replace(student_checkpoint=str(models / "student"), seed=1)
    with pytest.raises(ValueError, match=r"would write its student over student_checkpoint .*; choose another output_"):
        distill(started, data=small_data, output_dir=models)
    (models / "student" / "notes.md").write_text("mine")
    with pytest.raises(ValueError, match=r"student holds notes\.md, which no run wrote and which would be lost"):
        distill(SHORT, data=small_data, output_dir=models)
    assert (models / "student" / "model.safetensors").read_bytes() == weights
    assert (models / "student" / "notes.md").read_text() == "mine"


def test_runs_with_other_teacher_logits_have_folders_of_their_own(own_artifacts, small_data):
    ids = torch.tensor(small_data.student_train["id"][:])
    uniform = TeacherLogits(ids, torch.zeros(len(ids), 3))
    folders = {distill(SHORT, data=small_data, teacher_logits=logits).folder for logits in (None, uniform)}
    assert len(folders) == 2


def test_a_run_that_dies_while_saving_has_no_metrics(own_artifacts, small_data, monkeypatch):
    run = distill(SHORT, data=small_data)

    def die(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("kd_helpers.runs.save_model", die)
    with pytest.raises(OSError, match="no space"):
        distill(SHORT, data=small_data, resume=False)
    assert not (run.folder / "metrics.json").exists()
    assert load_saved(run.folder / "student").config.num_labels == 3


def test_making_the_teacher_does_not_move_the_random_state(own_artifacts, small_data):
    config = SHORT.replace(teacher_epochs=1)
    data = dataclasses.replace(small_data, teacher_train=small_data.train)
    draws = []
    setup = resolve(config, data)
    for _ in range(2):  # made the first time, found the second
        torch.manual_seed(3)
        fine_tuned_teacher(setup)
        draws.append(torch.rand(1))
    assert torch.equal(*draws)
    assert len(list((own_artifacts / "teachers").glob("[0-9a-f]*"))) == 1


def test_steps_are_counted_without_a_progress_bar(own_artifacts, small_data, monkeypatch):
    monkeypatch.setattr("kd_helpers.loop.tqdm", partial(tqdm, disable=True))
    run = distill(SHORT.replace(max_steps=5, alpha=0.0), data=small_data)
    assert [entry["step"] for entry in run.history] == [4, 5]


def test_max_steps_stops_in_the_middle_of_an_epoch(own_artifacts, small_data):
    run = distill(SHORT.replace(max_steps=5, alpha=0.0), data=small_data)
    assert [entry["step"] for entry in run.history] == [4, 5]
    assert run.metrics["steps"] == 5
