"""Fixtures of all tests; `support` has the functions. Models are tiny and random unless a test says otherwise."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from support import hub_cache
from tqdm.std import tqdm

from kd_helpers import artifacts
from kd_helpers.config import PACKAGED_MODEL, DistillConfig
from kd_helpers.data import load_splits, tokenize
from kd_helpers.models import load_tokenizer

# A busy machine is slow, not wrong.
settings.register_profile("course", deadline=None)
settings.load_profile("course")

# tqdm's own lock is shared by a process and those that it forks: a child that is killed while it holds the lock would
# block every progress bar of its parent for ever.
tqdm.set_lock(threading.RLock())

LONGEST = ("test_again", "test_papermill", "test_doors", "test_sweep", "test_trainer", "test_explorers")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first, so that no process waits for one that began last; one of them tunes the teacher."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


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
    for kept in ("machines", "teachers", "teacher_logits"):  # the first, so that "auto" means what it meant to them
        (shared / kept).mkdir(parents=True, exist_ok=True)
        (own_artifacts / kept).symlink_to(shared / kept, target_is_directory=True)
    return own_artifacts


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A process that is forked has no more threads than the one that forked it, whatever torch thinks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
