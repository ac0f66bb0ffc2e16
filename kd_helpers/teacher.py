"""Chapters 02 and 05: the teacher, fine-tuned once, and its logits, computed once.

A frozen teacher gives the same logits for the same text in every epoch, at every temperature and every alpha. So it
runs once over the texts, and its logits are cached. They are looked up by the id of a text, never by its position in
an epoch, so shuffling cannot mix them up.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import safetensors.torch
import torch
from scipy.special import bdtrc
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kd_helpers import artifacts
from kd_helpers.checkpoints import build_parts, checkpoints_dir
from kd_helpers.config import DistillConfig
from kd_helpers.data import dataset_digest, evaluation_batches, tokenize, training_batches
from kd_helpers.loop import train_classifier
from kd_helpers.losses import are_probabilities
from kd_helpers.models import (
    checkpoint_version,
    freeze,
    load_config,
    load_saved,
    load_teacher,
    match_padding,
    model_digest,
    save_model,
    teacher_forward,
    unwrapped,
)
from kd_helpers.pretrained import require_softmax_head, warn_of_unknown_tokens
from kd_helpers.provenance import made_by
from kd_helpers.resolve import Setup

SHARD = 2048  # texts; an interrupted pass loses at most this many. A multiple of the batches' size


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
        """Refuse logits for another number of classes than the data has."""
        if self.logits.shape[1] != len(label_names):
            raise ValueError(
                f"the teacher logits are for {self.logits.shape[1]} classes, the data has {len(label_names)} "
                f"({', '.join(label_names[:10])}); use a teacher that was trained for these classes."
            )

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """The logits `[M, C]` of the texts `ids` `[M]`.

        Raises:
            ValueError: a text has no teacher logits.
        """
        unknown = ids[~torch.isin(ids, self.ids)]
        if len(unknown):
            raise ValueError(
                f"{len(unknown):,} of {len(ids):,} texts have no teacher logits (the first has id "
                f"{int(unknown[0])}); compute them for these texts (cached_logits)."
            )
        order = torch.argsort(self.ids)
        return self.logits[order[torch.searchsorted(self.ids[order], ids)]]


def cached_logits(
    teacher: PreTrainedModel,
    tokenized: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    precision: torch.dtype,
    root: Path | None = None,
) -> TeacherLogits:
    """The teacher's logits for every text: read from the cache, or computed once and kept there.

    They are stored under a fingerprint of the teacher's weights and configuration, the tokens, the precision and the
    code, so the logits of another teacher, tokenizer or `max_length` are never taken for this one's. An interrupted
    pass continues after the last `SHARD` texts that were finished.

    Args:
        teacher: frozen.
        tokenized: what `data.tokenize` returns.
        tokenizer: that of the teacher.
        precision: of the matrix products.
        root: the artifacts folder that holds the cache; `artifacts_dir()` when left out.
    """
    match_padding(unwrapped(teacher), tokenizer)
    key = artifacts.fingerprint(
        {
            **made_by("kd_helpers.teacher"),
            "teacher": model_digest(teacher),
            "tokens": hashlib.sha256(repr(_tokens(tokenized, tokenizer)).encode()).hexdigest(),
            "precision": str(precision),
        }
    )
    root = artifacts.artifacts_dir() if root is None else root
    folder, shards = root / "teacher_logits" / key, root / "checkpoints" / key

    def run_teacher(_number: int, rows: Sequence[int], bar: tqdm, target: Path) -> None:
        _run_teacher(teacher, evaluation_batches(tokenized.select(rows), tokenizer), precision, bar, target)

    def compute(target: Path) -> None:
        rows = evaluation_batches(tokenized, tokenizer).batch_sampler.order  # so shards have the batches of the whole
        made = build_parts(shards, rows, run_teacher, size=SHARD, description="Running the teacher", unit="text")
        parts = [_read_logits(part) for part in made]
        _write_logits(target, torch.cat([part.ids for part in parts]), torch.cat([part.logits for part in parts]))

    artifacts.get_or_build(folder, compute)
    shutil.rmtree(shards, ignore_errors=True)
    return _read_logits(folder)


def _tokens(tokenized: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """All that a teacher sees of texts: their ids, every column of the tokenizer, and how batches are padded."""
    columns = [column for column in tokenized.column_names if column in {"id", *tokenizer.model_input_names}]
    return [*((column, tokenized[column][:]) for column in columns), tokenizer.pad_token_id, tokenizer.padding_side]


def _run_teacher(
    teacher: PreTrainedModel, batches: DataLoader[Any], precision: torch.dtype, bar: tqdm, target: Path
) -> None:
    ids, logits = [], []
    for batch in batches:
        ids.append(batch["id"])
        logits.append(teacher_forward(teacher, batch, precision).cpu())
        bar.update(len(batch["id"]))
    _write_logits(target, torch.cat(ids), torch.cat(logits))


def _write_logits(target: Path, ids: torch.Tensor, logits: torch.Tensor) -> None:
    safetensors.torch.save_file({"ids": ids, "logits": logits}, target / "logits.safetensors")


def _read_logits(folder: Path) -> TeacherLogits:
    # Read into memory: a mapped file would change under us if it were damaged or replaced later.
    stored = safetensors.torch.load((folder / "logits.safetensors").read_bytes())
    return TeacherLogits(stored["ids"], stored["logits"])


def attach(tokenized: datasets.Dataset, teacher_logits: TeacherLogits) -> datasets.Dataset:
    """The dataset with a column `teacher_logits`, so that its batches carry the logits of the cached teacher."""
    if "teacher_logits" in tokenized.column_names:
        tokenized = tokenized.remove_columns("teacher_logits")
    rows = teacher_logits.lookup(torch.tensor(tokenized["id"][:]))
    return tokenized.add_column("teacher_logits", list(rows.numpy()))


def fine_tuned_teacher(setup: Setup, *, checkpoint_steps: int = 0) -> PreTrainedModel:
    """The teacher, fine-tuned on its labelled texts and frozen.

    It is fine-tuned once and found again in `artifacts/teachers` by every later notebook and run: nothing of the
    student, the temperature, alpha or `config.seed` changes it. With `teacher_epochs=0` it is the checkpoint's own.
    When interrupted, it continues from its last checkpoint, which is written after each epoch and, unless
    `checkpoint_steps` is 0, after every so many steps.

    Raises:
        ValueError: the checkpoint can't be the teacher; see `models.load_classifier` and `models.match_tokenizer`.
    """
    config, data, tokenizer = setup.config, setup.data, setup.tokenizers.teacher
    if config.teacher_epochs == 0:
        require_softmax_head(config.teacher_source, load_config(config.teacher_source))
        return freeze(load_teacher(config, data.label_names, tokenizer)).to(setup.device)
    recipe = DistillConfig(
        preset=config.preset,
        teacher_checkpoint=config.teacher_checkpoint,
        alpha=0.0,
        epochs=config.teacher_epochs,
        learning_rate=config.teacher_learning_rate,
        max_length=config.max_length,
        warmup_ratio=0.1,
        teacher_train_size=config.teacher_train_size,
        lean=config.lean,
        precision=str(setup.precision).removeprefix("torch."),
        device=setup.device.type,
    )
    provenance = {
        **made_by("kd_helpers.teacher"),
        "recipe": recipe.to_dict(),
        "checkpoint": checkpoint_version(config.teacher_source),
        "labels": data.label_names,
        "texts": dataset_digest(data.teacher_train),
    }
    key = artifacts.fingerprint(provenance)
    folder, checkpoints = artifacts.artifacts_dir() / "teachers" / key, checkpoints_dir(key)

    def fine_tune(target: Path) -> None:
        teacher = load_teacher(recipe, data.label_names, tokenizer).to(setup.device)
        validation = evaluation_batches(tokenize(data.validation, tokenizer, recipe.max_length), tokenizer)
        texts = tokenize(data.teacher_train, tokenizer, recipe.max_length)
        batches = training_batches(texts, tokenizer, recipe.batch_size, seed=recipe.seed)
        # What a caller draws next must not depend on whether the teacher was found or made.
        with torch.random.fork_rng():
            torch.manual_seed(recipe.seed)
            progress = train_classifier(
                teacher,
                batches,
                config=recipe,
                validation=validation,
                precision=setup.precision,
                description="Fine-tuning the teacher",
                checkpoints=checkpoints,
                checkpoint_steps=checkpoint_steps,
            )
        save_model(target, teacher, tokenizer)
        artifacts.save_json(target / "history.json", progress.history)
        artifacts.save_json(target / artifacts.PROVENANCE, provenance)

    artifacts.get_or_build(folder, fine_tune)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return freeze(load_saved(folder)).to(setup.device)


def load_teacher_logits(setup: Setup, split: str, *, checkpoint_steps: int = 0) -> TeacherLogits:
    """The logits of the configured teacher for one split of the data: found in the cache, or computed.

    Args:
        setup: names teacher and data.
        split: a split of `DataSplits`, e.g. "student_train" or "test".
        checkpoint_steps: see `fine_tuned_teacher`.
    """
    teacher = fine_tuned_teacher(setup, checkpoint_steps=checkpoint_steps)
    tokenizer = setup.tokenizers.teacher
    tokenized = tokenize(getattr(setup.data, split), tokenizer, setup.config.max_length)
    warn_of_unknown_tokens(tokenized, tokenizer, setup.config.teacher_source)
    return cached_logits(teacher, tokenized, tokenizer, precision=setup.precision)


def warn_if_teacher_at_chance(teacher_logits: TeacherLogits, labelled: datasets.Dataset) -> None:
    """Warn when the teacher is not shown to be better than a rule that always predicts the commonest class.

    A teacher that is no better was never trained for these classes, or has them in another order. The check is a
    one-sided binomial test at a level of 1%. Without labelled texts there is none.
    """
    if len(labelled) == 0:
        return
    labels = torch.tensor(labelled["label"][:])
    right = int((teacher_logits.lookup(torch.tensor(labelled["id"][:])).argmax(dim=-1) == labels).sum())
    commonest = int(torch.bincount(labels).max())
    if bdtrc(right - 1, len(labels), commonest / len(labels)) > 0.01:  # the probability of so many or more
        warnings.warn(
            f"the teacher is not shown to be above chance level: it is right for {right:,} of {len(labels):,} labelled "
            f"texts, and always predicting the commonest class would be right for {commonest:,}. If it knows no more, "
            "its student learns noise; fine-tune the teacher (teacher_epochs), or check the order of its classes.",
            stacklevel=2,
        )
