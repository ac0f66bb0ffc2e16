"""Whole runs that take a second or two, and whether two of them ended alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from kd_helpers.config import DistillConfig
from kd_helpers.models import save_model
from kd_helpers.runs import DistillResult
from support.models import LABELS, tiny_bert


def tiny_config(
    folder: Path, tokenizer: PreTrainedTokenizerBase, *, labels: Mapping[int, str] = LABELS, **changes: Any
) -> DistillConfig:
    """Two epochs of four steps with models so small that a run takes a second or two; they are saved in `folder`."""
    for name, layers in (("teacher", 2), ("student", 1)):
        model = tiny_bert(layers, classes=len(labels), vocabulary=len(tokenizer))
        model.config.id2label = dict(labels)
        save_model(folder / name, model, tokenizer)
    usual = {
        "teacher_checkpoint": str(folder / "teacher"),
        "student_checkpoint": str(folder / "student"),
        "train_size": 64,
        "epochs": 2,
        "batch_size": 16,
        "max_length": 24,
        "teacher_epochs": 1,
        "teacher_train_size": 64,
        "device": "cpu",
        "precision": "float32",
    }
    return DistillConfig(**usual | changes)


def same_run(one: DistillResult, other: DistillResult) -> bool:
    """Weights, history, predictions and all measures, save for the time it took."""
    weights = [result.student.state_dict() for result in (one, other)]
    measures = [{name: value for name, value in run.metrics.items() if name != "seconds"} for run in (one, other)]
    return (
        all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
        and one.history == other.history
        and torch.equal(one.predictions.logits, other.predictions.logits)
        and measures[0] == measures[1]
    )
