"""Execute the notebooks in place, keep their outputs without what differs between two runs, and keep what each cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from kd_helpers import artifacts
from kd_helpers.course.costs import count_teachers, measured, print_cost, store_cost
from kd_helpers.course.notebooks import without_bars
from kd_helpers.course.publish import refresh


def store(paths: Sequence[Path]) -> None:
    """Execute notebooks in place, keep their outputs, and keep what each cost.

    Raises:
        RuntimeError: a notebook writes to stderr; the warning would be stored with it.
    """
    for number, path in enumerate(paths, start=1):
        notebook = nbformat.read(path, as_version=4)
        refresh(notebook, path)
        before = count_teachers()
        with measured() as cost:
            # One print may arrive in pieces: they are stored as one output.
            place = {"metadata": {"path": str(path.parent)}}
            NotebookClient(notebook, timeout=None, coalesce_streams=True, resources=place).execute()
        without_bars(notebook)
        if loud := [cell for cell in notebook.cells if any(o.get("name") == "stderr" for o in cell.get("outputs", []))]:
            raise RuntimeError(f"{path.name} writes to stderr: {loud[0].outputs}")
        artifacts.write_text(path, nbformat.writes(notebook) + "\n")
        store_cost(path.stem, cost | {"teachers_made": count_teachers() - before})
        print_cost(number, len(paths), path, cost)
