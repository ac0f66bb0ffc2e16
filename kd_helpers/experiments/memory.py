"""The most memory that a piece of work holds."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path

import torch


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, float]]:
    """Fill in `peak_megabytes` within: the most that was held above what was held before.

    Of the GPU, or of the process where Linux tells; NaN elsewhere.
    """
    found = {"peak_megabytes": float("nan")}
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        found["peak_megabytes"] = (torch.cuda.max_memory_allocated() - before) / 1e6
        return
    before = float("nan")
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # else what earlier work freed is still held, and hides what this one takes
        Path("/proc/self/clear_refs").write_text("5")  # begins a new peak
        before = _held_megabytes("VmRSS")
    yield found
    with contextlib.suppress(OSError):
        found["peak_megabytes"] = _held_megabytes("VmHWM") - before


def _held_megabytes(what: str) -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith(what)).split()[1]) / 1e3
