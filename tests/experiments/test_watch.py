"""Measuring a model while it is trained."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import nn

from kd_helpers.experiments.watch import Curve


@pytest.mark.parametrize(("better", "best_step"), [(operator.gt, 6), (operator.lt, 3)])
def test_a_curve_keeps_the_weights_of_the_first_best_moment(better, best_step):
    model = nn.Linear(1, 1, bias=False)
    values = {3: 0.2, 6: 0.9, 9: 0.2, 10: 0.9}

    def measure() -> dict[str, float]:
        return {"validation": values[int(model.weight.item())], "weight": model.weight.item()}

    curve = Curve(model, measure, steps=10, every=3, better=better)
    for step in range(1, 11):
        nn.init.constant_(model.weight, step)
        curve.look(step)
    assert [entry["step"] for entry in curve.history] == [3, 6, 9, 10]
    assert [entry["weight"] for entry in curve.history] == [3.0, 6.0, 9.0, 10.0]
    assert curve.weights["weight"].item() == best_step
    seconds = [entry["seconds"] for entry in curve.history]
    assert seconds == sorted(seconds)
    assert model.weight.item() == 10


def test_the_seconds_of_a_curve_leave_out_the_measuring(monkeypatch):
    clock = iter([100.0, 101.0, 151.0, 153.0, 203.0])  # begun; two moments, each measured for 50 seconds
    monkeypatch.setattr("kd_helpers.experiments.watch.time.perf_counter", lambda: next(clock))
    curve = Curve(nn.Linear(1, 1), lambda: {"validation": 0.0}, steps=2, every=1, better=operator.gt)
    curve.look(1)
    curve.look(2)
    assert [entry["seconds"] for entry in curve.history] == [1.0, 3.0]
    assert torch.equal(curve.weights["weight"], curve.model.weight)
