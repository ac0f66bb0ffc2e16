"""The notebooks as files: where they are, what their first cell says, and how one looks without a kernel."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
WIDGET = "application/vnd.jupyter.widget-view+json"


def is_checkout() -> bool:
    """Whether the package stands in a checkout of the repository, with the notebooks beside it."""
    return NOTEBOOKS.is_dir() and (ROOT / "pyproject.toml").is_file()


def notebook_paths() -> list[Path]:
    """The course's notebooks in the order of their numbers."""
    return sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def title(path: Path) -> str:
    """A notebook's first heading."""
    return _opening(path)[0]


def question(path: Path) -> str:
    """The question of a notebook: the text under its first heading, up to the first question mark."""
    asked, mark, _ = " ".join(_opening(path)[1].split()).partition("?")
    return asked + mark if mark else ""


def _opening(path: Path) -> tuple[str, str]:
    """The first cell's heading and the text under it."""
    import nbformat  # here, so that the commands' help does without it

    heading, _, text = nbformat.read(path, as_version=4).cells[0].source.partition("\n")
    return heading.removeprefix("# "), text


def tags(cell: NotebookNode) -> list[str]:
    """A cell's tags."""
    return cell.metadata.get("tags", [])


def is_folded(cell: NotebookNode) -> bool:
    """Whether a cell serves rather than teaches: it begins with a title, and its code is folded everywhere."""
    return cell.cell_type == "code" and cell.source.startswith("# @title ")


def without_bars(notebook: NotebookNode) -> NotebookNode:
    """Remove, in place, what has no meaning without a kernel: progress bars, widget state, clocks and paths."""
    notebook.metadata.pop("widgets", None)
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        for key in ("execution", "papermill"):
            cell.metadata.pop(key, None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
    return notebook
