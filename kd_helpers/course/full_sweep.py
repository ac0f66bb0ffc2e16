"""The full sweep of chapter 07, from the folder of a finished `make sweep` into the package."""

from __future__ import annotations

from kd_helpers import artifacts, experiments
from kd_helpers.course.notebooks import NOTEBOOKS
from kd_helpers.experiments import comparison, study, sweep

SWEEP, SWEPT = "temperature_and_alpha", NOTEBOOKS / "05_distill_and_evaluate.ipynb"


def store_sweep() -> None:
    """Store the finished full sweep in the package, with the label smoothing that it is compared with.

    Raises:
        FileNotFoundError: the sweep was not run, or some of its runs are missing.
    """
    table = sweep.collect(artifacts.artifacts_dir() / "sweeps" / SWEEP)
    if (table["status"] != "finished").any():
        raise FileNotFoundError(f"runs are missing: {table['status'].value_counts().to_dict()}; run `make sweep`.")
    parameters = sweep.parameter_columns(table)
    varied = [name for name in parameters if table[name].nunique() > 1]
    measures = [name for name in table.columns if name.startswith(("validation_", "test_"))]
    (fixed,) = table[parameters.drop(varied)].head(1).to_dict("records")
    config, seeds = sweep.config_from_parameters(fixed), sorted(table["seed"].unique().tolist())
    smoothed = comparison.comparison_study(config, arms=["label_smoothing"], seeds=seeds)
    smoothing = []
    for run in study.run_study(smoothed)["runs"]:
        flat = sweep.flatten({"validation": run["history"][-1], "test": run})
        smoothing.append({"seed": run["seed"]} | {name: flat[name] for name in measures})
    content = {
        "made_with": study.made_with(smoothed.module) | {"threads": int(table["threads"].iloc[0])},
        "notebook": SWEPT.stem,
        "fixed": fixed,
        "runs": table[[*varied, *measures, "wall_seconds"]].to_dict("records"),
        "label_smoothing": smoothing,
    }
    artifacts.save_json(experiments.RESULTS / f"{SWEEP}.json", content)
