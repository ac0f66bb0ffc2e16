"""What both studies of chapter 11 are tried with."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import BertConfig, BertModel

from kd_helpers.config import DistillConfig
from kd_helpers.experiments import distilbert
from kd_helpers.resolve import resolve

SHAPE = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 4}


@pytest.fixture(scope="session")
def headless(tmp_path_factory, tokenizer) -> str:
    """A pre-trained BERT without a language head, as the packaged one."""
    folder = tmp_path_factory.mktemp("headless")
    torch.manual_seed(0)
    BertModel(BertConfig(**SHAPE)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def language_config(headless, small_data, splits, monkeypatch) -> DistillConfig:
    """Of a teacher that is not fine-tuned, on few texts."""
    data = dataclasses.replace(small_data, transfer=splits.transfer)
    monkeypatch.setattr(distilbert, "resolve", lambda config: resolve(config, data))
    return DistillConfig(
        teacher_checkpoint=headless, teacher_epochs=0, max_length=24, precision="float32", device="cpu"
    )
