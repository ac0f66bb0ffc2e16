"""Chapter 16: a teacher's answers to more texts than memory holds.

The texts are a stream in shards, as `datasets` reads files. Each is answered once and becomes a Parquet file, whole
or not at all, with the token ids and the answers side by side. Processes share the shards out; one that is killed loses
the shard in hand. The files are read back as a stream that the Trainer takes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from kd_helpers import artifacts
from kd_helpers.data import evaluation_batches
from kd_helpers.losses import IGNORE_INDEX
from kd_helpers.teacher_logits import ask, weights_digest

ROWS = 1024  # texts held in memory at a time
ANSWERS = "answers.parquet"


def answer_shards(
    teacher: nn.Module,
    texts: datasets.IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    max_length: int,
    precision: torch.dtype = torch.float32,
) -> None:
    """Ask the teacher about every text of a stream, shard by shard; shards that are done are left alone.

    Under `accelerate launch` or `torchrun` process p of P takes the shards p, p + P, … and returns when they are done;
    `missing_shards` tells about all. A stream is known only once it is read: that the texts are those of the last time
    is for you to see to.

    Args:
        teacher: a frozen classifier.
        texts: with a column `text` and, where there are labels, a column `label`; each of its shards gives one file
            (`load_dataset(…, streaming=True)` has one for each file, `to_iterable_dataset(num_shards=…)` as many
            as you like).
        tokenizer: cuts the texts for teacher and student alike, which must have the same vocabulary.
        folder: where the answers go, a folder for each shard.
        max_length: tokens of a text that are kept.
        precision: of the teacher's matrix products.

    Raises:
        ValueError: the stream has no column `text`, or the folder was begun with another teacher, tokenizer, number of
            shards, `max_length` or `precision`.
        OSError: the folder can't be written.
    """
    if "text" not in (texts.column_names or ["text"]):
        raise ValueError(f"the texts have the columns {', '.join(texts.column_names)}; rename the right one to 'text'.")
    folder = Path(folder)
    # What a launcher tells each of its processes; they need not talk to each other here.
    process, processes = (int(os.environ.get(name, alone)) for name, alone in (("RANK", 0), ("WORLD_SIZE", 1)))
    made_of = {
        "teacher": weights_digest(teacher),
        "vocabulary": artifacts.fingerprint(tokenizer.get_vocab()),
        "max_length": max_length,
        "precision": str(precision),
        "shards": texts.num_shards,
    }
    artifacts.require_same(folder, made_of)
    mine = range(process, texts.num_shards, processes)
    for index in tqdm(mine, desc="Asking the teacher", unit="shard", leave=False):
        shard = texts.shard(num_shards=texts.num_shards, index=index)

        def answer(target: Path, shard: datasets.IterableDataset = shard) -> None:
            writer = None
            for rows in shard.batch(ROWS):
                table = pa.table(_answered(teacher, rows, tokenizer, max_length, precision))
                writer = writer or pq.ParquetWriter(target / ANSWERS, table.schema)
                writer.write_table(table)
            if writer is not None:
                writer.close()

        artifacts.get_or_build(folder / f"{index:06d}", answer)


def _answered(
    teacher: nn.Module, rows: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, max_length: int, precision: Any
) -> dict[str, list[Any]]:
    """The columns of some texts, with the answers, in the order of the texts."""
    count = len(rows["text"])
    encoded = tokenizer(rows["text"], truncation=True, max_length=max_length)
    labels = [IGNORE_INDEX if label is None else label for label in rows.get("label", [None] * count)]
    columns = {**encoded, "label": labels}
    lengths = [len(tokens) for tokens in encoded["input_ids"]]
    numbered = datasets.Dataset.from_dict({**columns, "id": range(count), "length": lengths})
    answers: np.ndarray | None = None
    for batch in evaluation_batches(numbered, tokenizer):
        logits = ask(teacher, batch, precision).cpu().numpy()
        answers = np.empty((count, logits.shape[1]), dtype=np.float32) if answers is None else answers
        answers[batch["id"].numpy()] = logits
    return {**columns, "teacher_logits": list(answers)}


def missing_shards(folder: str | Path) -> list[int]:
    """The numbers of the shards that are not answered yet, or damaged."""
    folder = Path(folder)
    count = artifacts.load_json(folder / artifacts.MADE_OF)["shards"]
    return [index for index in range(count) if not artifacts.is_intact(folder / f"{index:06d}")]


def read_shards(folder: str | Path) -> datasets.IterableDataset:
    """The texts with their answers as a stream: token ids, `label` (−100 for none) and `teacher_logits`.

    Raises:
        FileNotFoundError: a shard is missing or damaged.
    """
    folder = Path(folder)
    if missing := missing_shards(folder):
        raise FileNotFoundError(
            f"{folder} lacks {len(missing):,} shards (the first is {missing[0]}); run answer_shards again, which makes "
            "what is missing."
        )
    files = sorted(str(path) for path in folder.glob(f"[0-9]*/{ANSWERS}"))
    return datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
