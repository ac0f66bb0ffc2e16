"""The token loss against another toolkit's: both take turns on the same logits."""

from __future__ import annotations

import time

import pytest
import torch
from torch.nn import functional as F

from kd_helpers.experiments import token_speed
from kd_helpers.experiments.conformance_toolkits import Call
from kd_helpers.experiments.token_speed import compared, logits_of, ours
from kd_helpers.losses import IGNORE_INDEX


def slow(batch, temperature: float = 1.0):
    """In one piece, and after a pause."""
    time.sleep(0.05)
    counts = batch.labels != IGNORE_INDEX
    log_p, log_q = (F.log_softmax(logits / temperature, dim=-1) for logits in (batch.teacher, batch.student))
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)[counts].mean()


@pytest.mark.parametrize("takes_temperature", [True, False])
def test_a_slower_loss_is_said_to_be_slower(monkeypatch, takes_temperature):
    monkeypatch.setattr(token_speed, "SHAPES", ((2, 8, 5),))
    monkeypatch.setattr(token_speed, "ROUNDS", 3)
    (row,) = compared(Call("slow", slow, takes_temperature=takes_temperature, tokens=True, timed=True))
    assert (row["vocabulary"], row["tokens"]) == (5, 16)
    assert row["seconds"] >= 0.05 > row["ours_seconds"]
    assert row["times"] == pytest.approx(row["seconds"] / row["ours_seconds"], rel=0.5)


def test_both_compute_the_same_on_tokens_of_which_a_quarter_does_not_count():
    batch = logits_of((3, 8, 7))
    assert (batch.labels == IGNORE_INDEX).float().mean() == 0.25
    torch.testing.assert_close(ours(batch), slow(batch))
