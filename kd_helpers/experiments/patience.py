"""Chapter 07: what more steps, and more texts without labels, are worth.

Its runs are those of chapter 06's comparison at other lengths and with other transfer sets: this module adds no code
to them, so a result names the comparison as what made it. Every length is a run of its own, whose learning rate falls
to 0 at its end. The runs of the comparison's own length are not made again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from kd_helpers.experiments.comparison import ARMS, COMPARISON, COMPARISON_SEEDS, comparison_study
from kd_helpers.experiments.study import Arm, Study, run_study, stored_study, study_table

# As the stored comparison was made, with which these runs are compared.
CONFIG = COMPARISON.replace(precision="float32")
STEPS = (125, 250, 500, 1000, 2000)
LONG, LONG_SEEDS = 1000, (0, 1, 2)  # with more steps than this there are fewer seeds: a run takes ten minutes and more
# The baseline is measured at its best epoch and, in the same run, at its end.
ARMS_BY_STEPS = ("best_epoch", "tuned_teacher", "transfer_set")
NEW_TEXTS = (2500, 7000, 14_131)  # in the last, all that the teacher was not fine-tuned on


def length_study(steps: int) -> Study:
    """Three arms of the comparison, trained for so many steps."""
    seeds = LONG_SEEDS if steps > LONG else COMPARISON_SEEDS
    return comparison_study(CONFIG.replace(max_steps=steps), arms=ARMS_BY_STEPS, seeds=seeds)


def texts_study() -> Study:
    """Students of the tuned teacher with so many texts without labels that are new to it."""
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


def by_steps(stored: Mapping[str, Any]) -> pd.DataFrame:
    """Accuracy on test of every arm at every length: a row for each length and seed, a column for each arm.

    The column `best_epoch` is the baseline after its best epoch, `baseline` the same runs after their last step.
    """

    def table(runs: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
        last = study_table({"runs": [run for run in runs if run["arm"] == "best_epoch"]}, "last_accuracy")
        return study_table({"runs": runs}, "accuracy").assign(baseline=last["best_epoch"])

    return pd.concat({steps: table(runs_of(stored, steps)) for steps in STEPS}, names=["steps"])


def best_baseline(stored: Mapping[str, Any]) -> pd.Series:
    """Accuracy on test of the baseline at the best of all lengths and epochs, by accuracy on validation; by seed.

    In a long run the best epoch lies where the learning rate is still high; a short run ends at a low one. Each seed
    chooses among the lengths that it has.
    """
    runs = [run for steps in STEPS for run in runs_of(stored, steps) if run["arm"] == "best_epoch"]

    def on_validation(run: Mapping[str, Any]) -> float:
        return max(epoch["accuracy"] for epoch in run["history"])

    seeds = sorted({run["seed"] for run in runs})
    best = {seed: max((run for run in runs if run["seed"] == seed), key=on_validation) for seed in seeds}
    return pd.Series({seed: run["accuracy"] for seed, run in best.items()})


def by_texts(stored: Mapping[str, Any]) -> pd.DataFrame:
    """Accuracy on test for every number of new texts: a row for each seed, a column for each number.

    With none the student is the comparison's with the tuned teacher.
    """
    none = study_table(stored_study("comparison"), "accuracy")["tuned_teacher"]
    new = study_table(stored, "accuracy").rename(columns=lambda arm: int(arm.removeprefix("new_texts_")))
    return pd.concat([none.rename(0), new], axis=1)


def stored_patience() -> dict[str, Any]:
    """The study that comes with the package."""
    return stored_study("patience")
