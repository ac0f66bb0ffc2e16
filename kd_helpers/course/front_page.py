"""The site's front page: the question, the result, how to start, and a card for each chapter."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from PIL import Image

from kd_helpers.course import notebooks
from kd_helpers.course.contents import Entry, entry, parts
from kd_helpers.course.numbers import number
from kd_helpers.course.pages import PageRenderer, inline, page
from kd_helpers.experiments.comparison import main_arms, stored_comparison
from kd_helpers.experiments.signals import BASELINE
from kd_helpers.experiments.study import means, titles

CARD_WIDTH = 640  # pixels, twice the width of a card


@dataclass(frozen=True)
class Picture:
    """A PNG as base64, and its description."""

    data: str
    alt: str


@dataclass(frozen=True)
class Card:
    """A chapter on the front page."""

    entry: Entry
    question: str
    picture: Picture | None


@dataclass(frozen=True)
class Row:
    """A model in the chart: its accuracy as text, and where on the axis mean and interval lie, in percent of it."""

    title: str
    distilled: bool
    text: str
    low: float
    mean: float
    high: float


def front_page(paths: Sequence[Path]) -> str:
    """The front page, with a card for each of these notebooks."""
    return page(
        "front_page.html.j2",
        intro=readme_section("# "),
        start=readme_section("## Start"),
        hero=first_picture(paths[0]),
        sentence=result_sentence(),
        chart=result_chart(),
        parts=[(part, [card(path) for path in part.paths if path.suffix == ".ipynb"]) for part in parts(paths)],
    )


def readme_section(heading: str) -> str:
    """The text under the README's heading that begins like this, up to the next section, as HTML."""
    readme = (notebooks.ROOT / "README.md").read_text(encoding="utf-8")
    _, found, text = f"\n{readme}".partition(f"\n{heading}")
    if not found:
        raise ValueError(f"README.md has no heading {heading!r}, whose text the front page shows.")
    return PageRenderer(folder="").render(text.partition("\n")[2].partition("\n## ")[0])


def card(path: Path) -> Card:
    """The card of a chapter, with its first figure in small."""
    picture = first_picture(path)
    return Card(entry(path), inline(notebooks.question(path)), picture and Picture(_small(picture.data), picture.alt))


def first_picture(path: Path) -> Picture | None:
    """The first figure that a notebook stores."""
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                return Picture(output.data["image/png"], output.metadata["image/png"]["alt"])
    return None


def _small(data: str) -> str:
    """A PNG in the size and with the few colours that a card needs."""
    picture = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
    picture.thumbnail((CARD_WIDTH, CARD_WIDTH))
    buffer = io.BytesIO()
    picture.quantize(64).save(buffer, format="png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def result_sentence() -> str:
    """The result of the stored comparison in one sentence."""
    steps = stored_comparison()["choices"]["config"]["max_steps"]
    gain, transfer = (f"comparison: {arm} - {BASELINE}, accuracy" for arm in ("tuned_teacher", "transfer_set"))
    return (
        f"After {steps:,} optimiser steps, the student of a fine-tuned teacher is <strong>{number(gain)}</strong> more "
        f"accurate than the same student trained on the labels alone (95% interval {number(f'{gain}, interval')}), and "
        f"<strong>{number(transfer)}</strong> ({number(f'{transfer}, interval')}) more accurate when it also learns "
        "the teacher's outputs for further tweets without labels, the transfer set. (Differences are computed before "
        "rounding.)"
    )


def result_chart() -> dict[str, Any]:
    """The accuracy of the comparison's main arms and of the teacher: rows, and the ends of the axis as text."""
    stored = main_arms(stored_comparison())
    table = means(stored, "accuracy")
    first, last = table["low"].min() - 0.02, table["high"].max() + 0.02

    def row(title: str, distilled: bool, text: str, *values: float) -> Row:
        return Row(title, distilled, text, *(100 * (value - first) / (last - first) for value in values))

    teacher = stored["teachers"]["tuned"]["accuracy"]
    rows = [row("The tuned teacher itself", False, number("comparison: tuned, accuracy"), teacher, teacher, teacher)]
    for arm, title in titles(stored).items():
        mean, low, high = table.loc[arm]
        distilled = stored["arms"][arm]["recipe"]["teacher"] == "tuned"
        rows.append(row(title, distilled, number(f"comparison: {arm}, accuracy"), low, mean, high))
    return {"rows": rows, "seeds": len(stored["seeds"]), "first": f"{first:.0%}", "last": f"{last:.0%}"}
