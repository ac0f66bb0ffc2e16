"""Chapter 16: the same loss on many devices.

`DistillationTrainer` is a `transformers.Trainer` whose loss is that of chapter 03. Processes, mixed precision, gradient
accumulation, checkpoints and sharding are the Trainer's and accelerate's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from kd_helpers.config import require_alpha, require_temperature
from kd_helpers.loop import require_finite
from kd_helpers.losses import IGNORE_INDEX, DistillationLoss, distillation_loss
from kd_helpers.metrics import classification_metrics
from kd_helpers.models import accepted_inputs, freeze, require_teacher_and_student

TEACHER_LOGITS = "teacher_logits"  # the column of the cached teacher logits


class DistillationTrainer(Trainer):
    """A `transformers.Trainer` for classifiers that learn from a teacher.

    The loss of an optimiser step is `losses.distillation_loss` of all its texts, however they are spread over
    processes and accumulated batches: the soft loss is their mean over all texts, the hard loss over those that have a
    label. Beside the Trainer's `loss` it logs `soft_loss`, `hard_loss` and `fidelity` (the share of texts on which
    student and teacher name the same class), in evaluation with the prefix `eval_`. A stream is read in its own order,
    and what does not fill its last step is left out.

    Args:
        model: the student.
        args: the Trainer's arguments; label smoothing must be off, since the teacher takes its place.
        teacher_model: a teacher that runs on every batch (online). It is frozen, placed (and under FSDP sharded) by
            accelerate, and neither trained nor saved. None reads cached logits from the column `teacher_logits`, `[C]`
            for each text.
        temperature: T of the soft loss.
        alpha: weight of the soft loss; at 0 no teacher is needed.
        compute_metrics: as the Trainer's; the course's five measures if left out.
        options: everything else that a Trainer takes.

    Texts to evaluate need no teacher logits: `eval_loss` is the hard loss where there are none.

    Raises:
        ValueError: there is no teacher where one is needed or two where there should be one, the texts have no labels,
            label smoothing is on, or the teacher does not fit the student.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        teacher_model: PreTrainedModel | None = None,
        temperature: float = 2.0,
        alpha: float = 0.5,
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
        if isinstance(texts, IterableDataset) and args.accelerator_config.dispatch_batches is None:
            # The first process would read for all of them, and could not put batches of different lengths together.
            args.accelerator_config.dispatch_batches = False
        self.temperature, self.alpha = temperature, alpha
        self.student_inputs = accepted_inputs(type(model))
        self.teacher_inputs = frozenset() if teacher_model is None else accepted_inputs(type(teacher_model))
        super().__init__(model, args, **{"compute_metrics": course_metrics} | options)
        self.teacher = None if teacher_model is None else self._place(freeze(teacher_model))
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
        outputs = model(**{name: inputs[name] for name in self.student_inputs if name in inputs})
        rows = len(inputs["labels"]) if model.training else self._rows_not_repeated(len(inputs["labels"]))
        student_logits, labels = outputs.logits[:rows], inputs["labels"][:rows]
        teacher_logits = self._teacher_logits(inputs)
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

    def _teacher_logits(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
        if self.teacher is None:
            return inputs.get(TEACHER_LOGITS)
        with torch.no_grad():
            return self.teacher(**{name: inputs[name] for name in self.teacher_inputs if name in inputs}).logits

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
        """
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if len(batches) < num_batches:
            return [], None
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
        """Columns of the dataset that are kept: also the teacher's inputs, and its cached logits."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns += [TEACHER_LOGITS, *sorted(self.teacher_inputs - set(self._signature_columns))]

    def _place(self, teacher: PreTrainedModel) -> nn.Module:
        known = len(self.accelerator._models)
        if not self.is_fsdp_enabled:
            placed = self.accelerator.prepare_model(teacher, evaluation_mode=True)
        elif self.accelerator.is_fsdp2:
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
                alpha = self.alpha if taught else 0.0
                logs[name] = alpha * soft / max(taught, 1) + (1 - alpha) * hard / max(labelled, 1)
        super().log(logs, start_time)


def _texts_and_labels(labels: torch.Tensor) -> torch.Tensor:
    """How many texts a batch has and how many of them a label, `[2]`, on its device: a GPU is not waited for."""
    labelled = labels != IGNORE_INDEX
    return torch.stack([torch.ones_like(labelled), labelled]).sum(dim=-1)


def _require_labels_and_one_teacher(teacher_model: nn.Module | None, alpha: float, train_dataset: Any) -> None:
    columns = getattr(train_dataset, "column_names", None)  # a stream may not know its own
    if not columns:
        return
    if not {"label", "labels", "label_ids"} & set(columns):
        raise ValueError(
            f"train_dataset has the columns {', '.join(columns)}; add a column 'label', with {IGNORE_INDEX} for texts "
            "that have none."
        )
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
    """The course's five measures on the texts that have a label, for `compute_metrics`."""
    logits, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
    labelled = labels != IGNORE_INDEX
    return classification_metrics(logits[labelled], labels[labelled])
