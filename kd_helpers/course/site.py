"""The course as a website: one HTML page for each notebook as it is stored, and an index."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import nbformat

from kd_helpers import artifacts
from kd_helpers.course import notebooks
from kd_helpers.course.pages import to_html, write_index


def write_page(path: Path, folder: Path) -> None:
    """Write a notebook, with the outputs it has, into `folder` as a page."""
    notebook = notebooks.without_bars(nbformat.read(path, as_version=4))
    artifacts.write_text(folder / f"{path.stem}.html", to_html(notebook, notebooks.title(path)))


def site(paths: Sequence[Path], folder: Path) -> None:
    """Make pages with an index from notebooks as they are stored, without executing them."""
    for path in paths:
        write_page(path, folder)
    write_contents(paths, folder)


def write_contents(paths: Sequence[Path], folder: Path) -> None:
    """Write the index of the course's pages into `folder`, under the README's title and the package's description."""
    name = (notebooks.ROOT / "README.md").read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
    project = (notebooks.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    about = re.search(r'(?m)^description = "(.*)"$', project)[1]
    write_index(paths, folder, name=name, about=about)
