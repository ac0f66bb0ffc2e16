"""What several test modules share. Models here are tiny and random unless a test says otherwise."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import hub_cache
import pytest
import torch
from hypothesis import settings
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from kd_helpers import artifacts
from kd_helpers.config import PACKAGED_MODEL, DistillConfig
from kd_helpers.data import load_splits, tokenize
from kd_helpers.models import load_tokenizer

# A busy machine is slow, not wrong.
settings.register_profile("course", deadline=None)
settings.load_profile("course")

LONGEST = ("test_results", "test_papermill", "test_doors", "test_sweep", "test_trainer", "test_explorers")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first, so that no process waits for one that began last; one of them tunes the teacher."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


LABELS = {0: "negative", 1: "neutral", 2: "positive"}


@pytest.fixture
def own_artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An artifacts folder of the test's own."""
    monkeypatch.setenv("KD_ARTIFACTS", str(tmp_path / "artifacts"))
    return tmp_path / "artifacts"


@pytest.fixture
def own_artifacts_but_teacher(own_artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As `own_artifacts`, but with the course's fine-tuned teacher and its logits, which take minutes to make."""
    monkeypatch.delenv("KD_ARTIFACTS")
    shared = artifacts.artifacts_dir()
    monkeypatch.setenv("KD_ARTIFACTS", str(own_artifacts))
    own_artifacts.mkdir()
    for kept in ("teachers", "teacher_logits"):
        (shared / kept).mkdir(parents=True, exist_ok=True)
        (own_artifacts / kept).symlink_to(shared / kept, target_is_directory=True)
    return own_artifacts


@pytest.fixture(scope="session")
def hub_environment(tmp_path_factory) -> dict[str, str]:
    """The environment of a process that finds the hub's presets, in small, in a local cache and has no network."""
    return hub_cache.build(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(PACKAGED_MODEL)


@pytest.fixture(scope="session")
def splits():
    return load_splits(DistillConfig(train_size=96, transfer_size=32))


@pytest.fixture(scope="session")
def small_data():
    """Splits for whole runs in seconds: 64 training texts, 40 to validate, 40 to test."""
    data = load_splits(DistillConfig(train_size=64))
    short = {split: getattr(data, split).select(range(40)) for split in ("validation", "test")}
    return dataclasses.replace(data, **short)


@pytest.fixture(scope="session")
def tokenized(splits, tokenizer):
    """128 short training texts, the last 32 without a label."""
    return tokenize(splits.student_train, tokenizer, max_length=24)


def tiny_bert(layers: int = 2, *, dropout: float = 0.1, seed: int = 0, classes: int = 3):
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            hidden_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=64,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            num_labels=classes,
            id2label={index: LABELS.get(index, f"class {index}") for index in range(classes)},
        )
    )


def tiny_distilbert(*, seed: int = 0):
    torch.manual_seed(seed)
    return DistilBertForSequenceClassification(
        DistilBertConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=64, num_labels=3)
    )
