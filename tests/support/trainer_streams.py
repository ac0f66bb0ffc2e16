"""What each of the two processes of `test_trainer_inputs` does with streams whose shards are of different lengths."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets
from accelerate import PartialState
from transformers import AutoTokenizer

from kd_helpers import DistillationTrainer
from kd_helpers.models import load_saved
from kd_helpers.shards import read_shards
from support.trainer import SOFTENING, arguments, collator


def train(folder: Path, *, batch_size: int) -> DistillationTrainer:
    """Two epochs over the shards in `folder`, which are a stream to train on and one to evaluate."""
    tokenizer = AutoTokenizer.from_pretrained("student")
    trainer = DistillationTrainer(
        load_saved(Path("student")),
        arguments(
            folder / "trained",
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=batch_size,
            max_steps=6,
            eval_strategy="epoch",
        ),
        train_dataset=read_shards(folder),
        eval_dataset=read_shards(folder),
        data_collator=collator(tokenizer),
        **SOFTENING,
    )
    trainer.train()
    return trainer


def shards_of(texts: datasets.Dataset, sizes: list[int]) -> datasets.IterableDataset:
    """A stream of so many texts a shard."""

    def rows(sizes):
        for start, size in sizes:
            yield from texts.select(range(start, start + size))

    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return datasets.IterableDataset.from_generator(
        rows, gen_kwargs={"sizes": list(zip(starts, sizes, strict=True))}, features=texts.features
    )


def train_and_log(name: str) -> None:
    """Ends with its Trainer let go: one that lives on keeps gloo's threads alive, and they may stop an exit midway."""
    trainer = train(Path(name), batch_size=8)
    if trainer.is_world_process_zero():
        Path(f"{name}.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        train_and_log(name)
    PartialState().destroy_process_group()
