"""Execute the notebooks with papermill, and leave executed copies and HTML pages in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import papermill

from kd_helpers import artifacts
from kd_helpers.course.costs import measured, print_cost
from kd_helpers.course.site import write_contents, write_page
from kd_helpers.experiments.comparison import format_table


def run(paths: Sequence[Path], folder: Path) -> None:
    """Execute notebooks with papermill into `folder`, as notebooks and as HTML pages with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(paths, start=1):
        executed = folder / path.name
        bar = {"desc": path.stem, "leave": False}
        with measured() as cost:
            papermill.execute_notebook(path, executed, cwd=path.parent, progress_bar=bar)
        write_page(executed, folder)
        print_cost(number, len(paths), path, cost)
    write_contents(paths, folder)


def run_and_report(paths: Sequence[Path]) -> None:
    """Run notebooks, print the comparison that they made, and say where the pages are."""
    if not (artifacts.artifacts_dir() / "teachers").exists():
        print("The first notebook also fine-tunes the teacher, which takes about two minutes on two cores.", flush=True)
    folder = artifacts.artifacts_dir() / "course"
    run(paths, folder)
    table = artifacts.artifacts_dir() / "comparison.json"
    if table.exists():
        print(f"\n{format_table(artifacts.load_json(table))}\n\nwritten to {table}")
    print(f"The notebooks as pages: {folder / 'index.html'}")
