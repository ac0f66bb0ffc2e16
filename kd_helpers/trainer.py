"""Chapter 16: the same loss on many devices.

`DistillationTrainer` is a `transformers.Trainer` whose loss is that of chapter 03. Processes, mixed precision, gradient
accumulation, checkpoints and sharding are the Trainer's and accelerate's. What it shares with the Trainer for causal
language models (`methods.causal_trainer`) is in `teacher_trainer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kd_helpers.losses import IGNORE_INDEX, DistillationLoss, distillation_loss
from kd_helpers.metrics import classification_metrics
from kd_helpers.models import match_padding, unwrapped
from kd_helpers.teacher_trainer import Inputs, TeacherTrainer
from kd_helpers.trainer_arguments import DistillationArguments

__all__ = [
    "DistillationArguments",
    "DistillationTrainer",
    "TeacherStudentCollator",
    "course_metrics",
    "with_teacher_tokens",
]

TEACHER_LOGITS = "teacher_logits"  # the column of the cached teacher logits
TEACHER = "teacher_"  # stands in front of the name of an input that only the teacher reads, as in teacher_input_ids
LABELS = ("label", "labels", "label_ids")  # what a collator makes `labels` of


class DistillationTrainer(TeacherTrainer):
    """A `transformers.Trainer` for classifiers that learn from a teacher.

    The loss of an optimiser step is `losses.distillation_loss` of all its texts, however they are spread over
    processes and accumulated batches: the soft loss is their mean over all texts, the hard loss over those that have a
    label. Beside the Trainer's `loss` it logs `soft_loss`, `hard_loss` and `fidelity` (the share of texts on which
    student and teacher name the same class), in evaluation with the prefix `eval_`.

    A stream is read in its own order, and what does not fill its last step is left out. Every process reads all of it
    and takes its rows of each step: files or shards of different lengths could not be shared out evenly. Between
    processes, a stream to evaluate is read into memory.

    Args:
        model: the student; it may be compiled, or have adapters (LoRA).
        args: the Trainer's arguments, or `DistillationArguments`, which hold temperature and alpha as well; label
            smoothing must be off, since the teacher takes its place.
        teacher_model: a teacher that runs on every batch (online): a model, or the name or folder of a fine-tuned
            classifier, which is loaded with `args.teacher_init_kwargs`. It is frozen, placed (and under FSDP sharded)
            by accelerate, under DeepSpeed in an engine of its own, and neither trained nor saved. It reads the columns
            `teacher_input_ids`, `teacher_attention_mask`, … where there are any (`with_teacher_tokens` adds them,
            `TeacherStudentCollator` pads them), else the student's. None reads cached logits from the column
            `teacher_logits`, `[C]` for each text.
        temperature: T of the soft loss; None takes that of `args`, or 2.
        alpha: weight of the soft loss; at 0 no teacher is needed, at 1 no labels are. None takes that of `args`, or
            0.9.
        peft_config: makes adapters for the student, which then learn in its place (`peft.LoraConfig` and its kin).
        compute_metrics: as the Trainer's; the course's five measures if left out.
        options: everything else that a Trainer takes.

    Texts to evaluate need no teacher logits: `eval_loss` is the hard loss where there are none. They need no labels
    either: it is the soft loss then, and there are no `compute_metrics` of the course. With neither there is no
    `eval_loss`.

    Raises:
        ValueError: there is no teacher where one is needed or two where there should be one, the texts have no labels
            although alpha is below 1, label smoothing is on, the teacher does not fit the student, or the two have
            different vocabularies and only the student's tokens are there. A stream shows some of it in training only,
            and there that it is shorter than one step. Or one is a causal model, or a choice is for those alone; or the
            teacher can't be loaded, for which FileNotFoundError and ConnectionError are raised as well.
    """

    KIND = AutoModelForSequenceClassification
    KIND_IN_WORDS = "text classifier"

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        teacher_model: PreTrainedModel | str | Path | None = None,
        temperature: float | None = None,
        alpha: float | None = None,
        peft_config: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            args,
            teacher_model=teacher_model,
            temperature=temperature,
            alpha=alpha,
            peft_config=peft_config,
            **{"compute_metrics": course_metrics} | options,
        )
        # The Trainer tells the student before it trains, but not before it is measured, and a teacher never.
        read = getattr(self.data_collator, "student", self.data_collator), self.model
        taught = getattr(self.data_collator, "teacher", self.data_collator), self.teacher
        for collator, reader in (read, taught):
            tokenizer = getattr(collator, "tokenizer", self.processing_class)
            if reader is not None and isinstance(tokenizer, PreTrainedTokenizerBase):
                match_padding(unwrapped(reader), tokenizer)

    def _require_student(self, student: nn.Module) -> None:
        _require_no_causal_model("student", student)
        for name, value in (("beta", self.choices.beta), ("share", self.choices.share)):
            if value != 0:
                raise ValueError(
                    f"{name} is {value}, which is for causal language models (CausalDistillationTrainer); a classifier "
                    f"learns by forward KL from texts that it is given, so leave {name} at 0."
                )

    def _require_fit(self, teacher: nn.Module | None, student: nn.Module, texts: Any) -> None:
        _require_no_causal_model("teacher", teacher)
        _require_labels_and_one_teacher(teacher, self.alpha, texts)
        self.vocabularies = None if teacher is None else (_vocabulary_size(teacher), _vocabulary_size(student))
        columns = getattr(texts, "column_names", None) or ()
        self.teacher_has_own_tokens = any(map(self._is_teacher_input, columns))
        if columns and not self.teacher_has_own_tokens:
            self._require_shared_vocabulary()

    def _is_teacher_input(self, column: str) -> bool:
        """Whether a column is for the teacher alone: "teacher_name" may be about a school."""
        return column.startswith(TEACHER) and column.removeprefix(TEACHER) in self.teacher_inputs

    def _columns(self) -> frozenset[str]:
        return super()._columns() | {TEACHER_LOGITS, *(f"{TEACHER}{name}" for name in self.teacher_inputs)}

    def _prepared(self, inputs: Inputs) -> Inputs:
        """The batch, with "no label" for each text where it has none."""
        if "labels" in inputs:
            return inputs
        first = next(tensor for tensor in inputs.values() if isinstance(tensor, torch.Tensor))
        return {**inputs, "labels": torch.full((len(first),), IGNORE_INDEX, device=first.device)}

    def _prepared_step(self, batches: list[Inputs]) -> list[Inputs]:
        if self.alpha < 1 and not all("labels" in batch for batch in batches):
            raise ValueError(_without_labels(batches[0], self.alpha))
        return super()._prepared_step(batches)

    def _counts(self, inputs: Inputs) -> torch.Tensor:
        """How many texts a batch has and how many of them a label, `[2]`, on its device: a GPU is not waited for."""
        labelled = inputs["labels"] != IGNORE_INDEX
        return torch.stack([torch.ones_like(labelled), labelled]).sum(dim=-1)

    def _measured(
        self, student_logits: torch.Tensor, teacher_logits: torch.Tensor | None, inputs: Inputs, alpha: float
    ) -> tuple[DistillationLoss, torch.Tensor]:
        loss = distillation_loss(
            student_logits, teacher_logits, inputs["labels"], temperature=self.temperature, alpha=alpha
        )
        if teacher_logits is None:
            return loss, torch.zeros_like(loss.total)
        return loss, (student_logits.argmax(dim=-1) == teacher_logits.argmax(dim=-1)).sum()

    def prediction_step(
        self, model: nn.Module, inputs: Inputs, *arguments: Any, **options: Any
    ) -> tuple[torch.Tensor | None, Any, torch.Tensor | None]:
        """As the Trainer's. Where nothing can be measured, for want of labels and of a teacher, there is no loss."""
        if "labels" not in inputs and not self._has_teacher(inputs):
            read = self._inputs_of(self.student_inputs, inputs)
            step = super(TeacherTrainer, self).prediction_step(model, read, *arguments, **options)
            return self._logits_alone(step)
        return super().prediction_step(model, inputs, *arguments, **options)

    def _has_teacher(self, inputs: Inputs) -> bool:
        """Whether there are teacher logits for a batch that is evaluated, or a teacher that can read its tokens."""
        if self.teacher is None:
            return TEACHER_LOGITS in inputs
        has_own = any(map(self._is_teacher_input, inputs))
        return has_own or not (self.teacher_has_own_tokens or self._vocabularies_differ())

    def _teacher_logits(self, inputs: Inputs, *, training: bool) -> torch.Tensor | None:
        if self.teacher is None:
            return inputs.get(TEACHER_LOGITS)
        own = {name.removeprefix(TEACHER): tensor for name, tensor in inputs.items() if self._is_teacher_input(name)}
        if training and not own:
            self._require_shared_vocabulary()
        elif training:  # a stream may not have said so before
            self.teacher_has_own_tokens = True
        elif not self._has_teacher(inputs):
            return None
        return self._run_teacher(own or inputs)

    def _vocabularies_differ(self) -> bool:
        return (
            self.vocabularies is not None
            and None not in self.vocabularies
            and self.vocabularies[0] != self.vocabularies[1]
        )

    def _require_shared_vocabulary(self) -> None:
        """Refuse to give the student's tokens to a teacher that has others.

        The tables of embeddings are what there is to compare. The same size does not prove the same vocabulary.
        """
        if self._vocabularies_differ():
            teacher, student = self.vocabularies
            raise ValueError(
                f"the teacher's vocabulary has {teacher:,} tokens, the student's {student:,}, and train_dataset has "
                f"the student's tokens only; add the teacher's (with_teacher_tokens makes the columns "
                f"{TEACHER}input_ids, …, TeacherStudentCollator pads them), or give the teacher's cached logits in a "
                f"column {TEACHER_LOGITS!r} in place of teacher_model. If both do have the same tokenizer, "
                "resize_token_embeddings makes their tables alike."
            )


