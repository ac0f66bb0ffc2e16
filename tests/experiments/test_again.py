"""One run of every stored study is made again by the code of today, and held to what is stored.

What takes seconds is in `make test`, the rest in `make test-longer`.
"""

from __future__ import annotations

import dataclasses
import datetime
import statistics
from pathlib import Path

import pytest

from kd_helpers import artifacts
from kd_helpers.course.full_sweep import SWEPT
from kd_helpers.experiments import again, origin, patience
from kd_helpers.experiments.again import ENTRIES, SEED, Entry, OtherChoicesError, make_again, stored_part
from kd_helpers.experiments.origin import made_again
from kd_helpers.experiments.studies import STUDIES
from kd_helpers.experiments.study import Arm, Study, run_study, stored_study
from kd_helpers.experiments.sweep import stored_sweep, sweep

QUICK = ("dark_knowledge", "survey", "survey.subliminal", "survey.calibration")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.longer) for name in ENTRIES]
)
def test_a_run_that_is_made_again_gives_what_is_stored(name, own_artifacts_but_teacher):
    """Another processor rounds in another order, and then runs part as two seeds do: four standard deviations."""
    try:
        measures = make_again(name)["measures"]
    except (OtherChoicesError, FileNotFoundError) as error:  # until the study is made again, or its texts are here
        pytest.skip(str(error))
    assert measures.keys() == set(ENTRIES[name].measures)
    of_arm = [run for run in stored_part(name)["runs"] if run["arm"] == ENTRIES[name].arm]
    for measure, (stored, now) in measures.items():
        spread = statistics.stdev(float(run[measure]) for run in of_arm)
        assert now == pytest.approx(stored, abs=4 * spread), measure


def test_the_quick_ones_have_the_choices_of_today(own_artifacts, monkeypatch):
    """So none of them is skipped."""

    class ReachedError(Exception):
        pass

    def run(*_arguments):
        raise ReachedError

    monkeypatch.setattr(again, "run_arm", run)
    for name in QUICK:
        with pytest.raises(ReachedError):
            make_again(name)


@pytest.mark.longer
def test_one_run_of_the_stored_sweep_is_what_a_new_run_gives(own_artifacts_but_teacher, tmp_path):
    sought = {"temperature": 4.0, "alpha": 0.9, "seed": 0}
    stored = next(run for run in stored_sweep()["runs"] if sought.items() <= run.items())
    grid = {name: [value] for name, value in sought.items()}
    # As one of two jobs it gets one thread, as in the stored sweep, whatever else runs.
    (run,) = sweep(SWEPT, grid, fixed=stored_sweep()["fixed"], out=tmp_path / "out", jobs=2).to_dict("records")
    assert run["status"] == "finished", run["error"]
    for measure, tolerance in (("accuracy", 0.02), ("macro_recall", 0.02), ("nll", 0.06)):
        assert run[f"test_{measure}"] == pytest.approx(stored[f"test_{measure}"], abs=tolerance)


def test_every_study_and_part_that_names_its_code_has_an_entry():
    named = {name: stored_study(name) for name in STUDIES}
    named |= {
        f"{name}.{part}": value
        for name, stored in named.items()
        for part, value in stored.items()
        if isinstance(value, dict) and "made_with" in value
    }
    expected = {name for name, stored in named.items() if "source" in stored["made_with"]}  # since 0.5.0
    # Of chapter 07's lengths the shortest stands for all: a longer run has the same code.
    assert ENTRIES.keys() == expected - {f"patience.{steps}_steps" for steps in patience.STEPS[1:]}


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_names_a_stored_run_and_its_measures(name):
    entry, stored = ENTRIES[name], stored_part(name)
    (run,) = (run for run in stored["runs"] if (run["arm"], run["seed"]) == (entry.arm, SEED))
    assert set(entry.measures) <= run.keys()


def test_what_was_made_again_is_of_what_is_stored():
    """Or readers would be told of an older result."""
    for name, found in made_again().items():
        entry, stored = ENTRIES[name], stored_part(name)
        assert found["of"] == {key: stored["made_with"][key] for key in found["of"]}
        assert (found["arm"], found["seed"]) == (entry.arm, SEED)
        (run,) = (run for run in stored["runs"] if (run["arm"], run["seed"]) == (entry.arm, SEED))
        assert {measure: then for measure, (then, _) in found["measures"].items()} == {
            measure: float(run[measure]) for measure in entry.measures
        }


# The command


@dataclasses.dataclass(frozen=True)
class Plus:
    plus: float


@pytest.fixture
def small(own_artifacts, monkeypatch, tmp_path) -> Path:
    """Two stored studies of one arm, and the file of what is made again."""

    def built(plus: float, texts: str = "one") -> Study:
        arms, choices = {"only": Arm("Only", Plus(plus))}, {"texts": texts}
        return Study(
            "small", "kd_helpers.experiments.study", arms, (0,), choices, lambda r, s, _: {"score": s + r.plus}
        )

    stored = tmp_path / "again.json"
    for module in (again, origin):
        monkeypatch.setattr(module, "AGAIN", stored)
    entries = {
        "same": Entry(lambda _: built(0.5), "only", ("score",)),
        "other": Entry(lambda _: built(1), "only", ("score",)),
        "other_texts": Entry(lambda _: built(0.5, "two"), "only", ("score",)),
    }
    monkeypatch.setattr(again, "ENTRIES", entries)
    monkeypatch.setattr(again, "stored_study", lambda _name: run_study(built(0.5)))
    return stored


def test_the_command_stores_what_runs_gave(small, capsys):
    assert again.main(["same"]) == 0
    assert capsys.readouterr().out == "same, only, seed 0: score 0.5000 (stored: 0.5000)\n"
    assert list(artifacts.load_json(small)) == ["same"]
    assert again.main(["same", "other"]) == 0
    assert "other, only, seed 0: score 1.0000 (stored: 0.5000)\n" in capsys.readouterr().out
    stored = artifacts.load_json(small)
    assert {name: run["measures"] for name, run in stored.items()} == {
        "other": {"score": [0.5, 1.0]},
        "same": {"score": [0.5, 0.5]},
    }
    assert stored["same"]["date"] == datetime.date.today().isoformat()


def test_a_study_that_would_be_made_with_other_choices_is_left_out(small, capsys):
    assert again.main([]) == 1
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 2
    assert printed.err.endswith(
        "other_texts: the stored study and today's differ in their choices (texts), so one run would show nothing; "
        "make the whole study again: `kd-helpers study other_texts`.\n"
    )
    assert artifacts.load_json(small).keys() == {"same", "other"}


def test_a_study_that_has_no_entry_is_refused(small, capsys):
    with pytest.raises(SystemExit) as stopped:
        again.main(["same", "another"])
    assert stopped.value.code == 2
    assert "there is no stored run of another; choose from same, other, other_texts." in capsys.readouterr().err
    assert not small.exists()
