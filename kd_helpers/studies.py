"""Chapters 10 to 12: studies that take longer than a notebook should, kept as data with what made them.

A study is some arms, each with every seed. A run that is done is found again, so a study goes on where it was cut off.

    python -m kd_helpers.studies dark_knowledge
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import itertools
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from kd_helpers import artifacts
from kd_helpers.comparison import intervals, versions

STUDIES = ("dark_knowledge", "distilbert", "tinybert")  # modules with a function `study`

Run = Callable[[int], dict[str, float]]


def run_study(name: str, arms: Mapping[str, Run], seeds: Sequence[int], *, choices: dict[str, Any]) -> dict[str, Any]:
    """Run every arm with every seed.

    Args:
        name: of the study.
        arms: what each arm does with a seed; it returns its measures by name.
        seeds: arms are compared seed by seed, so the same seed must mean the same start and the same batches in all.
        choices: everything else that the results depend on, JSON-ready.

    Returns:
        JSON-ready: `made_with`, `choices`, and `runs`, each with `arm`, `seed` and its measures.
    """
    runs = []
    for seed, arm in tqdm(list(itertools.product(seeds, arms)), desc=f"Study {name}", unit="run", leave=False):
        made_of = {"study": name, "arm": arm, "seed": seed, "choices": choices, "versions": versions()}
        folder = artifacts.artifacts_dir() / "studies" / artifacts.fingerprint(made_of)

        def measure(target: Path, arm: str = arm, seed: int = seed) -> None:
            artifacts.save_json(target / "measures.json", arms[arm](seed))

        artifacts.get_or_build(folder, measure)
        runs.append({"arm": arm, "seed": seed, **artifacts.load_json(folder / "measures.json")})
    where = f"{platform.machine()}, threads: {torch.get_num_threads()}"
    made_with = versions() | {"machine": where, "date": datetime.date.today().isoformat()}
    return {"made_with": made_with, "choices": choices, "runs": runs}


def stored_study(name: str) -> dict[str, Any]:
    """A study that comes with the package (see `run_study`)."""
    return artifacts.load_json(artifacts.RESULTS / f"{name}.json")


def study_table(study: dict[str, Any], metric: str) -> pd.DataFrame:
    """One row a seed, one column an arm, in the order in which the arms were run."""
    runs = pd.DataFrame(study["runs"])
    return runs.pivot(index="seed", columns="arm", values=metric)[list(dict.fromkeys(runs["arm"]))]


def means(study: dict[str, Any], metric: str) -> pd.DataFrame:
    """The mean of every arm over the seeds, with its 95% t interval: columns `mean`, `low`, `high`."""
    return intervals(dict(study_table(study, metric)), "mean")


def gains(study: dict[str, Any], metric: str, *, over: str) -> pd.DataFrame:
    """Each other arm minus the arm `over`, seed by seed: columns `gain`, `low`, `high` (a 95% t interval)."""
    table = study_table(study, metric)
    return intervals({arm: table[arm] - table[over] for arm in table if arm != over}, "gain")


def main(arguments: Sequence[str] | None = None) -> None:
    """Make a study and store it in the package, with what made it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("study", choices=STUDIES)
    name = parser.parse_args(arguments).study
    artifacts.save_json(artifacts.RESULTS / f"{name}.json", importlib.import_module(f"kd_helpers.{name}").study())


if __name__ == "__main__":
    main()
