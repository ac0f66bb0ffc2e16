"""Chapter 05: the training loop, for every loss in the course.

`distill_epoch` is the readable core: one pass over the batches of a classifier. `fit` makes any number of steps with
any loss, and adds what a long run needs: checkpoints and exact resume, validation after each epoch, a progress bar, and
errors that name the step. Both make their steps with `training_step`, the only one in the package.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from kd_helpers.checkpoints import Progress, last_checkpoint, load_checkpoint, save_checkpoint
from kd_helpers.config import DistillConfig, require_whole
from kd_helpers.lean import lean_training
from kd_helpers.losses import DistillationLoss, distillation_loss
from kd_helpers.metrics import evaluate
from kd_helpers.models import Batch, model_inputs, reading, require_teacher_and_student, teacher_forward
from kd_helpers.optim import make_optimizer, make_scheduler
from kd_helpers.runtime import autocast


class Losses(Protocol):
    """A NamedTuple of scalars: what a loss function returns. `total` is trained, every field is recorded."""

    total: torch.Tensor

    def _asdict(self) -> dict[str, torch.Tensor]: ...


class Loss(NamedTuple):
    """A loss of one part, for `fit`: a scalar."""

    total: torch.Tensor


class EpochLosses(NamedTuple):
    """The losses of every step, and the norm of its gradient before clipping: float32 tensors `[steps]` on the CPU."""

    total: torch.Tensor
    soft: torch.Tensor
    hard: torch.Tensor
    gradient_norm: torch.Tensor

    def mean(self) -> dict[str, float]:
        """The mean of each over the steps."""
        return {name: values.mean().item() for name, values in self._asdict().items()}


class DivergedError(FloatingPointError):
    """Training met a loss or a gradient that is not a finite number; the weights are those of the step before.

    Args:
        step: which step, counted from 1.
        parts: the losses and the norm of the gradient, by name.
        checkpoint: the last good one.
    """

    def __init__(self, step: int, parts: dict[str, float], checkpoint: Path | None = None) -> None:
        self.step, self.parts, self.checkpoint = step, parts, checkpoint
        values = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in parts.items())
        kept = "" if checkpoint is None else f"; the last good checkpoint is {checkpoint}"
        super().__init__(
            f"training diverged at step {step} ({values}): lower the learning rate, or train in float32{kept}."
        )


def training_step(
    trained: nn.Module,
    batch: Any,
    loss_of: Callable[[Any], Losses],
    optimizer: Optimizer,
    scheduler: LRScheduler,
    *,
    number: int,
    precision: torch.dtype = torch.float32,
    max_grad_norm: float = 1.0,
) -> dict[str, torch.Tensor]:
    """One step: loss, gradient, clipping, update.

    Args:
        trained: holds every parameter that is trained.
        batch: whatever `loss_of` takes.
        loss_of: computes the losses of a batch.
        optimizer: of the trained parameters.
        scheduler: moves the learning rate after the update.
        number: of the step, counted from 1, for the error.
        precision: dtype of the matrix products.
        max_grad_norm: the gradient is scaled down to this norm when it is longer; infinity leaves it alone.

    Returns:
        The losses by name and `gradient_norm` (before clipping), scalars without a graph.

    Raises:
        ValueError: `max_grad_norm` is no number above 0.
        DivergedError: the total loss or the gradient is not finite. The update was not made.
    """
    if not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm is {max_grad_norm}; give a number above 0, or infinity for no clipping.")
    device = next(trained.parameters()).device
    with autocast(device, precision):
        loss = loss_of(batch)
    optimizer.zero_grad()
    loss.total.backward()
    norm = nn.utils.clip_grad_norm_(trained.parameters(), max_grad_norm)
    values = {name: value.detach() for name, value in (*loss._asdict().items(), ("gradient_norm", norm))}
    # A GPU has to be waited for here, once per step. Otherwise one bad step would spoil every weight unnoticed.
    require_finite(number, values["total"] + norm, values)
    optimizer.step()
    scheduler.step()
    return values


def require_finite(step: int, decisive: torch.Tensor, parts: dict[str, torch.Tensor]) -> None:
    """Stop a training step whose `decisive` value, a scalar, is not finite; `parts` are named in the error.

    Raises:
        DivergedError: it is not finite.
    """
    if not torch.isfinite(decisive.detach()):
        raise DivergedError(step, {name: value.item() for name, value in parts.items()})


def classifier_loss(
    student: PreTrainedModel, *, temperature: float, alpha: float, teacher: PreTrainedModel | None = None
) -> Callable[[Batch], DistillationLoss]:
    """The loss function of chapter 05: the student's forward pass and `distillation_loss`.

    Args:
        student: the model that learns.
        temperature: T of the soft loss.
        alpha: weight of the soft loss.
        teacher: a frozen model that runs on every batch (online); None reads the teacher logits that the batches carry
            as `teacher_logits` (cached). With alpha 0 neither is needed.
    """

    def loss_of(batch: Batch) -> DistillationLoss:
        teacher_logits = batch.get("teacher_logits") if teacher is None else teacher_forward(teacher, batch)
        with reading(student, batch):
            student_logits = student(**model_inputs(student, batch)).logits
        device = student_logits.device
        return distillation_loss(
            student_logits,
            None if teacher_logits is None else teacher_logits.to(device, non_blocking=True),
            batch["labels"].to(device, non_blocking=True),
            temperature=temperature,
            alpha=alpha,
        )

    return loss_of


def distill_epoch(
    student: PreTrainedModel,
    batches: Iterable[Batch],
    optimizer: Optimizer,
    scheduler: LRScheduler,
    *,
    temperature: float,
    alpha: float,
    teacher: PreTrainedModel | None = None,
    precision: torch.dtype = torch.float32,
    max_grad_norm: float = 1.0,
) -> EpochLosses:
    """Train the student on every batch once.

    Args:
        student: the model that learns, in place.
        batches: `input_ids`, `attention_mask`, `labels` and, when there is no `teacher`, `teacher_logits`.
        optimizer: of the student's parameters.
        scheduler: moves the learning rate after each step.
        temperature: T of the soft loss.
        alpha: weight of the soft loss.
        teacher: see `classifier_loss`.
        precision: dtype of the matrix products; the losses are always float32.
        max_grad_norm: the gradient is scaled down to this norm when it is longer.

    Raises:
        ValueError: teacher and student share weights, are swapped, or name their classes differently; the teacher is
            in train mode, or the shapes differ.
        DivergedError: a loss or a gradient is not finite. The student keeps the weights of the step before.
    """
    require_teacher_and_student(teacher, student)
    loss_of = classifier_loss(student, temperature=temperature, alpha=alpha, teacher=teacher)
    student.train()
    steps = [
        training_step(
            student,
            batch,
            loss_of,
            optimizer,
            scheduler,
            number=number,
            precision=precision,
            max_grad_norm=max_grad_norm,
        )
        for number, batch in enumerate(batches, start=1)
    ]
    if not steps:
        raise ValueError("there are no batches to train on; give at least one.")
    return EpochLosses(**{name: torch.stack([step[name] for step in steps]).cpu() for name in steps[0]})


def fit(
    modules: nn.Module | Sequence[nn.Module],
    batches: DataLoader[Any] | Iterable[Any],
    loss_of: Callable[[Any], Losses],
    *,
    steps: int,
    optimizer: Callable[[nn.Module], Optimizer],
    scheduler: Callable[[Optimizer], LRScheduler],
    precision: torch.dtype = torch.float32,
    max_grad_norm: float = 1.0,
    lean: bool = False,
    validate: Callable[[], dict[str, float]] | None = None,
    after_step: Callable[[int], None] | None = None,
    checkpoints: Path | None = None,
    checkpoint_steps: int = 0,
    description: str | None = "Training",
) -> Progress:
    """Train one module or several together, for a number of steps, with any loss.

    A new method is a function `loss_of`. It closes over its models, takes a batch and returns a NamedTuple of scalars
    whose first field is `total`:

        class HintLoss(NamedTuple):
            total: torch.Tensor
            hint: torch.Tensor

        def loss_of(batch): ...

        fit([student, projection], batches, loss_of, steps=100, optimizer=adamw, scheduler=linear)

    Args:
        modules: everything that is trained, in place: a student, or a student and its projections.
        batches: a loader of `data.training_batches` or `language_batches`, repeated as often as it takes, each epoch in
            its own order; or a list or stream of batches in a fixed order, at least `steps` of them.
        loss_of: computes the losses of a batch, under autocast in `precision`. Losses must be computed in float32.
        steps: optimiser steps in all.
        optimizer: makes the optimiser of what is trained. It is a function, since `lean` replaces parameters first.
        scheduler: makes the schedule of that optimiser.
        precision: dtype of the matrix products.
        max_grad_norm: the gradient is scaled down to this norm when it is longer; infinity leaves it alone.
        lean: leave out what teaches nothing (see `lean.lean_training`); needs a loader of tokenized texts.
        validate: measures on held-out data after each epoch, for the history. An epoch is a pass over the loader.
        after_step: called with the number of steps made, after each.
        checkpoints: a folder for checkpoints, one after each epoch. Training goes on from the newest one in it.
        checkpoint_steps: also write one after every so many steps.
        description: of the progress bar; None shows none.

    Returns:
        The progress at the end. Its history has one entry per epoch: `epoch`, `step` (how many were made by then),
        `losses` (of each step by name, with `gradient_norm`) and `validation` (what `validate` returned).

    Raises:
        ValueError: there are too few batches, the order of the loader does not follow from the epoch, or `checkpoints`
            holds those of other modules, or of a longer training.
        DivergedError: a loss or a gradient is not finite; the last good checkpoint is named.
        MemoryError: a step needs more memory than there is; a batch size to try is named.
    """
    require_whole("steps", steps, minimum=1)
    if isinstance(batches, Sequence) and len(batches) < steps:
        raise ValueError(f"{steps} steps need as many batches, there are {len(batches)}; give more, or a loader.")
    if isinstance(batches, DataLoader) and not hasattr(batches.batch_sampler, "set_epoch"):
        raise ValueError(
            "the loader's order does not follow from the epoch, so a run that is resumed would see other batches; "
            "make it with data.training_batches, or give a list of batches."
        )
    together = modules if isinstance(modules, nn.Module) else nn.ModuleList(modules)
    per_epoch = len(batches) if isinstance(batches, DataLoader) else steps
    with contextlib.ExitStack() as lean_context:
        if lean:
            _make_lean(lean_context, [modules] if isinstance(modules, nn.Module) else modules, batches)
        # After `lean` has put its own parameters in place.
        optimizer_ = optimizer(together)
        scheduler_ = scheduler(optimizer_)
        state = (together, optimizer_, scheduler_)
        # Batches that draw something, as masked tokens are drawn, have a generator of their own.
        generator = getattr(getattr(batches, "collate_fn", None), "generator", None)
        progress = Progress() if checkpoints is None else load_checkpoint(checkpoints, *state, generator)
        if progress.step > steps:
            raise ValueError(
                f"{checkpoints} has a checkpoint after {progress.step} steps, and {steps} are asked for; choose "
                "another folder."
            )
        started = time.perf_counter() - progress.seconds

        def save() -> None:
            progress.seconds = time.perf_counter() - started
            if checkpoints is not None:
                save_checkpoint(checkpoints, *state, progress, generator)

        bar = tqdm(
            total=steps,
            initial=progress.step,
            desc=description,
            unit="step",
            leave=False,
            disable=True if description is None else None,
        )
        with bar:
            for batch in _remaining_batches(batches, per_epoch, progress.step, steps):
                together.train()
                with _failures_explained(batch, checkpoints):
                    values = training_step(
                        together,
                        batch,
                        loss_of,
                        optimizer_,
                        scheduler_,
                        number=progress.step + 1,
                        precision=precision,
                        max_grad_norm=max_grad_norm,
                    )
                progress.add(values)
                bar.update()
                if after_step is not None:
                    after_step(progress.step)
                if progress.step % per_epoch == 0 or progress.step == steps:
                    measures = {} if validate is None else validate()
                    if "accuracy" in measures:
                        bar.set_postfix(validation=f"{measures['accuracy']:.1%}")
                    progress.finish_epoch(measures)
                    save()
                elif checkpoint_steps and progress.step % checkpoint_steps == 0:
                    save()
        optimizer_.zero_grad()  # gradients take as much memory as the model
    if progress.step < steps:
        raise ValueError(f"{steps} steps need as many batches, the stream had {progress.step}; give more, or a loader.")
    return progress


def _make_lean(context: contextlib.ExitStack, modules: Sequence[nn.Module], batches: Any) -> None:
    if not isinstance(batches, DataLoader):
        raise ValueError("lean training needs a loader of tokenized texts; give one, or lean=False.")
    tokenizer = getattr(batches.collate_fn, "tokenizer", None)  # what it pads with need not be the table's own padding
    padding = [] if tokenizer is None else [[tokenizer.pad_token_id]]
    token_ids = [*batches.dataset["input_ids"][:], *padding]
    for module in modules:
        if isinstance(module, PreTrainedModel):
            context.enter_context(lean_training(module, token_ids))


def _remaining_batches(batches: Any, per_epoch: int, made: int, steps: int) -> Iterator[Any]:
    """The batches of the steps that are left, epoch after epoch in the order that each of them has."""
    if not isinstance(batches, DataLoader):
        yield from itertools.islice(batches, made, steps)
        return
    while made < steps:
        epoch, start = divmod(made, per_epoch)
        batches.batch_sampler.set_epoch(epoch, start=start)
        for batch in itertools.islice(batches, steps - made):
            yield batch
            made += 1


@contextlib.contextmanager
def _failures_explained(batch: Any, checkpoints: Path | None) -> Iterator[None]:
    """Say of a step that failed where the last good checkpoint is, or what to do where memory ran out."""
    try:
        yield
    except DivergedError as error:
        last = None if checkpoints is None else last_checkpoint(checkpoints)
        raise DivergedError(error.step, error.parts, last) from None
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
            raise
        raise MemoryError(_memory_advice(batch)) from error


def _memory_advice(batch: Any) -> str:
    """What to do where a step with this batch took more memory than there is."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        return "a step needs more memory than there is; try smaller batches."
    size, length = batch["input_ids"].shape
    remedy = f"batch_size={size // 2}" if size > 1 else f"a max_length below {length}"
    return f"a step with batch_size={size} and {length} tokens a text needs more memory than there is; try {remedy}."


