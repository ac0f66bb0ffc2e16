"""Chapter 05: the frozen teacher's answers, asked for online or remembered.

A frozen teacher gives the same answer to the same text in every epoch, at every temperature and every
alpha. So it is asked once. Answers are found by the id of a text, never by its position in an epoch:
shuffling can't mix them up.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import datasets
import safetensors.torch
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from kd_helpers import artifacts
from kd_helpers.data import evaluation_batches
from kd_helpers.models import model_inputs


@dataclasses.dataclass(frozen=True)
class TeacherLogits:
    """The teacher's logits for a set of texts.

    Attributes:
        ids: int64 `[N]`, the texts.
        logits: float32 `[N, C]`, row i for text `ids[i]`.
    """

    ids: torch.Tensor
    logits: torch.Tensor

    def digest(self) -> str:
        """SHA-256 over ids and logits."""
        return hashlib.sha256(self.ids.numpy().tobytes() + self.logits.numpy().tobytes()).hexdigest()

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """The logits `[M, C]` of the texts `ids` `[M]`.

        Raises:
            KeyError: a text the teacher was never asked about.
        """
        order = torch.argsort(self.ids)
        position = torch.searchsorted(self.ids[order], ids).clamp(max=len(self.ids) - 1)
        rows = order[position]
        unknown = ids[self.ids[rows] != ids]
        if len(unknown):
            raise KeyError(f"{len(unknown)} texts have no teacher logits, the first has id {int(unknown[0])}.")
        return self.logits[rows]


def ask(teacher: nn.Module, batch: dict[str, torch.Tensor], precision: torch.dtype) -> torch.Tensor:
    """The teacher's logits for one batch: float32 `[N, C]`, without gradient.

    Raises:
        ValueError: the teacher is in train mode, where dropout makes its answers random.
    """
    if teacher.training:
        raise ValueError("the teacher is in train mode, so dropout changes its answers; call freeze(teacher) first.")
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
    another teacher, tokenizer or `max_length` is never taken for this one's.
    """
    made_of = {
        "teacher": weights_digest(teacher),
        "tokens": hashlib.sha256(repr((tokenized["id"][:], tokenized["input_ids"][:])).encode()).hexdigest(),
        "precision": str(precision),
    }
    folder = artifacts.artifacts_dir() / "teacher_logits" / artifacts.fingerprint(made_of)

    def compute(target: Path) -> None:
        ids, logits = [], []
        for batch in tqdm(evaluation_batches(tokenized, tokenizer), desc="Asking the teacher", leave=False):
            ids.append(batch["id"])
            logits.append(ask(teacher, batch, precision).cpu())
        safetensors.torch.save_file({"ids": torch.cat(ids), "logits": torch.cat(logits)}, target / "logits.safetensors")

    artifacts.get_or_build(folder, compute)
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
