"""Every notebook as a reader gets it: alone in an empty folder, with texts of one's own and the hub's models.

The hub's own texts are many, so two chapters stand for all of them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import kd_helpers
from kd_helpers.course.notebooks import notebook_paths

PATHS = notebook_paths()
ADJECTIVES = {"yes": ("fine", "lovely", "great"), "no": ("awful", "broken", "late"), "": ("blue", "round", "new")}
DOORS = {
    "own texts": {"preset": "bert", "data": "../own.csv", "text_column": "review", "label_column": "verdict"},
    "hub's texts": {"preset": "bert"},
}
# Chapter 05, which trains a whole run, stands for all of them in `make test`; `make test-longer` opens the others.
OFTEN = ("own texts 05",)
DOORS_AND_PATHS = [("own texts", path) for path in PATHS] + [
    ("hub's texts", path) for path in PATHS if path.stem[:2] in ("01", "05")
]
CASES = [
    pytest.param(
        door, path, id=f"{door}-{path.stem}", marks=[] if f"{door} {path.stem[:2]}" in OFTEN else pytest.mark.longer
    )
    for door, path in DOORS_AND_PATHS
]


def own_texts() -> str:
    """Three hundred reviews of two classes; every third has no label."""
    lines = ["review;verdict"]
    for number in range(100):
        lines += [f"order {number} is {words[number % 3]};{verdict}" for verdict, words in ADJECTIVES.items()]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with the texts, and with a copy of the package that has no checkout around it."""
    home = tmp_path_factory.mktemp("doors")
    shutil.copytree(Path(kd_helpers.__file__).parent, home / "site" / "kd_helpers")
    (home / "own.csv").write_text(own_texts(), encoding="utf-8")
    return home


@pytest.mark.parametrize(("door", "path"), CASES)
def test_a_notebook_alone_in_an_empty_folder(home, hub_environment, door, path):
    environment = {**os.environ, **hub_environment, "PYTHONPATH": str(home / "site"), "OMP_NUM_THREADS": "1"}
    environment.pop("KD_ARTIFACTS", None)
    folder = home / f"{door} {path.stem}"
    folder.mkdir()
    shutil.copy(path, folder)
    choices = [word for choice in DOORS[door].items() for word in ("-p", *choice)]
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", path.name, "out.ipynb", *choices]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    cells = nbformat.read(folder / "out.ipynb", as_version=4).cells
    assert any("All checks passed." in str(cell.get("outputs")) for cell in cells)
    assert {entry.name for entry in folder.iterdir()} <= {path.name, "out.ipynb", "artifacts"}
