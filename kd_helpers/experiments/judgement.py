"""Is one way of training better than another? An estimate over seeds and test texts, and an answer in words.

A difference in accuracy between two arms would come out otherwise with other seeds, and with other test texts. Both are
drawn here: the differences form a table with a row for each seed and a column for each text, and the interval covers
both (crossed random effects, with Satterthwaite's degrees of freedom).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from scipy import stats

PAYS, DOES_NOT_PAY, CANNOT_TELL, UNFINISHED = "pays", "does not pay", "cannot tell", "unfinished"
MEASURES = ("accuracy", "macro_recall")
MOST_TEXTS = 1_000_000  # that are looked through for a number that would suffice


def text_weights(labels: np.ndarray, measure: str) -> np.ndarray:
    """The weight of each test text, with mean 1, under which the mean of right answers is the measure.

    Args:
        labels: `[N]`, numbers of the classes.
        measure: "accuracy", or "macro_recall", in which every class that occurs counts the same.
    """
    if measure == "accuracy":
        return np.ones(len(labels))
    _, place, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return len(labels) / (len(counts) * counts[place])


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A difference and its interval, over seeds and over texts.

    Attributes:
        gain: the estimate.
        low, high: ends of the interval.
        level: of the interval, e.g. 0.95.
        seeds, texts: how many of each.
        of_seeds, of_texts, of_both: what a single seed, a single text, and a single seed on a single text add to the
            variance.
        least: variance that is left however alike the arms are, for one text; see `crossed`.
    """

    gain: float
    low: float
    high: float
    level: float
    seeds: int
    texts: int
    of_seeds: float
    of_texts: float
    of_both: float
    least: float

    def variance(self, seeds: int, texts: int) -> float:
        """Of the gain, with other numbers of seeds and texts."""
        return self.of_seeds / seeds + self.of_texts / texts + self.of_both / (seeds * texts) + self.least / texts**2

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return dataclasses.asdict(self)


def crossed(differences: np.ndarray, weights: np.ndarray | None = None, *, level: float = 0.95) -> Estimate:
    """The mean difference with an interval over seeds and texts.

    Variance of the mean: σ²(seeds)/S + σ²(texts)/N + σ²(both)/(S·N), from the mean squares of a two-way table without
    repetition; a component that comes out negative counts as 0. To this comes the variance of one more text on which
    the arms disagree, as Agresti and Min (2005) add it for matched pairs: where two arms agree on all of 40 texts, the
    interval must not be [0, 0].

    Weighted texts have the freedom of fewer: (Σw)²/Σw² of them (Kish 1965). Where four texts of a rare class carry all
    of a difference, the interval must be that of few texts.

    Args:
        differences: `[S, N]`, for each seed and text 1 where only the first arm is right, −1 where only the second is,
            else 0. One row counts as one seed, whose interval covers texts alone.
        weights: `[N]`, see `text_weights`; None weights all texts the same.
        level: of the interval.
    """
    differences = np.atleast_2d(np.asarray(differences, dtype=float))
    seeds, texts = differences.shape
    weights = np.ones(texts) if weights is None else weights
    table = differences * weights
    mean, by_seed, by_text = table.mean(), table.mean(axis=1), table.mean(axis=0)
    of_text = max(texts - 1, 1)
    freedom = {"seed": max(seeds - 1, 1), "text": max(float(weights.sum() ** 2 / (weights**2).sum()) - 1, 1.0)}
    if seeds == 1:
        squares, both = {"text": float(((by_text - mean) ** 2).sum() / of_text)}, 0.0
    else:
        rest = table - by_seed[:, None] - by_text + mean
        both = float((rest**2).sum() / ((seeds - 1) * of_text))
        squares = {
            "seed": float(texts * ((by_seed - mean) ** 2).sum() / (seeds - 1)),
            "text": float(seeds * ((by_text - mean) ** 2).sum() / of_text),
        }
    of_seeds = max(0.0, (squares.get("seed", 0.0) - both) / texts)
    of_texts = max(0.0, (squares["text"] - both) / seeds)
    least = float(weights.max() ** 2)
    found = Estimate(float(mean), mean, mean, level, seeds, texts, of_seeds, of_texts, both, least)
    variance = found.variance(seeds, texts)
    parts = [
        (of_texts / texts + least / texts**2, freedom["text"]),
        (of_seeds / seeds, freedom["seed"]),
        (both / (seeds * texts), freedom["seed"] * freedom["text"]),
    ]
    half = np.sqrt(variance) * stats.t.ppf((1 + level) / 2, _satterthwaite(parts))
    return dataclasses.replace(found, low=float(mean - half), high=float(mean + half))


def _satterthwaite(parts: list[tuple[float, float]]) -> float:
    """The degrees of freedom of a sum of independent variances, each given with its own."""
    return sum(part for part, _ in parts) ** 2 / sum(part**2 / freedom for part, freedom in parts)


def answer(estimate: Estimate, *, above: float, least: float) -> str:
    """What an estimate says of a claim.

    Args:
        estimate: of the difference.
        above: the whole interval must lie above this for the claim to hold.
        least: the estimate must be at least this for the claim to hold; where the whole interval lies below, it fails.

    Returns:
        `PAYS`, `DOES_NOT_PAY`, or `CANNOT_TELL`.
    """
    if estimate.low > above and estimate.gain >= least:
        return PAYS
    return DOES_NOT_PAY if estimate.high < least else CANNOT_TELL


def needed(estimate: Estimate, *, above: float, least: float, most_seeds: int) -> dict[str, int | None]:
    """How many seeds, or else how many test texts, would decide, if the estimate stayed what it is.

    Args:
        estimate, above, least: see `answer`.
        most_seeds: that can be had.

    Returns:
        `seeds` with the same texts, and `texts` with the same seeds; None where no number up to `most_seeds` or
        `MOST_TEXTS` would do.
    """
    room = estimate.gain - above if estimate.gain >= least else least - estimate.gain
    quantile = stats.norm.ppf((1 + estimate.level) / 2)

    def suffices(seeds: int, texts: int) -> bool:
        return quantile * np.sqrt(estimate.variance(seeds, texts)) < room

    seeds = range(estimate.seeds + 1, most_seeds + 1)
    texts = np.unique(np.geomspace(estimate.texts + 1, MOST_TEXTS, 400).astype(int)).tolist()
    return {
        "seeds": next((count for count in seeds if suffices(count, estimate.texts)), None),
        "texts": next((count for count in texts if suffices(estimate.seeds, count)), None),
    }
