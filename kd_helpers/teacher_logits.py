"""Chapter 05: the frozen teacher's answers, asked for online or remembered.

A frozen teacher gives the same answer to the same text in every epoch, at every temperature and every
alpha. So it is asked once. Answers are found by the id of a text, never by its position in an epoch:
shuffling can't mix them up.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import safetensors.torch
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from kd_helpers import artifacts
from kd_helpers.checkpoints import checkpoints_dir
from kd_helpers.data import evaluation_batches
from kd_helpers.losses import are_probabilities
from kd_helpers.models import model_inputs, require_eval_mode

SHARD = 2048  # texts; what a pass that is cut off loses at most. A multiple of the batches' size


@dataclasses.dataclass(frozen=True)
class TeacherLogits:
    """The teacher's logits for a set of texts.

    Attributes:
        ids: int64 `[N]`, the texts.
        logits: float32 `[N, C]`, row i for text `ids[i]`.

    Raises:
        ValueError: the shapes don't fit, a logit is not finite, or they are probabilities.
    """

    ids: torch.Tensor
    logits: torch.Tensor

    def __post_init__(self) -> None:
        if self.logits.ndim != 2 or self.ids.shape != self.logits.shape[:1]:
            raise ValueError(
                f"ids have shape {tuple(self.ids.shape)} and logits {tuple(self.logits.shape)}; give N ids and a row "
                "of logits for each."
            )
        if not bool(self.logits.isfinite().all()):
            raise ValueError("the teacher's logits are not all finite; it diverged, so fine-tune it anew.")
        if are_probabilities(self.logits):
            raise ValueError(
                "the teacher's logits are probabilities (every row sums to 1); give the outputs before the softmax."
            )

    def digest(self) -> str:
        """SHA-256 over ids and logits."""
        return hashlib.sha256(self.ids.numpy().tobytes() + self.logits.numpy().tobytes()).hexdigest()

    def require_classes(self, label_names: Sequence[str]) -> None:
        """Refuse answers about another number of classes than the data has."""
        if self.logits.shape[1] != len(label_names):
            raise ValueError(
                f"the teacher answers with {self.logits.shape[1]} classes, the data has {len(label_names)} "
                f"({', '.join(label_names[:10])}); take the answers of a teacher for these."
            )

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """The logits `[M, C]` of the texts `ids` `[M]`.

        Raises:
            ValueError: a text the teacher was never asked about.
        """
        unknown = ids[~torch.isin(ids, self.ids)]
        if len(unknown):
            raise ValueError(
                f"{len(unknown):,} of {len(ids):,} texts have no answer of the teacher (the first has id "
                f"{int(unknown[0])}); ask it about these texts."
            )
        order = torch.argsort(self.ids)
        return self.logits[order[torch.searchsorted(self.ids[order], ids)]]


def ask(teacher: nn.Module, batch: dict[str, torch.Tensor], precision: torch.dtype) -> torch.Tensor:
    """The teacher's logits for one batch: float32 `[N, C]`, without gradient.

    Raises:
        ValueError: the teacher is in train mode, where dropout makes its answers random.
    """
    require_eval_mode(teacher)
    inputs = model_inputs(teacher, batch)
    device = next(iter(inputs.values())).device
    with torch.no_grad(), autocast(device, precision):
        return teacher(**inputs).logits.float()


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Run matrix products in `precision`; float32 leaves everything as it is."""
    return torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)


def cached_logits(
    teacher: nn.Module,
    tokenized: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    precision: torch.dtype,
) -> TeacherLogits:
    """The teacher's logits for every text: read from `artifacts/`, or computed once and kept there.

    What is kept is named after the teacher's weights, the token ids and the precision, so an answer of
    another teacher, tokenizer or `max_length` is never taken for this one's. Cut off, it goes on after the last
    `SHARD` texts that were finished.
    """
    made_of = {
        "teacher": weights_digest(teacher),
        "tokens": hashlib.sha256(repr((tokenized["id"][:], tokenized["input_ids"][:])).encode()).hexdigest(),
        "precision": str(precision),
    }
    key = artifacts.fingerprint(made_of)
    folder, shards = artifacts.artifacts_dir() / "teacher_logits" / key, checkpoints_dir(key)

    def compute(target: Path) -> None:
        with tqdm(total=len(tokenized), desc="Asking the teacher", unit="text", leave=False) as bar:
            parts = []
            for number, texts in enumerate(_shards(tokenized)):
                ask_them = functools.partial(_ask_all, teacher, evaluation_batches(texts, tokenizer), precision, bar)
                artifacts.get_or_build(shards / f"{number:06d}", ask_them)
                parts.append(_read_logits(shards / f"{number:06d}"))
                bar.update(sum(len(part.ids) for part in parts) - bar.n)  # of a shard that was found
        _write_logits(target, torch.cat([part.ids for part in parts]), torch.cat([part.logits for part in parts]))

    artifacts.get_or_build(folder, compute)
    shutil.rmtree(shards, ignore_errors=True)
    return _read_logits(folder)


def _shards(tokenized: datasets.Dataset) -> Iterator[datasets.Dataset]:
    """The texts from short to long, `SHARD` at a time: cut into batches they give those of the whole."""
    order = np.argsort(np.asarray(tokenized["length"][:]), kind="stable")
    for start in range(0, len(order), SHARD):
        yield tokenized.select(order[start : start + SHARD])


def _ask_all(teacher: nn.Module, batches: DataLoader[Any], precision: torch.dtype, bar: tqdm, target: Path) -> None:
    ids, logits = [], []
    for batch in batches:
        ids.append(batch["id"])
        logits.append(ask(teacher, batch, precision).cpu())
        bar.update(len(batch["id"]))
    _write_logits(target, torch.cat(ids), torch.cat(logits))


def _write_logits(target: Path, ids: torch.Tensor, logits: torch.Tensor) -> None:
    safetensors.torch.save_file({"ids": ids, "logits": logits}, target / "logits.safetensors")


def _read_logits(folder: Path) -> TeacherLogits:
    # Read into memory: a mapped file would change under us if it were damaged or replaced later.
    stored = safetensors.torch.load((folder / "logits.safetensors").read_bytes())
    return TeacherLogits(stored["ids"], stored["logits"])


def attach(tokenized: datasets.Dataset, answers: TeacherLogits) -> datasets.Dataset:
    """The dataset with a column `teacher_logits`, so that its batches carry the teacher's answers."""
    if "teacher_logits" in tokenized.column_names:
        tokenized = tokenized.remove_columns("teacher_logits")
    rows = answers.lookup(torch.tensor(tokenized["id"][:]))
    return tokenized.add_column("teacher_logits", list(rows.numpy()))


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and values of all weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        # Seen as bytes, since NumPy does not know bfloat16.
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
