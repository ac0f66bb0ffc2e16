"""What the execution of a notebook costs: time, memory, and whether it had to fine-tune a teacher."""

from __future__ import annotations

import contextlib
import datetime
import platform
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from kd_helpers import artifacts, experiments, provenance

SECONDS_BETWEEN_SAMPLES = 0.1


@contextlib.contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Measure `seconds` and `peak_megabytes`: the time within, and the most memory that child processes hold at once.

    Memory is the resident memory of this process's children and of their own children, read ten times a second. Memory
    that two processes share counts twice.
    """
    cost, finished, start = {"seconds": 0.0, "peak_megabytes": 0.0}, threading.Event(), time.perf_counter()

    def watch() -> None:
        while not finished.wait(SECONDS_BETWEEN_SAMPLES):
            cost["peak_megabytes"] = max(cost["peak_megabytes"], _megabytes_of_children())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield cost
    finally:
        cost["seconds"] = time.perf_counter() - start
        finished.set()
        watcher.join()


def _megabytes_of_children() -> float:
    """The memory held by the processes that this one started, and by those that they started."""
    held = 0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it may end at any moment
            held += process.memory_info().rss
    return held / 1e6


def count_teachers() -> int:
    """The number of fine-tuned teachers among the artifacts."""
    return len(list((artifacts.artifacts_dir() / "teachers").glob("[!.]*/")))


def store_cost(name: str, cost: dict[str, float]) -> None:
    """Store what a notebook cost, and on what machine, among the results; the costs of other notebooks stay."""
    made_with = {
        **provenance.versions(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
    }
    rounded = {key: round(value, 1) for key, value in cost.items()}
    costs = stored_costs() | {name: rounded | {"made_with": made_with}}
    artifacts.save_json(experiments.RESULTS / "costs.json", dict(sorted(costs.items())))


def stored_costs() -> dict[str, Any]:
    """What each notebook cost when it was stored: `seconds`, `peak_megabytes`, `teachers_made` and `made_with`."""
    path = experiments.RESULTS / "costs.json"
    return artifacts.load_json(path) if path.exists() else {}


def print_cost(number: int, count: int, path: Path, cost: dict[str, float]) -> None:
    """Print that a notebook is finished, and what it cost."""
    spent = f"{cost['seconds']:.0f} s, {cost['peak_megabytes']:,.0f} MB at the peak"
    print(f"[{number}/{count}] {path.stem}: {spent}", flush=True)
