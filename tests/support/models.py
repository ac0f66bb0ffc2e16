"""Tiny random models, which are made and trained in moments."""

from __future__ import annotations

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

LABELS = {0: "negative", 1: "neutral", 2: "positive"}


def tiny_bert(
    layers: int = 2, *, dropout: float = 0.1, seed: int = 0, classes: int = 3, vocabulary: int = 30_522
) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=vocabulary,
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


def tiny_distilbert(*, seed: int = 0) -> DistilBertForSequenceClassification:
    torch.manual_seed(seed)
    return DistilBertForSequenceClassification(
        DistilBertConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=64, num_labels=3)
    )
