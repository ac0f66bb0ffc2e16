"""Sweeps: planned, resumed, shared and collected. Most of them run a notebook that only writes a number."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import joblib
import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from scipy import stats

from kd_helpers import artifacts, provenance
from kd_helpers.course.full_sweep import SWEPT
from kd_helpers.experiments import sweep
from kd_helpers.experiments.sweep import stored_sweep
from kd_helpers.provenance import made_by

TIMES = ["wall_seconds", "threads", "ended"]
KERNEL = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
PARAMETERS = """x: float = 1.0  # a number
mode: str = "a"  # how
count: int = 2  # how many
loud: bool = False  # whether
output_dir: str = ""  # where"""
BODY = """import json, os, pathlib, time
here = pathlib.Path({here!r})
with open(here / "log", "a") as log:
    log.write(f"{{x}} {{mode}}\\n")
if x == 3 and not (here / "mended").exists():
    raise RuntimeError("three is refused")
time.sleep({nap})
pathlib.Path(output_dir).mkdir(parents=True)
metrics = {{"validation": {{"accuracy": x / 10}}, "cores": int(os.environ["OMP_NUM_THREADS"])}}
pathlib.Path(output_dir, "metrics.json").write_text(json.dumps(metrics))"""


def write_notebook(
    path: Path, *, body: str = BODY, parameters: str = PARAMETERS, nap: float = 0, text: str = ""
) -> Path:
    cells = [new_markdown_cell(text), new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    cells.append(new_code_cell(body.format(here=str(path.parent), nap=nap)))
    nbformat.write(new_notebook(cells=cells, metadata=KERNEL), path)
    return path


@pytest.fixture
def toy(tmp_path):
    return write_notebook(tmp_path / "toy.ipynb")


def executions(path: Path) -> list[str]:
    """What the notebook was executed with, a line each time it began."""
    log = path.parent / "log"
    return log.read_text().splitlines() if log.exists() else []


def start(path: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "kd_helpers", "sweep", str(path), *map(str, arguments)]
    # A job in the background of a script ignores Ctrl-C, and so would what it starts; a reader's shell does not.
    heeds = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeds)


