from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss
from support.models import tiny_bert
from torch.testing import assert_close

from kd_helpers.data import evaluation_batches, training_batches
from kd_helpers.losses import soft_targets
from kd_helpers.metrics import (
    classification_metrics,
    evaluate,
    expected_calibration_error,
    fidelity,
    predict,
    reliability,
)


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


@pytest.mark.parametrize("measure", [classification_metrics, reliability, expected_calibration_error])
def test_only_texts_with_labels_are_scored(measure):
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="some texts have no label"):
        measure(logits, torch.tensor([0, -100, 1, 2]))
    with pytest.raises(ValueError, match="there are no texts to score"):
        measure(logits[:0], torch.tensor([], dtype=torch.int64))


def test_fidelity_is_computed_in_float32():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(50, 3, generator=generator).bfloat16() for _ in range(2))
    assert fidelity(student, teacher) == fidelity(student.float(), teacher.float())


def test_evaluate_measures_what_predict_says(tokenized, tokenizer):
    labelled = tokenized.select(range(96))
    batches = evaluation_batches(labelled, tokenizer)
    model = tiny_bert()
    predictions = predict(model, batches)
    assert evaluate(model, batches) == classification_metrics(predictions.logits, predictions.labels)


@pytest.mark.parametrize("measure", [classification_metrics, reliability, expected_calibration_error])
def test_what_can_not_be_scored_is_named(measure):
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 1])
    for wrong in (3, -1):
        with pytest.raises(ValueError, match=rf"label {wrong} is out of range; labels run from 0 to 2"):
            measure(logits, torch.tensor([0, 1, wrong, 1]))
    with pytest.raises(ValueError, match=r"logits have shape \(4, 3\), the labels \(1,\)"):
        measure(logits, labels[:1])
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="some logits are not finite"):
            measure(logits.masked_fill(torch.eye(4, 3).bool(), value), labels)


def test_labels_of_any_whole_type_are_scored():
    logits, labels = torch.eye(3)[[0, 1, 2, 1]], torch.tensor([0, 1, 2, 2])
    for kind in (torch.int32, torch.uint8):
        assert classification_metrics(logits, labels.to(kind)) == classification_metrics(logits, labels)


def test_fidelity_needs_logits_of_the_same_texts():
    with pytest.raises(ValueError, match=r"student logits have shape \(4, 3\) but teacher logits \(1, 3\)"):
        fidelity(torch.zeros(4, 3), torch.zeros(1, 3))
