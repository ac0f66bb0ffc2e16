"""Parts of the README and of docs/ that commands write, each between two marks."""

from __future__ import annotations

from kd_helpers import artifacts
from kd_helpers.course import notebooks


def write_block(name: str, content: str, *, by: str, page: str = "README.md") -> None:
    """Replace the text between a page's marks of that name; the first mark names the command that writes it."""
    begin, end = f"<!-- {name}: written by `make {by}` -->", f"<!-- end of {name} -->"
    path = notebooks.ROOT / page
    text = path.read_text(encoding="utf-8")
    if (text.count(begin), text.count(end)) != (1, 1):
        raise ValueError(f"{page} must hold {begin!r} and {end!r} once each.")
    before, _, rest = text.partition(begin)
    artifacts.write_text(path, f"{before}{begin}\n{content}\n{end}{rest.partition(end)[2]}")
