"""How the tests of the Trainer train, in one process and in each of two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import DataCollatorWithPadding, TrainingArguments

from kd_helpers.data import PAD_TO_MULTIPLE_OF

SOFTENING = {"temperature": 2.0, "alpha": 0.7}


def collator(tokenizer) -> DataCollatorWithPadding:
    return DataCollatorWithPadding(tokenizer, pad_to_multiple_of=PAD_TO_MULTIPLE_OF)


def usual(folder: Path) -> dict[str, Any]:
    """One epoch over the texts in their order, every step logged."""
    return {
        "output_dir": str(folder),
        "num_train_epochs": 1,
        "per_device_train_batch_size": 32,
        "learning_rate": 1e-3,
        "weight_decay": 0.01,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(**usual(folder) | changes)
