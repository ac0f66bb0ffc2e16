"""Execute the notebooks with papermill, and leave executed copies and HTML pages in a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import papermill

from kd_helpers import artifacts
from kd_helpers.course.costs import measured, print_cost
from kd_helpers.course.notebooks import notebook_paths
from kd_helpers.course.site import write_contents, write_page
from kd_helpers.experiments.comparison import BASELINE, stored_comparison
from kd_helpers.experiments.study import gains, study_table, titles


def run(paths: Sequence[Path], folder: Path, *, others: Sequence[Path] = ()) -> None:
    """Execute notebooks with papermill into `folder`, as notebooks and as HTML pages with an index.

    Args:
        paths: of the notebooks.
        folder: for their executed copies and the pages.
        others: notebooks that are not executed: their pages show what is stored, so that no link leads nowhere.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(paths, start=1):
        executed = folder / path.name
        bar = {"desc": path.stem, "leave": False}
        with measured() as cost:
            papermill.execute_notebook(path, executed, cwd=path.parent, progress_bar=bar)
        write_page(executed, folder)
        print_cost(number, len(paths), path, cost)
    for path in others:
        write_page(path, folder)
    write_contents(sorted({*paths, *others}), folder)


def run_and_report(paths: Sequence[Path]) -> None:
    """Run notebooks, print the comparison that they made beside the stored one, and say where the pages are."""
    if not (artifacts.artifacts_dir() / "teachers").exists():
        print("The first notebook also fine-tunes the teacher, which takes about two minutes on two cores.", flush=True)
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
    lines = [
        f"{'':32}{'accuracy':>10}{'NLL':>8}   gain over the baseline (95% interval)",
        f"{'The tuned teacher itself':32}{teacher['accuracy']:>10.1%}{teacher['nll']:>8.2f}",
    ]
    for arm, title in titles(comparison).items():
        line = f"{title:32}{accuracy[arm]:>10.1%}{nll[arm]:>8.2f}"
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
