"""Chapter 07: what more steps, and more texts without labels, are worth.

Its runs are those of chapter 06's comparison at other lengths and with other transfer sets. Every length is a run of
its own, whose learning rate falls to 0 at its end. Those that the comparison has made are found again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pandas as pd

from kd_helpers.experiments.comparison import ARMS, COMPARISON, comparison_study
from kd_helpers.experiments.study import Arm, Study, run_study, stored_study

STEPS = (125, 250, 500, 1000, 2000, 4000)
# The baseline is measured at its best epoch and, in the same run, at its end.
ARMS_BY_STEPS = ("best_epoch", "tuned_teacher", "transfer_set")
NEW_TEXTS = (2500, 5000, 10_000, 14_131)  # in the last, all that the teacher was not fine-tuned on


def length_study(steps: int) -> Study:
    """Three arms of the comparison, trained for so many steps."""
    return comparison_study(COMPARISON.replace(max_steps=steps), arms=ARMS_BY_STEPS)


def texts_study() -> Study:
    """Students of the tuned teacher with so many further texts that are new to it, with none, and with all."""
    recipe = ARMS["transfer_set"].recipe
    further = {
        f"new_texts_{count}": Arm(f"{count:,} new texts", dataclasses.replace(recipe, new_texts=count))
        for count in NEW_TEXTS
    }
    arms = {"tuned_teacher": ARMS["tuned_teacher"], **further, "transfer_set": ARMS["transfer_set"]}
    return dataclasses.replace(comparison_study(COMPARISON), arms=arms)


def study() -> dict[str, Any]:
    """Both studies: that of the texts and, as `125_steps`, `250_steps` …, that of each length."""
    lengths = {f"{steps}_steps": _measures(run_study(length_study(steps))) for steps in STEPS}
    return _measures(run_study(texts_study())) | lengths


def _measures(result: dict[str, Any]) -> dict[str, Any]:
    """A study's result without what each run predicted, which is long."""
    left_out = ("predicted", "confusion", "reliability")
    runs = [{name: value for name, value in run.items() if name not in left_out} for run in result["runs"]]
    return result | {"runs": runs}


def by_steps(stored: Mapping[str, Any], measure: str = "accuracy") -> pd.DataFrame:
    """A measure on test for every arm and length: a row for each length and seed, a column for each arm.

    The column `baseline` is the baseline after its last step, `best_epoch` after its best epoch.
    """
    rows = [
        {"steps": steps, "seed": run["seed"], "arm": arm, "value": run[key]}
        for steps in STEPS
        for run in stored[f"{steps}_steps"]["runs"]
        for arm, key in columns_of(run["arm"], measure).items()
    ]
    return pd.DataFrame(rows).pivot(index=["steps", "seed"], columns="arm", values="value")


def columns_of(arm: str, measure: str) -> dict[str, str]:
    """The columns of `by_steps` that a run fills, and the name of the measure in the run."""
    return {"best_epoch": measure, "baseline": f"last_{measure}"} if arm == "best_epoch" else {arm: measure}


def best_baseline(stored: Mapping[str, Any], measure: str = "accuracy") -> pd.Series:
    """A measure on test of the baseline at the best of all lengths and epochs, by accuracy on validation; by seed.

    In a long run the best epoch can lie where the learning rate still rises; a short run ends at a low one.
    """
    runs = [run for steps in STEPS for run in stored[f"{steps}_steps"]["runs"] if run["arm"] == "best_epoch"]
    runs.sort(key=lambda run: max(epoch["accuracy"] for epoch in run["history"]))
    return pd.Series({run["seed"]: run[measure] for run in runs}, name="best_baseline").sort_index()


def stored_patience() -> dict[str, Any]:
    """The study that comes with the package."""
    return stored_study("patience")
