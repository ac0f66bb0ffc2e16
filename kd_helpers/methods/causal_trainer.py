"""Chapter 13: causal language models that learn from a teacher in a `transformers.Trainer`.

The losses are those of `language_models`, token by token, and the Trainer is that of chapter 16: processes, mixed
precision, gradient accumulation, checkpoints and sharding are not ours.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from kd_helpers.losses import (
    IGNORE_INDEX,
    DistillationLoss,
    require_same_vocabulary,
    token_hard_loss,
    token_soft_loss,
)
from kd_helpers.methods.language_models import next_tokens, require_writable, written_by_student
from kd_helpers.models import unwrapped
from kd_helpers.teacher_trainer import Inputs, TeacherTrainer

TAUGHT = "taught"  # in a prepared batch: True for the tokens of which the teacher's prediction is learned


class CausalDistillationTrainer(TeacherTrainer):
    """A `transformers.Trainer` for causal language models that learn from a teacher.

    The loss of an optimiser step is `alpha · soft + (1 − alpha) · hard` over all its tokens, however they are spread
    over processes and accumulated batches: the mean of `losses.token_soft_loss` over the tokens that count, and that of
    `losses.token_hard_loss` over those that have a label. Beside the Trainer's `loss` it logs `soft_loss`, `hard_loss`
    and `fidelity` (the share of tokens for which student and teacher find the same one likeliest), in evaluation with
    the prefix `eval_`.

    A batch holds `input_ids` and `attention_mask` `[B, L]`, padded on either side. Its `labels` are the same tokens,
    not shifted, with −100 for those that count in neither loss; without labels all tokens count that are no padding.
    The first token of a text is never predicted. Beware of `DataCollatorForLanguageModeling`, for which every padding
    token is padding: where texts end in the token that also pads, no student learns to end one. Texts without labels
    and `DataCollatorWithPadding`, the Trainer's choice where it has a tokenizer, need no such care.

    With `share` (λ of GKD, arXiv 2306.13649) some batches are not learned as they are: from the first `prompt_tokens`
    of each of their texts the student goes on, and learns what the teacher predicts at each token that it wrote. These
    tokens have no label, and count in the soft loss as all others do. Which batches these are is the same in all
    processes, and depends, as what is written does, on the seed, the step and the place of the batch in it alone: a run
    that is resumed writes the same.

    Args:
        model: the student, an `AutoModelForCausalLM`; it may be compiled, or have adapters (LoRA).
        args: the Trainer's arguments, or `DistillationArguments`, which say everything else as well: temperature,
            alpha, beta (the divergence, see `losses.token_soft_loss`), `share`, and how the student writes. Label
            smoothing must be off.
        teacher_model: as `DistillationTrainer` takes it: a model, or the name or folder of one, which is loaded with
            `args.teacher_init_kwargs`; None at alpha 0 only.
        temperature: T of the soft loss; None takes that of `args`, or 2.
        alpha: weight of the soft loss; None takes that of `args`, or 0.9.
        peft_config: makes adapters for the student, which then learn in its place (`peft.LoraConfig` and its kin).
        options: everything else that a Trainer takes.

    Raises:
        TypeError, ValueError: a choice makes no sense, there is no teacher where one is needed, the two have different
            vocabularies, one is no causal model, or the student is to write while its weights are sharded.
        FileNotFoundError, ConnectionError: the teacher can't be found.
    """

    KIND = AutoModelForCausalLM
    KIND_IN_WORDS = "causal language model"

    def __init__(self, model: PreTrainedModel, args: TrainingArguments, **options: Any) -> None:
        super().__init__(model, args, **options)
        if _counts_positions_itself(self.model):
            self.student_inputs -= {"position_ids"}
        if self.teacher is not None and _counts_positions_itself(self.teacher):
            self.teacher_inputs -= {"position_ids"}
        if self.choices.share > 0:
            _require_whole_weights(self.choices.share, self.is_fsdp_enabled, _zero_stage(self.accelerator.state))
        self.end_id = self._token_that_ends_a_text()

    def _require_student(self, student: nn.Module) -> None:
        _require_causal_model("student", student)
        if self.choices.share > 0:
            prompt = range(self.choices.prompt_tokens)
            require_writable(student, [prompt], self.choices.new_tokens, self.choices.sampling_temperature)

    def _require_fit(self, teacher: nn.Module | None, student: nn.Module, texts: Any) -> None:
        columns = getattr(texts, "column_names", None)
        if columns and "input_ids" not in columns:
            raise ValueError(
                f"train_dataset has the columns {', '.join(columns)}, and no 'input_ids'; tokenize its texts."
            )
        if teacher is None:
            if self.alpha > 0:
                raise ValueError(f"alpha is {self.alpha} but there is no teacher; give a teacher_model, or alpha=0.")
            return
        _require_causal_model("teacher", teacher)
        require_same_vocabulary(_vocabulary(student), _vocabulary(teacher))

    def _inputs_of(self, accepted: frozenset[str], inputs: Inputs) -> dict[str, Any]:
        """What a model reads of a batch, with each token's place in its text, wherever the padding stands."""
        read = super()._inputs_of(accepted, inputs)
        mask = inputs.get("attention_mask")
        if mask is not None and "position_ids" in accepted and "position_ids" not in inputs:
            read["position_ids"] = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)
        if "use_cache" in accepted:
            read["use_cache"] = False  # nothing is written here
        return read

    def _prepared(self, inputs: Inputs) -> Inputs:
        """The batch, with −100 for every label that does not count, and which tokens are taught."""
        if TAUGHT in inputs:
            return inputs
        if "position_ids" in inputs and "position_ids" not in self.student_inputs:
            raise ValueError(
                "the batch holds position_ids, and the student counts positions itself; pad texts, do not pack them."
            )
        ids, mask = inputs["input_ids"], _attention(inputs)
        labels = inputs["labels"] if "labels" in inputs else ids.masked_fill(mask == 0, IGNORE_INDEX)
        labels = labels.masked_fill(mask.cumsum(dim=-1) <= 1, IGNORE_INDEX)  # the first token, and what pads before it
        return {**inputs, "labels": labels, TAUGHT: labels != IGNORE_INDEX}

    def _prepared_step(self, batches: list[Inputs]) -> list[Inputs]:
        return [self._written(batch, place) or self._prepared(batch) for place, batch in enumerate(batches)]

    def _written(self, batch: Inputs, place: int) -> Inputs | None:
        """What the student writes in the place of a batch, or None where the batch is learned as it is."""
        moment = [self.args.seed, self.state.global_step, place]
        # Not of the process: all of them write, or none does, and so none waits for another.
        if np.random.default_rng([*moment, 0]).random() >= self.choices.share:
            return None
        if "position_ids" in batch:
            raise ValueError(
                f"share is {self.choices.share}, and the batch holds packed texts (position_ids), which the student "
                "can't continue one by one; set share to 0, or pad texts (DataCollatorWithPadding)."
            )
        written, counts = written_by_student(
            self.model,
            {"input_ids": batch["input_ids"], "attention_mask": _attention(batch)},
            prompt_tokens=self.choices.prompt_tokens,
            new_tokens=self.choices.new_tokens,
            temperature=self.choices.sampling_temperature,
            seed=[*moment, 1 + self.args.process_index],
            end_id=self.end_id,
        )
        ids = written["input_ids"]
        inputs = {
            "input_ids": ids,
            "attention_mask": written["attention_mask"],
            "labels": torch.full_like(ids, IGNORE_INDEX),
            TAUGHT: counts.bool(),
        }
        return {name: tensor.to(self.args.device) for name, tensor in inputs.items()}

    def _counts(self, inputs: Inputs) -> torch.Tensor:
        return torch.stack([inputs[TAUGHT].sum(), (inputs["labels"] != IGNORE_INDEX).sum()])

    def _teacher_logits(self, inputs: Inputs, *, training: bool) -> torch.Tensor | None:
        return None if self.teacher is None else self._run_teacher(inputs)

    def _measured(
        self, student_logits: torch.Tensor, teacher_logits: torch.Tensor | None, inputs: Inputs, alpha: float
    ) -> tuple[DistillationLoss, torch.Tensor]:
        labels = inputs["labels"]
        own = next_tokens(student_logits, labels, labels != IGNORE_INDEX)
        hard = token_hard_loss(own.logits.detach() if alpha == 1 else own.logits, own.labels)
        if teacher_logits is None:
            return DistillationLoss(hard, torch.zeros_like(hard), hard), torch.zeros_like(hard)
        taught = next_tokens(teacher_logits, labels, inputs[TAUGHT])
        soft = token_soft_loss(
            own.logits, taught.logits, taught.mask, temperature=self.temperature, beta=self.choices.beta
        )
        # A part of weight 0 is left out rather than multiplied by 0: 0 · inf would poison the total.
        total = sum(weight * part for weight, part in ((alpha, soft), (1 - alpha, hard)) if weight > 0)
        agreed = (own.logits.argmax(dim=-1) == taught.logits.argmax(dim=-1)) & taught.mask
        return DistillationLoss(total, soft, hard), agreed.sum()

    def _token_that_ends_a_text(self) -> int | None:
        config = unwrapped(self.model).config.get_text_config()
        known = (self.choices.end_id, getattr(self.processing_class, "eos_token_id", None), config.eos_token_id)
        first = next((token for token in known if token is not None), None)
        return first[0] if isinstance(first, (list, tuple)) else first


