"""Where a stored result comes from, in a sentence or two for its readers.

Apart from `study`, so that other words change the code of no study.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kd_helpers import artifacts
from kd_helpers.experiments import RESULTS
from kd_helpers.provenance import source_digest

AGAIN = RESULTS / "again.json"


def is_current(result: Mapping[str, Any]) -> bool:
    """Whether a stored result was made by the code of today. Results of version 0.4.0 and before name no code."""
    made = result["made_with"]
    return "source" in made and made["source"] == source_digest(made["module"])


def origin(result: Mapping[str, Any]) -> str:
    """What made a stored result, and when; if its code has changed since, what today's code gives in its place.

    Runs that were made again are those of `again`.
    """
    made = result["made_with"]
    first = f"Made with torch {made['torch']} on {made['date']}."
    if is_current(result):
        return first
    return f"{first} Parts of its code have changed since then{_made_again(result)}."


def made_again() -> dict[str, Any]:
    """The runs of stored studies that were made again, and what they gave (see `again.make_again`)."""
    return artifacts.load_json(AGAIN)


def _made_again(result: Mapping[str, Any]) -> str:
    run = next((run for run in made_again().values() if _is_of(run, result)), None)
    if run is None:
        return ", and it has not been repeated"
    other = [
        f"{name} {again:.4f} (stored: {stored:.4f})"
        for name, (stored, again) in run["measures"].items()
        if again != stored
    ]
    found = "the same numbers"
    if other:
        found = f"other numbers, perhaps because of the new code or another processor: {', '.join(other)}"
    return f"; one of its runs, repeated on {run['date']}, gave {found}"


def _is_of(run: Mapping[str, Any], result: Mapping[str, Any]) -> bool:
    """Whether a run that was made again is one of a result's, and not of another part that was made on the same day."""
    if run["of"] != {name: result["made_with"].get(name) for name in run["of"]}:
        return False
    measures = {name: stored for name, (stored, _) in run["measures"].items()}
    return any(
        (stored["arm"], stored["seed"]) == (run["arm"], run["seed"])
        and measures == {name: stored.get(name) for name in measures}
        for stored in result["runs"]
    )
