"""How the tests of the Trainer for causal models train, in one process and in each of two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from kd_helpers.losses import IGNORE_INDEX
from kd_helpers.methods.causal_trainer import CausalDistillationTrainer
from kd_helpers.methods.language_models import CausalShape, make_causal_model
from kd_helpers.models import freeze
from kd_helpers.trainer import DistillationArguments
from support.trainer import usual

V, PAD = 24, 23
SHAPE = CausalShape(vocabulary=V, width=16, depth=2, heads=2, positions=32)


def made_texts(count: int) -> list[list[int]]:
    """Random texts of 2 to 12 tokens, of lengths that differ much from one to the next."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, V, size=2 + (7 * number) % 11).tolist() for number in range(count)]


TEXTS = made_texts(32)
DATASET = datasets.Dataset.from_dict({"input_ids": TEXTS})


def collate(side: str = "right", *, labels: bool = False, prompt: int = 0) -> Callable[[list[dict]], dict]:
    """Pads on one side; labels, if asked for, leave out the padding and the first `prompt` tokens of each text."""

    def pad(values: list[int], length: int, filling: int) -> list[int]:
        fill = [filling] * (length - len(values))
        return [*fill, *values] if side == "left" else [*values, *fill]

    def batch(rows: list[dict]) -> dict[str, torch.Tensor]:
        texts = [row["input_ids"] for row in rows]
        length = max(map(len, texts))
        made = {
            "input_ids": [pad(text, length, PAD) for text in texts],
            "attention_mask": [pad([1] * len(text), length, 0) for text in texts],
        }
        if labels:
            hidden = [[*[IGNORE_INDEX] * prompt, *text[prompt:]] for text in texts]
            made["labels"] = [pad(row, length, IGNORE_INDEX) for row in hidden]
        return {name: torch.tensor(value) for name, value in made.items()}

    return batch


def tiny(*, seed: int = 0, **changes: int) -> LlamaForCausalLM:
    return make_causal_model(SHAPE._replace(**changes), seed=seed)


def sharp(model: PreTrainedModel, times: float = 30.0) -> PreTrainedModel:
    """The same model with an output layer of its own and larger logits.

    Random logits are all but alike, and with the table of embeddings for an output layer the likeliest token is always
    the one that was read.
    """
    table = model.get_input_embeddings().weight.detach()
    noise = torch.randn(table.shape, generator=torch.Generator().manual_seed(round(1000 * table.sum().abs().item())))
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(times * (table + 0.03 * noise))
    return model


def teacher_of(*, seed: int = 1, **changes: int) -> LlamaForCausalLM:
    return freeze(sharp(tiny(seed=seed, **changes)))


def arguments(folder: Path, **changes: Any) -> DistillationArguments:
    """One epoch over the texts in their order, every step logged."""
    settings = {"temperature": 2.0, "alpha": 0.6, "per_device_train_batch_size": 8, "new_tokens": 6}
    return DistillationArguments(**usual(folder) | settings | changes)


def make(folder: Path, *, model=None, teacher_model=None, collator=None, texts=DATASET, options=None, **changes):
    return CausalDistillationTrainer(
        tiny() if model is None else model,
        arguments(folder, **changes),
        teacher_model=teacher_of() if teacher_model is None else teacher_model,
        train_dataset=texts,
        data_collator=collator or collate(),
        **options or {},
    )


def trained(folder: Path, **options: Any) -> CausalDistillationTrainer:
    trainer = make(folder, **options)
    trainer.train()
    return trainer