def _attention(inputs: Inputs) -> torch.Tensor:
    """1 for each token that is no padding, `[B, L]`."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"]) if mask is None else mask


def _vocabulary(model: nn.Module) -> int:
    return unwrapped(model).config.get_text_config().vocab_size


def _counts_positions_itself(model: nn.Module) -> bool:
    """Whether a model, as RoBERTa, begins to count at the id of its padding, and leaves padding out without help."""
    return any(
        name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
        for name, module in unwrapped(model).named_modules()
    )


def _require_causal_model(whose: str, model: nn.Module) -> None:
    inner = unwrapped(model)
    name = type(inner).__name__
    if name.endswith(("ForSequenceClassification", "ForTokenClassification")) or inner.config.is_encoder_decoder:
        raise ValueError(
            f"the {whose} is a {name}, and CausalDistillationTrainer is for causal language models "
            "(AutoModelForCausalLM); for classifiers use DistillationTrainer."
        )
    if name in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values() and name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ValueError(
            f"the {whose} is a {name}, whose tokens see those that they are to predict; take a causal language model."
        )
    # Of BERT and its kin, which have masked language models as well, only decoders hide the tokens that follow.
    beside = vars(sys.modules[type(inner).__module__])
    if not getattr(inner.config, "is_decoder", True) and any(other.endswith("ForMaskedLM") for other in beside):
        raise ValueError(
            f"the {whose} is a {name} that is no decoder, so its tokens see those that they are to predict; set "
            "is_decoder to True in its configuration."
        )


def _zero_stage(state: Any) -> int:
    plugin = getattr(state, "deepspeed_plugin", None)
    return 0 if plugin is None else plugin.zero_stage


def _require_whole_weights(share: float, is_fsdp: bool, zero_stage: int) -> None:
    if is_fsdp or zero_stage == 3:
        raise ValueError(
            f"share is {share}, but {'FSDP' if is_fsdp else 'DeepSpeed ZeRO-3'} divides the student's weights among "
            "the processes, and to write a text each of them needs all; set share to 0, or use DDP or ZeRO-2."
        )
