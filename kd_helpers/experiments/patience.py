"""Chapter 07: what more steps, and more texts without labels, are worth.

Its runs are those of chapter 06's comparison at other lengths and with other transfer sets. Every length is a run of
its own, whose learning rate falls to 0 at its end. Those of the comparison itself are not made again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pandas as pd

from kd_helpers.experiments.comparison import ARMS, COMPARISON, COMPARISON_SEEDS, comparison_study
from kd_helpers.experiments.study import Arm, Study, run_study, stored_study

# As the stored comparison was made, with which these runs are compared.
CONFIG = COMPARISON.replace(precision="float32")
STEPS = (125, 250, 500, 1000, 2000)
LONG, LONG_SEEDS = 1000, (0, 1, 2)  # with more steps than this there are fewer seeds: a run takes up to half an hour
# The baseline is measured at its best epoch and, in the same run, at its end.
ARMS_BY_STEPS = ("best_epoch", "tuned_teacher", "transfer_set")
NEW_TEXTS = (2500, 7000, 14_131)  # in the last, all that the teacher was not fine-tuned on


def length_study(steps: int) -> Study:
    """Three arms of the comparison, trained for so many steps."""
    seeds = LONG_SEEDS if steps > LONG else COMPARISON_SEEDS
    return comparison_study(CONFIG.replace(max_steps=steps), arms=ARMS_BY_STEPS, seeds=seeds)


def texts_study() -> Study:
    """Students of the tuned teacher with so many further texts that are new to it."""
    recipe = ARMS["transfer_set"].recipe
    arms = {
        f"new_texts_{count}": Arm(f"{count:,} new texts", dataclasses.replace(recipe, new_texts=count))
        for count in NEW_TEXTS
    }
    return dataclasses.replace(comparison_study(CONFIG), arms=arms)


def study() -> dict[str, Any]:
    """Both studies: that of the texts and, as `125_steps`, `250_steps` …, that of each length.

    Its 1,000 steps are the comparison's own (see `runs_of`).
    """
    lengths = {
        f"{steps}_steps": _measures(run_study(length_study(steps))) for steps in STEPS if steps != CONFIG.max_steps
    }
    return _measures(run_study(texts_study())) | lengths


def _measures(result: dict[str, Any]) -> dict[str, Any]:
    """A study's result without what each run predicted, which is long."""
    left_out = ("predicted", "confusion", "reliability")
    runs = [{name: value for name, value in run.items() if name not in left_out} for run in result["runs"]]
    return result | {"runs": runs}


def runs_of(stored: Mapping[str, Any], steps: int) -> list[Mapping[str, Any]]:
    """The runs of one length: from the stored study of this module, or from the stored comparison."""
    result = stored_study("comparison") if steps == CONFIG.max_steps else stored[f"{steps}_steps"]
    return [run for run in result["runs"] if run["arm"] in ARMS_BY_STEPS]


def by_steps(stored: Mapping[str, Any], measure: str = "accuracy") -> pd.DataFrame:
    """A measure on test for every arm and length: a row for each length and seed, a column for each arm.

    The column `baseline` is the baseline after its last step, `best_epoch` after its best epoch.
    """
    rows = [
        {"steps": steps, "seed": run["seed"], "arm": arm, "value": run[key]}
        for steps in STEPS
        for run in runs_of(stored, steps)
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
    runs = [run for steps in STEPS for run in runs_of(stored, steps) if run["arm"] == "best_epoch"]
    runs.sort(key=lambda run: max(epoch["accuracy"] for epoch in run["history"]))
    return pd.Series({run["seed"]: run[measure] for run in runs}, name="best_baseline").sort_index()


def by_texts(stored: Mapping[str, Any], measure: str = "accuracy") -> pd.DataFrame:
    """A measure on test for every number of further texts: a row for each seed, a column for each number.

    With none the student is the comparison's with the tuned teacher.
    """
    rows = [{"seed": run["seed"], "texts": 0, "value": run[measure]} for run in _of_tuned_teacher()]
    rows += [
        {"seed": run["seed"], "texts": int(run["arm"].removeprefix("new_texts_")), "value": run[measure]}
        for run in stored["runs"]
    ]
    return pd.DataFrame(rows).pivot(index="seed", columns="texts", values="value")


def _of_tuned_teacher() -> list[Mapping[str, Any]]:
    return [run for run in stored_study("comparison")["runs"] if run["arm"] == "tuned_teacher"]


def stored_patience() -> dict[str, Any]:
    """The study that comes with the package."""
    return stored_study("patience")
