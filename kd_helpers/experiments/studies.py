"""The studies that come with the package, and the command that makes one again.

They are listed here and not in `study`, so that another study changes the code of none.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from kd_helpers import artifacts
from kd_helpers.experiments import RESULTS

# Modules with a function `study`, whose result is stored by that name.
STUDIES = (
    *("comparison", "patience", "dark_knowledge", "distilbert", "tinybert", "language_models", "rationales", "survey"),
    *("label_curve", "deployment", "verdict_study", "settings"),
)


def main(arguments: Sequence[str] | None = None, *, prog: str = "kd-helpers study") -> int:
    """Make a study and store it in the package.

    Returns:
        Exit status: 0. A request that can't be met exits with 2.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Make one of the course's studies and store it in the package, with what made it. Runs that are "
        "finished are found again, so the same command continues an interrupted study.",
        epilog=f"Example: {prog} dark_knowledge. A study takes from half an hour to some hours on two cores; "
        "the same command in a second terminal shares the work.",
    )
    parser.add_argument("study", choices=STUDIES, help="which one; the result goes to experiments/results/STUDY.json")
    name = parser.parse_args(arguments).study
    result = importlib.import_module(f"kd_helpers.experiments.{name}").study()
    artifacts.save_json(RESULTS / f"{name}.json", result)
    print(f"{len(result['runs'])} runs of {len(result['arms'])} arms, written to {RESULTS / f'{name}.json'}")
    return 0
