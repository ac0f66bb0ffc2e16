"""How fast is the token loss? `token_soft_loss` and another toolkit's loss take turns on the same logits.

It runs in the process of a toolkit (see `conformance`), so it loads torch and little else.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from kd_helpers.experiments.conformance_toolkits import Batch, Call
from kd_helpers.experiments.memory import peak_memory
from kd_helpers.losses import IGNORE_INDEX, token_soft_loss

# Texts, tokens of each, and tokens of the vocabulary: chapter 13's, and that of a small language model.
SHAPES = ((8, 2048, 512), (8, 128, 32_000))
UNLABELLED = 0.25  # of the tokens, as padding is
ROUNDS = 7


def logits_of(shape: tuple[int, int, int]) -> Batch:
    """Random logits and labels; the last tokens of each text do not count."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(shape, generator=generator) for _ in range(2))
    labels = torch.randint(shape[-1], shape[:2], generator=generator)
    labels[:, -round(UNLABELLED * shape[1]) :] = IGNORE_INDEX
    return Batch(student.requires_grad_(), teacher, labels)


def ours(batch: Batch) -> torch.Tensor:
    """The course's loss, at a temperature of 1, which every toolkit has."""
    return token_soft_loss(batch.student, batch.teacher, batch.labels != IGNORE_INDEX, temperature=1.0)


def compared(call: Call) -> list[dict[str, float]]:
    """Let a toolkit's loss and ours take turns.

    Returns:
        For each of `SHAPES`: `vocabulary`, `tokens`; `seconds` of the toolkit's loss with its gradient and
        `ours_seconds` (medians), `times` (the median of their ratio within a round); `megabytes` and `ours_megabytes`,
        the most memory held above the logits.
    """
    theirs = partial(call.adapter, temperature=1.0) if call.takes_temperature else call.adapter
    rows = []
    for shape in SHAPES:
        batch = logits_of(shape)
        work = [partial(_with_gradient, loss, batch) for loss in (theirs, ours)]
        for one in work:
            one()  # warms up
        rounds = [[_seconds(one) for one in work] for _ in range(ROUNDS)]
        memory = []
        for one in work:
            with peak_memory(batch.student.device) as peak:
                one()
            memory.append(peak["peak_megabytes"])
        seconds = [statistics.median(column) for column in zip(*rounds, strict=True)]
        rows.append(
            {
                "vocabulary": shape[-1],
                "tokens": shape[0] * shape[1],
                "seconds": seconds[0],
                "ours_seconds": seconds[1],
                "times": statistics.median(first / second for first, second in rounds),
                "megabytes": memory[0],
                "ours_megabytes": memory[1],
            }
        )
    return rows


def _with_gradient(loss: Callable[[Batch], torch.Tensor], batch: Batch) -> None:
    torch.autograd.grad(loss(batch), batch.student)


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
