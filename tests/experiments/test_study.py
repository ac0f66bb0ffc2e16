"""A study: every arm with every seed, made once, kept, compared seed by seed."""

from __future__ import annotations

import json

import pytest

from kd_helpers import artifacts
from kd_helpers.experiments import study
from kd_helpers.experiments.study import gains, means, run_study, stored_study, study_table


@pytest.fixture
def asked() -> list[tuple[str, int]]:
    return []


@pytest.fixture
def arms(asked):
    """An arm that scores its seed, one that scores 10 more, and one that scores twice as much as the first."""

    def arm(name, score):
        def run(seed: int) -> dict[str, float]:
            asked.append((name, seed))
            return {"score": score(seed)}

        return run

    return {
        "plain": arm("plain", float),
        "ten": arm("ten", lambda s: s + 10.0),
        "twice": arm("twice", lambda s: 2.0 * s),
    }


def test_every_arm_meets_every_seed_once(own_artifacts, arms, asked):
    study = run_study("test", arms, (1, 3), choices={"steps": 5})
    assert asked == [(arm, seed) for seed in (1, 3) for arm in arms]
    assert json.loads(json.dumps(study)) == study
    assert run_study("test", arms, (1, 3), choices={"steps": 5})["runs"] == study["runs"]
    assert len(asked) == 6, "found again"
    run_study("test", arms, (1, 3), choices={"steps": 6})
    assert len(asked) == 12, "other choices are another study"


def test_a_study_goes_on_where_it_was_cut_off(own_artifacts, arms, asked):
    def cut_off(seed: int) -> dict[str, float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study("test", {**arms, "twice": cut_off}, (1, 3), choices={})
    assert asked == [("plain", 1), ("ten", 1)]
    run_study("test", arms, (1, 3), choices={})
    assert asked.count(("plain", 1)) == 1


def test_arms_are_compared_seed_by_seed(own_artifacts, arms):
    study = run_study("test", arms, (1, 3), choices={})
    assert list(study_table(study, "score")) == ["plain", "ten", "twice"]
    assert means(study, "score")["mean"].to_dict() == {"plain": 2.0, "ten": 12.0, "twice": 4.0}
    gain = gains(study, "score", over="plain")
    assert gain.loc["ten"].to_list() == [10.0, 10.0, 10.0], "the same for each seed: no spread"
    assert gain.loc["twice", "gain"] == 2.0
    assert gain.loc["twice", "low"] < 0 < gain.loc["twice", "high"]


def test_the_command_stores_a_study(own_artifacts, monkeypatch, tmp_path):
    monkeypatch.setattr(artifacts, "RESULTS", tmp_path)
    made = {"made_with": {}, "choices": {}, "runs": []}
    monkeypatch.setattr(
        "kd_helpers.studies.importlib.import_module", lambda name: type("M", (), {"study": lambda: made})
    )
    studies.main(["dark_knowledge"])
    assert stored_study("dark_knowledge") == made
    with pytest.raises(SystemExit):
        studies.main(["other"])
