"""The study of steps and texts: its runs are those of the comparison."""

from __future__ import annotations

import dataclasses

import pytest

from kd_helpers.experiments import comparison, patience
from kd_helpers.experiments.study import run_arm


@pytest.fixture
def folders(own_artifacts, monkeypatch):
    """Where the runs of a study are, none of which trains anything."""
    monkeypatch.setattr(comparison, "read_corpus", lambda config: "the course's tweets")  # they take a second
    monkeypatch.setattr(comparison, "corpus_digest", lambda corpus: "their digest")

    def of(study) -> dict[tuple[str, int], str]:
        study = dataclasses.replace(study, run=lambda *_: {})
        return {(arm, seed): run_arm(study, arm, seed)["folder"] for arm in study.arms for seed in study.seeds}

    return of


def test_a_thousand_steps_and_no_new_texts_are_runs_of_the_comparison(folders):
    made = folders(comparison.comparison_study(comparison.COMPARISON))
    thousand, texts = folders(patience.length_study(1000)), folders(patience.texts_study())
    assert thousand.items() <= made.items()
    assert {key for key, folder in texts.items() if made.get(key) == folder} == {
        (arm, seed) for arm in ("tuned_teacher", "transfer_set") for seed in comparison.COMPARISON_SEEDS
    }
    other = folders(patience.length_study(125))
    assert not set(other.values()) & set(made.values())


def test_the_arms_of_the_texts_differ_in_their_number_alone():
    arms = patience.texts_study().arms
    assert next(iter(arms)) == "tuned_teacher"
    assert [*arms][-1] == "transfer_set"
    recipes = [arm.recipe for name, arm in arms.items() if name.startswith("new_texts")]
    assert [recipe.new_texts for recipe in recipes] == [2500, 5000, 10_000, 14_131]
    assert len({dataclasses.replace(recipe, new_texts=0) for recipe in recipes}) == 1


def test_a_table_has_the_baseline_at_both_of_its_moments():
    def runs(steps: int) -> list[dict]:
        return [
            {"arm": "best_epoch", "seed": 0, "accuracy": 0.7, "last_accuracy": steps / 10_000},
            {"arm": "tuned_teacher", "seed": 0, "accuracy": 0.8},
        ]

    table = patience.by_steps({f"{steps}_steps": {"runs": runs(steps)} for steps in patience.STEPS})
    assert list(table.columns) == ["baseline", "best_epoch", "tuned_teacher"]
    assert table["baseline"].tolist() == [steps / 10_000 for steps in patience.STEPS]
    assert table.loc[(125, 0), "best_epoch"] == 0.7


def test_the_best_baseline_is_chosen_on_validation_among_all_lengths():
    """Seed 0 is best after 250 steps, seed 1 after 125; what is measured on test has no say."""
    best_on_validation = {(125, 0): 0.70, (250, 0): 0.75, (125, 1): 0.8}

    def runs(steps: int) -> list[dict]:
        return [
            {
                "arm": "best_epoch",
                "seed": seed,
                "accuracy": steps / 10_000 + seed / 10,
                "history": [{"accuracy": best_on_validation.get((steps, seed), 0.5)}, {"accuracy": 0.4}],
            }
            for seed in (0, 1)
        ]

    found = patience.best_baseline({f"{steps}_steps": {"runs": runs(steps)} for steps in patience.STEPS})
    assert found.to_dict() == pytest.approx({0: 0.025, 1: 0.1125})


def test_what_each_run_predicted_is_not_stored_twice(monkeypatch):
    made = {"arms": {}, "runs": [{"arm": "tuned_teacher", "accuracy": 0.8, "predicted": "0 1", "confusion": [[1]]}]}
    monkeypatch.setattr(patience, "run_study", lambda study: made)
    monkeypatch.setattr(patience, "comparison_study", lambda config, **arms: comparison.Study("", "", {}, (), {}, None))
    stored = patience.study()
    assert stored["runs"] == stored["125_steps"]["runs"] == [{"arm": "tuned_teacher", "accuracy": 0.8}]