def train_classifier(
    model: PreTrainedModel,
    batches: DataLoader[Any],
    *,
    config: DistillConfig,
    validation: DataLoader[Any] | None = None,
    precision: torch.dtype = torch.float32,
    teacher: PreTrainedModel | None = None,
    description: str | None = "Training",
    checkpoints: Path | None = None,
    checkpoint_steps: int = 0,
) -> Progress:
    """`fit` with the loss, the optimiser and the schedule that a configuration asks for.

    Args:
        model: the classifier that learns, in place.
        batches: of `data.training_batches`.
        config: temperature, alpha, steps, `lean`, and all that optimiser and schedule need.
        validation: batches to evaluate on after each epoch.
        precision: of the matrix products.
        teacher: an online teacher; None where the batches carry `teacher_logits`, or alpha is 0.
        description: of the progress bar; None shows none.
        checkpoints: see `fit`.
        checkpoint_steps: see `fit`.

    Returns:
        See `fit`; losses are `total`, `soft` and `hard`.
    """
    require_teacher_and_student(teacher, model)
    steps = config.max_steps or config.epochs * len(batches)
    return fit(
        model,
        batches,
        classifier_loss(model, temperature=config.temperature, alpha=config.alpha, teacher=teacher),
        steps=steps,
        **recipe(config, steps),
        precision=precision,
        lean=config.lean,
        validate=None if validation is None else functools.partial(evaluate, model, validation, precision),
        checkpoints=checkpoints,
        checkpoint_steps=checkpoint_steps,
        description=description,
    )


def recipe(config: DistillConfig, steps: int) -> dict[str, Any]:
    """The arguments `optimizer`, `scheduler` and `max_grad_norm` of `fit` that a configuration asks for."""
    return {
        "optimizer": functools.partial(
            make_optimizer, learning_rate=config.learning_rate, weight_decay=config.weight_decay
        ),
        "scheduler": functools.partial(make_scheduler, steps=steps, warmup_ratio=config.warmup_ratio),
        "max_grad_norm": config.max_grad_norm,
    }
