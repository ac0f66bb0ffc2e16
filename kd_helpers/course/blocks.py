"""Parts of the README that commands write, each between two marks."""

from __future__ import annotations

from kd_helpers import artifacts
from kd_helpers.course import notebooks


def write_block(name: str, content: str, *, by: str | None = None) -> None:
    """Replace the text between the README's marks of that name; the first mark names the command that writes it."""
    begin, end = f"<!-- {name}: written by `make {by or name}` -->", f"<!-- end of {name} -->"
    path = notebooks.ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    if (text.count(begin), text.count(end)) != (1, 1):
        raise ValueError(f"README.md must hold {begin!r} and {end!r} once each.")
    before, _, rest = text.partition(begin)
    artifacts.write_text(path, f"{before}{begin}\n{content}\n{end}{rest.partition(end)[2]}")
