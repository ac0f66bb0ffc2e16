"""What a run takes beside its training steps: evaluation, everything around them, and the time until the first step."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kd_helpers import loop, runs
from kd_helpers.config import DistillConfig
from kd_helpers.data import evaluation_batches
from kd_helpers.metrics import evaluate
from kd_helpers.models import model_inputs
from kd_helpers.resolve import resolve
from kd_helpers.runs import distill
from kd_helpers.runtime import autocast
from kd_helpers.teacher import load_teacher_logits

BATCH_SIZES = (16, 32, 64, 128, 256)  # of which the fastest counts
ROUNDS = 5


def evaluation_cost(
    model: PreTrainedModel, batches: DataLoader[Any], tokenizer: PreTrainedTokenizerBase, precision: torch.dtype
) -> dict[str, float]:
    """What `evaluate` takes against forward passes alone, over the same texts.

    Args:
        model: in eval mode.
        batches: as the course evaluates them.
        tokenizer: of the model.
        precision: of the matrix products.

    Returns:
        `texts`; `seconds` of `evaluate`, `forward_seconds` of the passes at the batch size that is fastest, with
        batches that are made beforehand, the fastest of some rounds each; their `ratio`, and that `batch_size`.
    """
    ready = {size: list(evaluation_batches(batches.dataset, tokenizer, size)) for size in BATCH_SIZES}
    device = next(model.parameters()).device

    def forward(size: int) -> float:
        with torch.inference_mode(), autocast(device, precision):
            start = time.perf_counter()
            for batch in ready[size]:
                last = model(**model_inputs(model, batch)).logits
            last.float().cpu()  # waits for an asynchronous device
            return time.perf_counter() - start

    def whole() -> float:
        start = time.perf_counter()
        evaluate(model, batches, precision)
        return time.perf_counter() - start

    whole()  # warms up
    seconds = min(whole() for _ in range(ROUNDS))
    passes = {size: min(forward(size) for _ in range(ROUNDS)) for size in BATCH_SIZES}
    best = min(passes, key=passes.__getitem__)
    return {
        "texts": len(batches.dataset),
        "seconds": seconds,
        "forward_seconds": passes[best],
        "ratio": seconds / passes[best],
        "batch_size": best,
    }


@contextlib.contextmanager
def stopwatch(module: ModuleType, name: str) -> Iterator[list[float]]:
    """Fill a list with the seconds of each call of a module's function, as long as the context lasts."""
    function, seconds = getattr(module, name), []

    def timed(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            seconds.append(time.perf_counter() - start)

    setattr(module, name, timed)
    try:
        yield seconds
    finally:
        setattr(module, name, function)


def run_cost(config: DistillConfig) -> dict[str, float]:
    """What `distill` takes with a teacher whose logits are there: a run that was not made before.

    Returns:
        `seconds` of all, of training `steps`, of `evaluations`, and what is `outside` both: loading, tokenizing,
        digests, checkpoints and saving.
    """
    load_teacher_logits(resolve(config), "student_train")
    with (
        stopwatch(loop, "training_step") as steps,
        stopwatch(loop, "evaluate") as validations,
        stopwatch(runs, "predict") as tests,
    ):
        start = time.perf_counter()
        distill(config, resume=False)
        seconds = time.perf_counter() - start
    evaluations = sum(validations) + sum(tests)
    return {
        "seconds": seconds,
        "steps": sum(steps),
        "evaluations": evaluations,
        "outside": seconds - sum(steps) - evaluations,
    }


# Run by another Python, which loads everything anew.
TO_FIRST_STEP = """
import time; start = time.perf_counter()
from kd_helpers import DistillConfig, distill; imported = time.perf_counter()
import os, sys
from kd_helpers import loop

def first(*arguments, **options):
    print("seconds", imported - start, time.perf_counter() - start, flush=True)
    os._exit(0)

loop.training_step = first
distill(DistillConfig(**{config!r}), resume=False)
"""


def time_to_first_step(config: DistillConfig) -> dict[str, float]:
    """What a fresh process takes from the import of this package to the first step, the teacher being there.

    Returns:
        `import` and `first_step`, seconds from the start: medians of some rounds.
    """
    script = TO_FIRST_STEP.format(config=config.to_dict())
    found = []
    for _ in range(ROUNDS):
        done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True)
        words = next(line for line in done.stdout.splitlines() if line.startswith("seconds")).split()
        found.append((float(words[1]), float(words[2])))
    imports, firsts = (sorted(column)[len(column) // 2] for column in zip(*found, strict=True))
    return {"import": imports, "first_step": firsts}