def wait_until(holds, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


# The plan


def test_a_grid_is_every_combination_and_alpha_0_is_run_once(toy):
    notebook = sweep.read_notebook(SWEPT)
    settings = sweep.plan(notebook, {"temperature": [1, 2, 4], "alpha": [0, 0.5], "seed": [0, 1]}, {"epochs": 1})
    assert len(settings) == 12
    assert len({setting.run.name for setting in settings}) == 3 * 2 + 2
    assert {setting.parameters["epochs"] for setting in settings} == {1}
    assert sorted({setting.parameters["temperature"] for setting in settings}) == [1.0, 2.0, 4.0]
    first = settings[0]
    assert set(first.parameters) == set(notebook.defaults) - {"output_dir"}
    assert first.run.parameters["temperature"] == notebook.defaults["temperature"]


@pytest.mark.parametrize(
    ("grid", "fixed", "message"),
    [
        ({"y": ["1"]}, {}, "toy has no parameter 'y'; it has x, mode, count, loud."),
        ({"x": ["one"]}, {}, "x is 'one'; give a finite number."),
        ({"count": ["1.5"]}, {}, "count is '1.5'; give a whole number."),
        ({"loud": ["yes"]}, {}, "loud is 'yes'; give True or False."),
        ({"x": ["1"]}, {"output_dir": "here"}, "output_dir is set by the sweep"),
        ({"x": ["1"]}, {"x": "2"}, "x is given both as a grid and as a fixed value"),
        ({"x": ["nan"]}, {}, "x is 'nan'; give a finite number."),
        ({"x": ["1", "1.0"]}, {}, "x lists 1.0 twice"),
        ({"x": []}, {}, "x has no values"),
    ],
)
def test_what_can_not_be_run_is_refused_before_anything_starts(toy, tmp_path, grid, fixed, message):
    with pytest.raises(ValueError, match=message):
        sweep.sweep(toy, grid, fixed=fixed, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert executions(toy) == []


def test_values_outside_their_range_are_refused_before_anything_starts(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        sweep.main([str(SWEPT), "-g", "temperature=2,0", "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "temperature is 0.0; give a finite number greater than 0." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.ipynb"], "there is no notebook nowhere.ipynb"),
        (["{toy}", "-g", "x"], "is no grid; write it as NAME=V1,V2"),
        (["{toy}", "-g", "x=1", "-g", "x=2"], "x is given twice"),
        (["{toy}", "-p", "x", "1", "-p", "x", "2"], "x is given twice"),
        (["{toy}", "-g", "x=1", "--out", "{toy}"], "is a file; choose a folder for --out"),
        (["{toy}", "-g", "x=1", "--out", "{toy}/sub"], "can't be written: a file stands where a folder is needed"),
        (["{toy}", "-g", "x=1", "--jobs", "1000"], "jobs is 1000; this machine has"),
        (["{toy}", "-g", "x=1", "--jobs", "0"], "jobs is 0; this machine has"),
    ],
)
def test_a_bad_command_gets_one_sentence(toy, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        sweep.main([argument.format(toy=toy) for argument in arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ("x: float = 1.0", "has no parameter 'output_dir'"),
        ("layers = (0, 2)\noutput_dir = ''", "layers in odd.ipynb can't be swept"),
        ("x = 2 * 3\noutput_dir = ''", "x in odd.ipynb can't be swept"),
        ("x = = 3\noutput_dir = ''", "the cell tagged 'parameters' of odd.ipynb is not Python"),
        ("status = 1\noutput_dir = ''", "has a parameter 'status', a column that the table has already"),
    ],
)
def test_a_notebook_that_can_not_be_swept_is_refused(tmp_path, parameters, message):
    odd = write_notebook(tmp_path / "odd.ipynb", parameters=parameters)
    with pytest.raises(ValueError, match=message):
        sweep.read_notebook(odd)


def test_what_is_no_notebook_is_refused(tmp_path):
    (tmp_path / "empty.ipynb").write_text("{}")
    with pytest.raises(ValueError, match="is no notebook"):
        sweep.read_notebook(tmp_path / "empty.ipynb")


def test_parameters_are_read_as_python_reads_them():
    code = """x: float = 1  # 0 = off
sep: str = "#"  # between
rate: float | None = None  # None: the preset's
n = 3
on = False"""
    types, defaults = sweep.declared_parameters(code, "here")
    assert types == {"x": float, "sep": str, "rate": float, "n": int, "on": bool}
    assert defaults == {"x": 1.0, "sep": "#", "rate": None, "n": 3, "on": False}
    assert type(defaults["x"]) is float, "1 and 1.0 are one setting"


def test_a_run_is_known_by_its_code_and_its_parameters(toy, monkeypatch):
    def names(**parameters):
        return [setting.run.name for setting in sweep.plan(sweep.read_notebook(toy), {"x": [1.0]}, parameters)]

    before = names()
    assert names(mode="a") == before, "the default, said aloud"
    assert names(mode="b") != before
    write_notebook(toy, text="other words")
    assert names() == before
    write_notebook(toy, body=BODY + "\n# other code")
    assert names() != before
    write_notebook(toy)
    monkeypatch.setattr(sweep, "made_by", lambda *modules: {"source": "another digest"})
    assert names() != before


def run_names(path: Path, **parameters) -> list[str]:
    return [setting.run.name for setting in sweep.plan(sweep.read_notebook(path), {"x": [1.0]}, parameters)]


IMPORTING = """%matplotlib inline
from kd_helpers import distill
import kd_helpers.losses
if mode == "never":
    %pip install nothing
    from kd_helpers.methods import tinybert
    from kd_helpers.course import plots
"""
IMPORTED = ("kd_helpers.runs", "kd_helpers.losses", "kd_helpers.methods.tinybert")


def test_the_code_that_a_notebook_imports_is_part_of_what_a_run_is_known_by(toy, tmp_path, monkeypatch):
    importing, asked = write_notebook(tmp_path / "importing.ipynb", body=IMPORTING + BODY), []
    assert sweep.read_notebook(importing).made_by == made_by(*IMPORTED)
    assert sweep.read_notebook(toy).made_by == made_by()
    before = run_names(importing)
    monkeypatch.setattr(sweep, "made_by", lambda *modules: asked.append(modules) or {"source": "another digest"})
    assert run_names(importing) != before
    assert asked == [IMPORTED]


@pytest.mark.parametrize(
    ("module", "counts"), [("losses", True), ("methods.tinybert", True), ("shards", False), ("course.plots", False)]
)
def test_a_changed_module_is_another_run_where_the_notebook_imports_it(tmp_path, monkeypatch, module, counts):
    importing = write_notebook(tmp_path / "importing.ipynb", body=IMPORTING + BODY)
    before = run_names(importing)
    name = f"kd_helpers.{module}"
    monkeypatch.setitem(provenance.SOURCES, name, provenance.SOURCES[name] + "\nCHANGED = True\n")
    provenance.source_digest.cache_clear()
    try:
        assert (run_names(importing) != before) == counts
    finally:
        provenance.source_digest.cache_clear()


def test_the_courses_sweep_depends_on_the_loop_and_all_below_it(monkeypatch):
    asked = []
    monkeypatch.setattr(sweep, "made_by", lambda *modules: asked.append(modules) or {"source": "a digest"})
    sweep.read_notebook(SWEPT)
    found = provenance.imported_modules(*asked)
    assert {f"kd_helpers.{name}" for name in ("runs", "teacher", "loop", "losses", "data", "models", "lean")} <= found


def write_texts(path: Path, word: str) -> None:
    rows = "".join(f"{word} {number},{number % 2}\n" for number in range(20))
    path.write_text("text,label\n" + rows)


@pytest.mark.parametrize("name", ["data", "validation_data", "test_data"])
def test_other_texts_in_the_same_file_of_the_home_folder_are_another_run(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    notebook, names = sweep.read_notebook(SWEPT), []
    for other in ("data", "validation_data", "test_data"):
        write_texts(tmp_path / f"{other}.csv", other)
    fixed = {"data": "~/data.csv", "validation_data": "~/validation_data.csv", "test_data": "~/test_data.csv"}
    for word in (name, "another", "another"):
        write_texts(tmp_path / f"{name}.csv", word)
        (setting,) = sweep.plan(notebook, {"alpha": [0.5]}, fixed)
        names.append(setting.run.name)
    assert names[0] != names[1] == names[2]


CHECKPOINTS = PARAMETERS.replace(
    "output_dir", 'teacher_checkpoint: str = ""  # a folder\nstudent_checkpoint: str = ""  # another\noutput_dir'
)


@pytest.mark.parametrize("parameter", ["teacher_checkpoint", "student_checkpoint"])
@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("model.safetensors", True),
        ("config.json", True),
        ("tokenizer.json", True),
        ("vocab.txt", True),
        ("README.md", False),
    ],
)
def test_a_changed_file_of_a_model_is_another_run(tmp_path, parameter, file, counts):
    swept = write_notebook(tmp_path / "swept.ipynb", parameters=CHECKPOINTS)
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json", "vocab.txt", "README.md"):
        (folder / name).write_text(name)
    before = run_names(swept, **{parameter: str(folder)})
    assert run_names(swept, **{parameter: str(folder)}) == before
    (folder / file).write_text("another")
    assert (run_names(swept, **{parameter: str(folder)}) != before) == counts


PLANNING = """
import sys
import kd_helpers.experiments.sweep
heavy = {{"torch", "transformers", "datasets", "sklearn", "scipy"}}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
status = kd_helpers.experiments.sweep.main(
    [{notebook!r}, "-g", "temperature=1,4", "-g", "alpha=0,0.5", "--out", {out!r}, "--dry-run"]
)
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
sys.exit(status)
"""


def test_a_sweep_is_planned_without_loading_torch(tmp_path):
    code = PLANNING.format(notebook=str(SWEPT), out=str(tmp_path / "out"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{SWEPT.stem}: settings 4, runs 3 (at alpha 0 one run serves all temperatures)" in done.stdout
    assert not (tmp_path / "out").exists()


def test_a_folder_is_named_for_people(toy):
    (setting,) = sweep.plan(sweep.read_notebook(toy), {"x": [2.5], "mode": ["a/b c"]})
    assert setting.run.name.startswith("x=2.5,mode=a_b_c-")


def test_a_dry_run_shows_the_plan_and_writes_nothing(toy, tmp_path, capsys):
    assert sweep.main([str(toy), "-g", "x=1,2", "-p", "mode", "b", "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "toy: settings 2, runs 2\n" in shown
    assert "x                1.0, 2.0" in shown
    assert "0 finished, 0 failed before, 2 to run" in shown
    assert not (tmp_path / "out").exists()


# Running, failing, resuming


def test_a_sweep_runs_what_is_missing_and_writes_its_table(toy, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    table = sweep.sweep(toy, {"x": [1, 2], "mode": ["a", "b"]}, out=out)
    assert table["validation_accuracy"].tolist() == [0.1, 0.1, 0.2, 0.2]
    assert set(table["status"]) == {"finished"}
    assert table["cores"].tolist() == table["threads"].tolist() == [joblib.cpu_count()] * 4
    assert os.environ["OMP_NUM_THREADS"] == "7", "put back"
    again = sweep.sweep(toy, {"x": [1, 2, 4], "mode": ["a"]}, out=out)
    assert len(executions(toy)) == 5, "only the new one"
    assert len(again) == 5, "earlier settings stay in the table"
    assert sweep.main([str(toy), "-g", "x=1,2", "--out", str(out), "--dry-run"]) == 0
    assert "2 finished, 0 failed before, 0 to run" in capsys.readouterr().out
    pd.testing.assert_frame_equal(pd.read_parquet(out / "table.parquet"), sweep.collect(out))
    assert pd.read_csv(out / "table.csv")["validation_accuracy"].tolist() == again["validation_accuracy"].tolist()


@pytest.mark.parametrize("name", ["out", "a {b} 100% é"])
def test_the_executed_notebook_knows_where_it_lies(toy, tmp_path, name):
    (row,) = sweep.sweep(toy, {"mode": ['"{x}" \\ é']}, out=tmp_path / name).itertuples()
    assert row.status == "finished", row.error
    assert row.mode == '"{x}" \\ é'
    folder = tmp_path / name / "runs" / row.run
    notebook = nbformat.read(folder / "notebook.ipynb", as_version=4)
    injected = {}
    exec(notebook.cells[2].source, injected)
    assert injected["output_dir"] == str(folder / "output")
    assert injected["mode"] == row.mode
    assert ".building" not in (folder / "notebook.ipynb").read_text()
    assert (folder / "output" / "metrics.json").exists()


def test_jobs_share_the_cores(toy, tmp_path):
    jobs = joblib.cpu_count()
    table = sweep.sweep(toy, {"x": [1, 2, 4, 5]}, out=tmp_path / "out", jobs=jobs)
    assert table["cores"].tolist() == [1] * 4
    assert table["validation_accuracy"].tolist() == [0.1, 0.2, 0.4, 0.5]


def test_a_run_that_can_not_be_written_does_not_stop_the_others(toy, tmp_path, monkeypatch):
    def write_folder(folder, build, write_folder=artifacts.write_folder):
        if folder.name.startswith("x=2"):
            raise OSError("no space left")
        write_folder(folder, build)

    monkeypatch.setattr(artifacts, "write_folder", write_folder)
    with pytest.raises(OSError, match="no space left"):
        sweep.sweep(toy, {"x": [1, 2, 4]}, out=tmp_path / "out")
    assert sweep.collect(tmp_path / "out")["status"].tolist() == ["finished", "planned", "finished"]


def test_a_failed_run_is_kept_and_named_and_tried_again(toy, tmp_path, capsys):
    command = [str(toy), "-g", "x=1,3,4", "--out", str(tmp_path / "out")]
    assert sweep.main(command) == 1
    printed = capsys.readouterr().out
    table = sweep.collect(tmp_path / "out").set_index("x")
    assert table["status"].tolist() == ["finished", "failed", "finished"]
    assert table.loc[3.0, "error"] == "RuntimeError in cell [3]: three is refused"
    kept = tmp_path / "out" / "runs" / table.loc[3.0, "run"] / "notebook.ipynb"
    assert f"failed: {kept}: RuntimeError in cell [3]" in printed
    assert "three is refused" in kept.read_text()
    (toy.parent / "mended").touch()
    assert sweep.main(command) == 0
    assert sorted(executions(toy)) == ["1.0 a", "3.0 a", "3.0 a", "4.0 a"]
    assert sweep.main(command) == 0, "nothing is left to do"
    assert len(executions(toy)) == 4


def test_a_notebook_without_metrics_has_failed(tmp_path):
    silent = write_notebook(tmp_path / "silent.ipynb", body="pass")
    (row,) = sweep.sweep(silent, {"x": [1]}, out=tmp_path / "out").itertuples()
    assert (row.status, row.error) == ("failed", "the notebook wrote no metrics.json into its output_dir")


def test_a_kernel_that_dies_fails_its_run_alone(tmp_path):
    deadly = write_notebook(tmp_path / "deadly.ipynb", body="import os\nif x == 1: os._exit(1)\n" + BODY)
    table = sweep.sweep(deadly, {"x": [1, 2]}, out=tmp_path / "out")
    assert table["status"].tolist() == ["failed", "finished"]
    assert "DeadKernelError" in table["error"][0]


def test_a_changed_notebook_runs_again_and_the_table_holds_one_experiment(toy, tmp_path):
    out = tmp_path / "out"
    sweep.sweep(toy, {"x": [1, 2]}, out=out)
    write_notebook(toy, body=BODY.replace("x / 10", "x / 100"))
    table = sweep.sweep(toy, {"x": [1]}, out=out)
    assert table["validation_accuracy"].tolist() == [0.01]
    assert len(list((out / "runs").glob("[!.]*"))) == 3, "earlier runs stay on the disk"
    write_notebook(toy)
    assert sweep.sweep(toy, {"x": [1]}, out=out)["validation_accuracy"].tolist() == [0.1]
    assert len(executions(toy)) == 3, "the first version was found again"


def test_changed_code_of_the_package_runs_again_and_the_table_holds_one_experiment(toy, tmp_path, monkeypatch):
    out = tmp_path / "out"
    sweep.sweep(toy, {"x": [1, 2]}, out=out)
    with monkeypatch.context() as patched:
        patched.setattr(sweep, "made_by", lambda *modules: {"source": "another digest"})
        table = sweep.sweep(toy, {"x": [1]}, out=out)
        assert table["x"].tolist() == [1.0]
        assert len(executions(toy)) == 3
        assert sweep.read_plan(out)["provenance"]["source"] == "another digest"
    assert sweep.sweep(toy, {"x": [1]}, out=out)["x"].tolist() == [1.0]
    assert len(executions(toy)) == 3, "that of the first code was found again"


def test_a_damaged_run_is_reported_and_made_again(toy, tmp_path):
    (run,) = sweep.sweep(toy, {"x": [1]}, out=tmp_path / "out")["run"]
    path = tmp_path / "out" / "runs" / run / "run.json"
    path.write_text(path.read_text().replace("0.1", "0.9"))
    with pytest.warns(UserWarning, match="is damaged and counts as not run"):
        table = sweep.sweep(toy, {"x": [1]}, out=tmp_path / "out")
    assert table["validation_accuracy"].tolist() == [0.1]
    assert len(executions(toy)) == 2


def test_a_folder_is_for_one_notebook(toy, tmp_path):
    sweep.sweep(toy, {"x": [1]}, out=tmp_path / "out")
    other = write_notebook(tmp_path / "other.ipynb")
    with pytest.raises(ValueError, match="holds a sweep of toy, not of other; choose another --out"):
        sweep.sweep(other, {"x": [1]}, out=tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="holds no sweep"):
        sweep.collect(tmp_path)


@pytest.mark.parametrize("by", [pytest.param(signal.SIGKILL, marks=pytest.mark.longer), signal.SIGINT])
def test_stopped_in_the_middle_of_a_run_it_goes_on_from_there(tmp_path, by):
    toy, out = write_notebook(tmp_path / "toy.ipynb", nap=2), tmp_path / "out"
    grid = ["-g", "x=1,2,4", "--out", out]
    stopped = start(toy, *grid)
    wait_until(lambda: len(executions(toy)) == 2)
    stopped.send_signal(by)
    printed, _ = stopped.communicate()
    assert stopped.returncode == (130 if by == signal.SIGINT else -signal.SIGKILL)
    assert ("What was finished is kept, and the same command finds it again." in printed) == (by == signal.SIGINT)
    half = sweep.collect(out)
    assert half["status"].tolist() == ["finished", "planned", "planned"]
    assert half["validation_accuracy"].tolist()[0] == 0.1
    assert half["validation_accuracy"].isna().sum() == 2

    resumed = start(toy, *grid)
    _, errors = resumed.communicate()
    assert resumed.returncode == 0, errors
    assert executions(toy) == ["1.0 a", "2.0 a", "2.0 a", "4.0 a"], "the run in flight is the only one repeated"
    undisturbed = sweep.sweep(toy, {"x": [1, 2, 4]}, out=tmp_path / "undisturbed")
    pd.testing.assert_frame_equal(sweep.collect(out).drop(columns=TIMES), undisturbed.drop(columns=TIMES))
    assert not list((out / "runs").glob(".building-*")), "what the killed run left behind is cleared away"


def test_two_sweeps_share_a_folder(tmp_path):
    patient = BODY.replace("if x == 3", 'while not (here / "go").exists():\n    time.sleep(0.1)\nif x == 3')
    toy, out = write_notebook(tmp_path / "toy.ipynb", body=patient), tmp_path / "out"
    both = [start(toy, "-g", f"x={values}", "--out", out) for values in ("1,2,3,5", "5,3,2,6")]
    wait_until(lambda: sorted(executions(toy)) == ["1.0 a", "5.0 a"])  # both have begun
    (tmp_path / "go").touch()
    printed = [process.communicate() for process in both]
    for process, (output, errors) in zip(both, printed, strict=True):
        assert process.returncode == 1, errors
        assert output.count("failed: ") == 1, "both wanted x = 3"
    assert sorted(executions(toy)) == ["1.0 a", "2.0 a", "3.0 a", "5.0 a", "6.0 a"], "nothing is done twice"
    table = sweep.collect(out)
    assert table["x"].tolist() == [1, 2, 3, 5, 6]
    assert table["status"].tolist() == ["finished", "finished", "failed", "finished", "finished"]
    pd.testing.assert_frame_equal(pd.read_parquet(out / "table.parquet"), table)


COUNTING = """
import pathlib
from kd_helpers import runs, teacher

def count(what):
    with open(pathlib.Path(__file__).with_name("passes"), "a") as log:
        log.write(what + "\\n")

def run(model, batch, precision, run=teacher.teacher_forward):
    count(f"run {len(batch['id'])}")
    return run(model, batch, precision)

def train(*arguments, description, train=runs.train_classifier, **options):
    count(description)
    return train(*arguments, description=description, **options)

teacher.teacher_forward, runs.train_classifier, teacher.train_classifier = run, train, train
"""
DISTILLATION = """import sys
sys.path.insert(0, {here!r})
import counting, dataclasses
from kd_helpers import DistillConfig, distill, load_splits
config = DistillConfig(preset=preset, temperature=temperature, alpha=alpha, epochs=1, seed=seed, train_size=train_size,
                       teacher_epochs=teacher_epochs, teacher_train_size=train_size)
data = load_splits(config)
data = dataclasses.replace(data, validation=data.validation.select(range(40)), test=data.test.select(range(40)))
distill(config, data=data, output_dir=output_dir)"""
DISTILLATION_PARAMETERS = """preset: str = "offline"  # a preset
temperature: float = 2.0  # T
alpha: float = 0.5  # weight
train_size: int = 64  # texts
teacher_epochs: int = 1  # epochs
seed: int = 0  # seed
output_dir: str = ""  # where"""


@pytest.mark.longer
def test_the_teacher_is_tuned_once_and_run_once_in_the_whole_sweep(tmp_path, own_artifacts):
    """Two sweeps start cold, together, with two temperatures and two alphas."""
    (tmp_path / "counting.py").write_text(COUNTING)
    notebook = write_notebook(tmp_path / "small.ipynb", body=DISTILLATION, parameters=DISTILLATION_PARAMETERS)
    command = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import counting
from kd_helpers.experiments.sweep import main
sys.exit(main([{str(notebook)!r}, "-g", "temperature=1,4", "-g", "alpha=0.5,1", "-g", "seed=0", "--out",
               {str(tmp_path / "out")!r}, "--jobs", "{min(2, joblib.cpu_count())}"]))
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", command], **pipes) for _ in range(2)]
    for process in both:
        _, errors = process.communicate()
        assert process.returncode == 0, errors[-2000:]
    passes = (tmp_path / "passes").read_text().splitlines()
    assert passes.count("Distilling") == 4
    assert passes.count("Fine-tuning the teacher") == 1
    assert [line for line in passes if line.startswith("run")] == ["run 64"]
    assert sweep.collect(tmp_path / "out")["validation_nll"].nunique() == 4, "settings differ in what they give"


# Reading the table


def test_surface_is_mean_and_half_a_t_interval():
    values = [0.70, 0.72, 0.77]
    rows = [{"temperature": 2.0, "alpha": 0.5, "seed": seed, "m": value} for seed, value in enumerate(values)]
    rows += [{"temperature": 4.0, "alpha": 0.5, "seed": 0, "m": 0.5}]
    mean, half = sweep.surface(pd.DataFrame(rows), "m")
    interval = stats.ttest_1samp(values, 0).confidence_interval()
    assert mean.loc[2.0, 0.5] == pytest.approx(0.73)
    assert half.loc[2.0, 0.5] == pytest.approx((interval.high - interval.low) / 2)
    assert mean.loc[4.0, 0.5] == 0.5
    assert pd.isna(half.loc[4.0, 0.5])
    with pytest.raises(ValueError, match="another parameter varies"):
        sweep.surface(pd.DataFrame([*rows, rows[0] | {"m": 0.9}]), "m")


def test_flatten_keeps_numbers():
    nested = {"test": {"nll": 0.5, "name": "x", "curve": [1]}, "steps": 3, "converged": True}
    assert sweep.flatten(nested) == {"test_nll": 0.5, "steps": 3, "converged": 1.0}


def test_the_best_so_far_names_what_varies():
    table = pd.DataFrame({"alpha": [0.0, 1.0], "seed": [3, 3], "status": "finished", sweep.BEST: [0.7, 0.8]})
    assert sweep.best_so_far(table) == "best single run 80.0% on validation (alpha 1.0)"
    assert sweep.best_so_far(table.head(1)) == "best single run 70.0% on validation"
    assert sweep.best_so_far(table.drop(columns=sweep.BEST)) == ""


# The stored sweep


@pytest.fixture(scope="module")
def stored():
    return stored_sweep()


def test_stored_sweep_is_a_full_grid(stored):
    table = pd.DataFrame(stored["runs"])
    temperatures, alphas, seeds = (set(table[name]) for name in ("temperature", "alpha", "seed"))
    assert len(temperatures) >= 4
    assert len(alphas) >= 5
    assert {0.0, 1.0} <= alphas
    assert len(seeds) >= 3
    assert len(table) == len(temperatures) * len(alphas) * len(seeds)
    assert not table.duplicated(["temperature", "alpha", "seed"]).any()
    assert not table.isna().any().any()
    assert {run["seed"] for run in stored["label_smoothing"]} == seeds


def test_stored_sweep_was_measured(stored):
    table = pd.DataFrame(stored["runs"])
    taught = table[table["alpha"] > 0]
    assert taught["validation_nll"].nunique() == len(taught), "no two runs give the same number"
    assert (table[table["alpha"] == 0].groupby("seed")["validation_nll"].nunique() == 1).all(), "T means nothing there"
    assert {"kd_helpers", "python", "torch", "transformers", "date", "threads"} <= set(stored["made_with"])
    assert stored["notebook"] == SWEPT.stem
    assert set(stored["fixed"]) <= set(sweep.read_notebook(SWEPT).defaults)


def test_texts_that_cant_be_read_are_refused_by_the_plan(tmp_path):
    notebook = sweep.read_notebook(SWEPT)
    with pytest.raises(ValueError, match=r"there is no file 'missing.csv' in"):
        sweep.plan(notebook, {"alpha": [0.0, 0.5]}, {"data": "missing.csv"})


def test_other_texts_in_the_same_file_are_another_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = sweep.read_notebook(SWEPT)
    names = set()
    for word in ("fine", "other"):
        write_texts(Path("own.csv"), word)
        (setting,) = sweep.plan(notebook, {"alpha": [0.5]}, {"data": "own.csv"})
        names.add(setting.run.name)
    assert len(names) == 2


@pytest.mark.parametrize("cell", ["files = !ls", "time = %time 3", "distill?", "%%bash\nls -l | head"])
def test_a_cell_that_is_no_plain_python_may_use_any_code(cell):
    found = sweep._imported_modules(f"{cell}\nfrom kd_helpers import distill")
    assert {"kd_helpers.runs", "kd_helpers.losses"} <= provenance.imported_modules(found)
    assert not sweep._imported_modules("%matplotlib inline\n!ls\nx = 3")
