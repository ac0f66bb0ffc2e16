"""What a stored result depends on beside its settings: the code that made it, and nothing that is not code."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import tiny_config

import kd_helpers
from kd_helpers import provenance

PACKAGE = Path(kd_helpers.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.stem not in ("__init__", "__main__") and path.parent.name != "course"
)

# The code alone

SOURCE = '''\
"""What it is for.

In two paragraphs."""

import os  # for the path

# Nobody changes this.
LIMIT = 3  # texts


class Thing:
    """A thing."""

    name = "# no comment"
    text = """No docstring.

    # Nor a comment.
    """

    def act(self, x):
        """Do it."""

        # first
        return x + LIMIT  # then


async def later():
    "One line."
    return f"{LIMIT} # not a comment"
'''
CODE = '''\
import os
LIMIT = 3
class Thing:
    name = "# no comment"
    text = """No docstring.

    # Nor a comment.
    """
    def act(self, x):
        return x + LIMIT
async def later():
    return f"{LIMIT} # not a comment"'''


def test_comments_docstrings_and_empty_lines_are_left_out():
    assert provenance.code_only(SOURCE) == CODE


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("What it is for.", "What it's for."),
        ("In two paragraphs.", "In two\n\nparagraphs.\n"),
        ("# for the path", ""),
        ("# Nobody changes this.", "# Somebody did.\n\n# Twice."),
        ("# texts", "# sentences"),
        ("A thing.", "Another one."),
        ('"""Do it."""\n', ""),
        ("# first", ""),
        ('"One line."', "'''Or two.\n\n    Indeed.'''"),
        ("\n\n\nclass", "\n\nclass"),
    ],
)
def test_what_is_no_code_changes_nothing(before, after):
    assert SOURCE.count(before) == 1
    assert provenance.code_only(SOURCE.replace(before, after)) == CODE


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("LIMIT = 3", "LIMIT = 4"),
        ("x + LIMIT", "x - LIMIT"),
        ("# no comment", "# another text"),
        ("No docstring.", "Still none."),
        ("# not a comment", "# still none"),
        ("import os", "import sys"),
        ("async def", "def"),
        ("No docstring.\n\n", "No docstring.\n"),
        ("docstring.\n", "docstring. \n"),
    ],
)
def test_code_changes_it(before, after):
    assert SOURCE.count(before) == 1
    assert provenance.code_only(SOURCE.replace(before, after)) != CODE


@pytest.mark.parametrize("module", MODULES)
def test_what_is_left_of_a_module_is_the_same_program(module):
    """But for docstrings the syntax trees are equal, so no text that a program uses was changed."""
    source = provenance.SOURCES[module]
    left = provenance.code_only(source)
    assert ast.dump(_without_docstrings(ast.parse(left))) == ast.dump(_without_docstrings(ast.parse(source)))
    assert provenance.code_only(left) == left


def _without_docstrings(tree: ast.AST) -> ast.AST:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and (
            isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
        ):
            node.body = body[1:] or [ast.Pass()]
    return tree


# The modules that a result depends on


def test_what_is_imported_directly_or_through_others_counts():
    found = provenance.imported_modules(["kd_helpers.runs"])
    assert {"kd_helpers.runs", "kd_helpers.loop", "kd_helpers.losses", "kd_helpers.lean", "kd_helpers.optim"} <= found
    assert not any(name.startswith(("kd_helpers.course", "kd_helpers.experiments")) for name in found)
    assert not any(name.startswith("kd_helpers.methods") for name in found), "a run does not depend on other methods"


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_digest(module):
    found = provenance.imported_modules([module])
    assert module in found
    assert re.fullmatch(r"[0-9a-f]{16}", provenance.source_digest(module))


@pytest.mark.parametrize(
    ("source", "modules"),
    [
        ("from kd_helpers.losses import soft_loss", ["kd_helpers.losses"]),
        ("from kd_helpers import losses, optim", ["kd_helpers.losses", "kd_helpers.optim"]),
        ("import kd_helpers.losses as l", ["kd_helpers.losses"]),
        ("from kd_helpers import soft_loss, distill", ["kd_helpers.losses", "kd_helpers.runs"]),
        ("from kd_helpers.methods import tinybert", ["kd_helpers.methods.tinybert"]),
        ("def f():\n    from kd_helpers.losses import soft_loss", ["kd_helpers.losses"]),
        ("from kd_helpers.course import plots\nfrom kd_helpers.course.run import run\nimport torch", []),
    ],
)
def test_imports_are_found(source, modules):
    assert provenance.imports_of(source) == modules


def test_the_versions_of_the_packages_that_compute_count():
    made_by = provenance.made_by("kd_helpers.runs")
    assert made_by["source"] == provenance.source_digest("kd_helpers.runs")
    assert {"torch", "transformers", "tokenizers", "numpy"} < made_by.keys()
    assert kd_helpers.__version__ not in made_by.values(), "a release does not make everything anew"
    assert provenance.versions()["kd_helpers"] == kd_helpers.__version__


# A copy of the package


@pytest.fixture
def site(tmp_path) -> Path:
    """A folder with a copy of the package, which a test may edit."""
    return copy_of_the_package(tmp_path / "site")


def copy_of_the_package(site: Path) -> Path:
    shutil.copytree(PACKAGE, site / "kd_helpers", ignore=shutil.ignore_patterns("__pycache__", "results"))
    return site


def edit(site: Path, module: str, before: str, after: str) -> None:
    path = site / "kd_helpers" / module
    source = path.read_text(encoding="utf-8")
    assert before in source, f"{module} has no {before!r}"
    path.write_text(source.replace(before, after, 1), encoding="utf-8")


def python(site: Path, code: str, *arguments: str) -> str:
    """Run code that imports the copy; nothing else of the checkout is found."""
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


DIGEST = """
import sys
import kd_helpers
from kd_helpers.provenance import source_digest
assert kd_helpers.__file__.startswith(sys.argv[1])
print(source_digest(*sys.argv[2:]))
"""


def digest_in(site: Path, *modules: str) -> str:
    return python(site, DIGEST, str(site), *(modules or ("kd_helpers.runs",)))


Edit = tuple[str, str, str]
T_SQUARED: Edit = ("losses.py", "return temperature**2 * (F.kl_div", "return 1000 * (F.kl_div")
PLOT: Edit = ("course/plots.py", "_DOTS_PER_INCH = ", "_DOTS_PER_INCH = 1 + ")
AN_IMPORT = ("import annotations\n", "import annotations\nimport textwrap\n")
MATTERS: dict[str, Edit] = {
    "a formula": T_SQUARED,
    "the loop": ("loop.py", "optimizer.zero_grad()", "optimizer.zero_grad(set_to_none=False)"),
    "the splits": ("data.py", *AN_IMPORT),
    "the way of running": ("lean.py", "2**16", "2**15"),
}
DOES_NOT: dict[str, Edit] = {
    "a plot": PLOT,
    "a docstring": ("losses.py", "No gradient reaches `teacher_logits`.", "The teacher gets no gradient."),
    "a comment": ("losses.py", "# Divided by N, not by N · C", "# The mean over N, not over N · C"),
    "an empty line": ("losses.py", "IGNORE_INDEX = -100", "\n\nIGNORE_INDEX = -100"),
    "another method": ("methods/tinybert.py", *AN_IMPORT),
    "a study": ("experiments/study.py", *AN_IMPORT),
    "the version": ("__init__.py", '__version__ = "', '__version__ = "9'),
}


@pytest.mark.parametrize("name", [*MATTERS, *DOES_NOT])
def test_the_digest_follows_code_that_a_run_depends_on_and_nothing_else(site, name):
    before = digest_in(site)
    assert before.strip() == provenance.source_digest("kd_helpers.runs"), "the copy is the package"
    edit(site, *(MATTERS | DOES_NOT)[name])
    assert (digest_in(site) != before) == (name in MATTERS)


def test_the_digest_of_a_method_follows_the_library_below_it(site):
    method = "kd_helpers.methods.tinybert"
    before = digest_in(site, method)
    edit(site, *T_SQUARED)
    after = digest_in(site, method)
    assert after != before
    edit(site, *DOES_NOT["another method"])
    assert digest_in(site, method) not in (before, after)


# A whole run

# One process for each copy of the package would import torch each time, so that here one process forks them.
RUNS = """
import json, os, sys
import datasets, sklearn.metrics, torch  # what takes long, and is the same for all
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, trainer_utils

