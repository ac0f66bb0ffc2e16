"""What a run takes beside its steps is measured on the run itself."""

from __future__ import annotations

import time

import pytest
import torch
from support.models import tiny_bert
from support.own_texts import own_config

from kd_helpers import artifacts, loop
from kd_helpers.data import evaluation_batches
from kd_helpers.experiments import overheads
from kd_helpers.experiments.overheads import evaluation_cost, run_cost, stopwatch, time_to_first_step


def test_evaluation_is_held_against_the_fastest_forward_passes(tokenized, tokenizer, monkeypatch):
    model = tiny_bert().eval()
    labelled = tokenized.select(range(96))
    batches = evaluation_batches(labelled, tokenizer)
    found = evaluation_cost(model, batches, tokenizer, torch.float32)
    assert found["texts"] == len(labelled)
    assert found["ratio"] == pytest.approx(found["seconds"] / found["forward_seconds"])
    assert found["batch_size"] in overheads.BATCH_SIZES

    def slow(*arguments):
        time.sleep(0.5)

    monkeypatch.setattr(overheads, "evaluate", slow)
    assert evaluation_cost(model, batches, tokenizer, torch.float32)["seconds"] >= 0.5


def test_a_stopwatch_changes_nothing_but_the_time_it_notes():
    function = loop.require_finite
    with stopwatch(loop, "require_finite") as seconds:
        loop.require_finite(1, torch.tensor(1.0), {})
        with pytest.raises(loop.DivergedError):
            loop.require_finite(2, torch.tensor(torch.inf), {})
    assert len(seconds) == 2
    assert loop.require_finite is function


def test_the_cost_of_a_run_is_that_of_its_parts(tmp_path, own_artifacts, tokenizer):
    config = own_config(tmp_path, tokenizer, epochs=2)
    found = run_cost(config)
    assert found["seconds"] == pytest.approx(found["steps"] + found["evaluations"] + found["outside"])
    assert min(found.values()) > 0
    again = run_cost(config)
    assert again["steps"] > 0, "a finished run is not just found again"


def test_the_first_step_comes_after_the_import_and_leaves_no_run(tmp_path, own_artifacts, tokenizer, monkeypatch):
    monkeypatch.setattr(overheads, "ROUNDS", 1)
    config = own_config(tmp_path, tokenizer)
    found = time_to_first_step(config)
    assert 0 < found["import"] < found["first_step"]
    assert not (artifacts.artifacts_dir() / "runs").exists()
