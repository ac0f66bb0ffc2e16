"""Every notebook as a reader gets it: alone in an empty folder, with a preset of the hub or with texts of one's own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest

import kd_helpers
from kd_helpers.course import notebook_paths

PATHS = notebook_paths()
ADJECTIVES = {"yes": ("fine", "lovely", "great"), "no": ("awful", "broken", "late"), "": ("blue", "round", "new")}
DOORS = {
    "preset of the hub": {"preset": "bert"},
    "own texts": {"preset": "bert", "data": "../own.csv", "text_column": "review", "label_column": "verdict"},
}


def own_texts() -> str:
    """Three hundred reviews of two classes; every third has no label."""
    lines = ["review;verdict"]
    for number in range(100):
        lines += [f"order {number} is {words[number % 3]};{verdict}" for verdict, words in ADJECTIVES.items()]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def runs(hub_environment, tmp_path_factory):
    """Run everything, two processes of one thread at a time; the package is a copy without a checkout around it."""
    home = tmp_path_factory.mktemp("doors")
    shutil.copytree(Path(kd_helpers.__file__).parent, home / "site" / "kd_helpers")
    (home / "own.csv").write_text(own_texts(), encoding="utf-8")
    environment = {**os.environ, **hub_environment, "PYTHONPATH": str(home / "site"), "OMP_NUM_THREADS": "1"}
    environment.pop("KD_ARTIFACTS", None)

    def run(case: tuple[str, Path]) -> tuple[subprocess.CompletedProcess, Path]:
        door, path = case
        folder = home / f"{door} {path.stem}"
        folder.mkdir()
        shutil.copy(path, folder)
        choices = [word for choice in DOORS[door].items() for word in ("-p", *choice)]
        command = [sys.executable, "-m", "papermill", "--no-progress-bar", path.name, "out.ipynb", *choices]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        return done, folder

    cases = [(door, path) for door in DOORS for path in PATHS]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(cases, pool.map(run, cases), strict=True))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
@pytest.mark.parametrize("door", DOORS)
def test_a_notebook_alone_in_an_empty_folder(runs, door, path):
    done, folder = runs[door, path]
    assert done.returncode == 0, done.stderr[-2000:]
    cells = nbformat.read(folder / "out.ipynb", as_version=4).cells
    assert any("All checks passed." in str(cell.get("outputs")) for cell in cells)
    assert {entry.name for entry in folder.iterdir()} <= {path.name, "out.ipynb", "artifacts"}
