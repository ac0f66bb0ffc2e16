"""Chapter 11: what distilling a language model is worth for a task, by the number of its labels.

The students are those of the chapter's other study (see `experiments.distilbert`). For every number of labels each
student tries three learning rates and keeps the one that is best on validation, so no way of training is compared at
another's rate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_helpers.experiments import distilbert
from kd_helpers.experiments.distilbert import Ground, Route
from kd_helpers.experiments.study import Arm, Study, run_study, stored_study

MODULE = "kd_helpers.experiments.label_curve"
ARMS: dict[str, Arm] = {
    name: Arm(arm.title, dataclasses.replace(arm.recipe, tasks=())) for name, arm in distilbert.ARMS.items()
}
# Tried by every student, by the number of labels: the best rate grows with it.
RATES: dict[int, tuple[float, ...]] = {
    50: (1e-5, 3e-5, 1e-4),
    100: (3e-5, 1e-4, 3e-4),
    500: (1e-4, 3e-4, 1e-3),
    2500: (3e-4, 1e-3, 3e-3),
}


def curve_study(
    ground: Ground,
    language_rates: Mapping[str, float],
    *,
    seeds: Sequence[int] = distilbert.SEEDS,
    steps: int = distilbert.STEPS,
) -> Study:
    """Train on texts without labels (or don't), then for the task with each number of labels and each rate.

    Runs have for each number of labels, of the student with the rate that is most accurate on validation,
    `labels_COUNT_accuracy` and `labels_COUNT_nll` on test and its `labels_COUNT_rate`; and `labels_COUNT_tried`, by
    rate the accuracy on validation.

    Args:
        ground: what all runs share.
        language_rates: peak learning rates on texts without labels, by arm.
        seeds: of the runs.
        steps: on texts without labels.
    """
    rate_of = {ARMS[name].recipe: rate for name, rate in language_rates.items()}

    def run(route: Route, seed: int, _folder: Path) -> dict[str, Any]:
        student = distilbert.train_language(route, ground, rate_of[route], seed=seed, steps=steps)
        data, measures = ground.setup.data, {}
        for count, rates in RATES.items():
            task = distilbert.Task(count)
            tuned = {rate: distilbert.train_task(student, route, task, ground, rate, seed=seed) for rate in rates}
            tried = {
                rate: distilbert.measure_task(classifier, ground, data.validation)["accuracy"]
                for rate, classifier in tuned.items()
            }
            rate = max(tried, key=tried.__getitem__)
            measures |= {f"labels_{count}_rate": rate, f"labels_{count}_tried": tried}
            measured = distilbert.measure_task(tuned[rate], ground, data.test)
            measures |= {f"labels_{count}_{what}": value for what, value in measured.items()}
        return measures

    return Study("label_curve", MODULE, ARMS, seeds, choices(ground, language_rates, steps), run)


def choices(ground: Ground, language_rates: Mapping[str, float], steps: int) -> dict[str, Any]:
    """What the results depend on, beside arm and seed."""
    return distilbert.choices(ground, steps) | {
        "tasks": {str(count): distilbert.Task(count)._asdict() | {"rates": rates} for count, rates in RATES.items()},
        "language_rates": dict(language_rates),
    }


def chosen_language_rates() -> dict[str, float]:
    """By arm, the rate on texts without labels that the chapter's other study chose."""
    chosen = stored_study("distilbert")["choices"]["learning_rates"]
    return {name: chosen[name]["language"] for name in ARMS}


def study() -> dict[str, Any]:
    """The arms of `ARMS` with every seed."""
    ground = distilbert.prepare(distilbert.CONFIG, adaptation_steps=distilbert.ADAPTATION_STEPS)
    return run_study(curve_study(ground, chosen_language_rates()))
