"""Estimates over seeds and texts, and the answers that are drawn from them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from kd_helpers.experiments.judgement import (
    CANNOT_TELL,
    DOES_NOT_PAY,
    PAYS,
    answer,
    crossed,
    needed,
    text_weights,
)


def naive_components(table: np.ndarray) -> tuple[float, float, float]:
    """Mean squares of seeds, texts and the rest, cell by cell."""
    seeds, texts = table.shape
    mean = table.mean()
    of_seeds = sum(texts * (table[s].mean() - mean) ** 2 for s in range(seeds)) / (seeds - 1)
    of_texts = sum(seeds * (table[:, t].mean() - mean) ** 2 for t in range(texts)) / (texts - 1)
    rest = sum(
        (table[s, t] - table[s].mean() - table[:, t].mean() + mean) ** 2
        for s, t in itertools.product(range(seeds), range(texts))
    ) / ((seeds - 1) * (texts - 1))
    return of_seeds, of_texts, rest


def test_the_components_are_those_of_a_two_way_table():
    table = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], size=(4, 30), p=[0.1, 0.7, 0.2])
    table += np.array([[0.5], [0.0], [-0.5], [0.2]])
    of_seeds, of_texts, rest = naive_components(table)
    found = crossed(table)
    assert found.gain == pytest.approx(table.mean())
    assert found.of_seeds == pytest.approx(max(0, (of_seeds - rest) / 30))
    assert found.of_texts == pytest.approx(max(0, (of_texts - rest) / 4))
    assert found.of_both == pytest.approx(rest)
    assert (found.seeds, found.texts, found.level) == (4, 30, 0.95)


def test_one_seed_gives_the_t_interval_over_texts_but_for_one_more_disagreement():
    row = np.random.default_rng(1).choice([-1.0, 0.0, 1.0], size=500)
    found = crossed(row)
    error = np.sqrt(row.var(ddof=1) / 500 + 1 / 500**2)
    half = error * stats.t.ppf(0.975, 499)
    assert (found.low, found.high) == (pytest.approx(row.mean() - half), pytest.approx(row.mean() + half))


def test_two_arms_that_always_agree_are_not_known_to_be_equal():
    found = crossed(np.zeros((3, 40)))
    assert found.gain == 0
    assert found.high == pytest.approx(-found.low)
    assert found.high == pytest.approx(stats.t.ppf(0.975, 39) / 40)


@pytest.mark.parametrize("spread", [0.0, 0.01])
def test_the_interval_holds_the_truth_as_often_as_it_says(spread):
    """Both seeds and texts are drawn; 95% of 600 intervals hold 0, give or take."""
    rng = np.random.default_rng(2)
    seeds, texts, missed = 5, 400, 0
    for _ in range(600):
        of_text = rng.choice([-0.4, 0.0, 0.4], size=texts, p=[0.1, 0.8, 0.1])
        chance = of_text + rng.normal(0, spread, size=(seeds, 1))
        draws = rng.random((seeds, texts))
        better, worse = np.clip(0.05 + chance / 2, 0, 1), np.clip(0.05 - chance / 2, 0, 1)
        table = (draws < better).astype(float) - (draws > 1 - worse)
        found = crossed(table)
        missed += not found.low <= 0 <= found.high
    assert 0.005 <= missed / 600 <= 0.075


def test_macro_recall_is_the_weighted_mean_of_right_answers():
    labels = np.array([0] * 90 + [1] * 9 + [2])
    right = np.array([1] * 45 + [0] * 45 + [1] * 6 + [0] * 3 + [1])
    weights = text_weights(labels, "macro_recall")
    assert weights.mean() == pytest.approx(1)
    assert (weights * right).mean() == pytest.approx((1 / 2 + 2 / 3 + 1) / 3)
    assert text_weights(labels, "accuracy").tolist() == [1.0] * 100


def test_four_texts_of_a_rare_class_do_not_decide():
    """They are all that the arms differ in. A sign test of four texts has p = 0.125."""
    labels = np.array([0] * 296 + [1] * 4)
    difference = (labels == 1).astype(float)
    found = crossed(difference, text_weights(labels, "macro_recall"))
    assert found.gain == pytest.approx(0.5)
    assert found.low < 0 < found.high


def test_the_interval_of_macro_recall_holds_the_truth_as_often_as_it_says():
    """A class of 5% decides half of it; 95% of 400 intervals hold 0, give or take."""
    rng = np.random.default_rng(5)
    labels = np.array([0] * 380 + [1] * 20)
    weights, missed = text_weights(labels, "macro_recall"), 0
    for _ in range(400):
        draws = rng.random((4, 400)) + rng.normal(0, 0.3, size=400)
        found = crossed((draws < 0.1).astype(float) - (draws > 0.9), weights)
        missed += not found.low <= 0 <= found.high
    assert missed / 400 <= 0.075


def table_of(gain: float, texts: int = 4000, seeds: int = 3) -> np.ndarray:
    """Differences with this mean, from 10% of the texts, the same for all seeds."""
    better = round(texts * (0.1 + gain) / 2)
    row = np.zeros(texts)
    row[:better], row[better : round(0.1 * texts)] = 1, -1
    return np.tile(row, (seeds, 1))


@pytest.mark.parametrize(
    ("gain", "texts", "expected"),
    [
        (0.04, 4000, PAYS),
        (-0.03, 4000, DOES_NOT_PAY),
        (0.0, 40_000, DOES_NOT_PAY),  # shown to be too small to matter
        (0.0, 1000, CANNOT_TELL),
        (0.02, 400, CANNOT_TELL),
        (0.005, 40_000, DOES_NOT_PAY),  # above 0, but below what matters
    ],
)
def test_answers(gain, texts, expected):
    assert answer(crossed(table_of(gain, texts)), above=0.0, least=0.01) == expected


def test_close_to_the_teacher_means_that_the_interval_ends_above_what_matters():
    close, far, open_ = (crossed(table_of(gain, texts)) for gain, texts in ((0.0, 40_000), (-0.05, 4000), (0.0, 400)))
    found = [answer(estimate, above=-0.01, least=-0.01) for estimate in (close, far, open_)]
    assert found == [PAYS, DOES_NOT_PAY, CANNOT_TELL]


def test_more_texts_of_the_same_kind_decide_where_it_says_so():
    found = crossed(table_of(0.02, 500))
    assert answer(found, above=0.0, least=0.01) == CANNOT_TELL
    wanted = needed(found, above=0.0, least=0.01, most_seeds=100)
    assert wanted["seeds"] is None, "the seeds agree, so more of them change nothing"
    assert answer(crossed(table_of(0.02, round(1.05 * wanted["texts"]))), above=0.0, least=0.01) == PAYS
    assert answer(crossed(table_of(0.02, round(0.8 * wanted["texts"]))), above=0.0, least=0.01) == CANNOT_TELL


def test_more_seeds_decide_where_seeds_differ():
    rng = np.random.default_rng(3)
    table = np.round(np.clip(rng.normal(0.03, 0.03, size=(3, 1)) + rng.normal(0, 0.1, size=(3, 5000)), -1, 1), 6)
    found = crossed(table)
    assert answer(found, above=0.0, least=0.01) == CANNOT_TELL
    wanted = needed(found, above=0.0, least=0.01, most_seeds=100)
    assert wanted["seeds"] is not None
    assert found.variance(wanted["seeds"], 5000) < found.variance(3, 5000)
    few = needed(found, above=0.0, least=0.01, most_seeds=wanted["seeds"] - 1)
    assert few["seeds"] is None, "no more than can be had are promised"