def with_teacher_tokens(texts: datasets.Dataset, teacher_texts: datasets.Dataset) -> datasets.Dataset:
    """The student's tokenized texts with the teacher's tokens beside them, as `teacher_input_ids`, ….

    Args:
        texts: what `data.tokenize` returns with the student's tokenizer.
        teacher_texts: the same with the teacher's.

    Raises:
        ValueError: they are not the same texts in the same order.
    """
    if texts["id"][:] != teacher_texts["id"][:]:
        raise ValueError("texts and teacher_texts hold other texts, or in another order; tokenize the same dataset.")
    own = teacher_texts.remove_columns([name for name in ("id", "label", "length") if name in teacher_texts.features])
    return datasets.concatenate_datasets(
        [texts, own.rename_columns({name: f"{TEACHER}{name}" for name in own.column_names})], axis=1
    )


class TeacherStudentCollator:
    """Makes batches of texts that are encoded for both models, each padded by its own tokenizer.

    Args:
        tokenizer: the student's.
        teacher_tokenizer: the teacher's, for the columns that begin with `teacher_`, save `teacher_logits`.
        pad_to_multiple_of: see `transformers.DataCollatorWithPadding`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase,
        *,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        self.student = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=pad_to_multiple_of)
        self.teacher = DataCollatorWithPadding(teacher_tokenizer, pad_to_multiple_of=pad_to_multiple_of)
        self.inputs = frozenset(teacher_tokenizer.model_input_names)

    def __call__(self, texts: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """One batch: the tensors of the student, and those of the teacher under their prefixed names."""
        own = [name for name in texts[0] if name.removeprefix(TEACHER) in self.inputs and name.startswith(TEACHER)]
        batch = dict(self.student([{name: text[name] for name in text if name not in own} for text in texts]))
        if own:
            padded = self.teacher([{name.removeprefix(TEACHER): text[name] for name in own} for text in texts])
            batch |= {f"{TEACHER}{name}": tensor for name, tensor in padded.items()}
        return batch


def _vocabulary_size(model: nn.Module) -> int | None:
    """Rows of the table of token embeddings; None where it can't be found."""
    try:
        return unwrapped(model).get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):
        return None


