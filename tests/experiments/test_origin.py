"""What readers are told of where a stored result comes from."""

from __future__ import annotations

import datetime
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
from nbval.plugin import get_sanitize_patterns

from kd_helpers.experiments import origin as told
from kd_helpers.experiments.origin import is_current, origin
from kd_helpers.experiments.studies import STUDIES
from kd_helpers.experiments.study import made_with, stored_study

MODULE = "kd_helpers.experiments.dark_knowledge"
CHANGED = " Parts of its code have changed since then"
OF = {"module": MODULE, "source": "0123456789abcdef", "date": "2030-01-02"}


def made_then(**changes: str) -> dict[str, Any]:
    runs = [{"arm": arm, "seed": 0, "accuracy": 0.75, "nll": 0.5} for arm in ("one", "two")]
    return {"made_with": made_with(MODULE) | OF | {"torch": "9.9"} | changes, "runs": runs}


def run_again(arm: str = "one", **measures: list[float]) -> dict[str, Any]:
    return {"of": OF, "arm": arm, "seed": 0, "source": "f" * 16, "date": "2031-02-03", "measures": measures}


@pytest.fixture
def again(monkeypatch) -> dict[str, Any]:
    """The runs that were made again: none, unless a test adds some."""
    runs: dict[str, Any] = {}
    monkeypatch.setattr(told, "made_again", lambda: runs)
    return runs


def test_of_a_result_of_todays_code_the_day_is_told():
    result = {"made_with": made_with(MODULE)}
    assert is_current(result)
    assert origin(result) == f"Made with torch {result['made_with']['torch']} on {datetime.date.today().isoformat()}."


def test_of_a_result_of_other_code_that_it_has_changed(again):
    no_code = {name: value for name, value in made_then()["made_with"].items() if name not in ("source", "module")}
    for result in (made_then(), made_then() | {"made_with": no_code}):
        assert not is_current(result)
        said = f"Made with torch 9.9 on 2030-01-02.{CHANGED}, and it has not been repeated."
        assert origin(result) == said


def test_and_what_a_run_gave_that_was_made_again(again):
    start = f"Made with torch 9.9 on 2030-01-02.{CHANGED}; one of its runs, repeated on 2031-02-03, gave "
    again["one"] = run_again(accuracy=[0.75, 0.75])
    assert origin(made_then()) == f"{start}the same numbers."
    again["one"] = run_again(accuracy=[0.75, 0.7501], nll=[0.5, 0.5])
    said = "other numbers, perhaps because of the new code or another processor: accuracy 0.7501 (stored: 0.7500)."
    assert origin(made_then()) == start + said


@pytest.mark.parametrize("other", [{"arm": "three"}, {"seed": 1}, {"measures": {"accuracy": [0.7, 0.7]}}])
def test_a_run_of_another_part_says_nothing_of_this_one(again, other):
    again["one"] = run_again(accuracy=[0.75, 0.75]) | other
    assert origin(made_then()).endswith(f"{CHANGED}, and it has not been repeated.")


@pytest.mark.parametrize("other", [{"date": "2030-01-03"}, {"source": "a" * 16}, {"module": "kd_helpers.loop"}])
def test_a_run_of_another_result_says_nothing_of_this_one(again, other):
    again["one"] = run_again(accuracy=[0.75, 0.75])
    assert origin(made_then(**other)).endswith(f"{CHANGED}, and it has not been repeated.")


@pytest.mark.parametrize("width", [30, 60, 88])
@pytest.mark.parametrize("measures", [{}, {"accuracy": [0.75, 0.75]}, {"accuracy": [0.75, 0.76], "nll": [0.5, 0.25]}])
def test_the_notebooks_are_compared_without_what_another_version_of_the_code_adds(again, measures, width):
    if measures:
        again["one"] = run_again(**measures)
    today = {"made_with": made_then()["made_with"] | {"source": made_with(MODULE)["source"]}}
    ((pattern, replacement),) = get_sanitize_patterns(
        (Path(__file__).parents[1] / "notebooks/sanitize.ini").read_text()
    )
    assert re.sub(pattern, replacement, textwrap.fill(origin(made_then()), width)) == textwrap.fill(
        origin(today), width
    )


@pytest.mark.parametrize("name", STUDIES)
def test_a_stored_study_says_where_it_comes_from(name):
    stored = stored_study(name)
    made, said = stored["made_with"], origin(stored)
    assert said.startswith(f"Made with torch {made['torch']} on {made['date']}.")
    datetime.date.fromisoformat(made["date"])
    if "source" not in made:  # of 0.4.0 and before
        assert not is_current(stored)
    assert (CHANGED in said) == (not is_current(stored))
