"""Execute the notebooks with papermill, and leave executed copies and HTML pages in a folder."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import joblib
import papermill
from tqdm.auto import tqdm

from kd_helpers import artifacts
from kd_helpers.course.costs import stored_costs
from kd_helpers.course.notebooks import notebook_paths
from kd_helpers.course.site import write_contents, write_page
from kd_helpers.experiments.comparison import stored_comparison
from kd_helpers.experiments.environment import environment
from kd_helpers.experiments.signals import BASELINE
from kd_helpers.experiments.study import gains, study_table, titles
from kd_helpers.experiments.sweep import threads_per_job

SIDE_BY_SIDE = 2  # notebooks; while one loads libraries or draws, the other computes


def run(paths: Sequence[Path], folder: Path, *, others: Sequence[Path] = ()) -> None:
    """Execute notebooks with papermill into `folder`, as notebooks and as HTML pages with an index.

    The first one runs alone, because it fine-tunes the teacher, for which the others would wait. Those run side by
    side, each with its share of the cores, the longest first.

    Args:
        paths: of the notebooks.
        folder: for their executed copies and the pages.
        others: notebooks that are not executed: their pages show what is stored, so that no link leads nowhere.
    """
    folder.mkdir(parents=True, exist_ok=True)
    finished = itertools.count(1)

    def execute(path: Path) -> None:
        start, executed = time.perf_counter(), folder / path.name
        papermill.execute_notebook(path, executed, progress_bar={"desc": path.stem, "leave": False})
        write_page(executed, folder)
        tqdm.write(f"[{next(finished)}/{len(paths)}] {path.stem}: {time.perf_counter() - start:.0f} s")

    for path in paths[:1]:
        execute(path)
    jobs = min(SIDE_BY_SIDE, joblib.cpu_count())
    pool = ThreadPoolExecutor(jobs)
    with environment({"OMP_NUM_THREADS": str(threads_per_job(jobs)), "TOKENIZERS_PARALLELISM": "false"}):
        try:
            for future in as_completed([pool.submit(execute, path) for path in longest_first(paths[1:])]):
                future.result()
        finally:  # after an error, notebooks that have not begun do not begin
            pool.shutdown(wait=False, cancel_futures=True)
    for path in others:
        write_page(path, folder)
    write_contents(sorted({*paths, *others}), folder)


def longest_first(paths: Sequence[Path]) -> list[Path]:
    """Notebooks by the time that they took when they were stored, so that no long one begins last."""
    costs = stored_costs()
    return sorted(paths, key=lambda path: -costs.get(path.stem, {"seconds": 0})["seconds"])


def run_and_report(paths: Sequence[Path]) -> None:
    """Run notebooks, print the comparison that they made beside the stored one, and say where the pages are."""
    if not (artifacts.artifacts_dir() / "teachers").exists():
        print("The first notebook also fine-tunes the teacher: two to eight minutes on two cores.", flush=True)
    folder = artifacts.artifacts_dir() / "course"
    run(paths, folder, others=[path for path in notebook_paths() if path not in paths])
    live = artifacts.artifacts_dir() / "comparison.json"
    if live.exists():
        print(f"\n{report(artifacts.load_json(live), stored_comparison())}\n\nThe live comparison is in {live}.")
    print(f"The notebooks as pages: {folder / 'index.html'}")


def report(live: Mapping[str, Any], stored: Mapping[str, Any]) -> str:
    """The live comparison of chapter 06 and the one that comes with the course, each with what it is, as plain text."""
    return "\n\n".join(
        [
            f"The live comparison, which chapter 06 made on this machine: {_extent(live)}.\n"
            "It is short, so expect smaller gains than in the full comparison.",
            table(live),
            f"The full comparison, which comes with the course: {_extent(stored)}.\n"
            "Draw your conclusions from this one; chapter 06 explains it.",
            table(stored),
        ]
    )


def table(comparison: Mapping[str, Any]) -> str:
    """A comparison as plain text: the teacher, then every arm with its gain over the baseline, seed by seed."""
    teacher = comparison["teachers"]["tuned"]
    accuracy, nll = (study_table(comparison, metric).mean() for metric in ("accuracy", "nll"))
    gained = gains(comparison, "accuracy", over=BASELINE)
    itself = "The tuned teacher itself"
    width = max(map(len, (itself, *titles(comparison).values())))
    lines = [
        f"{'':{width}}{'accuracy':>10}{'NLL':>8}   gain over the baseline (95% interval)",
        f"{itself:{width}}{teacher['accuracy']:>10.1%}{teacher['nll']:>8.2f}",
    ]
    for arm, title in titles(comparison).items():
        line = f"{title:{width}}{accuracy[arm]:>10.1%}{nll[arm]:>8.2f}"
        if arm != BASELINE:
            gain, low, high = 100 * gained.loc[arm]
            line += f"   {gain:+.1f} points ({low:+.1f} to {high:+.1f})"
        lines.append(line)
    return "\n".join(lines)


def _extent(comparison: Mapping[str, Any]) -> str:
    """How much was trained."""
    config = comparison["choices"]["config"]
    return (
        f"{len(comparison['arms'])} arms, {len(comparison['seeds'])} seeds, {config['max_steps']:,} optimiser steps a "
        f"run, {config['train_size']:,} labelled texts"
    )
