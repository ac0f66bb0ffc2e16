"""Chapter 16: teacher logits for more texts than fit into memory.

The texts are a stream in shards, as `datasets` reads files. The teacher runs over each shard once, and the shard
becomes a Parquet file, complete or not at all, with token ids and teacher logits side by side. Processes divide the
shards among themselves; one that is killed loses only the shard that it was working on. The files are read back as a
stream that the Trainer accepts.
"""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Iterable
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
from kd_helpers.config import expanded
from kd_helpers.data import evaluation_batches
from kd_helpers.losses import IGNORE_INDEX
from kd_helpers.models import match_padding, model_digest, teacher_forward, unwrapped
from kd_helpers.pretrained import tokenizer_digest
from kd_helpers.provenance import made_by

ROWS = 1024  # texts held in memory at a time
LOGITS = "teacher_logits.parquet"


def cache_shards(
    teacher: nn.Module,
    texts: datasets.IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    max_length: int,
    precision: torch.dtype = torch.float32,
) -> None:
    """Run the teacher over every text of a stream, shard by shard; shards that are done are left alone.

    Under `accelerate launch` or `torchrun`, process p of P takes the shards p, p + P, … and returns when they are done;
    `missing_shards` looks at all of them. A stream is not known before it is read, so make sure yourself that the texts
    are the same as the last time.

    Args:
        teacher: a frozen classifier.
        texts: with a column `text` and, where there are labels, a column `label` of class numbers; nothing, NaN, −1
            (as the hub writes where a label is secret) and −100 mean that there is none. Each of its shards gives one
            file (`load_dataset(…, streaming=True)` has one for each file, `to_iterable_dataset(num_shards=…)` as many
            as you like).
        tokenizer: cuts the texts for teacher and student alike, which must have the same vocabulary.
        folder: where the logits go, a folder for each shard.
        max_length: tokens of a text that are kept.
        precision: of the teacher's matrix products.

    Raises:
        ValueError: the stream has no column `text`, something that is no text or no class number stands in it, its
            classes are named otherwise than the teacher's, or the folder was begun with another teacher, tokenizer,
            number of shards, `max_length` or `precision`.
        OSError: the folder can't be written.
    """
    if "text" not in (texts.column_names or ["text"]):
        raise ValueError(f"the texts have the columns {', '.join(texts.column_names)}; rename the right one to 'text'.")
    _require_class_names(texts, teacher)
    match_padding(unwrapped(teacher), tokenizer)
    folder = Path(expanded(folder, "the folder"))
    # What a launcher tells each of its processes; they need not talk to each other here.
    process, processes = (int(os.environ.get(name, alone)) for name, alone in (("RANK", 0), ("WORLD_SIZE", 1)))
    provenance = {
        **made_by("kd_helpers.shards"),
        "teacher": model_digest(teacher),
        "tokenizer": tokenizer_digest(tokenizer),
        "max_length": max_length,
        "precision": str(precision),
        "shards": texts.num_shards,
    }
    artifacts.require_same(folder, provenance)
    mine = range(process, texts.num_shards, processes)
    for index in tqdm(mine, desc="Running the teacher", unit="shard", leave=False):
        shard = texts.shard(num_shards=texts.num_shards, index=index)

        def run(target: Path, shard: datasets.IterableDataset = shard) -> None:
            writer = None
            for rows in shard.batch(ROWS):
                table = pa.table(_with_teacher_logits(teacher, rows, tokenizer, max_length, precision))
                writer = writer or pq.ParquetWriter(target / LOGITS, table.schema)
                writer.write_table(table)
            if writer is not None:
                writer.close()

        artifacts.get_or_build(folder / f"{index:06d}", run)


def _with_teacher_logits(
    teacher: nn.Module, rows: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, max_length: int, precision: Any
) -> dict[str, list[Any]]:
    """The columns of some texts, with the teacher logits, in the order of the texts."""
    count = len(rows["text"])
    if no_text := [text for text in rows["text"] if not isinstance(text, str)]:
        raise ValueError(f"the column 'text' holds {no_text[0]!r}, which is no text; remove such rows, or fill them.")
    encoded = tokenizer(rows["text"], truncation=True, max_length=max_length)
    classes = teacher.config.num_labels
    labels = [_class_number(label, classes) for label in rows.get("label", [None] * count)]
    columns = {**encoded, "label": labels}
    lengths = [len(tokens) for tokens in encoded["input_ids"]]
    numbered = datasets.Dataset.from_dict({**columns, "id": range(count), "length": lengths})
    rows_of_logits: dict[int, np.ndarray] = {}
    for batch in evaluation_batches(numbered, tokenizer):
        logits = teacher_forward(teacher, batch, precision).cpu().numpy()
        rows_of_logits |= dict(zip(batch["id"].tolist(), logits, strict=True))
    return {**columns, "teacher_logits": [rows_of_logits[row] for row in range(count)]}


def _class_number(label: Any, classes: int) -> int:
    """A label as the losses take it: from 0 to `classes` − 1, or −100 for none, whichever way that was written.

    Raises:
        ValueError: it is something else.
    """
    if label is None or (isinstance(label, float) and math.isnan(label)) or label in (-1, IGNORE_INDEX):
        return IGNORE_INDEX
    if not isinstance(label, (int, float)) or not 0 <= label < classes or label != int(label):
        raise ValueError(
            f"the column 'label' holds {label!r}; give numbers from 0 to {classes - 1} in the order of the teacher's "
            f"classes, and {IGNORE_INDEX}, −1 or nothing where there is no label."
        )
    return int(label)


def _require_class_names(texts: datasets.IterableDataset, teacher: nn.Module) -> None:
    """Refuse a stream whose column `label` names its classes, and otherwise than the teacher does."""
    names = getattr((texts.features or {}).get("label"), "names", None)
    if not names or _is_unnamed(teacher.config.id2label.values()):
        return
    taught = [str(teacher.config.id2label[index]) for index in sorted(teacher.config.id2label)]
    if [name.casefold() for name in names] != [name.casefold() for name in taught]:
        raise ValueError(
            f"the classes of the texts are {', '.join(names[:10])}, the teacher's {', '.join(taught[:10])}; both must "
            "mean the same by the same number."
        )


def _is_unnamed(names: Iterable[str]) -> bool:
    """Whether these are the names that transformers gives to classes without any: LABEL_0, LABEL_1, …"""
    return all(re.fullmatch(r"(?i)label_\d+", str(name)) for name in names)


def missing_shards(folder: str | Path) -> list[int]:
    """The numbers of the shards that have no teacher logits yet, or are damaged."""
    folder = Path(expanded(folder, "the folder"))
    count = artifacts.load_json(folder / artifacts.PROVENANCE)["shards"]
    return [index for index in range(count) if not artifacts.is_intact(folder / f"{index:06d}")]


def read_shards(folder: str | Path) -> datasets.IterableDataset:
    """The texts with their teacher logits as a stream: token ids, `label` (−100 for none) and `teacher_logits`.

    Raises:
        FileNotFoundError: a shard is missing or damaged.
    """
    folder = Path(expanded(folder, "the folder"))
    if missing := missing_shards(folder):
        raise FileNotFoundError(
            f"{folder} lacks {len(missing):,} shards (the first is {missing[0]}); run cache_shards again, which makes "
            "what is missing."
        )
    files = sorted(glob.escape(str(path)) for path in folder.glob(f"[0-9]*/{LOGITS}"))
    return datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
