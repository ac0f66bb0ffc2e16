"""The notebooks under papermill, as anyone would type it: other parameters, another working directory."""

from __future__ import annotations

import json
import subprocess
import sys

import nbformat
import pytest
from click.testing import CliRunner
from papermill.cli import papermill as papermill_command

from kd_helpers.course.notebooks import NOTEBOOKS

DISTILL = NOTEBOOKS / "05_distill_and_evaluate.ipynb"


def papermill(*arguments: str, cwd) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_chapter_05_runs_with_other_parameters_from_anywhere(tmp_path):
    temperature, alpha = 4, 0.7
    short = ["-p", "epochs", "1", "-p", "train_size", "200"]
    parameters = ["-p", "temperature", temperature, "-p", "alpha", alpha, "-p", "output_dir", "run", *short]
    done = papermill(DISTILL, "out.ipynb", *parameters, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["temperature"], config["alpha"], config["train_size"]) == (temperature, alpha, 200)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["steps"] == 7
    assert 0 < metrics["validation"]["accuracy"] < 1
    text = json.dumps(nbformat.read(tmp_path / "out.ipynb", as_version=4))
    assert f"At temperature {temperature:g} and alpha {alpha:g}" in text


def test_chapter_14_learns_rationales_from_a_file_of_ones_own(tmp_path):
    rows = [
        f"Ticket {row}: my {thing} does not work,{team},The {thing} belongs to {team}."
        for row in range(12)
        for thing, team in (("card", "billing"), ("screen", "technical"), ("door", "other"))
    ]
    (tmp_path / "tickets.csv").write_text("message,team,why\n" + "\n".join([*rows, "What do I do?,other,"]) + "\n")
    columns = ["-p", "text_column", "message", "-p", "label_column", "team", "-p", "rationale_column", "why"]
    short = [
        "-p",
        "held_out",
        "9",
        "-p",
        "pretraining_steps",
        "20",
        "-p",
        "student_steps",
        "20",
        "-p",
        "rationale_weight",
        "0.5",
    ]
    done = papermill(
        NOTEBOOKS / "14_step_by_step.ipynb", "out.ipynb", "-p", "data", "tickets.csv", *columns, *short, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    text = json.dumps(nbformat.read(tmp_path / "out.ipynb", as_version=4))
    assert "28 questions to learn, 9 to measure on" in text
    assert "3 different labels: billing, other, technical" in text
    assert "labels and rationales: " in text


@pytest.mark.longer
def test_chapter_15_trains_one_method_by_its_name(tmp_path):
    short = ["-p", "steps", "10", "-p", "teacher_steps", "60", "-p", "seeds", "1"]
    notebook = NOTEBOOKS / "15_survey.ipynb"
    done = papermill(notebook, "out.ipynb", "-p", "method", "own_teacher", *short, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    text = json.dumps(nbformat.read(tmp_path / "out.ipynb", as_version=4))
    assert "own_teacher took " in text
    done = papermill(notebook, "out.ipynb", "-p", "method", "magic", *short, cwd=tmp_path)
    assert done.returncode != 0
    assert "ValueError: method is 'magic'; choose one of labels, smoothing, response" in done.stderr


def test_a_bad_parameter_stops_with_one_sentence(tmp_path):
    done = papermill(DISTILL, "out.ipynb", "-p", "temperature", "0", cwd=tmp_path)
    assert done.returncode != 0
    assert "ValueError: temperature is 0; give a finite number greater than 0." in done.stderr


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_parameters_read_like_documentation(path):
    done = CliRunner().invoke(papermill_command, ["--help-notebook", str(path)])
    assert done.exit_code == 0, done.output
    described = [line for line in done.output.splitlines() if "(default " in line]
    assert len(described) >= 2
