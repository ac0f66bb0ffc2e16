"""Texts of one's own that are easy to tell apart, and tiny models for them."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from kd_helpers.config import DistillConfig
from support.runs import tiny_config

WORDS = {"calm": ("rain", "moss", "lake", "dusk"), "loud": ("drum", "horn", "siren", "crowd")}


def write_texts(path: Path, *, labelled: int = 160, unlabelled: int = 40) -> str:
    """A CSV of two classes that differ by their words; the last rows have no label. Returns its path."""
    draw = random.Random(0)
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for number in range(labelled + unlabelled):
            name = tuple(WORDS)[number % 2]
            words = [draw.choice(WORDS[name]) for _ in range(4)] + [str(number)]
            rows.writerow([" ".join(words), name if number < labelled else ""])
    return str(path)


def own_config(folder: Path, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> DistillConfig:
    """A configuration for such texts, with tiny models; all of it is written into the folder."""
    data = write_texts(folder / "texts.csv")
    sizes = {"train_size": 60, "teacher_train_size": 60}
    return tiny_config(folder, tokenizer, labels=dict(enumerate(WORDS)), data=data, **sizes | changes)
