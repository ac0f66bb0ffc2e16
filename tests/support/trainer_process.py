"""What each of the two processes of `test_trainer` does: `torchrun … -m support.trainer_process`."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
from accelerate import PartialState
from transformers import AutoTokenizer

from kd_helpers import DistillationTrainer
from kd_helpers.models import load_saved
from support.trainer import SOFTENING, arguments, collator


def train(way: str, texts: datasets.Dataset) -> None:
    """Train with the teacher's logits, as a dataset or a stream, or with the teacher; then evaluate."""
    some = texts.select(range(90))  # which two processes can't share evenly; of the last of 84 the second has none
    if way == "stream":
        texts = texts.to_iterable_dataset()
    trainer = DistillationTrainer(
        load_saved(Path("student")),
        arguments(Path(way), per_device_train_batch_size=16, max_steps=4),
        teacher_model=load_saved(Path("teacher")) if way == "online" else None,
        train_dataset=texts.remove_columns("teacher_logits") if way == "online" else texts,
        eval_dataset=some.remove_columns("teacher_logits") if way == "online" else some,
        data_collator=collator(AutoTokenizer.from_pretrained("student")),
        **SOFTENING,
    )
    trainer.train()
    trainer.save_model(way)
    trainer.evaluate()
    trainer.evaluate(trainer.eval_dataset.select(range(84)), metric_key_prefix="few")
    if trainer.is_world_process_zero():
        Path(f"{way}.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    for way in ("cached", "online", "stream"):
        train(way, datasets.load_from_disk("texts"))
    PartialState().destroy_process_group()
