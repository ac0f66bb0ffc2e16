"""Where and how a run computes: device, precision, mode, seeds.

`precision="auto"` is measured once per machine and remembered under `artifacts/machines`, because the precision is part
of what a result is stored under: a busy machine must not decide otherwise tomorrow and train everything again.
"""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import nn

from kd_helpers import artifacts
from kd_helpers.config import DEVICES, PRECISIONS, DistillConfig, require_choice

WORTHWHILE = 1.5  # how much faster bfloat16 must be before "auto" takes it
MEASURING_SECONDS = 3.0  # no round of the measurement begins later; eight usually take a fraction of a second


class Machine(NamedTuple):
    """Where and how a run computes."""

    device: torch.device
    precision: torch.dtype


def machine(config: DistillConfig) -> Machine:
    """The device and the precision that a configuration asks for, with "auto" decided."""
    device = pick_device(config.device)
    return Machine(device, pick_precision(config.precision, device))


def pick_device(device: str = "auto") -> torch.device:
    """The device to compute on: the one that was asked for, else a GPU if there is one, else the CPU.

    Raises:
        ValueError: the device that was asked for is not present.
    """
    require_choice("device", device, DEVICES)
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        device = next(name for name in ("cuda", "mps", "cpu") if present[name])
    if not present[device]:
        raise ValueError(f"device is {device!r}, which this machine lacks; use device='auto'.")
    return torch.device(device)


def pick_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of the matrix products. `bfloat16` runs under autocast; the losses stay in float32.

    "auto" takes bfloat16 where a matrix product in it is clearly faster: some processors have units for bfloat16,
    others emulate it and lose. See `precision_decision`.
    """
    require_choice("precision", precision, PRECISIONS)
    return getattr(torch, precision_decision(device)["precision"] if precision == "auto" else precision)


def precision_decision(device: torch.device) -> dict[str, str | float]:
    """What "auto" means on this machine: measured the first time, read from `artifacts/machines` from then on.

    Returns:
        `processor`, `device` and `torch`, for which the decision holds, `speedup` (how many times faster a matrix
        product is in bfloat16 than in float32) and `precision`, "bfloat16" or "float32".
    """
    where = {"processor": processor(device), "device": device.type, "torch": torch.__version__}
    path = artifacts.artifacts_dir() / "machines" / f"{artifacts.fingerprint(where)}.json"
    with artifacts.locked(path):
        if path.exists():
            with contextlib.suppress(ValueError):  # a damaged file is measured and written again
                return artifacts.load_json(path)
        speedup = bfloat16_speedup(device)
        decision = {
            **where,
            "speedup": round(speedup, 2),
            "precision": "bfloat16" if speedup > WORTHWHILE else "float32",
        }
        artifacts.save_json(path, decision)
    return decision


def bfloat16_speedup(device: torch.device) -> float:
    """How many times faster a 1024 × 1024 matrix product is in bfloat16 than in float32; 0 where it can't be done.

    The two take turns, and the fastest pass of each counts, so that a busy moment slows neither or both. There are
    eight rounds. A processor that emulates bfloat16 can need seconds for one product: there, no round begins after
    `MEASURING_SECONDS`, but two are always made.
    """

    def seconds(matrix: torch.Tensor) -> float:
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # .item() waits for an asynchronous device
        return time.perf_counter() - start

    try:
        matrices = [torch.ones(1024, 1024, dtype=dtype, device=device) for dtype in (torch.float32, torch.bfloat16)]
        rounds: list[list[float]] = []
        end = time.perf_counter() + MEASURING_SECONDS
        while len(rounds) < 2 or (len(rounds) < 8 and time.perf_counter() < end):
            rounds.append([seconds(matrix) for matrix in matrices])
    except (RuntimeError, TypeError):  # a device without bfloat16
        return 0.0
    single, half = (min(timings[1:]) for timings in zip(*rounds, strict=True))  # the first round warms up
    return single / half


def processor(device: torch.device) -> str:
    """The name of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(": ")[2]
    return platform.processor() or "unknown"


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Run matrix products in `precision`; float32 switches autocast off, also one around it."""
    return torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, without dropout, and afterwards in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch on every device."""
    transformers.set_seed(seed)
    # MKL sets such a function up at its first call. When several threads make that call at once, one of them can get
    # values of low precision (github.com/pytorch/pytorch/issues/188792). A single value is computed by one thread.
    for function in (torch.exp, torch.log, torch.sqrt, torch.tanh, torch.erf):
        function(torch.ones(1))
