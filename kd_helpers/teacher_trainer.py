"""Chapter 16: what every Trainer needs that has a teacher beside it.

`TeacherTrainer` counts what the losses of an optimiser step are means over, in all its batches and processes, before
the first of them is computed; it loads and places the teacher, and logs. What a batch is, and what its losses are, is
left to `trainer.DistillationTrainer` (texts and their classes) and `methods.causal_trainer.CausalDistillationTrainer`
(texts and their tokens).
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset, get_worker_info
from transformers import AutoConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from kd_helpers import adapters
from kd_helpers.config import expanded
from kd_helpers.loop import require_finite
from kd_helpers.losses import DistillationLoss
from kd_helpers.models import (
    accepted_inputs,
    checkpoint_path,
    freeze,
    reading,
    require_teacher_and_student,
    unwrapped,
)
from kd_helpers.pretrained import NO_CODE, explained, quiet_transformers, require_encoder, require_model_folder, some
from kd_helpers.trainer_arguments import choices_of

Inputs = dict[str, torch.Tensor]
WHERE = ("cache_dir", "local_files_only", "revision", "subfolder")  # of from_pretrained's arguments: the right files


class TeacherTrainer(Trainer):
    """A `transformers.Trainer` whose student learns from a teacher and from labels.

    The loss of an optimiser step is `alpha · soft + (1 − alpha) · hard`: two means over the whole step, however it is
    spread over processes and accumulated batches. The first is over what the teacher judges, the second over what has a
    label. A subclass says what that is: `KIND`, and the methods under "What a subclass says".

    Args:
        model: the student; it may be compiled, or have adapters (LoRA).
        args: the Trainer's arguments; label smoothing must be off, since the teacher takes its place.
        teacher_model: None, a model, or its name on the hub or its folder, which is loaded. It is frozen, placed by
            accelerate or DeepSpeed apart from the student, and neither trained nor saved.
        temperature: T of the soft loss; None takes that of `args`, or 2.
        alpha: weight of the soft loss; None takes that of `args`, or 0.9.
        peft_config: makes adapters for the student, which then learn in its place (`peft.LoraConfig` and its kin).
        options: everything else that a Trainer takes.

    Raises:
        TypeError, ValueError, FileNotFoundError, ConnectionError: one sentence says what does not fit, or which teacher
            can't be loaded.
    """

    KIND: type  # transformers' class that loads a teacher
    KIND_IN_WORDS: str

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
        if model is None or options.get("compute_loss_func") is not None:
            what = "model is None" if model is None else "there is a compute_loss_func"
            raise ValueError(f"{what}; give a student as model, whose loss is this Trainer's own.")
        self.choices = choices_of(args, temperature=temperature, alpha=alpha)
        self.temperature, self.alpha = self.choices.temperature, self.choices.alpha
        if args.label_smoothing_factor > 0:
            raise ValueError(
                f"label_smoothing_factor is {args.label_smoothing_factor}; set it to 0; the soft targets take its "
                "place (a uniform teacher at T = 1 is label smoothing)."
            )
        self._require_student(model)
        # When asked for the device, args lets the processes find each other. ZeRO-3 needs that to load a teacher.
        if args.device.type == "cpu":
            # Of several processes on a CPU it is "cpu:0", as which torch can't load the optimiser's state, and older
            # versions of transformers make it try.
            args.__dict__["_setup_devices"] = torch.device("cpu")
        teacher = self._loaded(teacher_model)
        student = with_adapters(model, peft_config, seed=args.seed)
        require_teacher_and_student(teacher, student)
        self.student_inputs = accepted_inputs(type(unwrapped(student)))
        self.teacher_inputs = frozenset() if teacher is None else accepted_inputs(type(unwrapped(teacher)))
        texts = options.get("train_dataset")
        self._require_fit(teacher, student, texts)
        if isinstance(texts, IterableDataset) and args.accelerator_config.dispatch_batches is None:
            # The first process would read for all of them, and could not put batches of different lengths together.
            args.accelerator_config.dispatch_batches = False
        super().__init__(_compiled_in_place(student), args, **options)
        self.label_names = ["labels"]  # a wrapper's `forward` may not name them
        self.teacher = None if teacher is None else self._place(freeze(teacher))
        if not self.is_deepspeed_enabled:
            # Until transformers 5.5 it is the number of accumulated batches, and `backward` divides by it.
            self.accelerator.gradient_accumulation_steps = 1
        # The batches of an optimiser step are counted together (`get_batch_samples`), so the Trainer must not average.
        self.model_accepts_loss_kwargs = True
        self.sums = {True: self._no_sums(), False: self._no_sums()}  # of the losses, in training and in evaluation
        self.evaluated = "eval"  # what the measures of the last evaluation begin with

    # What a subclass says

    def _require_student(self, student: nn.Module) -> None:
        """Refuse a student, or choices, that this Trainer is not for."""
        raise NotImplementedError

    def _require_fit(self, teacher: nn.Module | None, student: nn.Module, texts: Any) -> None:
        """Refuse a teacher that does not fit the student, and texts that do not fit the two."""
        raise NotImplementedError

    def _prepared(self, inputs: Inputs) -> Inputs:
        """A batch that has `labels`, and all else that is counted and measured; it may have been prepared before."""
        raise NotImplementedError

    def _prepared_step(self, batches: list[Inputs]) -> list[Inputs]:
        """The batches of an optimiser step in this process."""
        return [self._prepared(batch) for batch in batches]

    def _counts(self, inputs: Inputs) -> torch.Tensor:
        """What the two losses of a prepared batch are means over: how much is taught and how much labelled, `[2]`."""
        raise NotImplementedError

    def _teacher_logits(self, inputs: Inputs, *, training: bool) -> torch.Tensor | None:
        """What the teacher says of a batch, or None."""
        raise NotImplementedError

    def _measured(
        self, student_logits: torch.Tensor, teacher_logits: torch.Tensor | None, inputs: Inputs, alpha: float
    ) -> tuple[DistillationLoss, torch.Tensor]:
        """The losses of a prepared batch, and on how much of it student and teacher agree."""
        raise NotImplementedError

    def _columns(self) -> frozenset[str]:
        """The columns of a dataset that are kept."""
        return self.student_inputs | self.teacher_inputs

    def _inputs_of(self, accepted: frozenset[str], inputs: Inputs) -> dict[str, Any]:
        """What a model reads of a batch."""
        return {name: inputs[name] for name in accepted if name in inputs}

    # The loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Inputs,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The batch's share in the loss of its optimiser step; in evaluation the loss of the batch alone.

        Raises:
            DivergedError: a loss in training is not finite. The step is not made.
            ValueError: a text is longer than the positions of one of the models.
        """
        inputs = self._prepared(inputs)
        with reading(model, inputs):
            outputs = model(**self._inputs_of(self.student_inputs, inputs))
        rows = len(inputs["labels"]) if model.training else self._rows_not_repeated(len(inputs["labels"]))
        teacher_logits = self._teacher_logits(inputs, training=model.training)
        teacher_logits = None if teacher_logits is None else teacher_logits[:rows]
        alpha = 0.0 if teacher_logits is None and not model.training else self.alpha
        counted = {name: value[:rows] for name, value in inputs.items() if getattr(value, "ndim", 0)}
        loss, agreed = self._measured(outputs.logits[:rows], teacher_logits, counted, alpha)
        here = self._counts(counted)
        if model.training:
            # The Trainer's own filter of NaN waits for a GPU once a batch, too.
            require_finite(self.state.global_step + 1, loss.total, loss._asdict())
        if rows:
            self._count(model.training, loss, here, agreed, taught=teacher_logits is not None)
        total = self._part(loss, here, num_items_in_batch) if model.training else loss.total
        return (total, outputs) if return_outputs else total

    def prediction_step(
        self, model: nn.Module, inputs: Inputs, *arguments: Any, **options: Any
    ) -> tuple[torch.Tensor | None, Any, torch.Tensor | None]:
        """As the Trainer's, of a batch that is prepared for the loss; of the student's outputs the logits are kept."""
        return self._logits_alone(super().prediction_step(model, self._prepared(inputs), *arguments, **options))

    @staticmethod
    def _logits_alone(step: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        """A step of prediction without hidden states and the like, which some models return behind their logits."""
        loss, logits, labels = step
        return loss, logits[0] if isinstance(logits, tuple) else logits, labels

    def _part(self, loss: DistillationLoss, here: torch.Tensor, everywhere: torch.Tensor) -> torch.Tensor:
        """What this batch adds to the loss of a step of which so much is taught and labelled `everywhere`.

        Processes average their gradients, and so the sum over them is their mean times their number.
        """
        taught, labelled = here / everywhere.clamp(min=1)
        parts = ((self.alpha, taught, loss.soft), (1 - self.alpha, labelled, loss.hard))
        # A part of weight 0 is left out rather than multiplied by 0: 0 · inf would poison the total.
        return self.args.world_size * sum(weight * share * part for weight, share, part in parts if weight > 0)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Inputs], num_batches: int, device: torch.device
    ) -> tuple[list[Inputs], torch.Tensor | None]:
        """The batches of an optimiser step, and how much of them is taught and labelled in all processes, `[2]`.

        A stream that ends within a step gives none: the Trainer would add its gradient to the next epoch's first step.

        Raises:
            ValueError: the texts lack something that the loss needs.
        """
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if len(batches) < num_batches:
            return [], None
        batches = self._prepared_step(batches)
        counts = torch.stack([self._counts(batch) for batch in batches]).sum(dim=0).to(device)
        return batches, self.accelerator.reduce(counts, "sum")

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        """As the Trainer's. In float16 its scaler looks for such gradients, and passes over the step.

        Raises:
            DivergedError: the gradient is not finite. The step is not made.
        """
        norm = super()._clip_grad_norm(model)
        if norm is not None and not self.args.fp16:  # DeepSpeed knows none before its first step
            as_tensor = torch.as_tensor(norm)
            require_finite(self.state.global_step + 1, as_tensor, {"gradient norm": as_tensor})
        return norm

    # The texts

    def _rows_not_repeated(self, rows: int) -> int:
        """How many of a batch that is evaluated are no repeats, made so that all processes have as many texts."""
        loader = self.accelerator.gradient_state
        if not loader.end_of_dataloader or loader.remainder <= 0:
            return rows
        return min(rows, max(0, loader.remainder - self.args.process_index * rows))

    def _set_signature_columns_if_needed(self) -> None:
        """Columns of the dataset that are kept: what either model reads, and what a subclass adds."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns += sorted(self._columns() - set(self._signature_columns))

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

    # The teacher

    def _loaded(self, teacher: PreTrainedModel | str | Path | None) -> PreTrainedModel | None:
        """The teacher, loaded if it was named."""
        options = self.choices.teacher_init_kwargs or {}
        if isinstance(teacher, (str, Path)):
            return load_named_teacher(teacher, self.KIND, self.KIND_IN_WORDS, **options)
        if options:
            raise ValueError(
                f"teacher_init_kwargs has {', '.join(options)}, which say how to load a teacher, but teacher_model is "
                "no name or folder; give one, or leave teacher_init_kwargs out."
            )
        return teacher

    def _run_teacher(self, inputs: Inputs) -> torch.Tensor:
        with torch.no_grad(), reading(self.teacher, inputs):
            return self.teacher(**self._inputs_of(self.teacher_inputs, inputs)).logits

    def _place(self, teacher: PreTrainedModel) -> nn.Module:
        if self.is_deepspeed_enabled:
            return inference_engine(teacher, self.accelerator.state.deepspeed_plugin.deepspeed_config)
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
        self, training: bool, loss: DistillationLoss, here: torch.Tensor, agreed: torch.Tensor, *, taught: bool
    ) -> None:
        """Add a batch to the sums of soft loss, hard loss and agreement, and to how much each is the sum of."""
        judged, labelled = here
        judged = judged if taught else torch.zeros_like(judged)
        # Kept on the device: a GPU need not be waited for until something is logged.
        sums = (judged * loss.soft, labelled * loss.hard, agreed, judged, labelled)
        self.sums[training] += torch.stack([value.detach().float() for value in sums])

    def _no_sums(self) -> torch.Tensor:
        return torch.zeros(5, device=self.args.device)

    def evaluation_loop(self, *arguments: Any, **options: Any) -> EvalLoopOutput:
        """As the Trainer's, with the losses counted from zero."""
        self.sums[False] = self._no_sums()
        self.evaluated = options.get("metric_key_prefix", "eval")
        return super().evaluation_loop(*arguments, **options)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add `soft_loss`, `hard_loss` and `fidelity` to the losses that the Trainer logs, over all processes."""
        # A loss by another name is the user's own, one of `compute_metrics` for example.
        for name in [name for name in ("loss", f"{self.evaluated}_loss") if name in logs]:
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


# Models


def load_named_teacher(name: str | Path, kind: type, in_words: str, **options: Any) -> PreTrainedModel:
    """A model that can teach as it is, with its head.

    Args:
        name: its folder, or its name on the hub.
        kind: class that loads it, such as `AutoModelForCausalLM`.
        in_words: what that is, for the sentences, such as "causal language model".
        options: of from_pretrained; `dtype` is that of the checkpoint if left out.

    Raises:
        ConnectionError: the hub is needed and can't be reached.
        FileNotFoundError: there is no such model, or it has no safetensors.
        ValueError: it is of another kind, lacks weights, or does not take one of the options.
    """
    name = os.fspath(name)
    local = expanded(name, "teacher_model")
    if not kind.__name__.endswith("ForSequenceClassification") and os.path.isdir(local):
        _require_no_adapter(name, local)
    path = checkpoint_path(name)
    require_model_folder(name, path)
    with explained(name, path):
        where = {key: options[key] for key in WHERE if key in options}
        config = AutoConfig.from_pretrained(path, **where, **NO_CODE)
    if type(config) not in kind._model_mapping:
        raise ValueError(f"{name!r} is a {config.model_type}, which is no {in_words}; take a teacher that is one.")
    settings = {"dtype": "auto", **options, **NO_CODE}
    try:
        with quiet_transformers(), torch.random.fork_rng(), explained(name, path):
            model, report = kind.from_pretrained(path, use_safetensors=True, output_loading_info=True, **settings)
    except TypeError as error:
        raise ValueError(
            f"teacher_init_kwargs has something that {name!r} does not take ({error}); give what from_pretrained takes."
        ) from error
    require_encoder(name, model, report)
    if lacking := sorted(report["missing_keys"]):
        raise ValueError(
            f"{name!r} is no trained {in_words} ({some(lacking)} is not in its weights), so it can't teach; train it "
            "first, or take another."
        )
    return model


def _require_no_adapter(name: str, path: str) -> None:
    if adapters.is_adapter(name, path):
        raise ValueError(
            f"{name!r} is no model but an adapter; merge it into its base model (merge_and_unload) and give the folder "
            "of that."
        )


def with_adapters(model: nn.Module, peft_config: Any, *, seed: int) -> nn.Module:
    """A student of which only adapters (LoRA) learn, or the student as it is without a configuration of them.

    Args:
        model: changed in place.
        peft_config: `peft.LoraConfig` or one of its kin, or None.
        seed: draws their weights, alike in all processes.

    Raises:
        ValueError: peft is not installed, or the model has adapters already.
    """
    if peft_config is None:
        return model
    if importlib.util.find_spec("peft") is None:
        raise ValueError("peft_config is given, but peft is not installed; install it (`pip install peft`).")
    import peft

    if isinstance(model, peft.PeftModel):
        raise ValueError("the student has adapters already; leave peft_config out, or give the model without them.")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return peft.get_peft_model(model, peft_config)


def inference_engine(model: PreTrainedModel, config: dict[str, Any]) -> nn.Module:
    """A frozen model in a DeepSpeed engine of its own, which has no optimiser, as trl places its reference models.

    Args:
        model: frozen.
        config: DeepSpeed's configuration of the student. With ZeRO-3 the model is sharded as the student is; with any
            lower stage, where the weights of a student are whole in every process, so are those of the model.
    """
    deepspeed = importlib.import_module("deepspeed")  # no dependency: it is there where the Trainer uses it
    engine, *_ = deepspeed.initialize(model=model, config=inference_config(model, config))
    engine.eval()  # which returns nothing here
    return engine


def inference_config(model: PreTrainedModel, config: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's configuration of a model that only predicts, made of that of the student."""
    config = {key: copy.deepcopy(value) for key, value in config.items() if key not in ("optimizer", "scheduler")}
    zero = config.get("zero_optimization", {})
    if zero.get("stage", 0) != 3:
        return config | {"zero_optimization": {"stage": 0}}
    # Where the student's are left to be worked out, that is done for the student when it begins to train.
    width = max(getattr(model.config, "hidden_sizes", None) or [model.config.get_text_config().hidden_size])
    worked_out = {
        "reduce_bucket_size": width * width,
        "stage3_prefetch_bucket_size": int(0.9 * width * width),
        "stage3_param_persistence_threshold": 10 * width,
    }
    zero |= {key: value for key, value in worked_out.items() if zero.get(key) == "auto"}
    return config


def _compiled_in_place(model: nn.Module) -> nn.Module:
    """The model that `torch.compile` wrapped, still compiled, but under its own names.

    The Trainer would save the wrapper's weights as `_orig_mod.…`, which nothing finds again.
    """
    if not hasattr(model, "_orig_mod"):
        return model
    inner = model._orig_mod
    inner._compiled_call_impl = model.dynamo_ctx(inner._call_impl)  # as `Module.compile`, with the wrapper's options
    return inner
