"""What the site consists of: the chapters in their parts, and the pages of docs/."""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kd_helpers.course import notebooks
from kd_helpers.course.pages import chapter_and_title, inline, page_name

# The parts of the course: the numbers of their chapters, their names, and a sentence for the front page.
PARTS = (
    (range(0, 10), "The main course", "From the idea to a measured gain. Read these chapters in order."),
    (range(10, 16), "Methods", "Published methods, each measured on its own. Read them in any order."),
    (range(16, 100), "Scaling", "The same loss on many devices."),
)


@dataclass(frozen=True)
class Entry:
    """A page in lists and links: its address, the number of its chapter if it is one, and its title as HTML."""

    address: str
    number: str
    title: str

    @property
    def label(self) -> str:
        """Number and title as HTML."""
        return f"{self.number} · {self.title}" if self.number else self.title

    @property
    def plain(self) -> str:
        """Number and title as text."""
        return html.unescape(re.sub(r"<[^>]+>", "", self.label))


@dataclass(frozen=True)
class Part:
    """Pages that belong together."""

    name: str
    about: str
    paths: list[Path]

    @property
    def entries(self) -> list[Entry]:
        """Its pages."""
        return [entry(path) for path in self.paths]


@functools.cache
def entry(path: Path) -> Entry:
    """A notebook or a Markdown file as an entry."""
    if path.suffix == ".ipynb":
        heading = notebooks.title(path)
    else:
        heading = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
    number, title = chapter_and_title(heading)
    return Entry(page_name(path), number, inline(title))


def docs_paths() -> list[Path]:
    """The Markdown files of docs/ in the order in which the README names them, then those that it does not name."""
    readme = (notebooks.ROOT / "README.md").read_text(encoding="utf-8")
    paths = sorted((notebooks.ROOT / "docs").glob("*.md"))
    return sorted(paths, key=lambda path: len(readme.partition(f"docs/{path.name}")[0]))


def parts(paths: Sequence[Path]) -> list[Part]:
    """The notebooks in their parts, then the pages of docs/."""
    found = [
        Part(name, about, [path for path in paths if int(path.name[:2]) in numbers]) for numbers, name, about in PARTS
    ]
    return [part for part in [*found, Part("Guides", "", docs_paths())] if part.paths]
