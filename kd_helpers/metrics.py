"""Chapters 05 and 06: what a model predicts, and how good that is.

Shapes: N texts, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from kd_helpers.losses import IGNORE_INDEX, require_same_shape
from kd_helpers.models import Batch, model_inputs, reading
from kd_helpers.runtime import autocast, evaluating


class Predictions(NamedTuple):
    """What a model predicts for N texts: `ids` int64 `[N]`, `logits` float32 `[N, C]`, `labels` int64 `[N]`."""

    ids: torch.Tensor
    logits: torch.Tensor
    labels: torch.Tensor


def predict(model: nn.Module, batches: Iterable[Batch], precision: torch.dtype = torch.float32) -> Predictions:
    """The model's logits for every text, without dropout, sorted by id. The model's mode is restored afterwards."""
    device = next(model.parameters()).device
    ids, logits, labels = [], [], []
    with evaluating(model), torch.inference_mode(), autocast(device, precision):
        for batch in batches:
            with reading(model, batch):
                logits.append(model(**model_inputs(model, batch)).logits.float().cpu())
            ids.append(batch["id"])
            labels.append(batch["labels"])
    if not ids:
        raise ValueError("there are no batches to predict; give at least one.")
    order = torch.argsort(torch.cat(ids))
    return Predictions(torch.cat(ids)[order], torch.cat(logits)[order], torch.cat(labels)[order])


def evaluate(model: nn.Module, batches: Iterable[Batch], precision: torch.dtype = torch.float32) -> dict[str, float]:
    """Accuracy, macro recall, macro F1, NLL and ECE of a model on labelled batches."""
    predictions = predict(model, batches, precision)
    return classification_metrics(predictions.logits, predictions.labels)


def classification_metrics(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """The course's five measures.

    Args:
        logits: `[N, C]`.
        labels: `[N]`, every one given.

    Returns:
        `accuracy`, `macro_recall` (TweetEval's measure for sentiment) and `macro_f1` in [0, 1], the latter two means
        over the classes that occur among the labels; `nll`, the mean negative log-likelihood of the label in nats;
        `ece`, the expected calibration error in [0, 1].

    Raises:
        ValueError: there are no texts, one has no label, a label is no class, or a logit is not a number.
    """
    labels = _labels_of(logits, labels)
    from sklearn.metrics import accuracy_score, f1_score, recall_score  # here: a first step need not wait for it

    predicted = logits.argmax(dim=-1)
    macro = {"average": "macro", "labels": labels.unique(), "zero_division": 0}
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_recall": float(recall_score(labels, predicted, **macro)),
        "macro_f1": float(f1_score(labels, predicted, **macro)),
        "nll": F.cross_entropy(logits.float(), labels).item(),
        "ece": expected_calibration_error(logits, labels),
    }


def _labels_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The labels as int64, if they are right for logits that are scored."""
    if labels.ndim != 1 or logits.ndim != 2 or len(labels) != len(logits):
        raise ValueError(
            f"the logits have shape {tuple(logits.shape)}, the labels {tuple(labels.shape)}; give logits [N, C] and a "
            "label for each row."
        )
    if len(labels) == 0:
        raise ValueError("there are no texts to score; give at least one.")
    labels, classes = labels.long(), logits.shape[1]
    if bool((labels == IGNORE_INDEX).any()):
        raise ValueError("some texts have no label, so they can't be scored; leave them out.")
    if len(wrong := labels[(labels < 0) | (labels >= classes)]):
        raise ValueError(f"label {wrong[0]} is out of range; labels run from 0 to {classes - 1}.")
    if bool(F.log_softmax(logits.float(), dim=-1).isnan().any()):
        raise ValueError("some logits are not finite, so they can't be scored; look at the model that computed them.")
    return labels


def reliability(logits: torch.Tensor, labels: torch.Tensor, bins: int = 15) -> dict[str, np.ndarray]:
    """Confidence against accuracy in bins of equal width (Guo et al. 2017, arXiv 1706.04599).

    Returns:
        `share` of the texts, mean `confidence` and `accuracy` of each bin, each `[bins]`. An empty bin has share 0 and
        NaN for the other two.

    Raises:
        ValueError: there are no texts, one has no label, a label is no class, or a logit is not a number.
    """
    labels = _labels_of(logits, labels)
    confidence, predicted = F.softmax(logits.float(), dim=-1).max(dim=-1)
    correct = (predicted == labels).float()
    index = (confidence * bins).long().clamp(max=bins - 1)
    count = torch.bincount(index, minlength=bins)
    return {
        "share": (count / len(labels)).numpy(),
        "confidence": (torch.bincount(index, confidence, bins) / count).numpy(),
        "accuracy": (torch.bincount(index, correct, bins) / count).numpy(),
    }


def expected_calibration_error(logits: torch.Tensor, labels: torch.Tensor, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over the bins, weighted by their share (1706.04599).

    Raises:
        ValueError: there are no texts, one has no label, a label is no class, or a logit is not a number.
    """
    curve = reliability(logits, labels, bins)
    return float(np.nansum(curve["share"] * np.abs(curve["confidence"] - curve["accuracy"])))


def fidelity(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> dict[str, float]:
    """How well a student matches its teacher, whatever the labels say (Stanton et al. 2021, arXiv 2106.05945).

    Args:
        student_logits: `[N, C]`.
        teacher_logits: `[N, C]`, for the same texts in the same order.

    Returns:
        `fidelity`, the share of texts for which both predict the same class, and `kl`, the mean of
        KL(teacher ‖ student) in nats.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(student_logits, teacher_logits)
    agreement = (student_logits.argmax(dim=-1) == teacher_logits.argmax(dim=-1)).float().mean()
    divergence = F.kl_div(
        F.log_softmax(student_logits.float(), dim=-1),
        F.log_softmax(teacher_logits.float(), dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    return {"fidelity": agreement.item(), "kl": divergence.item()}


def predict_and_evaluate(
    model: nn.Module, name: str, batches: Iterable[Batch], precision: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Measure any model on labelled batches, and the time that it takes.

    Returns:
        `model` (the name), the measures of `classification_metrics`, `texts`, `seconds` in all and `ms_per_text`.
        Batches are collected first, so that only the model is timed.
    """
    batches = list(batches)
    start = time.perf_counter()
    predictions = predict(model, batches, precision)
    seconds = time.perf_counter() - start
    return {
        "model": name,
        **classification_metrics(predictions.logits, predictions.labels),
        "texts": len(predictions.labels),
        "seconds": seconds,
        "ms_per_text": 1000 * seconds / len(predictions.labels),
    }


def latency(model: nn.Module, batches: Iterable[Batch], precision: torch.dtype = torch.float32) -> dict[str, float]:
    """Milliseconds that a batch takes, without dropout: `p50` and `p95` over the batches.

    Batches of one text give what is usually called latency. The first five batches run once more before, to warm up.
    The model is in eval mode afterwards.
    """
    model.eval()
    device = next(model.parameters()).device
    batches = list(batches)
    warm_up = batches[:5]
    milliseconds = []
    with torch.inference_mode(), autocast(device, precision):
        for batch in warm_up + batches:
            start = time.perf_counter()
            model(**model_inputs(model, batch)).logits.cpu()  # .cpu() waits for an asynchronous device
            milliseconds.append(1000 * (time.perf_counter() - start))
    p50, p95 = np.percentile(milliseconds[len(warm_up) :], [50, 95])
    return {"p50": float(p50), "p95": float(p95)}
