"""Figures: one style, the same colour for the same thing in every notebook, and text beside each picture."""

from __future__ import annotations

import io
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Image, Markdown, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kd_helpers.experiments.comparison import main_arms
from kd_helpers.experiments.study import means, study_table, titles

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {
    "teacher": "#0072B2",
    "student": "#D55E00",
    "baseline": "#6B6B6B",
    "label_smoothing": "#B07A00",
    "untuned_teacher": "#CC79A7",
    "tuned_teacher": "#D55E00",
    "transfer_set": "#007A59",
    "more_labels": "#000000",
    "best_epoch": "#6B6B6B",
    "own_labels": "#56B4E9",
    "hard_labels": "#8A3B00",
}
LINESTYLES = {
    "teacher": "-",
    "student": "-",
    "baseline": "--",
    "label_smoothing": ":",
    "untuned_teacher": "-.",
    "tuned_teacher": "-",
    "transfer_set": (0, (5, 1)),
    "more_labels": (0, (3, 1, 1, 1)),
    "best_epoch": "--",
    "own_labels": "-.",
    "hard_labels": ":",
}
_DOTS_PER_INCH = 160  # sharp on screens with two pixels a point
_POINTS_PER_INCH = 80  # shown at half of that

STYLE = {
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "axes.axisbelow": True,
    "lines.linewidth": 2,
}


def use_course_style() -> None:
    """Give every figure that follows the course's look."""
    plt.rcParams.update(STYLE)


def show(figure: Figure, *, caption: str, alt: str) -> None:
    """Show a figure once, as PNG, with its caption below and its description for those who can't see it.

    Args:
        figure: is closed afterwards.
        caption: what to see in it, Markdown.
        alt: what stands in it, for screen readers.
    """
    picture, width = png(figure)
    plt.close(figure)
    # As metadata, which the IPython of Colab takes too: its Image has no argument for descriptions.
    display(Image(picture, format="png", width=width, metadata={"alt": alt}))
    display(Markdown(f"*{caption}*"))


def png(figure: Figure) -> tuple[bytes, int]:
    """A figure as PNG, sharp on dense screens, and the width in points at which to show it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH)
    return buffer.getvalue(), round(figure.get_size_inches()[0] * _POINTS_PER_INCH)


def label_line_end(axes: Axes, text: str, *, colour: str, line: int = -1, dy: float = 0.0) -> None:
    """Write a line's name behind its last point, in its colour, in place of a legend.

    Args:
        axes: holds the line.
        text: the name.
        colour: of the text.
        line: which of the axes' lines.
        dy: points to move the text up, where names would overlap.
    """
    x, y = axes.lines[line].get_xydata()[-1]
    axes.annotate(text, (x, y), xytext=(6, dy), textcoords="offset points", color=colour, va="center")


def heat_map(axes: Axes, cells: pd.DataFrame, title: str, *, colours: str, form: str) -> None:
    """Draw a table as a map with its numbers in it.

    Args:
        axes: to draw on.
        cells: rows downwards, columns across; index and columns are numbers. NaN stays white.
        title: above the map.
        colours: a matplotlib colour map.
        form: how numbers are written, e.g. ".1f".
    """
    image = axes.imshow(cells, cmap=colours, aspect="auto")
    axes.grid(False)
    axes.set_title(title)
    axes.set_xticks(range(cells.shape[1]), [f"{column:g}" for column in cells.columns])
    axes.set_yticks(range(cells.shape[0]), [f"{row:g}" for row in cells.index])
    for row, column in np.ndindex(cells.shape):
        value = cells.iloc[row, column]
        red, green, blue, _ = image.cmap(image.norm(value))
        dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
        axes.text(column, row, format(value, form), ha="center", va="center", color="white" if dark else "black")


def arms_figure(comparison: dict[str, Any]) -> tuple[Figure, str]:
    """Accuracy of the main arms: each seed a tick, the mean a dot with its number, its 95% interval a bar.

    Args:
        comparison: what `kd_helpers.experiments.comparison.compare` returns.

    Returns:
        The figure, and its description for those who can't see it.
    """
    comparison = main_arms(comparison)
    teacher, names = comparison["teachers"]["tuned"]["accuracy"], titles(comparison)
    by_seed, summary = study_table(comparison, "accuracy"), means(comparison, "accuracy")
    figure, axis = plt.subplots(figsize=(7, 0.45 * len(names) + 1.2))
    beside = axis.get_yaxis_transform()
    described = []
    for row, (arm, title) in enumerate(names.items()):
        mean, low, high = summary.loc[arm]
        axis.plot([low, high], [row, row], color=COLOURS[arm], linewidth=4, alpha=0.4)
        axis.plot(by_seed[arm], [row] * len(by_seed), "|", color=COLOURS[arm], markersize=11)
        axis.plot(mean, row, "o", color=COLOURS[arm], markersize=8)
        axis.text(1.02, row, f"{mean:.1%}", color=COLOURS[arm], va="center", transform=beside)
        described.append(f"{title} {mean:.1%} ({low:.1%} to {high:.1%})")
    axis.axvline(teacher, color=COLOURS["teacher"], linestyle=":")
    axis.text(teacher, -0.8, f"teacher {teacher:.1%} ", color=COLOURS["teacher"], ha="right", va="center")
    axis.set_yticks(range(len(names)), list(names.values()))
    axis.set_ylim(len(names) - 0.5, -1.2)
    axis.xaxis.set_major_formatter("{x:.0%}")
    axis.set_xlabel("accuracy on test: seeds, mean, 95% interval")
    return figure, f"Accuracy on test. Teacher {teacher:.1%}; " + "; ".join(described)


def benchmark_figure(table: pd.DataFrame) -> tuple[Figure, str]:
    """Seconds of every way of training the student: the median a bar, fastest to slowest round a line.

    Args:
        table: what `kd_helpers.experiments.benchmark.ways_table` returns.

    Returns:
        The figure, and its description for those who can't see it.
    """
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(table) + 1.2))
    for row, (way, values) in enumerate(table.iterrows()):
        colour = COLOURS["student"] if way.startswith("distillation") else COLOURS["baseline"]
        axes.barh(row, values["seconds"], color=colour, alpha=0.8, height=0.6)
        axes.plot([values["fastest"], values["slowest"]], [row, row], color="black", linewidth=1.5)
        axes.text(values["slowest"], row, f"  {values['seconds']:.1f} s, {values['times']:.2f} ×", va="center")
    axes.set_yticks(range(len(table)), table.index)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 1.25 * table["slowest"].max())
    axes.set(xlabel="seconds (less is better)", title="One student, the same texts and epochs")
    described = [f"{way} {values['seconds']:.1f} s ({values['times']:.2f} times)" for way, values in table.iterrows()]
    return figure, "Median seconds, and times the course's distillation: " + "; ".join(described)
