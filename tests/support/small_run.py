"""The smallest distillation that goes all the way: texts, two random models and a script, for other environments."""

from __future__ import annotations

from pathlib import Path

from support.hub_cache import word_tokenizer
from support.models import tiny_bert

# Run in a folder that `write_texts_and_models` filled.
DISTIL = """
from kd_helpers import DistillConfig, distill

choices = {"teacher_checkpoint": "teacher", "student_checkpoint": "student", "teacher_epochs": 1, "epochs": 1}
result = distill(DistillConfig(data="texts.csv", batch_size=16, max_length=16, precision="float32", **choices))
assert result.metrics["steps"] > 0
assert 0 <= result.metrics["test"]["accuracy"] <= 1
print("distilled")
"""


def write_texts_and_models(folder: Path) -> Path:
    """Put a CSV of 90 short texts, a random teacher and a random student into a folder; returns it."""
    kinds = {"negative": "poor", "neutral": "plain", "positive": "fine"}
    rows = [f"{kinds[kind]} number {number},{kind}" for number in range(30) for kind in kinds]
    (folder / "texts.csv").write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    tokenizer = word_tokenizer([*kinds.values(), "number", *map(str, range(30))])
    for name, layers in (("teacher", 2), ("student", 1)):
        tiny_bert(layers).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder
