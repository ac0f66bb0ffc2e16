"""Chapter 07: one notebook, many settings.

papermill runs a notebook with other parameters; a sweep adds what it lacks. Values are checked before anything
starts, every run has a key, finished runs are found again, failed ones are kept and named, jobs share the cores,
and the results come back as one table. `python -m kd_helpers sweep --help` explains how to use it.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import datetime
import itertools
import json
import math
import os
import re
import textwrap
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import joblib
import nbformat
import papermill
from papermill.exceptions import PapermillExecutionError
from tqdm.auto import tqdm

from kd_helpers import artifacts
from kd_helpers.config import DATA_FILES, PATHS, TEXTS, DistillConfig, expanded
from kd_helpers.experiments import RESULTS
from kd_helpers.experiments.environment import environment
from kd_helpers.provenance import SOURCES, imports_of, made_by

if TYPE_CHECKING:
    import pandas as pd

# jupyter_client interrupts a kernel before shutting it down; if it comes early the kernel logs an error that is none.
QUIET = ("--IPKernelApp.log_level=CRITICAL",)
OUTPUT = "output_dir"  # the parameter through which a notebook is told where its metrics.json goes
BEST = "validation_accuracy"  # what the progress bar shows the best of: choices are made on validation
SCALARS: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool}
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}  # where a notebook names none
ABOUT_THE_RUN = ("wall_seconds", "threads", "ended", "error", "run")  # the table's last columns

Parameters = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Notebook:
    """A notebook that can be swept.

    Attributes:
        name: of its file, without the ending.
        source: the notebook as it was read; what happens to the file during a sweep changes no run.
        types: of each parameter.
        defaults: of each parameter.
        digest: of the source of its code cells. Texts and stored outputs can change without changing a result.
        made_by: the code of this package that its cells import (see `provenance.made_by`).
    """

    name: str
    source: nbformat.NotebookNode
    types: dict[str, type]
    defaults: Parameters
    digest: str
    made_by: dict[str, str]

    @property
    def distils(self) -> bool:
        """Whether its parameters are those of a `DistillConfig`: it has a preset."""
        return "preset" in self.types


def read_notebook(path: str | Path) -> Notebook:
    """Read a notebook and the parameters that it declares in its cell tagged `parameters`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no notebook, or one that can't be swept. One sentence says why.
    """
    path = Path(expanded(path))
    if not path.is_file():
        raise FileNotFoundError(f"there is no notebook {path}; give the path of an .ipynb file.")
    try:
        source = nbformat.read(path, as_version=4)
        nbformat.validate(source)
    except Exception as error:  # nbformat has one of its own for every way a file can be wrong
        raise ValueError(f"{path} is no notebook; give the path of an .ipynb file.") from error
    source.metadata.setdefault("kernelspec", KERNEL)  # programs that strip outputs may strip this, too
    code = [cell.source for cell in source.cells if cell.cell_type == "code"]
    tagged = [cell.source for cell in source.cells if "parameters" in cell.metadata.get("tags", [])]
    types, defaults = declared_parameters("\n".join(tagged), path.name)
    if OUTPUT not in types:
        raise ValueError(
            f"{path.name} has no parameter {OUTPUT!r}, so its results can't be collected; declare it in the cell "
            "tagged 'parameters', and write metrics.json there."
        )
    if taken := sorted(types.keys() & {"status", *ABOUT_THE_RUN}):
        raise ValueError(f"{path.name} has a parameter {taken[0]!r}, a column that the table has already; rename it.")
    modules = itertools.chain.from_iterable(map(_imported_modules, code))
    return Notebook(path.stem, source, types, defaults, artifacts.fingerprint({"code": code}), made_by(*modules))


def _imported_modules(cell: str) -> list[str]:
    """The modules of this package that a cell imports, its magic commands left out.

    A cell that is not Python even so may import anything, so it gets every module: a run too many is made anew rather
    than one too few.
    """
    try:
        return imports_of(re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", cell))
    except SyntaxError:
        return list(SOURCES)


def declared_parameters(code: str, where: str) -> tuple[dict[str, type], Parameters]:
    """The types and the defaults of the parameters that a cell declares, one `name: type = literal` each.

    Raises:
        ValueError: a default is no literal, or of another type than int, float, str and bool.
    """
    types, defaults = {}, {}
    try:
        statements = ast.parse(code).body
    except SyntaxError as error:
        raise ValueError(f"the cell tagged 'parameters' of {where} is not Python: {error.msg}.") from error
    for statement in statements:
        if not isinstance(statement, (ast.Assign, ast.AnnAssign)) or statement.value is None:
            continue
        target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
        name = ast.unparse(target)
        annotation = ast.unparse(statement.annotation) if isinstance(statement, ast.AnnAssign) else ""
        try:
            default = ast.literal_eval(statement.value)
        except ValueError:
            default = ...
        kind = SCALARS.get(annotation.split("|")[0].strip(), type(default))
        if kind not in SCALARS.values() or not isinstance(default, (int, float, str, bool, type(None))):
            raise ValueError(
                f"{name} in {where} can't be swept; give it a default that is a number, text, True or False."
            )
        types[name] = kind
        defaults[name] = float(default) if kind is float and type(default) is int else default
    return types, defaults


def parse(notebook: Notebook, name: str, text: str) -> Any:
    """The value that a command line gives to a parameter, in the parameter's own type.

    Raises:
        ValueError: the notebook has no such parameter, or the text is no value of its type.
    """
    known = [parameter for parameter in notebook.types if parameter != OUTPUT]
    if name == OUTPUT:
        raise ValueError(f"{OUTPUT} is set by the sweep, a folder for each run; choose the sweep's folder with --out.")
    if name not in known:
        raise ValueError(f"{notebook.name} has no parameter {name!r}; it has {', '.join(known)}.")
    wanted = notebook.types[name]
    if text == "None" and notebook.defaults[name] is None:
        return None
    if wanted is str:
        return text
    if wanted is bool and text in ("True", "False"):
        return text == "True"
    with contextlib.suppress(ValueError):
        if wanted in (int, float) and math.isfinite(value := wanted(text)):
            return value
    allowed = {int: "a whole number", float: "a finite number", bool: "True or False"}[wanted]
    raise ValueError(f"{name} is {text!r}; give {allowed}.")


@dataclasses.dataclass(frozen=True)
class Run:
    """One execution of the notebook.

    Attributes:
        name: of its folder: what differs from the notebook's defaults, and the key.
        parameters: all of them, `output_dir` left out.
    """

    name: str
    parameters: Parameters


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row of the table: the parameters that were requested, and the run that has their results."""

    parameters: Parameters
    run: Run


def plan(
    notebook: Notebook, grid: Mapping[str, Sequence[Any]], fixed: Mapping[str, Any] | None = None
) -> list[Setting]:
    """Every combination of the grid's values, each with its run.

    Where a notebook distils, alpha 0 means that nobody listens to the teacher and that the temperature changes nothing,
    so one run serves all temperatures.

    Args:
        notebook: what is run.
        grid: values of each parameter that varies.
        fixed: values of parameters that differ from the notebook's defaults but don't vary.

    Raises:
        TypeError, ValueError: a parameter is unknown, given twice, or has a value that is not allowed.
    """
    fixed = dict(fixed or {})
    if both := sorted(set(grid) & set(fixed)):
        raise ValueError(f"{', '.join(both)} is given both as a grid and as a fixed value; give one of them.")
    axes = {name: [parse(notebook, name, str(value)) for value in values] for name, values in grid.items()}
    for name, values in axes.items():
        if len(values) == 0:
            raise ValueError(f"{name} has no values; give at least one.")
        if repeated := [value for index, value in enumerate(values) if value in values[:index]]:
            raise ValueError(f"{name} lists {repeated[0]!r} twice; give each value once.")
    constant = {name: parse(notebook, name, str(value)) for name, value in fixed.items()}
    defaults = {name: value for name, value in notebook.defaults.items() if name != OUTPUT}
    settings, read = [], set()
    for values in itertools.product(*axes.values()):
        parameters = defaults | constant | dict(zip(axes, values, strict=True))
        alike = parameters
        if notebook.distils:
            config = config_from_parameters(parameters)
            source = tuple(getattr(config, name) for name in TEXTS)
            if config.data and source not in read:
                _require_readable(config)
                read.add(source)
            if parameters.get("alpha") == 0 and "temperature" in parameters:
                alike = parameters | {"temperature": notebook.defaults["temperature"]}
        settings.append(Setting(parameters, Run(run_name(notebook, alike), alike)))
    return settings


def run_name(notebook: Notebook, parameters: Parameters) -> str:
    """A run's folder: what differs from the defaults, for people; then its key, which tells any two runs apart."""
    digests = {name: _content_digest(name, value) for name, value in parameters.items()}
    files = {name: digest for name, digest in digests.items() if digest}
    key = artifacts.fingerprint({**notebook.made_by, "code": notebook.digest, "parameters": parameters, "files": files})
    changed = [f"{name}={value}" for name, value in parameters.items() if value != notebook.defaults[name]]
    readable = re.sub(r"[^\w.,=+-]+", "_", ",".join(changed) or "defaults", flags=re.ASCII)[:100]
    return f"{readable}-{key}"


def _content_digest(name: str, value: Any) -> str | None:
    """A digest of the file of texts or the folder of a model that a parameter names; None where it names neither."""
    if name not in PATHS or not value:
        return None
    path = Path(expanded(value, name))
    if name in DATA_FILES:
        return artifacts.file_digest(path) if os.path.isfile(path) else None
    return artifacts.model_folder_digest(path) if os.path.isdir(path) else None


def _require_readable(config: DistillConfig) -> None:
    """Refuse texts that the runs could not read; one that fails here would fail in every run."""
    from kd_helpers.data import load_splits  # which loads torch, and is not needed for the course's own tweets

    try:
        load_splits(config)
    except (OSError, ValueError) as error:  # whoever plans a sweep expects a ValueError
        raise ValueError(str(error)) from error


def config_from_parameters(parameters: Parameters) -> DistillConfig:
    """The `DistillConfig` that a notebook's parameters amount to: it refuses values outside their range."""
    fields = {field.name for field in dataclasses.fields(DistillConfig)}
    return DistillConfig(**{name: value for name, value in parameters.items() if name in fields})


def sweep(
    path: str | Path,
    grid: Mapping[str, Sequence[Any]],
    *,
    out: str | Path,
    fixed: Mapping[str, Any] | None = None,
    jobs: int = 1,
) -> pd.DataFrame:
    """Run a notebook with every combination of the grid's values; finished runs are found again.

    A run that fails is kept with its notebook, and the sweep goes on. Two sweeps may share one folder: neither
    repeats what the other does. A process that dies, however it dies, loses the runs in flight and nothing else.
    All runs find the teacher and its cached logits in `artifacts/`; where they are missing, the first run that needs
    them makes them, and the others wait. When interrupted from Python, the current runs end in the background.

    Args:
        path: of the notebook.
        grid: values of each parameter that varies.
        out: the sweep's folder, for one notebook.
        fixed: other parameters that differ from the notebook's defaults.
        jobs: runs at the same time. They share the cores, so each computes with cores / jobs threads; another number
            of threads rounds differently and gives slightly different numbers.

    Returns:
        The table of `collect`, also written to `table.csv` and `table.parquet`.

    Raises:
        FileNotFoundError, TypeError, ValueError: the request can't be met. Nothing has started then.
    """
    notebook = read_notebook(path)
    settings = plan(notebook, grid, fixed)
    threads_per_job(jobs)
    folder = Path(expanded(out, "out")).resolve()
    require_own_folder(folder, notebook)
    return run_plan(notebook, settings, folder, jobs)


def run_plan(notebook: Notebook, settings: Sequence[Setting], out: Path, jobs: int) -> pd.DataFrame:
    """Execute what is missing of a plan; `sweep` says how."""
    _record(out, notebook, settings)
    runs = {setting.run.name: setting.run for setting in settings}
    seen = {name: read_run(out / "runs" / name) for name in runs}
    todo = [run for run in runs.values() if not is_finished(seen[run.name])]
    threads = threads_per_job(jobs)
    libraries = ("OMP", "MKL", "OPENBLAS", "VECLIB_MAXIMUM")
    with (
        tqdm(total=len(runs), initial=len(runs) - len(todo), desc=notebook.name, unit="run") as bar,
        environment(
            {"TOKENIZERS_PARALLELISM": "false"} | {f"{library}_NUM_THREADS": str(threads) for library in libraries}
        ),
    ):
        bar.set_postfix_str(best_so_far(write_table(out)))
        # First the runs that nobody is working on; then wait for those of another sweep.
        for wait in (False, True):
            for run in _execute_all(notebook, todo, seen, out, jobs, threads, wait=wait):
                todo.remove(run)
                bar.set_postfix_str(best_so_far(write_table(out)))
                bar.update()
    return write_table(out)


def _execute_all(
    notebook: Notebook, runs: Sequence[Run], seen: Mapping[str, Any], out: Path, jobs: int, threads: int, *, wait: bool
) -> Iterator[Run]:
    """Execute runs, `jobs` at a time, and yield those that are done. What can't be written is raised at the end."""
    pool = ThreadPoolExecutor(jobs)
    broken: list[OSError] = []
    try:
        futures = {pool.submit(execute, notebook, run, seen[run.name], out, threads, wait=wait): run for run in runs}
        for future in as_completed(futures):
            try:
                done = future.result()
            except OSError as error:  # of this run's folder; the others may fare better
                broken.append(error)
                continue
            if done:
                yield futures[future]
    finally:  # an interrupt must not wait for runs that have not begun
        pool.shutdown(wait=False, cancel_futures=True)
    if broken:
        raise broken[0]


def threads_per_job(jobs: int) -> int:
    """How many threads each job may use so that all of them together use no core twice."""
    cores = joblib.cpu_count()
    if not isinstance(jobs, int) or not 1 <= jobs <= cores:
        raise ValueError(f"jobs is {jobs}; this machine has {cores} cores, so give a whole number from 1 to {cores}.")
    return cores // jobs


def execute(notebook: Notebook, run: Run, seen: dict[str, Any] | None, out: Path, threads: int, *, wait: bool) -> bool:
    """Make sure that a run is done, unless another process is working on it and we don't wait for that.

    The run's folder appears whole or not at all: the executed notebook, what it wrote into its `output_dir`
    (`output/`), and `run.json`, which says how it went. A run that failed is tried again if it had failed when the
    sweep began (`seen`), but not if another sweep has just tried it.

    Returns:
        False if another process is working on it.
    """
    folder = out / "runs" / run.name
    try:
        with filelock.FileLock(folder.with_name(f".{run.name}.lock"), timeout=-1 if wait else 0):
            entry = read_run(folder)
            if not is_finished(entry) and entry == seen:
                artifacts.write_folder(folder, lambda target: _run_notebook(notebook, run, folder, target, threads))
    except filelock.Timeout:
        return False
    return True


def _run_notebook(notebook: Notebook, run: Run, folder: Path, target: Path, threads: int) -> None:
    start = time.perf_counter()
    executed, output = target / "notebook.ipynb", target / "output"
    metrics, error = {}, ""
    try:
        parameters = run.parameters | {OUTPUT: str(output)}
        written = str(executed).replace("{", "{{").replace("}", "}}")  # papermill fills in what stands in braces
        papermill.execute_notebook(notebook.source, written, parameters, progress_bar=False, extra_arguments=QUIET)
        if (output / "metrics.json").is_file():
            metrics = flatten(artifacts.load_json(output / "metrics.json"))
        else:
            error = f"the notebook wrote no metrics.json into its {OUTPUT}"
    except PapermillExecutionError as failure:
        error = f"{failure.ename} in cell [{failure.exec_count}]: {failure.evalue}"
    except Exception as failure:  # a kernel that died or could not start: the other runs must go on
        error = f"{type(failure).__name__}: {failure}"
    if executed.exists():  # the folder gets its final name when it is whole, and the notebook speaks of that one
        text = executed.read_text(encoding="utf-8")
        for before, after in zip(_spellings(target), _spellings(folder), strict=True):
            text = text.replace(before, after)
        artifacts.write_text(executed, text)
    entry = {
        "parameters": run.parameters,
        "status": "failed" if error else "finished",
        "metrics": metrics,
        "wall_seconds": round(time.perf_counter() - start, 1),
        "threads": threads,
        "ended": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "error": textwrap.shorten(error, 300),  # the notebook keeps all of it
    }
    artifacts.save_json(target / "run.json", entry)


def _spellings(path: Path) -> list[str]:
    """How a notebook file writes a path: in outputs, and in the code that papermill injects."""
    written = (str(path), str(path).encode("unicode_escape").decode())
    return [json.dumps(text, ensure_ascii=False)[1:-1] for text in written]


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers in nested metrics: `{"test": {"nll": 0.6}}` becomes `{"test_nll": 0.6}`."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}_")
        elif isinstance(value, (int, float)):
            flat[prefix + name] = float(value) if isinstance(value, bool) else value
    return flat


def read_run(folder: Path) -> dict[str, Any] | None:
    """What `run.json` in a run's folder says; None where there is none, or a damaged one, which is reported."""
    path = folder / "run.json"
    if not path.exists():
        return None
    try:
        if artifacts.load_json(folder / artifacts.MANIFEST)["run.json"] == artifacts.file_digest(path):
            return artifacts.load_json(path)
    except (OSError, ValueError, KeyError):
        pass
    warnings.warn(f"{folder.name} is damaged and counts as not run.", stacklevel=2)
    return None


def is_finished(entry: dict[str, Any] | None) -> bool:
    """Whether a run, as `read_run` found it, has its results."""
    return entry is not None and entry["status"] == "finished"


def require_own_folder(out: Path, notebook: Notebook) -> None:
    """Refuse a folder that can't be a sweep's, or that holds one of another notebook.

    Raises:
        ValueError: one sentence says why.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; choose a folder for --out.")
    if (out / "plan.json").exists() and (other := read_plan(out)["notebook"]) != notebook.name:
        raise ValueError(f"{out} holds a sweep of {other}, not of {notebook.name}; choose another --out.")


def _record(out: Path, notebook: Notebook, settings: Sequence[Setting]) -> None:
    """Add settings to the sweep's plan, from which `collect` knows which runs belong to it.

    A notebook whose code changed, or changed code of this package, begins a new plan: earlier runs stay on the disk
    but leave the table, which would else mix two experiments.
    """
    artifacts.make_folder(out)
    provenance = {"notebook": notebook.name, "code": notebook.digest, **notebook.made_by}
    with filelock.FileLock(out / ".plan.lock"):
        old = read_plan(out) if (out / "plan.json").exists() else {}
        rows = old["settings"] if old.get("provenance") == provenance else []
        new = [{"parameters": setting.parameters, "run": setting.run.name} for setting in settings]
        rows += [row for row in new if row not in rows]
        content = {"notebook": notebook.name, "provenance": provenance, "settings": rows}
        artifacts.save_json(out / "plan.json", content | {"digest": artifacts.fingerprint(content)})


def read_plan(out: Path) -> dict[str, Any]:
    """The plan of a sweep: the notebook, what its runs are made of, and its settings.

    Raises:
        ValueError: it was changed or damaged, so it may name a run by the wrong parameters.
    """
    path = out / "plan.json"
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        plan = artifacts.load_json(path)
        if plan.pop("digest") == artifacts.fingerprint(plan):
            return plan
    raise ValueError(f"{path} is damaged; delete it and give the same command again, which finds the finished runs.")


def collect(out: str | Path) -> pd.DataFrame:
    """The sweep's table, from finished and half-finished sweeps alike.

    Returns:
        One row a setting, in order of the parameters: every parameter, `status` ("finished", "failed" or "planned"),
        the run's metrics (NaN until there are any), `wall_seconds` of the whole notebook, `threads`, `ended` (UTC),
        `error`, and `run`, the folder under `runs/` that holds everything else.

    Raises:
        FileNotFoundError: the folder holds no sweep.
        ValueError: its plan is damaged.
    """
    import pandas as pd

    out = Path(expanded(out, "out"))
    if not (out / "plan.json").exists():
        raise FileNotFoundError(f"{out} holds no sweep; give the folder that was the sweep's --out.")
    settings = read_plan(out)["settings"]
    names = list(settings[0]["parameters"])
    rows = []
    for setting in settings:
        entry = read_run(out / "runs" / setting["run"]) or {"status": "planned"}
        measured = {name: entry.get(name) for name in ("wall_seconds", "threads")}
        described = {name: entry.get(name, "") for name in ("ended", "error")}
        row = {**entry.get("metrics", {}), "status": entry["status"], **measured, **described, "run": setting["run"]}
        rows.append(row | setting["parameters"])
    table = pd.DataFrame(rows)
    metrics = [name for name in table.columns if name not in {*names, "status", *ABOUT_THE_RUN}]
    return table[[*names, "status", *metrics, *ABOUT_THE_RUN]].sort_values(names, ignore_index=True)


def write_table(out: Path) -> pd.DataFrame:
    """Write the sweep's table as CSV and Parquet, whole or not at all, and return it."""
    with filelock.FileLock(out / ".plan.lock"):  # or an older table could be written over a newer one
        table = collect(out)
        artifacts.write_text(out / "table.csv", table.to_csv(index=False))
        artifacts.write_bytes(out / "table.parquet", table.to_parquet(index=False))
    return table


def parameter_columns(table: pd.DataFrame) -> pd.Index:
    """The columns of a sweep's table that are parameters: those before `status`."""
    return table.columns[: table.columns.get_loc("status")]


def best_so_far(table: pd.DataFrame) -> str:
    """The best run by accuracy on validation and what is special about it; empty while there is none."""
    if BEST not in table or table[BEST].isna().all():
        return ""
    row = table.loc[table[BEST].idxmax()]
    varied = [name for name in parameter_columns(table) if table[name].nunique() > 1]
    setting = ", ".join(f"{name} {row[name]}" for name in varied)
    return f"best single run {row[BEST]:.1%} on validation" + (f" ({setting})" if setting else "")


def describe_plan(notebook: Notebook, settings: Sequence[Setting], out: Path, jobs: int) -> str:
    """What a sweep is about to do: values, runs, how many are finished, how long the rest will take."""
    threads = threads_per_job(jobs)
    runs = {setting.run.name for setting in settings}
    entries = [entry for name in runs if (entry := read_run(out / "runs" / name))]
    finished = [entry["wall_seconds"] for entry in entries if is_finished(entry)]
    left = len(runs) - len(finished)
    merged = any(setting.parameters != setting.run.parameters for setting in settings)
    shared = " (at alpha 0 one run serves all temperatures)" if merged else ""
    lines = [f"{notebook.name}: settings {len(settings)}, runs {len(runs)}{shared}"]
    for name in settings[0].parameters:
        values = list(dict.fromkeys(setting.parameters[name] for setting in settings))
        if values != [notebook.defaults[name]]:
            lines.append(f"  {name:16} {', '.join(map(str, values))}")
    estimate = "an estimate comes with the first that finishes"
    if finished:
        estimate = f"about {left * sum(finished) / len(finished) / jobs / 60:.0f} min"
    lines.append(f"  {len(finished)} finished, {len(entries) - len(finished)} failed before, {left} to run: {estimate}")
    lines.append(f"  jobs {jobs}, threads in each {threads}; results in {out}")
    return "\n".join(lines)


def surface(table: pd.DataFrame, metric: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A metric over temperature and alpha, from the table of a sweep with several seeds.

    Returns:
        Two tables with a row for each temperature and a column for each alpha: the mean over the seeds, and half the
        width of its 95% t interval (NaN where there is one seed).

    Raises:
        ValueError: a cell holds a seed twice, so something else than the seed varies in it.
    """
    from kd_helpers.experiments.statistics import mean_interval

    if table.duplicated(["temperature", "alpha", "seed"]).any():
        raise ValueError(
            "another parameter varies beside temperature, alpha and seed; keep the rows of one value of it."
        )
    cells = table.groupby(["temperature", "alpha"])[metric].agg(mean_interval)
    mean, half = cells.map(lambda cell: cell[0]), cells.map(lambda cell: (cell[2] - cell[1]) / 2)
    return mean.unstack(), half.unstack()


def stored_sweep() -> dict[str, Any]:
    """The full sweep that comes with the course, made by `make sweep`."""
    return artifacts.load_json(RESULTS / "temperature_and_alpha.json")


def main(arguments: Sequence[str] | None = None, *, prog: str = "kd-helpers sweep") -> int:
    """Run a notebook with every combination of the values given; finished runs are found again.

    Returns:
        Exit status: 0 if every run is finished, 1 if some failed. A request that can't be met exits with 2.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Run a notebook with every combination of the values given. Runs that are finished are found "
        "again, so the same command continues an interrupted sweep. The results are one table, table.csv.",
        epilog=f"Example: {prog} notebooks/05_distill_and_evaluate.ipynb --out nightly -g temperature=1,2 "
        "-g alpha=0,0.5,1 -p epochs 6. `papermill --help-notebook FILE` lists the parameters. Exit status: 0, or 1 if "
        "a run failed, or 2 if the request can't be met.",
    )
    parser.add_argument("notebook", type=Path, help="with a cell tagged 'parameters' that declares output_dir")
    parser.add_argument(
        "-g", "--grid", action="append", default=[], metavar="NAME=V1,V2,...", help="a parameter that varies; repeat it"
    )
    parser.add_argument(
        "-p", "--parameter", action="append", default=[], nargs=2, metavar=("NAME", "VALUE"), help="one that does not"
    )
    parser.add_argument("--out", type=Path, help="folder of the sweep; artifacts/sweeps/NOTEBOOK if left out")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, which share the cores (default 1)")
    parser.add_argument("--dry-run", action="store_true", help="show the plan and stop")
    chosen = parser.parse_args(arguments)
    try:
        out = chosen.out or artifacts.artifacts_dir() / "sweeps" / chosen.notebook.stem
        out = Path(expanded(out, "--out")).resolve()
        notebook = read_notebook(chosen.notebook)
        settings = plan(notebook, _grid(chosen.grid), _fixed(chosen.parameter))
        require_own_folder(out, notebook)
        print(describe_plan(notebook, settings, out, chosen.jobs), flush=True)
        if not chosen.dry_run:
            artifacts.make_folder(out)
    except (OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    if chosen.dry_run:
        return 0
    table = run_plan(notebook, settings, out, chosen.jobs)
    if best := best_so_far(table):
        print(best)
    print(f"{out / 'table.csv'} and table.parquet: {len(table)} rows")
    entries = {name: read_run(out / "runs" / name) for name in dict.fromkeys(setting.run.name for setting in settings)}
    failed = {name: entry for name, entry in entries.items() if not is_finished(entry)}
    for name, entry in failed.items():
        print(f"failed: {out / 'runs' / name / 'notebook.ipynb'}: {entry['error'] if entry else 'damaged'}")
    return 1 if failed else 0


def _grid(given: Sequence[str]) -> dict[str, list[str]]:
    """`["alpha=0,1"]` as `{"alpha": ["0", "1"]}`."""
    grid: dict[str, list[str]] = {}
    for text in given:
        name, equals, values = text.partition("=")
        if not equals or not values:
            raise ValueError(f"-g {text!r} is no grid; write it as NAME=V1,V2,... without spaces.")
        if name in grid:
            raise ValueError(f"{name} is given twice; list all its values behind one -g.")
        grid[name] = values.split(",")
    return grid


def _fixed(given: Sequence[Sequence[str]]) -> dict[str, str]:
    """`[["epochs", "3"]]` as `{"epochs": "3"}`."""
    fixed: dict[str, str] = {}
    for name, value in given:
        if name in fixed:
            raise ValueError(f"{name} is given twice; give it once, or all its values behind one -g.")
        fixed[name] = value
    return fixed
