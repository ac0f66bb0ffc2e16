"""Studies: several arms, each run with several seeds, stored with their provenance and compared seed by seed.

Every comparison of the course is a study: those of chapters 06 to 08 and 10 to 15. A run that is finished is
found again, so an interrupted study continues where it stopped, and two processes that make the same study at the same
time share its runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from kd_helpers import artifacts
from kd_helpers.experiments import RESULTS
from kd_helpers.experiments.statistics import intervals
from kd_helpers.provenance import made_by, source_digest, versions


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way of training the student.

    Attributes:
        title: for tables and figures.
        recipe: what the arm does, a dataclass of plain values. Each study has its own kind.
    """

    title: str
    recipe: Any

    def to_dict(self) -> dict[str, Any]:
        """Title and recipe, ready for JSON."""
        return {"title": self.title, "recipe": dataclasses.asdict(self.recipe)}


@dataclasses.dataclass(frozen=True)
class Study:
    """What is compared, and everything that the results depend on.

    Attributes:
        name: of the study.
        module: dotted name of the module that defines it; its code and what it imports are part of the provenance.
        arms: by name.
        seeds: arms are compared seed by seed, so the same seed must mean the same first weights and the same batches in
            all arms.
        choices: everything beside arm and seed that the results depend on, ready for JSON.
        run: trains one arm with one seed, `run(recipe, seed, folder)`, may keep files in the folder, and returns the
            measures, ready for JSON.
    """

    name: str
    module: str
    arms: Mapping[str, Arm]
    seeds: Sequence[int]
    choices: Mapping[str, Any]
    run: Callable[[Any, int, Path], dict[str, Any]]


def run_arm(study: Study, arm: str, seed: int, *, wait: bool = True) -> dict[str, Any]:
    """One arm of a study with one seed: found again, or run and stored.

    Args:
        study: the study.
        arm: its name.
        seed: one of the study's.
        wait: for another process that is running it.

    Returns:
        `arm`, `seed`, the measures, and `folder`, where under `artifacts/` the files of this run are.

    Raises:
        artifacts.BeingMadeError: another process is running it, and `wait` is False.
    """
    provenance = _provenance(study, arm, seed)
    folder = _folder(provenance)

    def run(target: Path) -> None:
        measures = study.run(study.arms[arm].recipe, seed, target)
        artifacts.save_json(target / "measures.json", measures)
        artifacts.save_json(target / artifacts.PROVENANCE, provenance)

    artifacts.get_or_build(folder, run, wait=wait)
    measures = artifacts.load_json(folder / "measures.json")
    return {"arm": arm, "seed": seed, **measures, "folder": folder.relative_to(artifacts.artifacts_dir()).as_posix()}


def _provenance(study: Study, arm: str, seed: int) -> dict[str, Any]:
    return {
        **made_by(study.module),
        "study": study.name,
        "arm": study.arms[arm].to_dict(),
        "seed": seed,
        "choices": dict(study.choices),
    }


def _folder(provenance: Mapping[str, Any]) -> Path:
    return artifacts.artifacts_dir() / "studies" / artifacts.fingerprint(provenance)


def run_study(study: Study) -> dict[str, Any]:
    """Run every arm with every seed, first those that no other process is running.

    Returns:
        Ready for JSON: `made_with` (see there), `choices`, `arms` (title and recipe by name), `seeds`, and `runs` (see
        `run_arm`).
    """
    plan = list(itertools.product(study.seeds, study.arms))
    for seed, arm in tqdm(plan, desc=f"Study {study.name}", unit="run", leave=False):
        with contextlib.suppress(artifacts.BeingMadeError):
            run_arm(study, arm, seed, wait=False)
    runs = [run_arm(study, arm, seed) for seed, arm in plan]  # found again, or waited for
    return {
        "made_with": made_with(study.module),
        "choices": dict(study.choices),
        "arms": {name: arm.to_dict() for name, arm in study.arms.items()},
        "seeds": list(study.seeds),
        "runs": runs,
    }


def made_with(module: str) -> dict[str, str]:
    """What made a result, where and when: `module`, the digest of its `source`, versions, `machine` and `date`."""
    return {
        "module": module,
        "source": source_digest(module),
        **versions(),
        "machine": f"{platform.machine()}, threads: {torch.get_num_threads()}",
        "date": datetime.date.today().isoformat(),
    }


def stored_study(name: str) -> dict[str, Any]:
    """A study that comes with the package (see `run_study`)."""
    return artifacts.load_json(RESULTS / f"{name}.json")


def titles(result: Mapping[str, Any]) -> dict[str, str]:
    """The titles of a study's arms, by name."""
    return {name: arm["title"] for name, arm in result["arms"].items()}


def study_table(result: Mapping[str, Any], metric: str) -> pd.DataFrame:
    """One row per seed, one column per arm, in the order in which the arms were run."""
    runs = pd.DataFrame(result["runs"])
    return runs.pivot(index="seed", columns="arm", values=metric)[list(dict.fromkeys(runs["arm"]))]


def means(result: Mapping[str, Any], metric: str) -> pd.DataFrame:
    """The mean of every arm over the seeds, with its 95% t interval: columns `mean`, `low`, `high`."""
    return intervals(dict(study_table(result, metric)), "mean")


def gains(result: Mapping[str, Any], metric: str, *, over: str) -> pd.DataFrame:
    """Each other arm minus the arm `over`, seed by seed: columns `gain`, `low`, `high` (a 95% t interval).

    The interval covers what another seed (fresh head, dropout, order of the batches) would change.
    """
    table = study_table(result, metric)
    return intervals({arm: table[arm] - table[over] for arm in table if arm != over}, "gain")
