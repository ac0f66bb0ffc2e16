"""The study that holds the verdict to account: what its verdicts are asked about, and what came out."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from kd_helpers.experiments.judgement import PAYS
from kd_helpers.experiments.text_sets import TWEETS, all_texts
from kd_helpers.experiments.verdict_study import ARMS, TEACHER_LABELS, TEXTS, draw, shares, stored_verdicts

stored = pytest.fixture(scope="module")(stored_verdicts)


def test_a_draw_has_its_sizes_and_other_texts_for_another_seed():
    case, whole = ARMS["random_head"].recipe, all_texts(TWEETS, TEACHER_LABELS)
    first, again, other = (draw(whole, case, seed) for seed in (0, 0, 1))
    sizes = [len(part) for part in (first.train, first.validation, first.test)]
    assert sizes == [case.labels, case.validation, case.test]
    assert first.train["id"][:] == again.train["id"][:]
    for part in ("train", "validation", "test"):
        assert getattr(first, part)["id"][:] != getattr(other, part)["id"][:]
    ids = [number for part in ("train", "validation", "test") for number in getattr(first, part)["id"][:]]
    assert len(set(ids)) == len(ids)


def test_shuffled_labels_are_the_same_labels_of_the_same_texts_in_another_order():
    found = draw(all_texts(TWEETS, TEACHER_LABELS), ARMS["shuffled_labels"].recipe, 0)
    assert found.teacher_train["id"][:] == found.train["id"][:]
    dealt, true = (np.array(part["label"][:]) for part in (found.teacher_train, found.train))
    assert sorted(dealt) == sorted(true)
    chance = ((np.bincount(true) / len(true)) ** 2).sum()
    assert (dealt == true).mean() == pytest.approx(chance, abs=0.1)


def test_the_tuned_teacher_has_seen_the_labels_of_the_student_and_no_held_out_text():
    found = draw(all_texts(TWEETS, TEACHER_LABELS), ARMS["tuned"].recipe, 3)
    seen = set(found.teacher_train["id"][:])
    assert len(seen) == TEACHER_LABELS
    assert set(found.train["id"][:]) <= seen
    assert not seen & {*found.validation["id"][:], *found.test["id"][:]}


def test_shares_by_hand():
    runs = [
        {"arm": arm, "pays": number < 1, "unfinished": ["baseline"] if number > 7 else []}
        for arm in ("random_head", "shuffled_labels")
        for number in range(10)
    ]
    runs += [{"arm": "tuned", "pays": number < 9, "unfinished": []} for number in range(10)]
    table = shares({"arms": dict.fromkeys(ARMS), "runs": runs})
    assert table.loc["ignorant", ["pays", "verdicts", "share"]].tolist() == [2, 20, 0.1]
    assert table.loc["ignorant, finished", ["pays", "verdicts"]].tolist() == [2, 16]
    assert table.loc["tuned", "share"] == 0.9
    assert table.loc["tuned", "low"] == pytest.approx(stats.beta.ppf(0.025, 9, 2))
    assert table.loc["ignorant", "high"] == pytest.approx(stats.beta.ppf(0.975, 3, 18))


def test_the_stored_verdicts_are_right_as_often_as_promised(stored):
    table = shares(stored)
    assert table.loc["ignorant", "verdicts"] >= 40
    assert table.loc["ignorant", "share"] <= 0.05
    assert table.loc["tuned", "share"] >= 0.9


def test_what_a_stored_verdict_says_follows_from_its_answers(stored):
    for run in stored["runs"]:
        asked = [entry["answer"] for entry in run["questions"] if entry["question"] != "teacher"]
        assert run["pays"] == (PAYS in asked)
        assert {entry["answer"] for entry in run["questions"]} <= {PAYS, "does not pay", "cannot tell", "unfinished"}
    assert {run["texts"] for run in stored["runs"] if run["arm"] != "tuned"} == set(TEXTS)