torch.set_num_threads(1)
choices = json.loads(sys.argv[1])
for site in sys.argv[2:]:
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        sys.path.insert(0, site)
        import kd_helpers
        assert kd_helpers.__file__.startswith(site)
        from kd_helpers import DistillConfig, distill, loop
        steps, training_step = [], loop.training_step
        loop.training_step = lambda *given, **options: steps.append(1) or training_step(*given, **options)
        run = distill(DistillConfig(**choices))
        soft = run.history[0]["losses"]["soft"]
        print(json.dumps({"folder": run.folder.name, "made": len(steps), "soft": soft, **run.metrics}), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_a_run_is_found_again_until_its_code_changes(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("KD_ARTIFACTS", str(tmp_path / "artifacts"))
    rows = [f"order {number} is {word},{word}" for number in range(60) for word in ("fine", "late")]
    (tmp_path / "own.csv").write_text("\n".join(["text,label", *rows]))
    labels = {0: "fine", 1: "late"}
    config = tiny_config(tmp_path, tokenizer, labels=labels, data=str(tmp_path / "own.csv"), epochs=1)
    sites = {name: copy_of_the_package(tmp_path / name) for name in ("first", "plots", "losses")}
    edit(sites["plots"], *PLOT)
    edit(sites["plots"], *DOES_NOT["a comment"])
    edit(sites["losses"], *T_SQUARED)
    order = ("first", "first", "plots", "losses", "losses", "first")
    said = python(sites["first"].parent, RUNS, json.dumps(config.to_dict()), *(str(sites[name]) for name in order))
    runs = [json.loads(line) for line in said.splitlines()]
    assert len(runs) == len(order)
    first, again, with_other_plots, with_another_loss, once_more, back = runs
    assert first["made"] > 0
    assert again == with_other_plots == back == first | {"made": 0}
    assert with_another_loss["folder"] != first["folder"]
    assert with_another_loss["made"] > 0
    assert with_another_loss["soft"] != first["soft"]
    assert once_more == with_another_loss | {"made": 0}
    for kind in ("runs", "teachers", "teacher_logits"):
        assert len(list((tmp_path / "artifacts" / kind).glob("[0-9a-f]*"))) == 2, kind
    stored = json.loads((tmp_path / "artifacts" / "runs" / first["folder"] / "provenance.json").read_text())
    assert stored["source"] == digest_in(sites["first"]).strip()


def test_a_notebook_that_imports_the_package_as_a_whole_may_use_all_that_it_offers():
    named = set(provenance.imports_of("import kd_helpers\nkd_helpers.distill(config)"))
    assert {"kd_helpers.runs", "kd_helpers.loop", "kd_helpers.losses"} <= named
    assert set(provenance.imports_of("from kd_helpers import distill")) == {"kd_helpers.runs"}
    assert set(provenance.imports_of("from kd_helpers import *")) == named
