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


def test_lengths_are_runs_of_the_comparison_in_a_fixed_precision(folders):
    made = folders(comparison.comparison_study(patience.CONFIG))
    assert folders(patience.length_study(patience.CONFIG.max_steps)).items() <= made.items()
    other = folders(patience.length_study(125))
    assert other.keys() <= made.keys()
    assert not set(other.values()) & set(made.values())
    assert patience.length_study(1000).seeds == comparison.COMPARISON_SEEDS
    assert patience.length_study(2000).seeds == patience.LONG_SEEDS == comparison.COMPARISON_SEEDS[:3]


def test_the_arms_of_the_texts_differ_in_their_number_alone():
    recipes = [arm.recipe for arm in patience.texts_study().arms.values()]
    assert [recipe.new_texts for recipe in recipes] == [2500, 7000, 14_131]
    assert {dataclasses.replace(recipe, new_texts=0) for recipe in recipes} == {comparison.ARMS["transfer_set"].recipe}


@pytest.fixture
def no_comparison(monkeypatch) -> dict:
    """A stored comparison that a test fills."""
    stored = {"runs": []}
    monkeypatch.setattr(patience, "stored_study", lambda name: {"comparison": stored}[name])
    return stored


def test_a_table_has_the_baseline_at_both_of_its_moments(no_comparison):
    def runs(steps: int) -> list[dict]:
        return [
            {"arm": "best_epoch", "seed": 0, "accuracy": 0.7, "last_accuracy": steps / 10_000},
            {"arm": "tuned_teacher", "seed": 0, "accuracy": 0.8},
        ]

    no_comparison["runs"] = [*runs(1000), {"arm": "hard_labels", "seed": 0, "accuracy": 0.6}]
    table = patience.by_steps({f"{steps}_steps": {"runs": runs(steps)} for steps in patience.STEPS if steps != 1000})
    assert list(table.columns) == ["best_epoch", "tuned_teacher", "baseline"]
    assert table["baseline"].tolist() == [steps / 10_000 for steps in patience.STEPS]
    assert table.loc[(125, 0), "best_epoch"] == 0.7


def test_the_best_baseline_is_chosen_on_validation_among_all_lengths(no_comparison):
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

    no_comparison["runs"] = runs(1000)
    found = patience.best_baseline({f"{steps}_steps": {"runs": runs(steps)} for steps in patience.STEPS})
    assert found.to_dict() == pytest.approx({0: 0.025, 1: 0.1125})


def test_without_further_texts_a_student_is_that_of_the_comparison(no_comparison):
    no_comparison["runs"] = [
        {"arm": arm, "seed": seed, "accuracy": accuracy + seed / 100}
        for arm, accuracy in (("tuned_teacher", 0.7), ("transfer_set", 0.9))
        for seed in (0, 1)
    ]
    stored = {"runs": [{"arm": "new_texts_2500", "seed": seed, "accuracy": 0.8 + seed / 100} for seed in (0, 1)]}
    table = patience.by_texts(stored)
    assert table.columns.tolist() == [0, 2500]
    assert table[0].tolist() == pytest.approx([0.7, 0.71])
    assert table[2500].tolist() == pytest.approx([0.8, 0.81])


def test_what_each_run_predicted_is_not_stored_twice(monkeypatch):
    made = {"arms": {}, "runs": [{"arm": "tuned_teacher", "accuracy": 0.8, "predicted": "0 1", "confusion": [[1]]}]}
    monkeypatch.setattr(patience, "run_study", lambda study: made)
    monkeypatch.setattr(
        patience, "comparison_study", lambda config, **options: comparison.Study("", "", {}, (), {}, None)
    )
    stored = patience.study()
    assert [f"{steps}_steps" for steps in patience.STEPS if f"{steps}_steps" not in stored] == ["1000_steps"]
    assert stored["runs"] == stored["125_steps"]["runs"] == [{"arm": "tuned_teacher", "accuracy": 0.8}]
