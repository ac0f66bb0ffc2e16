"""Numbers in Markdown: what a stored result says, written into the text and kept true.

A number that comes from a stored result is followed by a marker, an HTML comment that no reader sees:

    The tuned teacher's student is 5.6 points<!-- comparison: tuned_teacher - baseline, accuracy --> better
    (4.8 to 6.5<!-- comparison: tuned_teacher - baseline, accuracy, interval -->).

`make notebooks` writes the numbers, and a test fails where one is stale. The marker names the study, the arm (or the
arm minus another, seed by seed), the measure, and, for its 95% interval, `interval`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from kd_helpers.experiments.study import STUDIES, gains, means, stored_study

_NUMBER = r"[−-]?\d[\d,]*(?:\.\d+)?%?"
# The number, or two with "to" between them, its unit, and the marker.
MARKED = re.compile(rf"(?:{_NUMBER} to )?{_NUMBER}(?: (?:points?|nats))?<!-- (?P<spec>\w+: [^>]+?) -->")
# Measures that are shares: in percent, and their differences in points.
SHARES = ("accuracy", "macro_recall", "macro_f1", "fidelity", "language_accuracy", "again_accuracy", "validation")
# Numbers that no study has, by the name of the marker; each function returns the number as it is written.
OTHERS: dict[str, Callable[[str], str]] = {}


def fill(text: str) -> str:
    """The text with every marked number as the stored results have it.

    Raises:
        ValueError: a marker names a study, an arm or a measure that does not exist.
    """
    return MARKED.sub(lambda match: f"{number(match['spec'])}<!-- {match['spec']} -->", text)


def without_marked(text: str) -> str:
    """The text without marked numbers: what is left must hold no measured number."""
    return MARKED.sub("", text)


def number(spec: str) -> str:
    """What a marker stands for, as it is written: "5.6 points", "4.8 to 6.5", "72.0%", "0.59".

    Args:
        spec: `study: arm, measure`, `study: arm - other arm, measure`, or either with `, interval` at its end.

    Raises:
        ValueError: there is no such study, arm or measure.
    """
    study, _, rest = spec.partition(": ")
    if study in OTHERS:
        return OTHERS[study](rest)
    if study not in STUDIES:
        raise ValueError(f"the marker {spec!r} names no study; name one of {', '.join((*STUDIES, *OTHERS))}.")
    arms, measure, *interval = (part.strip() for part in rest.split(","))
    arm, _, other = (part.strip() for part in arms.partition(" - "))
    try:
        value, low, high = _interval(study, arm, other, measure)
    except KeyError as error:
        raise ValueError(f"the marker {spec!r} names {error}, which the study does not have.") from error
    share = measure in SHARES
    if interval:
        return f"{_written(low, share)} to {_written(high, share)}" + ("" if other or not share else "%")
    unit = "" if not share else " points" if other else "%"
    return f"{_written(value, share)}{unit}"


def _interval(study: str, arm: str, other: str, measure: str) -> tuple[float, float, float]:
    """The mean over the seeds of an arm's measure, or of its difference to another arm, with its 95% interval."""
    result = _stored(study)
    if arm in result.get("teachers", {}) and measure in result["teachers"][arm]:  # measured once, not by seed
        value = result["teachers"][arm][measure]
        return (value, value, value)
    table = gains(result, measure, over=other) if other else means(result, measure)
    return tuple(table.loc[arm])


@functools.cache
def _stored(study: str) -> Mapping[str, Any]:
    return stored_study(study)


def _written(value: float, share: bool) -> str:
    """One digit behind the point for shares in percent, else two, or three where the value is small."""
    if share:
        return f"{100 * value:.1f}".replace("-", "−")
    return f"{value:.3f}".replace("-", "−") if abs(value) < 0.1 else f"{value:.2f}".replace("-", "−")