def _require_no_causal_model(whose: str, model: nn.Module | None) -> None:
    kind = type(model if model is None else unwrapped(model))
    if any(base.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for base in kind.__mro__):
        raise ValueError(
            f"the {whose} is a causal language model ({kind.__name__}), and DistillationTrainer is for classifiers; "
            "use CausalDistillationTrainer of kd_helpers.methods.causal_trainer."
        )


def _without_labels(columns: Any, alpha: float) -> str:
    return (
        f"train_dataset has the columns {', '.join(columns)}; add a column 'label', with {IGNORE_INDEX} for texts "
        f"that have none, or set alpha=1, which needs no labels (alpha is {alpha})."
    )


def _require_labels_and_one_teacher(teacher_model: nn.Module | None, alpha: float, train_dataset: Any) -> None:
    columns = getattr(train_dataset, "column_names", None)  # a stream may not know its own
    if not columns:
        return
    if alpha < 1 and not set(LABELS) & set(columns):
        raise ValueError(_without_labels(columns, alpha))
    if teacher_model is not None and TEACHER_LOGITS in columns:
        raise ValueError(
            f"there is a teacher_model, and train_dataset has a column {TEACHER_LOGITS!r}; drop one of them, so that "
            "it is clear who teaches."
        )
    if teacher_model is None and TEACHER_LOGITS not in columns and alpha > 0:
        raise ValueError(
            f"alpha is {alpha} but there is no teacher; give a teacher_model, a column {TEACHER_LOGITS!r} in "
            "train_dataset (teacher.attach makes it), or alpha=0."
        )


def course_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """The course's five measures on the texts that have a label, for `compute_metrics`; none where no text has one."""
    logits, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
    labelled = labels != IGNORE_INDEX
    if not bool(labelled.any()):
        return {}
    return classification_metrics(logits[labelled], labels[labelled])
