"""The course as a website: a front page, a page for each notebook as it is stored, and one for each file of docs/."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nbformat

from kd_helpers import artifacts
from kd_helpers.course import notebooks
from kd_helpers.course.contents import docs_paths, entry, parts
from kd_helpers.course.front_page import front_page
from kd_helpers.course.pages import notebook_content, page, text_content


def write_page(path: Path, folder: Path) -> None:
    """Write a notebook with the outputs it has, or a Markdown file of docs/, into `folder` as a page."""
    if path.suffix == ".ipynb":
        content = notebook_content(nbformat.read(path, as_version=4))
    else:
        content = text_content(path.read_text(encoding="utf-8"), folder="docs")
    here, listed = entry(path), parts(notebooks.notebook_paths())
    order = [None, *(one for part in listed for one in part.entries), None]
    at = order.index(here) if here in order else 0  # a notebook from elsewhere has no neighbours
    before, after = (order[at - 1], order[at + 1]) if at else (None, None)
    shown = page("page.html.j2", content=content, here=here, before=before, after=after, parts=listed)
    artifacts.write_text(folder / here.address, shown)


def write_contents(paths: Sequence[Path], folder: Path) -> None:
    """Write into `folder` the front page, which presents these notebooks, and the pages of docs/."""
    for path in docs_paths():
        write_page(path, folder)
    artifacts.write_text(folder / "index.html", front_page(paths))


def site(paths: Sequence[Path], folder: Path) -> None:
    """Make the website from notebooks as they are stored, without executing them."""
    for path in paths:
        write_page(path, folder)
    write_contents(paths, folder)
