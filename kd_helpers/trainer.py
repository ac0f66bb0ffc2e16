"""Chapter 16: the same loss on many devices.

`DistillationTrainer` is a `transformers.Trainer` whose loss is that of chapter 03. Processes, mixed precision, gradient
accumulation, checkpoints and sharding are the Trainer's and accelerate's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import torch
from torch import nn
from torch.utils.data import IterableDataset, get_worker_info
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import EvalLoopOutput

from kd_helpers.config import require_alpha, require_temperature
from kd_helpers.loop import require_finite
from kd_helpers.losses import IGNORE_INDEX, DistillationLoss, distillation_loss
from kd_helpers.metrics import classification_metrics
from kd_helpers.models import accepted_inputs, freeze, require_teacher_and_student, unwrapped

TEACHER_LOGITS = "teacher_logits"  # the column of the cached teacher logits
TEACHER = "teacher_"  # stands in front of the name of an input that only the teacher reads, as in teacher_input_ids
LABELS = ("label", "labels", "label_ids")  # what a collator makes `labels` of


class DistillationTrainer(Trainer):
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
        args: the Trainer's arguments; label smoothing must be off, since the teacher takes its place.
        teacher_model: a teacher that runs on every batch (online). It is frozen, placed (and under FSDP sharded) by
            accelerate, and neither trained nor saved. It reads the columns `teacher_input_ids`,
            `teacher_attention_mask`, … where there are any (`with_teacher_tokens` adds them,
            `TeacherStudentCollator` pads them), else the student's. None reads cached logits from the column
            `teacher_logits`, `[C]` for each text.
        temperature: T of the soft loss.
        alpha: weight of the soft loss; at 0 no teacher is needed, at 1 no labels are.
        compute_metrics: as the Trainer's; the course's five measures if left out.
        options: everything else that a Trainer takes.

    Texts to evaluate need no teacher logits: `eval_loss` is the hard loss where there are none. They need no labels
    either: it is the soft loss then, and there are no `compute_metrics` of the course. With neither there is no
    `eval_loss`.

    Raises:
        ValueError: there is no teacher where one is needed or two where there should be one, the texts have no labels
            although alpha is below 1, label smoothing is on, the teacher does not fit the student, or the two have
            different vocabularies and only the student's tokens are there. A stream shows some of it in training only,
            and there that it is shorter than one step.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        teacher_model: PreTrainedModel | None = None,
        temperature: float = 2.0,
        alpha: float = 0.9,
        **options: Any,
    ) -> None:
        require_temperature(temperature)
        require_alpha(alpha)
        if args.label_smoothing_factor > 0:
            raise ValueError(
                f"label_smoothing_factor is {args.label_smoothing_factor}; set it to 0; the soft targets take its "
                "place (a uniform teacher at T = 1 is label smoothing)."
            )
        require_teacher_and_student(teacher_model, model)
        texts = options.get("train_dataset")
        _require_labels_and_one_teacher(teacher_model, alpha, texts)
        self.vocabularies = (
            None if teacher_model is None else (_vocabulary_size(teacher_model), _vocabulary_size(model))
        )
        columns = getattr(texts, "column_names", None) or ()
        self.teacher_has_own_tokens = any(_is_teacher_input(name) for name in columns)
        if columns and not self.teacher_has_own_tokens:
            self._require_shared_vocabulary()
        if args.device.type == "cpu":
            # Of several processes on a CPU it is "cpu:0", as which torch can't load the optimiser's state, and older
            # versions of transformers make it try.
            args.__dict__["_setup_devices"] = torch.device("cpu")
        if isinstance(texts, IterableDataset) and args.accelerator_config.dispatch_batches is None:
            # The first process would read for all of them, and could not put batches of different lengths together.
            args.accelerator_config.dispatch_batches = False
        self.temperature, self.alpha = temperature, alpha
        self.student_inputs = accepted_inputs(type(unwrapped(model)))
        self.teacher_inputs = frozenset() if teacher_model is None else accepted_inputs(type(unwrapped(teacher_model)))
        super().__init__(_compiled_in_place(model), args, **{"compute_metrics": course_metrics} | options)
        self.label_names = ["labels"]  # a wrapper's `forward` may not name them
        self.teacher = None if teacher_model is None else self._place(freeze(teacher_model))
        if not self.is_deepspeed_enabled:
            # Until transformers 5.5 it is the number of accumulated batches, and `backward` divides by it.
            self.accelerator.gradient_accumulation_steps = 1
        # The batches of an optimiser step are counted together (`get_batch_samples`), so the Trainer must not average.
        self.model_accepts_loss_kwargs = True
        self.sums = {True: self._no_sums(), False: self._no_sums()}  # of the losses, in training and in evaluation

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The batch's share in the loss of its optimiser step; in evaluation the loss of the batch alone.

        Raises:
            DivergedError: a loss in training is not finite. The step is not made.
        """
        inputs = _with_labels(inputs)
        outputs = model(**self._student_inputs(inputs))
        rows = len(inputs["labels"]) if model.training else self._rows_not_repeated(len(inputs["labels"]))
        student_logits, labels = outputs.logits[:rows], inputs["labels"][:rows]
        teacher_logits = self._teacher_logits(inputs, training=model.training)
        teacher_logits = None if teacher_logits is None else teacher_logits[:rows]
        alpha = 0.0 if teacher_logits is None and not model.training else self.alpha
        loss = distillation_loss(student_logits, teacher_logits, labels, temperature=self.temperature, alpha=alpha)
        here = _texts_and_labels(labels)
        if model.training:
            # The Trainer's own filter of NaN waits for a GPU once a batch, too.
            require_finite(self.state.global_step + 1, loss.total, loss._asdict())
        if rows:
            self._count(model.training, loss, here, student_logits, teacher_logits)
        total = self._share(loss, here, num_items_in_batch) if model.training else loss.total
        return (total, outputs) if return_outputs else total

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], *arguments: Any, **options: Any
    ) -> tuple[torch.Tensor | None, Any, torch.Tensor | None]:
        """As the Trainer's. Where nothing can be measured, for want of labels and of a teacher, there is no loss."""
        if "labels" not in inputs and not self._has_teacher(inputs):
            return super().prediction_step(model, self._student_inputs(inputs), *arguments, **options)
        return super().prediction_step(model, _with_labels(inputs), *arguments, **options)

    def _student_inputs(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: inputs[name] for name in self.student_inputs if name in inputs}

    def _has_teacher(self, inputs: dict[str, torch.Tensor]) -> bool:
        """Whether there are teacher logits for a batch that is evaluated, or a teacher that can read its tokens."""
        if self.teacher is None:
            return TEACHER_LOGITS in inputs
        return any(map(_is_teacher_input, inputs)) or not (self.teacher_has_own_tokens or self._vocabularies_differ())

    def _teacher_logits(self, inputs: dict[str, torch.Tensor], *, training: bool) -> torch.Tensor | None:
        if self.teacher is None:
            return inputs.get(TEACHER_LOGITS)
        own = {name.removeprefix(TEACHER): tensor for name, tensor in inputs.items() if _is_teacher_input(name)}
        if training and not own:
            self._require_shared_vocabulary()
        elif training:  # a stream may not have said so before
            self.teacher_has_own_tokens = True
        elif not self._has_teacher(inputs):
            return None
        read = own or inputs
        with torch.no_grad():
            return self.teacher(**{name: read[name] for name in self.teacher_inputs if name in read}).logits

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

    def _share(self, loss: DistillationLoss, here: torch.Tensor, everywhere: torch.Tensor) -> torch.Tensor:
        """What this batch adds to the loss of a step with so many texts and labels `everywhere`.

        Processes average their gradients, and so the sum over them is their mean times their number.
        """
        texts, labelled = here / everywhere.clamp(min=1)
        parts = ((self.alpha, texts, loss.soft), (1 - self.alpha, labelled, loss.hard))
        # A part of weight 0 is left out rather than multiplied by 0: 0 · inf would poison the total.
        return self.args.world_size * sum(weight * share * part for weight, share, part in parts if weight > 0)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, torch.Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
        """The batches of an optimiser step, and how many texts and labels they have in all processes, `[2]`.

        A stream that ends within a step gives none: the Trainer would add its gradient to the next epoch's first step.

        Raises:
            ValueError: the texts have no labels, which only alpha = 1 can do without.
        """
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if len(batches) < num_batches:
            return [], None
        if self.alpha < 1 and not all("labels" in batch for batch in batches):
            raise ValueError(_without_labels(batches[0], self.alpha))
        batches = [_with_labels(batch) for batch in batches]
        counts = _texts_and_labels(torch.cat([batch["labels"] for batch in batches])).to(device)
        return batches, self.accelerator.reduce(counts, "sum")

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        """As the Trainer's. In float16 its scaler looks for such gradients, and passes over the step.

        Raises:
            DivergedError: the gradient is not finite. The step is not made.
        """
        norm = super()._clip_grad_norm(model)
        if not self.args.fp16:
            as_tensor = torch.as_tensor(norm)
            require_finite(self.state.global_step + 1, as_tensor, {"gradient norm": as_tensor})
        return norm

    def _rows_not_repeated(self, rows: int) -> int:
        """How many of a batch that is evaluated are no repeats, made so that all processes have as many texts."""
        loader = self.accelerator.gradient_state
        if not loader.end_of_dataloader or loader.remainder <= 0:
            return rows
        return min(rows, max(0, loader.remainder - self.args.process_index * rows))

    def _set_signature_columns_if_needed(self) -> None:
        """Columns of the dataset that are kept: what either model reads, and the teacher's cached logits."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            own = {f"{TEACHER}{name}" for name in self.teacher_inputs}
            wanted = {TEACHER_LOGITS} | self.student_inputs | self.teacher_inputs | own
            self._signature_columns += sorted(wanted - set(self._signature_columns))

    def _get_dataloader(self, dataset: Any, *arguments: Any, **options: Any) -> Any:
        """As the Trainer's, of streams that processes can share."""
        if isinstance(dataset, IterableDataset):
            if options.get("is_training"):
                rows = self._train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
                dataset = _WholeSteps(dataset, rows)
            elif self.args.world_size > 1:
                # Only of what has a length it is known which rows are repeats, and those must not be scored.
                dataset = list(dataset)
        return super()._get_dataloader(dataset, *arguments, **options)

    def _place(self, teacher: PreTrainedModel) -> nn.Module:
        known = len(self.accelerator._models)
        if not self.is_fsdp_enabled:
            placed = self.accelerator.prepare_model(teacher, evaluation_mode=True)
        elif getattr(self.accelerator, "is_fsdp2", False):  # accelerate has it from 1.6 on
            placed = self._shard(teacher)
        else:
            placed = self.accelerator.prepare_model(teacher)
        # Where accelerate knows of a model the Trainer takes it for its own, and leaves the student unprepared.
        del self.accelerator._models[known:]
        return placed

    def _shard(self, teacher: PreTrainedModel) -> nn.Module:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model  # earlier versions have no FSDP2

        # The plugin notes which layers the first model has, and would look for them in the student.
        plugin = self.accelerator.state.fsdp_plugin
        layers, policy = plugin.transformer_cls_names_to_wrap, plugin.auto_wrap_policy
        sharded = fsdp2_prepare_model(self.accelerator, teacher)
        plugin.transformer_cls_names_to_wrap, plugin.auto_wrap_policy = layers, policy
        return sharded

    # What is logged

    def _count(
        self,
        training: bool,
        loss: DistillationLoss,
        here: torch.Tensor,
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor | None,
    ) -> None:
        """Add a batch to the sums of soft loss, hard loss and agreement, and to how many texts each is the sum of."""
        texts, labelled = here
        taught, agreed = torch.zeros_like(texts), torch.zeros_like(texts)
        if teacher_logits is not None:
            taught, agreed = texts, (student_logits.argmax(dim=-1) == teacher_logits.argmax(dim=-1)).sum()
        # Kept on the device: a GPU need not be waited for until something is logged.
        sums = (taught * loss.soft, labelled * loss.hard, agreed, taught, labelled)
        self.sums[training] += torch.stack([value.detach().float() for value in sums])

    def _no_sums(self) -> torch.Tensor:
        return torch.zeros(5, device=self.args.device)

    def evaluation_loop(self, *arguments: Any, **options: Any) -> EvalLoopOutput:
        """As the Trainer's, with the losses counted from zero."""
        self.sums[False] = self._no_sums()
        return super().evaluation_loop(*arguments, **options)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add `soft_loss`, `hard_loss` and `fidelity` to the losses that the Trainer logs, over all processes."""
        for name in [name for name in logs if name == "loss" or (name.endswith("_loss") and name != "train_loss")]:
            prefix, training = name.removesuffix("loss"), name == "loss"
            soft, hard, agreed, taught, labelled = self.accelerator.reduce(self.sums[training], "sum").tolist()
            self.sums[training] = self._no_sums()
            if taught:
                logs |= {f"{prefix}soft_loss": soft / taught, f"{prefix}fidelity": agreed / taught}
            if labelled:
                logs |= {f"{prefix}hard_loss": hard / labelled}
            if not training:  # the Trainer's own is a mean over batches, repeated texts included
                del logs[name]
            if not training and (taught or labelled):
                alpha = self.alpha if taught and labelled else float(taught > 0)
                logs[name] = alpha * soft / max(taught, 1) + (1 - alpha) * hard / max(labelled, 1)
        super().log(logs, start_time)


def _texts_and_labels(labels: torch.Tensor) -> torch.Tensor:
    """How many texts a batch has and how many of them a label, `[2]`, on its device: a GPU is not waited for."""
    labelled = labels != IGNORE_INDEX
    return torch.stack([torch.ones_like(labelled), labelled]).sum(dim=-1)


class _WholeSteps(IterableDataset):
    """The texts of a stream that fill whole optimiser steps.

    accelerate gives each process its rows of a stream that is no `datasets.IterableDataset`; of one that is, it gives
    whole shards, and one process would wait for ever for another whose shards are shorter.

    Args:
        texts: the stream.
        rows: texts of a step in all processes.
    """

    def __init__(self, texts: IterableDataset, rows: int) -> None:
        self.texts, self.rows = texts, rows
        self.generator = getattr(texts, "generator", None)  # accelerate keeps it alike in all processes

    def set_epoch(self, epoch: int) -> None:
        """Tell the stream which epoch it is."""
        if hasattr(self.texts, "set_epoch"):
            self.texts.set_epoch(epoch)
        elif isinstance(self.generator, torch.Generator):
            self.generator.manual_seed(epoch)

    def __len__(self) -> int:
        return len(self.texts) // self.rows * self.rows

    def __iter__(self) -> Iterator[Any]:
        texts, whole = iter(self.texts), 0
        while len(step := list(itertools.islice(texts, self.rows))) == self.rows:
            whole += 1
            yield from step
        if whole == 0 and get_worker_info() is None:  # a worker may be left without a shard
            raise ValueError(
                f"train_dataset is a stream of {len(step):,} texts, and one step takes {self.rows:,} (texts a batch × "
                "processes × accumulated batches); give more texts, or lower per_device_train_batch_size or "
                "gradient_accumulation_steps."
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

    def __call__(self, texts: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """One batch: the tensors of the student, and those of the teacher under their prefixed names."""
        own = [name for name in texts[0] if _is_teacher_input(name)]
        batch = dict(self.student([{name: text[name] for name in text if name not in own} for text in texts]))
        if own:
            padded = self.teacher([{name.removeprefix(TEACHER): text[name] for name in own} for text in texts])
            batch |= {f"{TEACHER}{name}": tensor for name, tensor in padded.items()}
        return batch


def _is_teacher_input(name: str) -> bool:
    return name.startswith(TEACHER) and name != TEACHER_LOGITS


def _compiled_in_place(model: nn.Module) -> nn.Module:
    """The model that `torch.compile` wrapped, still compiled, but under its own names.

    The Trainer would save the wrapper's weights as `_orig_mod.…`, which nothing finds again.
    """
    if not hasattr(model, "_orig_mod"):
        return model
    inner = model._orig_mod
    inner._compiled_call_impl = model.dynamo_ctx(inner._call_impl)  # as `Module.compile`, with the wrapper's options
    return inner


def _vocabulary_size(model: nn.Module) -> int | None:
    """Rows of the table of token embeddings; None where it can't be found."""
    try:
        return unwrapped(model).get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):
        return None


def _with_labels(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch, with "no label" for each text where it has none."""
    if "labels" in batch:
        return batch
    first = next(tensor for tensor in batch.values() if isinstance(tensor, torch.Tensor))
    return {**batch, "labels": torch.full((len(first),), IGNORE_INDEX, device=first.device)}


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
