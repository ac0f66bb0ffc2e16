"""Numbers in Markdown that no study has, such as those of chapter 07's sweep; and studies within a study."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from kd_helpers.course.numbers import _written, fill, number
from kd_helpers.experiments.comparison import stored_comparison
from kd_helpers.experiments.serving import stored_serving
from kd_helpers.experiments.study import stored_study
from kd_helpers.experiments.sweep import stored_sweep


def written(values, *, scale: float = 100, digits: int = 1) -> tuple[str, str]:
    """A mean and its t interval as the course writes them."""
    interval = stats.ttest_1samp(values, 0).confidence_interval()
    shown = [f"{scale * x:.{digits}f}".replace("-", "−") for x in (np.mean(values), interval.low, interval.high)]
    return shown[0], f"{shown[1]} to {shown[2]}"


def test_a_setting_of_the_sweep_and_its_gain_over_other_runs():
    stored = stored_sweep()
    table = pd.DataFrame(stored["runs"]).set_index("seed").sort_index()
    setting = table[(table["temperature"] == 4) & (table["alpha"] == 1)]["test_accuracy"]
    assert number("sweep: T 4 alpha 1, test_accuracy") == f"{written(setting)[0]}%"
    smoothing = pd.DataFrame(stored["label_smoothing"]).set_index("seed").sort_index()["test_accuracy"]
    baseline = table[(table["temperature"] == 1) & (table["alpha"] == 0)]["test_accuracy"]
    for name, other in (("smoothing", smoothing), ("baseline", baseline)):
        mean, interval = written(setting - other)
        assert number(f"sweep: T 4 alpha 1 - {name}, test_accuracy") == f"{mean} points"
        assert number(f"sweep: T 4 alpha 1 - {name}, test_accuracy, interval") == interval


def test_regions_of_the_sweep():
    taught = pd.DataFrame(stored_sweep()["runs"]).query("alpha > 0")
    by_alpha = taught.groupby(["alpha", "seed"])["validation_accuracy"].mean()
    mean, interval = written(by_alpha[0.9] - by_alpha[0.3])
    assert number("sweep: alpha 0.9 - alpha 0.3, validation_accuracy") == f"{mean} points"
    assert number("sweep: alpha 0.9 - alpha 0.3, validation_accuracy, interval") == interval
    cells = taught.groupby(["temperature", "alpha"])["validation_nll"].mean()
    assert number("sweep: spread, validation_nll") == f"{cells.max() - cells.min():.3f}"
    (best, worst) = (taught.set_index(["temperature", "alpha"]).loc[at] for at in (cells.idxmin(), cells.idxmax()))
    difference = best.set_index("seed")["validation_nll"] - worst.set_index("seed")["validation_nll"]
    assert number("sweep: best - worst, validation_nll, interval") == written(difference, scale=1, digits=3)[1]


def test_the_course_of_the_comparison_on_validation():
    curves: dict[str, list[list[float]]] = {}
    for run in stored_comparison()["runs"]:
        curves.setdefault(run["arm"], []).append([epoch["accuracy"] for epoch in run["history"]])
    tuned, baseline = np.array(curves["tuned_teacher"]), np.array(curves["baseline"])
    assert number("validation: baseline best, accuracy") == f"{written(baseline.max(axis=1))[0]}%"
    mean, interval = written(tuned[:, -1] - baseline.max(axis=1))
    assert number("validation: tuned_teacher last - baseline best, accuracy") == f"{mean} points"
    assert number("validation: tuned_teacher last - baseline best, accuracy, interval") == interval
    assert number("validation: tuned_teacher 237 - baseline 237, accuracy") == (
        f"{written(tuned[:, 2] - baseline[:, 2])[0]} points"
    )


def test_gains_by_steps_and_by_new_texts():
    stored, comparison = stored_study("patience"), stored_comparison()

    def by_seed(runs, arm, measure="accuracy"):
        return {run["seed"]: run[measure] for run in runs if run["arm"] == arm}

    runs_of = {int(part.removesuffix("_steps")): stored[part]["runs"] for part in stored if part.endswith("_steps")}
    runs_of[1000] = comparison["runs"]
    on_validation = {}
    for runs in runs_of.values():
        for run in runs:
            if run["arm"] == "best_epoch":
                best = max(epoch["accuracy"] for epoch in run["history"])
                on_validation.setdefault(run["seed"], []).append((best, run["accuracy"]))
    short, long = (by_seed(runs_of[steps], "tuned_teacher") for steps in (250, 2000))
    lead = np.array([accuracy - max(on_validation[seed])[1] for seed, accuracy in short.items()])
    mean, interval = written(lead)
    assert number("over_best_baseline: tuned_teacher, 250") == f"{mean} points"
    assert number("over_best_baseline: tuned_teacher, 250, interval") == interval
    mean, interval = written(np.array([long[seed] - short[seed] for seed in long]))
    assert number("more_steps: tuned_teacher, 2000 - 250") == f"{mean} points"
    assert number("more_steps: tuned_teacher, 2000 - 250, interval") == interval
    more, none = by_seed(stored["runs"], "new_texts_7000"), by_seed(comparison["runs"], "tuned_teacher")
    mean, interval = written(np.array([more[seed] - none[seed] for seed in more]))
    assert number("new_texts: 7000 - 0") == f"{mean} points"
    assert number("new_texts: 7000 - 0, interval") == interval


def test_a_gain_over_texts():
    stored = stored_comparison()
    labels, right = np.array(stored["labels"].split()), {}
    for run in stored["runs"]:
        right.setdefault(run["arm"], []).append(np.array(run["predicted"].split()) == labels)
    mean, interval = written(np.mean(right["tuned_teacher"], axis=0) - np.mean(right["baseline"], axis=0))
    assert number("texts: tuned_teacher - baseline") == f"{mean} points"
    assert number("texts: tuned_teacher - baseline, interval") == interval


def test_a_setting_that_two_arms_have_tried():
    runs = pd.DataFrame(stored_study("survey")["runs"]).set_index(["arm", "seed"])["tried"].sort_index()
    first, last = (np.array([tried[at] for tried in runs[arm]]) for arm, at in (("response", 0), ("more_pictures", 2)))
    mean, interval = written(first - last)
    assert number("tried: response - more_pictures, 4") == f"{mean} points"
    assert number("tried: response - more_pictures, 4, interval") == interval
    with pytest.raises(ValueError, match=r"no arm 'response' that tried 1\."):
        number("tried: response - more_pictures, 1")
    with pytest.raises(ValueError, match=r"no arm 'nobody' that tried 4\."):
        number("tried: nobody - more_pictures, 4")


def test_a_study_within_a_study():
    stored = stored_study("language_models")
    runs = pd.DataFrame(stored["sizes"]["runs"])
    mean, interval = written(runs[runs["arm"] == "64 × 2"]["coherent"])
    assert number("language_models.sizes: 64 × 2, coherent") == f"{mean}%"
    low, high = interval.split(" to ")
    assert number("language_models.sizes: 64 × 2, coherent, interval") == f"{low} to {high}%"
    marker = "<!-- language_models.sizes: 64 × 2, coherent -->"
    assert fill(f"Now 0.0%{marker}.") == f"Now {mean}%{marker}."
    assert number("language_models: teacher, nats") == f"{stored['teacher']['nats']:.2f}"
    with pytest.raises(ValueError, match="names no study"):
        number("nothing.sizes: 64 × 2, coherent")


def test_a_stale_number_is_written_anew():
    marker = "<!-- validation: baseline last, accuracy -->"
    right = number("validation: baseline last, accuracy")
    assert fill(f"It ends at 99.9%{marker}; so.") == f"It ends at {right}{marker}; so."


@pytest.mark.parametrize(
    "spec",
    [
        "sweep: T 3 alpha 1, test_accuracy",
        "sweep: nothing - baseline, test_accuracy",
        "validation: baseline 80, accuracy",
        "validation: nothing last, accuracy",
        "over_best_baseline: nothing, 250",
        "more_steps: tuned_teacher, 250 - 3",
        "new_texts: 3 - 0",
        "new_texts: 7000 - 0, accuracy",
    ],
)
def test_a_marker_that_names_nothing_is_refused(spec):
    with pytest.raises(
        ValueError, match=r"setting of the sweep|stored comparison has no|which does not exist|`interval` alone"
    ):
        number(spec)


@pytest.mark.parametrize(
    ("value", "share", "written"),
    [
        (0.186, True, "18.6"),
        (-0.186, True, "−18.6"),
        (-0.0004, True, "0.0"),
        (-1.238, False, "−1.24"),
        (-0.0123, False, "−0.012"),
        (-0.0001, False, "0.000"),
    ],
)
def test_a_number_has_as_many_digits_as_it_needs_and_no_minus_before_0(value, share, written):
    assert _written(value, share) == written


def test_changes_in_eight_bits_have_their_interval_over_texts():
    stored = stored_study("deployment")
    labels = np.array(stored["labels"].split())
    students = [run for run in stored["runs"] if run["arm"] == "student"]
    right = {
        way: np.mean([np.array(run[f"{way}_predicted"].split()) == labels for run in students], axis=0)
        for way in ("int8", "float32")
    }
    mean, interval = written(right["int8"] - right["float32"])
    assert number("served: student int8 - student float32") == f"{mean} points"
    assert number("served: student int8 - student float32, interval") == interval


def test_numbers_of_the_serving_benchmark():
    rows = {(row["model"], row["way"], row["threads"]): row for row in stored_serving()["rows"]}
    most = max(threads for *_, threads in rows)
    times = [rows[model, way, most]["p50_ms"] for model, way in (("student", "int8"), ("teacher", "torch"))]
    assert number("serving: student int8 / teacher torch, p50_ms") == f"{times[0] / times[1]:.1f}"
    assert number("serving: student int8, p50_ms") == f"{times[0]:.2f} ms"
    assert number("serving: student int8, megabytes, 1") == f"{rows['student', 'int8', 1]['megabytes']:.1f} MB"
    assert (
        fill("9 MB<!-- serving: student int8, megabytes --> and") != "9 MB<!-- serving: student int8, megabytes --> and"
    )
